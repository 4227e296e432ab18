"""The flywheel's store: what survives a crash, who may write, and how fast a large one opens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax.selfplay.store import INDEX, Store, index_path, read_store
from tests.fabricated import sample, synthetic

WRITER = """
import sys
from selfemo_jax.selfplay.store import Store
store = Store(sys.argv[1])
print("open", flush=True)
number = 0
while True:
    store.append({"iteration": 1, "accepted": number % 2 == 0, "number": number, "filler": "x" * 5000})
    number += 1
    if number == 40:
        store.flush()
        print("flushed", flush=True)
"""


def record(number: int, *, iteration: int = 1, accepted: bool = True) -> dict:
    return {"iteration": iteration, "accepted": accepted, "number": number, "reply": "Größe " * (number % 3)}


def numbers(records) -> list[int]:
    return [found["number"] for found in records]


def fill(store: Store, *, start: int = 0, stop: int) -> None:
    for number in range(start, stop):
        store.append(record(number, iteration=1 + number // 10, accepted=number % 3 == 0))


def test_records_come_back_in_order_by_harvest_and_by_verdict(tmp_path):
    with Store(tmp_path / "flywheel.jsonl") as store:
        fill(store, stop=25)
        assert numbers(store.records()) == list(range(25)) and len(store) == 25
        assert numbers(store.records(iteration=2)) == list(range(10, 20))
        assert numbers(store.records(iteration=2, accepted=True)) == [12, 15, 18]
        assert numbers(store.records(accepted=False))[:3] == [1, 2, 4]
        store.append(record(25, iteration=3, accepted=False))
        assert numbers(store.records(iteration=3, accepted=False))[-1] == 25
        assert list(store.records(iteration=9)) == []
    lines = (tmp_path / "flywheel.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[4]) == record(4, accepted=False)


def test_a_store_that_is_opened_again_holds_what_it_held(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    for start in (0, 10, 20):
        with Store(path) as store:
            fill(store, start=start, stop=start + 10)
    with Store(path) as store:
        assert numbers(store.records()) == list(range(30))
        assert numbers(store.records(iteration=3, accepted=True)) == [21, 24, 27]
    assert len(index_path(path).read_bytes()) == 30 * INDEX.itemsize


@pytest.mark.parametrize("damage", ["gone", "short", "cut inside an entry", "of another file", "too long"])
def test_a_missing_or_wrong_index_is_made_again(tmp_path, damage):
    path = tmp_path / "flywheel.jsonl"
    with Store(path) as store:
        fill(store, stop=30)
    saved = index_path(path)
    content = saved.read_bytes()
    if damage == "gone":
        saved.unlink()
    elif damage == "short":
        saved.write_bytes(content[: 7 * INDEX.itemsize])
    elif damage == "cut inside an entry":
        saved.write_bytes(content[: 7 * INDEX.itemsize + 5])
    elif damage == "of another file":
        other = np.frombuffer(content, INDEX).copy()
        other["length"] += 3
        other["start"] = np.concatenate([[0], np.cumsum(other["length"])[:-1]])
        saved.write_bytes(other.tobytes())
    else:
        end = path.stat().st_size
        saved.write_bytes(content + np.array([(end, 50, 9, 1)], INDEX).tobytes())
    assert numbers(read_store(path)) == list(range(30))
    with Store(path) as store:
        assert numbers(store.records(iteration=1, accepted=True)) == [0, 3, 6, 9]
    assert saved.read_bytes() == content


def test_going_back_to_a_checkpoint_sets_the_later_lines_aside(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    with Store(path) as store:
        fill(store, stop=12)
        point = store.length_and_digest()
        fill(store, start=12, stop=20)
        assert store.truncate_to(*point, tmp_path / "orphaned") > 0
        assert numbers(store.records()) == list(range(12))
        fill(store, start=15, stop=17)
        assert numbers(store.records()) == [*range(12), 15, 16]
    assert numbers(map(json.loads, (tmp_path / "orphaned" / path.name).open())) == list(range(12, 20))
    with Store(path) as store:
        assert numbers(store.records(iteration=2)) == [10, 11, 15, 16]


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    with Store(path) as store:
        fill(store, stop=3)
        with pytest.raises(ValueError, match="another process is writing"):
            Store(path)
        fill(store, start=3, stop=5)
        assert numbers(read_store(path)) == list(range(5)), "a reader is welcome"
    with Store(path) as store:
        assert numbers(store.records()) == list(range(5))


def writer(path: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_writer_loses_at_most_the_line_that_it_was_writing(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    process = writer(path)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="another process is writing"):
        Store(path)
    assert process.stdout.readline() == "flushed\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = path.read_bytes()
    whole = content.count(b"\n")
    assert whole >= 40
    with path.open("ab") as file:
        file.write(content[: 5000 // 2])  # the line that the crash cut off
    assert numbers(read_store(path)) == list(range(whole))
    with Store(path) as store:  # the lock died with the process
        assert numbers(store.records()) == list(range(whole))
        assert len(list(store.records(accepted=True))) == (whole + 1) // 2
        with pytest.raises(ValueError, match="cut off"):
            store.append(record(whole))


def test_what_is_no_record_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    with Store(path) as store:
        fill(store, stop=2)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"iteration": 1}\n')
    with pytest.raises(ValueError, match=f"at byte {size}"):
        Store(path)


def test_a_hundred_thousand_samples_load_in_seconds(tmp_path):
    path = tmp_path / "flywheel.jsonl"
    child = synthetic(sample(gold={"joy": 1.0}), iteration=1)
    line = {"iteration": 1, "accepted": True, "select": {"r1": 0.75}, "completion_ids": list(range(60))}
    text = json.dumps(line | {"sample": child.to_json()}) + "\n"
    later = text.replace('"iteration": 1, "accepted": true', '"iteration": 2, "accepted": true', 1)
    with path.open("w") as file:
        for start in range(0, 100_000, 10_000):
            file.write((text if start < 90_000 else later) * 10_000)

    def opened() -> float:
        began = time.process_time()
        with Store(path) as store:
            assert len(store) == 100_000
            assert sum(1 for _ in store.records(iteration=2, accepted=True)) == 10_000
        return time.process_time() - began

    without_index, with_index = opened(), opened()
    assert without_index < 10, f"{without_index:.1f} s of processor time without an index"
    assert with_index < 3, f"{with_index:.1f} s of processor time with one"

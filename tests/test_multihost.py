"""Several processes on loopback: they agree, each holds its own rows, and none waits for one that is gone."""

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfemo_jax.data.biographies import Biographies
from selfemo_jax.data.dialogues import MELD
from selfemo_jax.distributed import LOST, Launch, launch_of
from selfemo_jax.run_experts import as_told, told_others
from tests.fabricated import run_data, sample

WORKER = Path(__file__).with_name("host_worker.py")
PATIENCE = 240.0
"""Seconds for what takes ten on an idle machine."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(mode: str, out: Path, *, number: int = 2) -> list[subprocess.Popen]:
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(index), str(number), port, str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(number)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], *, patience: float = PATIENCE) -> list[tuple[int, str]]:
    """Exit status and output of each; all are gone afterwards."""
    try:
        # What one prints must be read while the other is waited for: a full pipe stops its writer.
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=patience)[0], processes))
        return [(process.returncode, words) for process, words in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def wait_for(*paths: Path, patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"{paths} did not come"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What two processes of two devices each found."""
    out = tmp_path_factory.mktemp("together")
    done = ended(start("together", out))
    assert [status for status, _ in done] == [0, 0], done
    return [json.loads((out / f"{index}.json").read_text()) for index in range(2)]


def test_each_process_brings_its_share_of_the_mesh(found):
    assert [one["local"] for one in found] == [2, 2]
    assert [one["first"] for one in found] == [True, False]
    assert "2 in each of 2 processes" in found[0]["words"]


def test_what_process_0_says_is_the_same_everywhere_and_asked_once(found):
    expected = [{"n": n, "x": 0.1 + n} for n in range(3)]
    assert [one["from_first"] for one in found] == [expected, expected]
    assert [one["num_calls"] for one in found] == [3, 0]
    assert [one["long"] for one in found] == [True, True]


def test_one_process_that_must_stop_stops_all(found):
    assert [(one["nobody"], one["somebody"]) for one in found] == [("", "SIGTERM")] * 2


def test_processes_with_other_files_are_refused_on_all_sides(found):
    assert all("the files of process 1" in one["unlike"] for one in found)


def test_a_batch_lies_in_parts_and_is_whole_together(found):
    assert [one["rows"] for one in found] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # Eight rows of five prompt tokens and the completion less its last token.
    assert [one["sum"] for one in found] == [5 * 36 + 8 * 2 * 9] * 2


def test_groups_of_the_first_process_reach_the_others_to_the_last_bit(found):
    assert found[0]["groups"] == found[1]["groups"]
    assert sorted(name for name, _ in found[0]["groups"]) == ["a", "b"]
    by_name = dict(found[1]["groups"])
    assert [tokens for tokens, _, _ in by_name["b"]] == [[8, 9, 9]] * 2
    assert by_name["a"][0][2] == [7]
    assert [one["metrics"] for one in found] == [{"rollout/retries": 3.0}, {}]


def test_the_first_process_gets_whole_weights_on_its_own_devices(found):
    local, sums = found[0]["weights"]
    assert local and found[1]["weights"] is None
    assert sums.keys() == found[0]["whole"].keys()
    for name, value in found[0]["whole"].items():
        assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-3), name


def test_a_process_that_fails_ends_the_others_with_its_reason(tmp_path):
    (first, out_first), (second, out_second) = ended(start("raise", tmp_path))
    # JAX aborts the second one if the first is gone before it has ended by itself.
    assert first == LOST and second in (1, -signal.SIGABRT), out_second
    assert "ValueError: its data is gone" in out_second
    assert "process 1 on" in out_first and "ended: ValueError: its data is gone" in out_first


def test_a_process_that_is_killed_counts_as_dead(tmp_path):
    processes = start("wait", tmp_path)
    try:
        wait_for(*(tmp_path / f"{index}.joined" for index in range(2)))
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        (status, words), _ = ended(processes)
    finally:
        for process in processes:
            process.kill()
    assert status == LOST and "process 1 on" in words and "counts as dead" in words, words
    assert time.monotonic() - began < PATIENCE / 4


def test_nobody_waits_for_a_first_process_that_is_killed(tmp_path):
    processes = start("wait", tmp_path)
    try:
        wait_for(*(tmp_path / f"{index}.joined" for index in range(2)))
        processes[0].send_signal(signal.SIGKILL)
        _, (status, words) = ended(processes)
    finally:
        for process in processes:
            process.kill()
    # Whoever is faster: our watch, or JAX's own, which aborts.
    assert status in (LOST, -signal.SIGABRT), (status, words)
    assert "process 0 does not answer" in words or "another task died" in words, words


def test_a_stop_of_all_processes_is_clean(tmp_path):
    assert [status for status, _ in ended(start("stop", tmp_path))] == [75, 75]


def test_what_experts_wrote_reaches_the_others_whole():
    samples = tuple(sample(n, labels=MELD, dialogue=f"d{n}", gold={"joy": 0.3}) for n in range(3))
    plain = run_data({"meld": samples})
    asked = dataclasses.replace(
        plain,
        expert_examples=((samples[0], (1, 2)),),
        expert_cache={"cache": "experts.jsonl", "length": 3, "sha256": "ab"},
        biographies=Biographies(source="one", written={("meld", "Ada"): "Kind to all."}),
        fingerprint="another",
    )
    assert as_told(plain, json.loads(json.dumps(told_others(asked)))) == asked
    assert as_told(plain, json.loads(json.dumps(told_others(plain)))) == plain


FLAGS = {"coordinator": None, "num_processes": None, "process_id": None, "host_timeout": None}


def test_a_run_by_itself_needs_nothing():
    assert launch_of(FLAGS, {}) is None
    assert launch_of({}, {}) is None


def test_flags_win_over_the_environment():
    environ = {"SELFEMO_COORDINATOR": "one:1", "SELFEMO_NUM_PROCESSES": "4", "SELFEMO_PROCESS_ID": "3"}
    assert launch_of(FLAGS, environ) == Launch(coordinator="one:1", num_processes=4, process_id=3)
    found = launch_of(FLAGS | {"process_id": 0, "host_timeout": 9.0}, environ)
    assert found == Launch(coordinator="one:1", num_processes=4, process_id=0, timeout=9.0)
    assert launch_of(FLAGS | {"coordinator": "auto"}, {}) == Launch(coordinator="auto")


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({"num_processes": 2}, {}, "without --coordinator"),
        ({"coordinator": "here"}, {}, "HOST:PORT"),
        ({"coordinator": "here:1", "num_processes": 2}, {}, "needs --num_processes and --process_id"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, {}, "expected 0 to 1"),
        ({"coordinator": "here:1"}, {"SELFEMO_NUM_PROCESSES": "two"}, "SELFEMO_NUM_PROCESSES"),
        ({"coordinator": "auto", "host_timeout": 0.0}, {}, "above 0"),
    ],
)
def test_half_a_launch_is_refused(flags, environ, words):
    with pytest.raises(ValueError, match=words):
        launch_of(FLAGS | flags, environ)

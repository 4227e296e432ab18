"""What a side cannot do costs its own rows: with sides that fail where they are told to."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from selfemo_jax.bench import driver, worker
from selfemo_jax.bench.driver import Driver
from selfemo_jax.bench.process import SideError, SideProcess
from selfemo_jax.bench.settings import BenchSettings
from tools import bench_throughput

# A side of the standard library alone. A fault is SIDE.PHASE.LAYOUT.WHEN, where WHEN is open, profile, or the
# number of the call; what it does is raise or die. SIDE.PHASE.LAYOUT.loss is another loss.
SIDE = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("bench_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
side, faults = sys.argv[2], json.loads(sys.argv[3])

def fail(key):
    if faults.get(key) == "raise":
        raise RuntimeError("out of memory at " + key)
    if faults.get(key) == "die":
        os._exit(137)

class Run:
    def __init__(self, case):
        self.key, self.calls = f"{side}.{case['phase']}.{case.get('layout', '')}", 0
        fail(self.key + ".open")

    def __call__(self):
        self.calls += 1
        fail(f"{self.key}.{self.calls}")
        return {"flops_per_s": 1e9, "loss": faults.get(self.key + ".loss", 0.5)}

    def close(self):
        pass

class Side:
    open = staticmethod(Run)
    peak_bytes = staticmethod(lambda: None)

    def describe(self):
        fail(side + ".describe")
        found = {"platform": "cpu", "device": "test", "num_devices": 1, "cores": 2}
        return found | {"versions": {}, "flags": {}}

    def profile(self, run, folder):
        fail(run.key + ".profile")
        return [("product", 1.0)]

worker.serve(Side(), commands=sys.stdin, answers=worker.take_stdout())
"""
BASE = BenchSettings(
    model="tiny", groups=1, group_size=2, prompt=6, completion=3, row_tokens=32, rounds=3,
    torch_compile="off", phases=("logprobs", "rl_update"), layouts=("packed", "separate"),
)  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs a benchmark with faults; its result, and who was alive whenever a process was started."""
    started: list[tuple[str, list[str]]] = []

    def run(faults: dict[str, str], **changes):
        made: list[tuple[str, SideProcess]] = []

        def start(side, settings, folder, *, devices, tools):
            started.append((side, [name for name, process in made if not process.ended]))
            command = [sys.executable, "-S", "-c", SIDE, worker.__file__, side, json.dumps(faults)]
            made.append((side, SideProcess([command], [{}], Path(folder) / f"{side}.log")))
            return made[-1][1]

        monkeypatch.setattr(driver, "start_side", start)
        one = Driver(dataclasses.replace(BASE, **changes), tmp_path, tmp_path, lambda text: None)
        try:
            return one.run(), started
        finally:
            one.close()

    run.started = started
    return run


def rows(result: dict) -> dict[tuple[str, str, str], int]:
    return {(r["phase"], r["side"], r["layout"]): len(r["seconds"]) for r in result["rows"]}


ALL = {
    (phase, side, layout): 3
    for phase in ("logprobs", "rl_update")
    for side in ("jax", "torch")
    for layout in ("packed", "separate")
}
# The first call opens, the second warms up, the last is the last timed one (sittings open twice).
FAULTS = {
    ("rounds", "raise"): ["open", "1", "2", "5"],
    ("rounds", "die"): ["1", "4"],
    ("sittings", "raise"): ["open", "2", "4"],
    ("sittings", "die"): ["3"],
}


@pytest.mark.parametrize(("interleave", "how"), FAULTS)
def test_a_contestant_that_fails_at_any_moment_costs_its_own_row(bench, interleave, how):
    expected = {key: num for key, num in ALL.items() if key[0] == "rl_update"}
    for when in FAULTS[interleave, how]:
        faults = {f"torch.rl_update.packed.{when}": how}
        result, _ = bench(faults, interleave=interleave, phases=("rl_update",))
        lost = {("rl_update", "torch", "packed")}
        if (interleave, how, when) == ("rounds", "die", "4"):
            # The process was that of the other too. One that ends while it opens is started again for it.
            lost.add(("rl_update", "torch", "separate"))
        assert rows(result) == {key: num for key, num in expected.items() if key not in lost}, when
        told = [one["label"] for one in result["unavailable"]]
        assert told[0] == "torch packed eager sdpa" and len(told) == len(lost), told
        words = "out of memory at torch.rl_update.packed" if how == "raise" else "the process ended"
        assert words in result["unavailable"][0]["error"]


def test_a_side_that_died_is_started_again_for_the_next_phase(bench):
    result, _ = bench({"torch.logprobs.packed.3": "die"}, layouts=("packed",))
    gone = ("logprobs", "torch", "packed")
    assert set(rows(result)) == {key for key in ALL if key[2] == "packed"} - {gone}


@pytest.mark.parametrize("when", ["open", "2"])
def test_a_process_of_a_sitting_is_gone_before_the_next_begins(bench, when):
    faults = {f"{side}.rl_update.packed.{when}": "raise" for side in ("jax", "torch")}
    _, started = bench(faults, interleave="sittings", phases=("rl_update",), layouts=("packed",))
    beside = {(side, tuple(alive)) for side, alive in started[2:]}
    assert beside == {("jax", ()), ("torch", ())}, started


@pytest.mark.parametrize("interleave", ["rounds", "sittings"])
def test_a_phase_whose_sides_disagree_has_no_times_and_the_others_do(bench, interleave):
    faults = {"torch.rl_update.packed.loss": 0.6}
    result, _ = bench(faults, interleave=interleave, layouts=("packed",))
    assert rows(result) == {
        key: num for key, num in ALL.items() if key[0] != "rl_update" and key[2] == "packed"
    }
    (words,) = result["disagreements"]
    assert words.startswith("rl_update: losses differ")


def test_a_trace_that_fails_leaves_the_times(bench, tmp_path):
    result, _ = bench({"jax.rl_update.packed.profile": "raise"}, profile=str(tmp_path), interleave="rounds")
    assert rows(result) == ALL
    (one,) = [one for one in result["profiles"] if "error" in one]
    assert one["label"] == "jax packed" and not one["items"]
    assert len(result["profiles"]) == len(ALL)


def test_a_trial_goes_on_without_a_way_that_fails(bench):
    faults = {"torch.rl_update.packed.2": "raise"}
    result, _ = bench(faults, torch_compile="best", phases=("rl_update",), layouts=("packed",))
    # Both ways of PyTorch fail at their second call, so that JAX alone is timed.
    assert {row["side"] for row in result["rows"]} == {"jax"}
    assert len(result["unavailable"]) == 2


def test_without_pytorch_jax_is_measured_unless_pytorch_was_named(bench):
    result, _ = bench({"torch.describe": "die"})
    assert {row["side"] for row in result["rows"]} == {"jax"} and len(result["rows"]) == 4
    (one,) = result["unavailable"]
    assert (one["phase"], one["label"]) == ("all phases", "torch")
    for named in ({"backend": "torch"}, {"torch_python": sys.executable}):
        with pytest.raises(SideError, match="the process ended"):
            bench({"torch.describe": "die"}, **named)


def test_tokens_that_do_not_fit_are_known_before_anything_is_measured(bench):
    with pytest.raises(ValueError, match="positions, a row has 7"):
        bench({}, layouts=("shared_prefix",), prefix_row_tokens=7)
    assert bench.started == []


def test_what_was_measured_is_written_before_it_is_compared(tmp_path, monkeypatch, capsys):
    found = measured_result()
    monkeypatch.setattr(bench_throughput, "_run", lambda args, settings: found)
    new, old = tmp_path / "made" / "new.json", tmp_path / "old.json"
    other = json.loads(json.dumps(found)) | {"rows": [], "format": 1}
    other["sides"]["jax"]["cores"] = 99
    old.write_text(json.dumps(other))
    words = ["--json", str(new), "--plot", str(tmp_path / "pictures" / "new.png"), "--compare", str(old)]
    assert bench_throughput.main(words) == 2
    assert "use --compare_by ratio" in capsys.readouterr().err
    assert json.loads(new.read_text())["rows"] and (tmp_path / "pictures" / "new.png").exists()


def test_an_earlier_result_of_other_work_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_throughput, "_run", lambda args, settings: pytest.fail("it ran"))
    (tmp_path / "old.json").write_text(json.dumps(measured_result()))
    assert bench_throughput.main(["--compare", str(tmp_path / "old.json"), "--prompt", "99"]) == 2
    assert "differ in prompt" in capsys.readouterr().err


def test_a_phase_that_is_gone_and_sides_that_disagree_change_the_exit_status(tmp_path, monkeypatch, capsys):
    found, old = measured_result(), tmp_path / "old.json"
    gone = dict(found["rows"][0], phase="sft_update")
    old.write_text(json.dumps(found | {"rows": [*found["rows"], gone]}))
    monkeypatch.setattr(bench_throughput, "_run", lambda args, settings: found)
    assert bench_throughput.main(["--compare", str(old)]) == 1
    assert "sft_update: jax separate (asked for, and MISSING)" in capsys.readouterr().out
    assert bench_throughput.main([]) == 0
    found["disagreements"] = ["rl_update: losses differ"]
    assert bench_throughput.main([]) == 2
    found |= {"disagreements": [], "rows": []}
    assert bench_throughput.main([]) == 2
    assert "nothing could be measured" in capsys.readouterr().err


def measured_result() -> dict:
    from tests.bench.test_results import ROWS, result

    return json.loads(json.dumps(result(ROWS)))


@pytest.mark.parametrize(
    ("changes", "faults", "words"),
    [
        ({}, {}, "no --tunix_python"),
        ({"tunix_python": "python"}, {}, "google-tunix is not installed"),
        ({"tunix_python": "python"}, {"tunix.describe": "die"}, "the process ended"),
        ({"backend": "jax"}, {}, None),
    ],
)
def test_tunix_is_left_out_with_how_to_get_it_unless_nobody_asked(bench, changes, faults, words):
    found, _ = bench(faults, phases=("rl_step",), **changes)
    assert ("rl_step", "jax", "") in rows(found)
    reasons = [one["error"] for one in found["unavailable"] if one["label"] == "tunix"]
    assert len(reasons) == (words is not None)
    assert all(words in one and "pip install google-tunix" in one for one in reasons)

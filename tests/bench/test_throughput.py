"""The benchmark from end to end on tiny shapes, both sides in processes of their own."""

import importlib.util
import json
import os

import pytest

from tools import bench_throughput

SIZES = {"model": "tiny", "groups": 2, "group_size": 2, "prompt": 12, "completion": 5, "row_tokens": 64}
HOW = {"rounds": 2, "torch_compile": "off", "platform": "cpu", "warmup": 0}
TINY = [word for name, value in {**SIZES, **HOW}.items() for word in (f"--{name}", str(value))]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The sides choose their own devices; the suite's flags are not theirs."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def bench(tmp_path, *words: str) -> dict:
    out = tmp_path / "result.json"
    assert bench_throughput.main([*TINY, *words, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    return json.loads(out.read_text())


@needs_torch
def test_both_sides_update_alike_and_are_timed_in_turns(tmp_path, capsys):
    found = bench(tmp_path, "--phases", "rl_update", "--layouts", "shared_prefix")
    rows = {row["side"]: row for row in found["rows"]}
    assert set(rows) == {"jax", "torch"}
    # What is asserted before timing: the same loss and gradient on the same rows.
    assert abs(rows["jax"]["loss"] - rows["torch"]["loss"]) <= 1e-5
    assert rows["jax"]["loss"] != 0.0
    assert rows["jax"]["grad_norm"] == pytest.approx(rows["torch"]["grad_norm"], rel=1e-4)
    assert all(len(row["seconds"]) == 2 and row["mfu"] > 0 for row in rows.values())
    assert rows["jax"]["flops"] == rows["torch"]["flops"]
    (ratio,) = found["ratios"]
    by_round = [b / a for a, b in zip(rows["jax"]["seconds"], rows["torch"]["seconds"], strict=True)]
    assert ratio["min"] == pytest.approx(min(by_round))
    assert {"torch", "transformers"} <= set(found["sides"]["torch"]["versions"])
    assert found["sides"]["jax"]["num_devices"] == 1
    assert found["sides"]["jax"]["allocator"] == found["sides"]["torch"]["allocator"] != {}
    assert "How many times as fast as PyTorch" in capsys.readouterr().out


@needs_torch
def test_cut_micro_batches_compute_the_same_and_the_faster_cut_is_kept(tmp_path):
    words = ("--phases", "rl_update", "--layouts", "separate", "--torch_compile", "off", "--micro_cuts")
    whole, cut = (bench(tmp_path / cuts, *words, cuts) for cuts in ("1", "2"))
    for first, second in zip(whole["rows"], cut["rows"], strict=True):
        assert second["label"] == f"{first['label']} micro/2"
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    both = bench(tmp_path / "both", *words, "1,2")
    labels = {row["label"] for row in both["rows"]} | {one["label"] for one in both["left_out"]}
    assert len(both["rows"]) == 2 and labels == {row["label"] for row in (*whole["rows"], *cut["rows"])}


def test_a_result_is_compared_with_an_earlier_one(tmp_path):
    bench(tmp_path, "--phases", "refresh", "--backend", "jax")
    result = tmp_path / "result.json"
    old = json.loads(result.read_text())
    old["rows"][0]["median_s"] *= 0.5
    (tmp_path / "old.json").write_text(json.dumps(old))
    against = ["--read", str(result), "--compare", str(tmp_path / "old.json")]
    assert bench_throughput.main([*against, "--threshold", "0.1"]) == 1
    assert bench_throughput.main([*against, "--threshold", "1.5"]) == 0


def test_settings_that_cannot_be_run_end_with_status_2(tmp_path, capsys):
    assert bench_throughput.main(["--backend", "tf"]) == 2
    assert "expected any of jax, torch, both" in capsys.readouterr().err


def test_a_side_that_does_not_start_says_why(tmp_path, capsys):
    words = [*TINY, "--phases", "refresh", "--torch_python", "/bin/false", "--work", str(tmp_path / "work")]
    assert bench_throughput.main(words) == 2
    assert "the process ended" in capsys.readouterr().err


@pytest.mark.slow
@needs_torch
def test_every_phase_on_every_layout(tmp_path):
    found = bench(tmp_path, "--profile", str(tmp_path / "traces"), "--sweep", "groups=4")
    phases = {"logprobs", "rl_update", "sft_update", "prefill", "decode", "rollout", "refresh", "rl_step"}
    for point in ({}, {"groups": 4}):
        rows = [row for row in found["rows"] if row["point"] == point]
        assert {row["phase"] for row in rows} == phases
        assert {row["layout"] for row in rows if row["phase"] == "rl_update"} == set(
            ("separate", "packed", "shared_prefix")
        )
    assert {"rollout_s", "reference_s", "update_s", "refresh_s"} <= set(
        next(row for row in found["rows"] if row["phase"] == "rl_step" and row["side"] == "jax")["parts"]
    )
    assert any(one["phase"] == "rl_update" for one in found["growth"])
    assert list((tmp_path / "traces").rglob("*.xplane.pb")) and list(
        (tmp_path / "traces").rglob("operations.txt")
    )


@pytest.mark.slow
@needs_torch
def test_two_devices_of_each_side_compute_the_same(tmp_path):
    words = ["--phases", "rl_update", "--layouts", "separate", "--devices", "2"]
    found = bench(tmp_path, *words)
    rows = {row["side"]: row for row in found["rows"]}
    assert set(rows) == {"jax", "torch"}
    assert abs(rows["jax"]["loss"] - rows["torch"]["loss"]) <= 1e-5
    assert rows["jax"]["grad_norm"] == pytest.approx(rows["torch"]["grad_norm"], rel=1e-4)


@pytest.mark.slow
@needs_torch
def test_one_side_at_a_time_takes_two_sittings(tmp_path):
    found = bench(tmp_path, "--phases", "refresh", "--interleave", "sittings", "--rounds", "3")
    assert {row["side"]: len(row["seconds"]) for row in found["rows"]} == {"jax": 3, "torch": 3}


@pytest.mark.slow
def test_trl_takes_a_step(tmp_path):
    python = os.environ.get("SELFEMO_TRL_PYTHON")
    if python is None:
        pytest.skip("SELFEMO_TRL_PYTHON does not name the Python of an environment with trl")
    found = bench(tmp_path, "--phases", "rl_step", "--trl_python", python)
    assert {row["side"] for row in found["rows"]} == {"jax", "torch", "trl"}

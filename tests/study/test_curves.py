"""Curves: roughness and rank correlation by hand, one curve a training, and what lacks points."""

import json

import numpy as np
import pytest

from selfemo_jax.study.__main__ import main
from selfemo_jax.study.curves import described, dev_curves, roughness, spearman, trainings


def line(step: int, phase: str, r1: float | None = None, dev: float | None = None) -> dict:
    found: dict = {"step": step, "phase": phase}
    if r1 is not None:
        found |= {"reward/r1": r1, "loss": 0.0}
    if dev is not None:
        found |= {"dev/wf1": dev, "dev/meld/accuracy": dev, "dev/meld/r1": dev**2, "dev/meld/wf1": dev}
    return found


LINES = [
    line(1, "cold", dev=0.05),
    line(2, "cold", dev=0.1),
    line(3, "rl_1", r1=0.2, dev=0.3),
    line(4, "rl_1", r1=0.1),
    line(5, "rl_1", r1=0.6, dev=0.2),
    line(6, "harvest_1", r1=0.9),
    line(7, "rl_final", r1=0.5, dev=0.5),
]
LINES[5].pop("loss")


def run_folder(tmp_path, lines, init="current"):
    """A run whose final phase starts from what `init` says."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    base = "model: {path: runs/base}\n" if init == "base" else ""
    (tmp_path / "config.yaml").write_text(
        f"note: plumbing run, not a result\n{base}flywheel: {{retrain: {{init: {init}}}}}\n"
    )
    return tmp_path


def test_roughness_by_hand():
    # Differences 1, 0, 2: standard deviation sqrt(2/3); range 3.
    assert roughness(np.array([0.0, 1.0, 1.0, 3.0])) == pytest.approx((2 / 3) ** 0.5 / 3)
    assert roughness(np.array([0.0, 1.0, 2.0, 3.0])) == 0
    assert roughness(np.array([1.0, 1.0, 1.0])) is None
    assert roughness(np.array([1.0, 2.0])) is None


def test_rank_correlation_by_hand_and_where_there_is_none():
    assert spearman(np.array([1, 2, 3]), np.array([0.1, 0.5, 0.2]))[0] == pytest.approx(0.5)
    # Two of the six orders of three points are as far from none; of 24 orders of four, 2.
    assert spearman(np.arange(3), np.array([0.1, 0.2, 0.5])) == pytest.approx((1.0, 1 / 3))
    assert spearman(np.arange(4), np.array([5.0, 3.0, 2.0, 1.0])) == pytest.approx((-1.0, 2 / 24))
    # With a tie: ranks 1, 2.5, 2.5, covariance 1.5 at most, and 4 of 6 orders reach it.
    assert spearman(np.arange(3), np.array([1.0, 2.0, 2.0]))[1] == pytest.approx(4 / 6)
    assert spearman(np.array([1, 2, 3]), np.array([4.0, 4.0, 4.0])) == (None, None)
    assert spearman(np.array([1, 2]), np.array([1.0, 2.0])) == (None, None)


def points(run, phases=None, curve="meld accuracy"):
    """Phases of each training -> steps and values of one of its curves."""
    found = {one.phases: {c.name: c for c in dev_curves(one)}[curve] for one in trainings(run, phases)}
    return {name: (c.steps.tolist(), c.values.tolist()) for name, c in found.items()}


def test_only_rl_counts_and_the_score_before_it_is_the_first_point(tmp_path):
    run = run_folder(tmp_path, LINES)
    assert points(run) == {("rl_1", "rl_final"): ([2, 3, 5, 7], [0.1, 0.3, 0.2, 0.5])}
    (found,) = trainings(run, None)
    curves = {curve.name: curve for curve in dev_curves(found)}
    assert np.allclose(curves["mean r1"].values, [0.01, 0.09, 0.04, 0.25])
    assert all(one["phase"] != "harvest_1" for one in found.lines)


def test_a_phase_that_starts_again_is_a_curve_of_its_own(tmp_path):
    """What fell back to the cold start did not get worse by training."""
    run = run_folder(tmp_path / "cold", LINES, init="cold")
    assert points(run) == {
        ("rl_1",): ([2, 3, 5], [0.1, 0.3, 0.2]),
        # It begins at step 7 with what the cold start left.
        ("rl_final",): ([6, 7], [0.1, 0.5]),
    }
    # The reward of rl_1 says nothing about the accuracy of rl_final.
    assert all(one["phase"] in ("cold", "rl_final") for one in trainings(run, None)[1].lines)
    assert points(run, ["rl_final"]) == {("rl_final",): ([6, 7], [0.1, 0.5])}
    # The base policy was never scored.
    run = run_folder(tmp_path / "base", LINES, init="base")
    assert points(run)["rl_final",] == ([7], [0.5])
    # From the phase before, which does not count here.
    run = run_folder(tmp_path / "current", LINES)
    assert points(run, ["rl_final"]) == {("rl_final",): ([6, 7], [0.2, 0.5])}


def test_rise_and_roughness_are_those_of_one_training(tmp_path):
    scores = [("rl_1", 0.33), ("rl_1", 0.36), ("rl_1", 0.40)]
    scores += [("rl_final", 0.32), ("rl_final", 0.36), ("rl_final", 0.42)]
    lines = [line(10, "cold", dev=0.30)]
    lines += [line(10 * n, phase, r1=dev, dev=dev) for n, (phase, dev) in enumerate(scores, start=2)]
    run = run_folder(tmp_path, lines, init="cold")
    first, final = (described(dev_curves(one)[0]) for one in trainings(run, None))
    assert (final["points"], final["first"], final["difference"]) == (4, 30.0, pytest.approx(12.0))
    assert (final["spearman with step"], final["p"]) == (pytest.approx(1.0), pytest.approx(2 / 24))
    # Changes of 2, 4 and 6 points: sqrt(8 / 3) over 12; glued together there would be a fall of 8.
    assert final["roughness"] == pytest.approx((8 / 3) ** 0.5 / 12)
    assert first["roughness"] == pytest.approx(np.std([3, 3, 4]) / 10)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    run = run_folder(tmp_path / "run", LINES)
    assert main(["curves", str(run)]) == 0
    found = json.loads((run / "study" / "curves.json").read_text())
    row = next(row for row in found["curves"] if row["curve"] == "meld accuracy")
    assert row["phases"] == "rl_1 + rl_final"
    assert (row["points"], row["first"], row["last"], row["difference"]) == (4, 10.0, 50.0, 40.0)
    assert row["spearman with step"] == pytest.approx(0.8)
    together = {row["with"]: row["spearman"] for row in found["agreement"] if row["set"] == "mean"}
    # r1 here is the square of the accuracy; training rewards up to steps 3, 5, 7 are 0.2, 0.3, 0.35.
    assert together["dev r1"] == pytest.approx(1.0)
    assert together["training r1 (10 steps)"] == pytest.approx(0.5)
    assert "plumbing run, not a result" in capsys.readouterr().out
    assert (run / "study" / "curves.png").stat().st_size > 1000


def test_held_out_inputs_of_self_play_are_a_curve_of_the_last_phase_and_in_no_mean(tmp_path, capsys):
    """Another harvest adds other inputs: what was scored before does not compare."""
    lines = [line(n, "rl_1" if n < 4 else "rl_final", r1=0.1, dev=0.1 * n) for n in range(1, 8)]
    for n, found in enumerate(lines, start=1):
        if n > 2:
            found |= {"dev/selfemo/accuracy": 1 - 0.1 * n, "dev/selfemo/r1": 0.5, "dev/selfemo/num": 9.0}
    run = run_folder(tmp_path / "run", lines)
    found = points(run, curve="selfemo accuracy")["rl_1", "rl_final"]
    assert found == ([4, 5, 6, 7], pytest.approx([0.6, 0.5, 0.4, 0.3]))
    assert points(run, curve="mean accuracy")["rl_1", "rl_final"][1] == pytest.approx(
        [0.1 * n for n in range(1, 8)]
    )
    assert main(["curves", str(run)]) == 0
    written = json.loads((run / "study" / "curves.json").read_text())
    row = next(row for row in written["curves"] if row["curve"] == "selfemo accuracy")
    assert (row["points"], row["difference"]) == (4, pytest.approx(-30))
    assert {row["set"] for row in written["agreement"]} == {"meld", "mean", "selfemo"}
    # One score is no curve.
    few = run_folder(tmp_path / "few", [*lines[:2], *lines[5:]])
    few_lines = [json.loads(one) for one in (few / "metrics.jsonl").read_text().splitlines()]
    few_lines[-1] = {key: value for key, value in few_lines[-1].items() if "selfemo" not in key}
    run_folder(few, few_lines)
    assert not any(
        curve.name.startswith("selfemo") for one in trainings(few, None) for curve in dev_curves(one)
    )


def test_a_phase_with_too_few_scores_is_left_out_and_named(tmp_path, capsys):
    run = run_folder(tmp_path / "run", LINES, init="base")
    assert main(["curves", str(run)]) == 0
    assert "left out for too few dev scores (rl_final 1)" in capsys.readouterr().out
    found = json.loads((run / "study" / "curves.json").read_text())
    assert {row["phases"] for name in ("curves", "agreement", "points") for row in found[name]} == {"rl_1"}


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["curves", str(tmp_path / "none")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    run = run_folder(tmp_path / "run", [line(1, "rl_1", r1=0.1, dev=0.2), line(2, "rl_1", r1=0.1)])
    assert main(["curves", str(run)]) == 2
    assert "smaller eval.every" in capsys.readouterr().err
    assert main(["curves", str(run), "--phases", "rl_1", "warm"]) == 2
    assert "has rl_1" in capsys.readouterr().err
    run = run_folder(tmp_path / "plain", [line(1, "cold", dev=0.1)])
    assert main(["curves", str(run)]) == 2
    assert "no phase of RL among cold" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert main(["curves", str(run)]) == 2
    assert "no config.yaml" in capsys.readouterr().err

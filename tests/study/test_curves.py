"""Curves: roughness and rank correlation by hand, the right phases, and what lacks points."""

import json

import numpy as np
import pytest

from selfemo_jax.study.__main__ import main
from selfemo_jax.study.curves import chosen_lines, dev_curves, roughness, spearman


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
    line(3, "rl", r1=0.2, dev=0.3),
    line(4, "rl", r1=0.1),
    line(5, "rl", r1=0.6, dev=0.2),
    line(6, "harvest", r1=0.9) | {"loss": None},
    line(7, "rl", r1=0.5, dev=0.5),
]
LINES[5].pop("loss")


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


def test_only_rl_counts_and_the_score_before_it_is_the_first_point(tmp_path):
    curves = {
        curve.name: curve for curve in dev_curves(chosen_lines(LINES, None, where=tmp_path), where=tmp_path)
    }
    assert curves["meld accuracy"].steps.tolist() == [2, 3, 5, 7]
    assert curves["meld accuracy"].values.tolist() == [0.1, 0.3, 0.2, 0.5]
    assert np.allclose(curves["mean r1"].values, [0.01, 0.09, 0.04, 0.25])


def run_folder(tmp_path, lines):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "config.yaml").write_text("note: plumbing run, not a result\n")
    return tmp_path


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    run = run_folder(tmp_path / "run", LINES)
    assert main(["curves", str(run)]) == 0
    found = json.loads((run / "study" / "curves.json").read_text())
    row = next(row for row in found["curves"] if row["curve"] == "meld accuracy")
    assert (row["points"], row["first"], row["last"], row["difference"]) == (4, 10.0, 50.0, 40.0)
    assert row["spearman with step"] == pytest.approx(0.8)
    together = {row["with"]: row["spearman"] for row in found["agreement"] if row["set"] == "mean"}
    # r1 here is the square of the accuracy; training rewards up to steps 3, 5, 7 are 0.2, 0.3, 0.35.
    assert together["dev r1"] == pytest.approx(1.0)
    assert together["training r1 (10 steps)"] == pytest.approx(0.5)
    assert "plumbing run, not a result" in capsys.readouterr().out
    assert (run / "study" / "curves.png").stat().st_size > 1000


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["curves", str(tmp_path / "none")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    run = run_folder(tmp_path / "run", [line(1, "rl", r1=0.1, dev=0.2), line(2, "rl", r1=0.1)])
    assert main(["curves", str(run)]) == 2
    assert "smaller eval.every" in capsys.readouterr().err
    assert main(["curves", str(run), "--phases", "rl", "warm"]) == 2
    assert "has rl" in capsys.readouterr().err

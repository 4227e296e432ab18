"""The study of whether RL teaches: differences, their errors, and the whole command on a micro run."""

import math

import numpy as np
import pytest

from selfemo_jax.study.__main__ import main
from selfemo_jax.study.learning import rise


def test_mean_difference_and_both_errors_by_hand():
    before = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    after = np.array([[1.0, 0.5, 1.0], [0.5, 0.5, 0.5]])
    result = rise(before, after, ["a", "a", "b"])
    # Differences: [1, 0, 0] and [0.5, 0.5, -0.5]; means 1/3 and 1/6.
    assert result.mean == pytest.approx(0.25)
    assert result.se_seeds == pytest.approx((1 / 3 - 1 / 6) / math.sqrt(2) / math.sqrt(2))
    # Averaged over seeds [0.75, 0.25, -0.25]; less the mean [0.5, 0, -0.5]; dialogue sums 0.5 and -0.5.
    assert result.se_dialogues == pytest.approx(math.sqrt(2 / 1 * (0.25 + 0.25)) / 3)
    assert not result.holds


def test_inputs_of_one_dialogue_do_not_count_as_independent():
    before, after = np.zeros((1, 4)), np.array([[0.3, 0.3, 0.1, 0.1]])
    apart = rise(before, after, ["a", "b", "c", "d"])
    together = rise(before, after, ["a", "a", "b", "b"])
    assert together.se_dialogues > 1.2 * apart.se_dialogues


def test_one_seed_has_no_error_over_seeds_and_is_judged_by_dialogues():
    result = rise(np.zeros((1, 3)), np.full((1, 3), 0.5), ["a", "b", "c"])
    assert math.isnan(result.se_seeds)
    assert result.se_dialogues == 0
    assert result.holds


def test_no_change_is_no_rise():
    same = np.array([[0.2, 0.9]])
    assert not rise(same, same, ["a", "b"]).holds


def test_arrays_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one column an input"):
        rise(np.zeros((1, 3)), np.zeros((1, 3)), ["a", "b"])


def test_no_seed_is_refused(tmp_path, capsys):
    assert main(["learning", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds is 0" in capsys.readouterr().err


def test_settings_that_train_refuses_are_named_before_anything_is_trained(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("rl: {stepz: 3}\n")
    assert main(["learning", "--config", str(config), "--out", str(tmp_path / "runs")]) == 2
    assert "rl.steps" in capsys.readouterr().err and not (tmp_path / "runs").exists()

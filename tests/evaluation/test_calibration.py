"""Calibration by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from selfemo_jax.evaluation.calibration import bins, brier, calibration, calibration_error, normalised, places

LABELS = ("joy", "anger", "fear")


def test_weights_become_shares_and_what_is_outside_the_list_is_lost():
    rows = normalised([{"joy": 0.9, "fear": 0.3}, {"anger": 0.2, "glee": 0.6}, {}], LABELS)
    np.testing.assert_allclose(rows, [[0.75, 0, 0.25], [0, 0.25, 0], [0, 0, 0]])


def test_calibration_error_of_five_answers_by_hand():
    # Bins of 1/15: 0.95 and 1.0 fall into the last one, 0.5 twice into the eighth, 0.2 into the third.
    confidence = np.array([0.95, 1.0, 0.5, 0.5, 0.2])
    right = np.array([True, False, True, True, False])
    expected = (2 * abs(0.5 - 0.975) + 2 * abs(1.0 - 0.5) + abs(0.0 - 0.2)) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert [b["num"] for b in bins(confidence, right)] == [1, 2, 2]
    # The border of a bin belongs to the bin below it; a confidence of 0 to the first.
    assert bins(np.array([3 / 15, 0.0]), np.array([True, True]))[1]["low"] == pytest.approx(2 / 15)


def test_a_perfectly_calibrated_stream_has_almost_no_error_and_a_boasting_one_has_much():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 20_000)
    assert calibration_error(confidence, rng.uniform(size=20_000) < confidence) < 0.02
    assert calibration_error(np.ones(20_000), rng.uniform(size=20_000) < 0.3) == pytest.approx(0.7, abs=0.02)


def test_brier_equals_scikit_learn_on_random_answers():
    rng = np.random.default_rng(1)
    probabilities, gold = rng.dirichlet(np.ones(4), 300), rng.integers(0, 4, 300)
    expected = brier_score_loss(gold, probabilities, labels=[0, 1, 2, 3], scale_by_half=False)
    assert brier(probabilities, gold) == pytest.approx(expected)


def test_invalid_answers_are_left_out_and_counted():
    probabilities = np.array([[0.75, 0.25, 0], [0, 1.0, 0], [0, 0, 0]])
    gold = np.array([0, 2, 1])
    found = calibration(probabilities, gold, np.array([0, 1, -1]), np.array([True, True, False]))
    assert found["share"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(0.875)
    assert found["brier"] == pytest.approx(((0.25**2 + 0.25**2) + (1 + 1)) / 2)
    # Gold is one label 0 and one label 2: to state their shares costs 2 (1/2)^2 each.
    assert found["brier_prior"] == pytest.approx(0.5)
    nothing = calibration(probabilities, gold, np.array([0, 1, -1]), np.zeros(3, bool))
    assert nothing["share"] == 0 and nothing["ece"] is None


def test_an_answer_without_a_label_of_the_list_is_never_right():
    found = calibration(np.zeros((1, 3)), np.array([0]), np.array([-1]), np.array([True]))
    assert found["accuracy"] == 0 and found["ece"] == 0 and found["brier"] == 1


def test_of_equal_weights_the_label_that_was_scored_is_the_one_that_can_be_right():
    half, valid = np.array([[0.5, 0.5, 0]]), np.array([True])
    for predicted, accuracy in ((0, 0.0), (1, 1.0)):
        found = calibration(half, np.array([1]), np.array([predicted]), valid)
        assert (found["accuracy"], found["confidence"]) == (accuracy, 0.5)
        assert found["ece"] == 0.5, "half sure, and all or nothing right"
    assert places(["fear", None, "glee"], LABELS).tolist() == [2, -1, -1]

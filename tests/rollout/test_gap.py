"""The gap of sampler and trainer: what is measured, and when it warns or stops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.algo.losses import importance_weights, largest_gap, rollout_gap
from selfemo_jax.rollout.gap import GapError, batch_ratio, check_gap, join_gaps, sequence_gap
from selfemo_jax.settings.rollout import Rollout

OLD = [np.array([-1.0, -2.0, -0.5], np.float32), np.array([-3.0], np.float32)]
SAMPLED = [np.array([-1.1, -2.0, -0.5], np.float32), np.array([-2.8], np.float32)]


def test_each_sequence_counts_by_the_geometric_mean_of_its_ratio():
    found = sequence_gap(OLD, SAMPLED)
    assert found["rollout_gap/ratio_highest"] == pytest.approx(np.exp(0.1 / 3), rel=1e-6)
    assert found["rollout_gap/ratio_lowest"] == pytest.approx(np.exp(-0.2), rel=1e-6)
    assert sequence_gap([], []) == {} == sequence_gap([np.array([])], [np.array([])])


def test_mini_batches_join_to_the_extremes_and_the_mean():
    first = {"rollout_gap/ratio_lowest": 0.9, "rollout_gap/ratio_highest": 1.0, "rollout_gap/masked": 0.5}
    second = {"rollout_gap/ratio_lowest": 0.8, "rollout_gap/ratio_highest": 1.2, "rollout_gap/masked": 0.0}
    assert join_gaps([first, second, {}]) == {
        "rollout_gap/ratio_lowest": 0.8, "rollout_gap/ratio_highest": 1.2, "rollout_gap/masked": 0.25,
    }  # fmt: skip
    assert join_gaps([]) == {}


def test_the_gaps_of_a_batch_by_hand():
    old, sampled = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.1, -1.9, jnp.nan]])
    mask = jnp.array([[True, True, False]])
    sums = rollout_gap(old, sampled, mask)
    assert float(sums["rollout_gap/dlogp_mean"][0]) == pytest.approx(0.2, abs=1e-6)
    expected = (np.exp(-1.0) - np.exp(-1.1)) + (np.exp(-1.9) - np.exp(-2.0))
    assert float(sums["rollout_gap/mean"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(sums["rollout_gap/k1"][0]) == pytest.approx(0.0, abs=1e-6)
    assert float(sums["rollout_gap/k3"][0]) == pytest.approx(np.exp(0.1) + np.exp(-0.1) - 2, rel=1e-3)
    assert float(largest_gap(old, sampled, mask)) == pytest.approx(0.1, abs=1e-6)
    assert float(largest_gap(old, sampled, jnp.zeros((1, 3), bool))) == 0.0
    assert batch_ratio({"rollout_gap/k1": -0.1}) == {"rollout_gap/ratio": pytest.approx(np.exp(0.1))}
    assert batch_ratio({}) == {}


def test_the_band_leaves_out_whole_sequences_whatever_the_kind():
    old = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -2.0, 0.0]])
    # Mean gaps: (0.3 - 0.3 + 0.003) / 3 = 0.001, and (0.1 + 0.1) / 2 = 0.1 over the two targets there are.
    sampled = jnp.array([[-1.3, -1.7, -3.003], [-1.1, -2.1, 50.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    for kind, first in (
        ("off", [1.0, 1.0, 1.0]),
        ("token", [np.exp(0.3), np.exp(-0.3), np.exp(0.003)]),
        ("sequence", [np.exp(0.003)] * 3),
    ):
        found = importance_weights(old, sampled, mask, kind=kind, cap=2.0, band=0.01)
        np.testing.assert_allclose(found[0], first, rtol=1e-5)
        np.testing.assert_array_equal(found[1], [0.0, 0.0, 0.0])
        wider = importance_weights(old, sampled, mask, kind=kind, cap=2.0, band=0.2)
        assert (np.asarray(wider[1]) > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("band", [0.0, -1.0])
def test_a_band_that_is_no_band_is_refused(band):
    with pytest.raises(ValueError, match="band is"):
        importance_weights(
            jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), kind="off", band=band
        )


def test_thresholds_warn_then_stop_and_a_gap_that_is_no_number_stops():
    settings = Rollout(gap_warn=0.005, gap_stop=0.05)

    def gap(value):
        return {"rollout_gap/mean": value}

    assert check_gap({}, settings, where="rl step 3") is None
    assert check_gap(gap(0.005), settings, where="rl step 3") is None
    warning = check_gap(gap(0.02), settings, where="rl step 3")
    assert warning is not None and warning.startswith("rl step 3: the sampler's probabilities differ")
    for value in (0.0501, float("nan")):
        with pytest.raises(GapError, match="above rollout.gap_stop 0.05"):
            check_gap(gap(value), settings, where="rl step 3")
    off = dataclasses.replace(settings, gap_warn=None, gap_stop=None)
    assert check_gap(gap(1.0), off, where="rl step 3") is None

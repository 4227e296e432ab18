import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.algo import advantages, consensus, rewards
from tests.algo import oracle
from tests.algo.groups import GOLDEN_GOLD, GOLDEN_GROUP, gold_array, mask_array, pred_arrays

ALL = jnp.ones((1, 4), bool)
group_advantages = jax.jit(advantages.group_advantages, static_argnames="kind")
KINDS = ["std", "mean", "leave_one_out"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(5, [1.093442, 0.531449, -0.494798, -1.130093]), (2.5, [1.194718, 0.434736, -0.647273, -0.982181])],
)
def test_from_weights_to_advantages_golden_numbers(step, expected):
    @jax.jit
    def pipeline(pred, gold, valid, class_mask, step):
        r1 = rewards.weighted_iou(pred, gold, valid)
        r2 = consensus.consensus_reward(pred, valid, class_mask, top_k=3, presence=0.0, kind="count")
        total = rewards.combine(r1, r2, step=step, total_steps=10, preset="paper")
        return advantages.group_advantages(total, jnp.ones_like(valid))

    pred, valid = pred_arrays([GOLDEN_GROUP])
    found = pipeline(pred, gold_array([GOLDEN_GOLD]), valid, mask_array(1), step)
    np.testing.assert_allclose(found[0], expected, atol=5e-6)


REWARD = st.none() | st.integers(0, 100).map(lambda hundredths: hundredths / 50)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=3, max_size=3), st.sampled_from(KINDS))
def test_advantages_equal_the_oracle_and_lost_rollouts_do_not_matter(groups, kind):
    values = jnp.array([[jnp.nan if r is None else r for r in group] for group in groups], jnp.float32)
    present = jnp.array([[r is not None for r in group] for group in groups])
    found = group_advantages(values, present, kind=kind)
    np.testing.assert_allclose(found, [oracle.advantages(group, kind) for group in groups], atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.871795, 1 / 3])
def test_equal_rewards_give_exactly_zero(kind, value):
    rewards_PG = jnp.full((1, 7), value).at[0, 2].add(3e-8)
    np.testing.assert_array_equal(group_advantages(rewards_PG, jnp.ones((1, 7), bool), kind=kind), 0)


@pytest.mark.parametrize(
    ("kind", "expected"), [("std", 0.7 / (1 + 1e-6)), ("mean", 0.7), ("leave_one_out", 0.7)]
)
def test_a_group_of_one_keeps_its_reward(kind, expected):
    present = jnp.array([[False, True, False]])
    found = group_advantages(jnp.array([[9.0, 0.7, jnp.nan]]), present, kind=kind)
    np.testing.assert_allclose(found, [[0.0, expected, 0.0]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_group_gets_zero(kind):
    found = group_advantages(jnp.full((1, 3), jnp.nan), jnp.zeros((1, 3), bool), kind=kind)
    np.testing.assert_array_equal(found, 0)


def scaled(r1, r2, weight, present=None, **settings):
    present = jnp.ones(r1.shape, bool) if present is None else present
    function = jax.jit(functools.partial(advantages.scaled_advantages, **settings))
    return np.asarray(function(r1, r2, r1 + weight * r2, weight, present))


EQUAL = jnp.zeros((1, 4))
VARIED = jnp.array([[1 / 3, 2 / 3, 2 / 3, 0.0]])


def test_lambda_is_divided_out_where_all_r1_are_equal_and_the_scale_is_the_rewards():
    small, full = (scaled(EQUAL, VARIED, weight, scale="reward")[0] for weight in (0.001, 1.0))
    # std of r2 is .319142; 1e-6 over .000319 leaves .3 percent.
    np.testing.assert_allclose(full, [-0.261116, 0.783346, 0.783346, -1.305577], atol=1e-4)
    np.testing.assert_allclose(small, full, rtol=5e-3)


def test_scale_r1_silences_groups_whose_r1_are_all_equal():
    for weight in (0.001, 1.0):
        np.testing.assert_array_equal(scaled(EQUAL, VARIED, weight, scale="r1"), 0)


def test_scale_parts_keeps_lambda_where_all_r1_are_equal():
    small, full = (scaled(EQUAL, VARIED, weight, scale="parts")[0] for weight in (0.001, 1.0))
    np.testing.assert_allclose(small, 0.001 * full, rtol=1e-5)
    np.testing.assert_allclose(full, oracle.advantages(VARIED[0].tolist(), "std"), atol=2e-5)


def test_scales_by_hand_where_r1_varies():
    # r1 std sqrt(1/2), r2 std sqrt(1/2): R = 1.1, .2 with weight .2 on r2 = .5, 1 (std of r2 sqrt(1/8)).
    r1, r2 = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 1.0]])
    root = np.sqrt(0.5)
    np.testing.assert_allclose(scaled(r1, r2, 0.2, scale="reward"), [[root, -root]], atol=1e-5)
    np.testing.assert_allclose(scaled(r1, r2, 0.2, scale="r1"), [[0.45 / root, -0.45 / root]], atol=1e-5)
    np.testing.assert_allclose(scaled(r1, r2, 0.2, scale="parts"), [[0.8 * root, -0.8 * root]], atol=1e-5)


@pytest.mark.parametrize("scale", ["reward", "r1", "parts"])
def test_lost_rollouts_get_zero_in_every_scale(scale):
    present = jnp.array([[True, True, False]])
    found = scaled(
        jnp.array([[1.0, 0.0, jnp.nan]]), jnp.array([[0.5, 1.0, jnp.nan]]), 0.2, present, scale=scale
    )
    assert np.isfinite(found).all() and found[0, 2] == 0 and found[0, 0] > 0


def test_scale_r1_needs_a_std():
    with pytest.raises(ValueError, match="kind std"):
        scaled(EQUAL, VARIED, 0.5, scale="r1", kind="mean")


def test_share_r2_only_counts_groups_and_their_part_of_the_advantages():
    r1 = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    r2 = jnp.array([[0.5, 1.0], [0.5, 1.0], [1.0, 1.0], [0.5, 1.0]])
    present = jnp.array([[True, True], [True, True], [True, True], [False, False]])
    A = jnp.array([[-1.0, 1.0], [3.0, -3.0], [0.0, 0.0], [jnp.nan, 7.0]])
    groups, size = jax.jit(advantages.share_r2_only)(r1, r2, A, present)
    assert float(groups) == pytest.approx(1 / 3) and float(size) == pytest.approx(2 / 8)
    assert [float(x) for x in advantages.share_r2_only(r1, r2, A * 0, jnp.zeros_like(present))] == [0.0, 0.0]
    assert float(advantages.share_flat(r1 + r2, present)) == pytest.approx(1 / 3)

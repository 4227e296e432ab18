import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.algo import rewards
from selfemo_jax.data.label_arrays import similarity_array
from tests.algo import oracle
from tests.algo.groups import (
    GOLD,
    GOLDEN_GOLD,
    GOLDEN_GROUP,
    GROUP,
    INVENTORY,
    gold_array,
    mask_array,
    pred_arrays,
)

weighted_iou = jax.jit(rewards.weighted_iou, static_argnames="smoothing")


def iou(pred, gold, **settings):
    pred_PGC, valid_PG = pred_arrays([[pred]])
    return float(weighted_iou(pred_PGC, gold_array([gold]), valid_PG, **settings)[0, 0])


@pytest.mark.parametrize(
    ("pred", "expected"),
    [
        ({"disgust": 0.9}, 0.515152),
        ({"disgust": 0.7, "anger": 0.3}, 0.515152),
        ({"disgust": 0.6, "sadness": 0.4}, 0.851852),
        ({"sadness": 0.5, "disgust": 0.5}, 0.694915),
        ({"disgust": 0.85, "sadness": 0.4}, 1.0),
        ({"disgust": 0.425, "sadness": 0.2}, 1.0),
        ({"neutral": 1.0}, 0.0),
        (None, 0.0),
    ],
)
def test_weighted_iou_golden_numbers(pred, expected):
    assert iou(pred, {"disgust": 0.85, "sadness": 0.4}) == pytest.approx(expected, abs=2e-6)


def test_gold_weights_are_normalized_and_its_scale_does_not_matter():
    normal = rewards.normalize_weights(jnp.array([0.85, 0.4, 0.0]))
    np.testing.assert_allclose(normal, [0.68, 0.32, 0.0], atol=1e-6)
    assert iou({"disgust": 0.9}, {"disgust": 1.7, "sadness": 0.8}) == pytest.approx(0.515152, abs=2e-6)


def test_unknown_weight_stays_in_the_union():
    # m = .6, so m / (2 - m) = .6 / 1.4.
    assert iou({"joy": 0.6, "bored": 0.4}, {"joy": 1.0}) == pytest.approx(0.6 / 1.4, abs=2e-6)


def test_iou_is_symmetric():
    first, second = {"joy": 0.7, "fear": 0.2}, {"joy": 0.3, "anger": 0.9, "fear": 0.1}
    assert iou(first, second) == pytest.approx(iou(second, first), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(GROUP, min_size=3, max_size=3), st.lists(GOLD, min_size=3, max_size=3))
def test_weighted_iou_equals_the_oracle(groups, golds):
    pred, valid = pred_arrays(groups)
    found = weighted_iou(pred, gold_array(golds), valid)
    expected = [
        [oracle.weighted_iou(p, gold) for p in group] for group, gold in zip(groups, golds, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(GROUP, min_size=2, max_size=2), st.lists(GOLD, min_size=2, max_size=2))
def test_argmax_accuracy_equals_the_oracle(groups, golds):
    pred, valid = pred_arrays(groups)
    found = rewards.argmax_accuracy(pred, gold_array(golds), valid)
    expected = [
        [oracle.accuracy(p, gold, INVENTORY) for p in group]
        for group, gold in zip(groups, golds, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernel", [rewards.weighted_iou, rewards.argmax_accuracy])
def test_an_invalid_row_of_nan_gets_zero_and_changes_no_other(kernel):
    pred, valid = pred_arrays([GOLDEN_GROUP])
    gold = gold_array([GOLDEN_GOLD])
    poisoned = pred.at[0, 3].set(jnp.nan)
    np.testing.assert_array_equal(kernel(poisoned, gold, valid), kernel(pred, gold, valid))
    assert kernel(poisoned, gold, valid)[0, 3] == 0


def test_a_label_without_any_weight_is_worth_nothing():
    pred = jnp.zeros((1, 1, 3))
    assert rewards.weighted_iou(pred, jnp.eye(3)[:1], jnp.ones((1, 1), bool))[0, 0] == 0
    # argmax of zeros is slot 0, which is gold here.
    assert rewards.argmax_accuracy(pred, jnp.eye(3)[:1], jnp.ones((1, 1), bool))[0, 0] == 0


def test_smoothing_adds_the_same_share_to_the_labels_of_the_list_only():
    # Seven labels, eps .7: each side gets .1 a label, then / 1.7. Wrong label: overlap 7 x .1, union 2 x 1 +
    # .5.
    mask = mask_array(1)
    assert iou({"fear": 1.0}, {"joy": 1.0}, smoothing=0.7, class_mask=mask) == pytest.approx(
        0.7 / 2.7, abs=1e-6
    )
    assert iou({"joy": 1.0}, {"joy": 0.4}, smoothing=0.7, class_mask=mask) == pytest.approx(1.0, abs=1e-6)
    assert iou(None, {"joy": 1.0}, smoothing=0.7, class_mask=mask) == 0
    with pytest.raises(ValueError, match="class_mask"):
        rewards.weighted_iou(*_arguments(), smoothing=0.1)


def _arguments():
    pred, valid = pred_arrays([GOLDEN_GROUP])
    return pred, gold_array([GOLDEN_GOLD]), valid


R1 = jnp.array([[1.0, 0.538462, 0.0, 0.0]])
R2 = jnp.array([[1 / 3, 2 / 3, 2 / 3, 0.0]])
GOLDEN_HALF = [[1.166667, 0.871795, 0.333333, 0.0]]


@pytest.mark.parametrize(
    ("preset", "lambda_max", "step"),
    [("paper", None, 5), ("robust", None, 10), ("paper", 0.5, 10), ("robust", 1.0, 5)],
)
def test_combined_reward_golden_numbers(preset, lambda_max, step):
    combine = jax.jit(functools.partial(rewards.combine, preset=preset, lambda_max=lambda_max))
    np.testing.assert_allclose(combine(R1, R2, step=step, total_steps=10), GOLDEN_HALF, atol=2e-6)


@pytest.mark.parametrize("preset", ["paper", "robust", "convex"])
@pytest.mark.parametrize("step", [1, 7, 10])
def test_combine_equals_the_oracle(preset, step):
    chosen = rewards.reward_preset(preset)
    found = rewards.combine(R1, R2, step=step, total_steps=10, preset=preset)
    expected = [
        oracle.combine(float(a), float(b), step, 10, chosen.lambda_max, chosen.form)
        for a, b in zip(R1[0], R2[0], strict=True)
    ]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_reward_weight_grows_from_the_first_step_and_stops_at_the_last():
    weights = [float(rewards.reward_weight(step, 4, lambda_max=0.5)) for step in (1, 2, 4, 6)]
    assert weights == [0.125, 0.25, 0.5, 0.5]
    assert float(rewards.reward_weight(1, 4, lambda_max=0.5, schedule="constant")) == 0.5
    with pytest.raises(ValueError, match="total_steps is 0"):
        rewards.reward_weight(1, 0, lambda_max=0.5)


def test_presets_are_those_of_the_method():
    assert (rewards.PAPER.lambda_max, rewards.PAPER.presence, rewards.PAPER.form) == (1.0, 0.0, "additive")
    assert (rewards.ROBUST.lambda_max, rewards.ROBUST.presence, rewards.ROBUST.form) == (
        0.5,
        0.05,
        "additive",
    )
    assert rewards.CONVEX.form == "convex"
    with pytest.raises(ValueError, match="papier.*paper, robust, convex"):
        rewards.reward_preset("papier")


def test_a_right_minority_answer_beats_a_wrong_majority_one_with_robust_and_only_ties_with_paper():
    r1, r2 = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    robust = rewards.combine(r1, r2, step=10, total_steps=10, preset="robust")
    paper = rewards.combine(r1, r2, step=10, total_steps=10, preset="paper")
    assert robust[0, 0] > robust[0, 1]
    assert paper[0, 0] == paper[0, 1]


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("someones_rewards")
    module.exact = lambda pred, gold, valid, class_mask: jnp.where(valid, 1.0, 0.0)
    module.short = lambda pred, gold: pred.sum(-1)
    module.per_prompt = lambda pred, gold, valid, class_mask: gold.sum(-1)
    module.integers = lambda pred, gold, valid, class_mask: valid.astype(jnp.int32)
    module.fixed = lambda pred, gold, valid, class_mask: jnp.zeros((2, 3))
    module.branches = lambda pred, gold, valid, class_mask: valid * 1.0 if pred.sum() > 0 else valid * 0.0
    module.number = 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_users_reward_function_is_loaded(user_module):
    assert rewards.load_reward("someones_rewards:exact") is user_module.exact


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("someones_rewards", "expected 'package.module:function'"),
        ("no_such_module_here:fn", "cannot import no_such_module_here"),
        ("someones_rewards:absent", "has no function absent"),
        ("someones_rewards:number", "has no function number"),
        ("someones_rewards:short", r"fn\(pred, gold, valid, class_mask\)"),
        ("someones_rewards:per_prompt", r"expected float32 of shape \(2, 3\)"),
        ("someones_rewards:integers", "expected float32"),
        ("someones_rewards:fixed", r"expected float32 of shape \(5, 1\)"),
        ("someones_rewards:branches", "without Python branches"),
    ],
)
def test_a_wrong_reward_function_is_refused_with_the_reason(user_module, path, message):
    with pytest.raises(ValueError, match=message):
        rewards.load_reward(path)


def test_similar_labels_earn_their_similarity():
    alike = {frozenset(("joy", "surprise")): 0.5, frozenset(("anger", "disgust")): 0.25}
    golds = [{"joy": 0.9}, {"disgust": 0.6, "fear": 0.2}]
    groups = [
        [{"joy": 0.3}, {"surprise": 0.8}, {"joy": 0.2, "surprise": 0.2}, None],
        [{"anger": 1.0}, {"fear": 0.1, "bored": 0.1}, {"neutral": 1.0}, {"disgust": 0.5, "anger": 0.5}],
    ]
    pairs = {"joy/surprise": 0.5, "disgust/anger": 0.25, "joy/happy": 0.9}
    kernel = jnp.asarray(similarity_array(pairs, [INVENTORY] * 2, num_classes=8))
    pred, valid = pred_arrays(groups)
    found = rewards.similarity_reward(pred, gold_array(golds), valid, kernel)
    expected = [
        [oracle.similarity(rollout, gold, alike) for rollout in group]
        for group, gold in zip(groups, golds, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # By hand: all on the pair earns 0.5; .75 of the gold is disgust, of which anger earns a quarter.
    np.testing.assert_allclose(found[0], [1.0, 0.5, 0.75, 0.0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0.1875, 0.125, 0.0, 0.46875], atol=1e-6)


def test_an_invalid_row_of_nan_has_no_similarity():
    pred, valid = pred_arrays([[{"joy": 1.0}, None]])
    kernel = jnp.asarray(similarity_array({}, [INVENTORY], num_classes=8))
    found = rewards.similarity_reward(pred.at[0, 1].set(np.nan), gold_array([{"joy": 1.0}]), valid, kernel)
    np.testing.assert_array_equal(found, [[1.0, 0.0]])

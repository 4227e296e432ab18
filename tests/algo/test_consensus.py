import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.algo import consensus, rewards
from tests.algo import oracle
from tests.algo.groups import GOLDEN_GROUP, GROUP, INVENTORY, gold_array, mask_array, pred_arrays

consensus_reward = jax.jit(
    consensus.consensus_reward, static_argnames=("top_k", "presence", "kind", "core", "divide")
)


def reward(group, **settings):
    return np.asarray(consensus_reward(*pred_arrays([group]), mask_array(1), **settings))[0]


def core_of(group, top_k=3):
    shares = consensus.core_distribution(*pred_arrays([group]), mask_array(1))
    chosen = np.asarray(consensus.core_set(shares, top_k=top_k))[0]
    return {label for label, inside in zip([*INVENTORY, "unknown"], chosen, strict=True) if inside}


def test_core_distribution_golden_numbers():
    shares = consensus.core_distribution(*pred_arrays([GOLDEN_GROUP]), mask_array(1))[0]
    found = dict(zip(INVENTORY, np.asarray(shares).tolist(), strict=False))
    assert found["joy"] == pytest.approx(0.566667, abs=1e-6)
    assert found["surprise"] == pytest.approx(0.3, abs=1e-6)
    assert found["neutral"] == pytest.approx(0.133333, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("presence", [0.0, 0.05])
def test_consensus_golden_numbers(presence):
    np.testing.assert_allclose(reward(GOLDEN_GROUP, presence=presence), [1 / 3, 2 / 3, 2 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(reward(GOLDEN_GROUP, kind="mass"), [1, 1, 1, 0], atol=1e-6)


# Each compiles once: top_k, presence, kind, core, divide.
SETTINGS = [
    (3, 0.0, "count", "mean", "core"),
    (1, 0.05, "count", "mean", "core"),
    (3, 0.05, "mass", "mean", "core"),
    (1, 0.0, "mass", "raw_mean", "core"),
    (3, 0.0, "count", "raw_mean", "top_k"),
    (3, 0.05, "count", "count", "core"),
    (1, 0.0, "mass", "count", "core"),
    (3, 0.05, "count", "count", "top_k"),
]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(GROUP, min_size=3, max_size=3),
    st.sampled_from(SETTINGS),
)
def test_consensus_equals_the_oracle(groups, chosen):
    names = ("top_k", "presence", "kind", "core", "divide")
    *_, core, _ = chosen
    pred, valid = pred_arrays(groups)
    same = {name: value for name, value in zip(names, chosen, strict=True) if name != "core"}
    found = consensus_reward(pred, valid, mask_array(3), core=core, **same)
    expected = [oracle.consensus(g, INVENTORY, core_kind=core, **same) for g in groups]
    np.testing.assert_allclose(found, expected, atol=2e-6)


# Normalised: joy (.5 + .5 + 0) / 3, fear (.5 + .25 + .5) / 3, anger (0 + .25 + .5) / 3.
THREE = [{"joy": 0.1, "fear": 0.1}, {"joy": 0.4, "fear": 0.2, "anger": 0.2}, {"fear": 0.4, "anger": 0.4}]


@pytest.mark.parametrize(
    ("core", "presence", "expected"),
    [
        ("mean", 0.0, {"joy": 1 / 3, "fear": 1.25 / 3, "anger": 0.25}),
        ("raw_mean", 0.0, {"joy": 0.5 / 3, "fear": 0.7 / 3, "anger": 0.2}),
        ("count", 0.0, {"joy": 2 / 3, "fear": 1.0, "anger": 2 / 3}),
        ("count", 0.3, {"joy": 2 / 3, "fear": 2 / 3, "anger": 1 / 3}),
    ],
)
def test_the_core_is_found_by_mean_weight_written_weight_or_number(core, presence, expected):
    pred, valid = pred_arrays([[*THREE, None]])
    shares = consensus.core_distribution(pred, valid, mask_array(1), core=core, presence=presence)[0]
    found = dict(zip(INVENTORY, np.asarray(shares).tolist(), strict=False))
    assert {label: found[label] for label in expected} == pytest.approx(expected, abs=1e-6)


def test_the_kinds_of_core_choose_different_labels():
    # Second place: joy has the larger mean share, anger the larger written weight; counted, they tie.
    second = {"mean": "joy", "raw_mean": "anger", "count": "joy"}
    for core, label in second.items():
        found = reward(THREE, core=core, top_k=2)
        hits = [{"fear", label} & rollout.keys() for rollout in THREE]
        np.testing.assert_allclose(found, [len(some) / 2 for some in hits])


def test_dividing_by_top_k_pays_an_agreed_group_less():
    agreed = [{"joy": 1.0}, {"joy": 0.5}]
    np.testing.assert_allclose(reward(agreed), [1, 1])
    np.testing.assert_allclose(reward(agreed, divide="top_k"), [1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(reward(GOLDEN_GROUP, divide="top_k"), reward(GOLDEN_GROUP))


def test_padding_the_list_gains_the_full_consensus_only_without_a_threshold():
    group = [
        {"joy": 0.98, "fear": 0.01, "anger": 0.01},
        {"joy": 0.5, "fear": 0.5},
        {"joy": 0.5, "anger": 0.5},
    ]
    pred, valid = pred_arrays([group])
    r1 = rewards.weighted_iou(pred, gold_array([{"joy": 1.0}]), valid)
    assert float(r1[0, 0]) == pytest.approx(0.9608, abs=1e-4)
    assert reward(group, presence=0.0)[0] == pytest.approx(1.0)
    assert reward(group, presence=0.05)[0] == pytest.approx(1 / 3)


def test_a_weight_of_exactly_the_threshold_counts():
    group = [{"joy": 0.95, "fear": 0.05}, {"fear": 1.0}]
    np.testing.assert_allclose(reward(group, presence=0.05), [1.0, 0.5])
    # In float32, .01 / (.01 + .01 + .18) is one bit below .05.
    assert reward([{"fear": 0.01, "anger": 0.01, "joy": 0.18}], presence=0.05)[0] == 1.0


def test_ties_go_to_the_earlier_label_even_if_the_sums_differ_in_the_last_bit():
    # anger: .1 + .2 + .7, fear: .7 + .2 + .1; in float32 one of the orders may come out larger.
    group = [{"anger": 0.1, "fear": 0.7, "joy": 0.2}, {"anger": 0.2, "fear": 0.2, "joy": 0.6}]
    group.append({"anger": 0.7, "fear": 0.1, "joy": 0.2})
    assert core_of(group, top_k=1) == {"fear"}
    nearly = jnp.array([[0.3, 0.3 + 3e-8, 0.3 + 6e-8, 0.1]])
    np.testing.assert_array_equal(consensus.core_set(nearly, top_k=2)[0], [True, True, False, False])


def test_unknown_labels_count_in_the_normalization_and_never_in_the_core():
    group = [{"bored": 0.9, "joy": 0.1}, {"bored": 0.9, "joy": 0.1}]
    shares = consensus.core_distribution(*pred_arrays([group]), mask_array(1))
    assert float(shares.sum()) == pytest.approx(0.1, abs=1e-6)
    assert core_of(group) == {"joy"}
    np.testing.assert_allclose(reward(group, kind="mass"), [0.1, 0.1], atol=1e-6)


def test_labels_outside_a_shorter_list_never_enter_the_core():
    pred, valid = pred_arrays([[{"anger": 0.9, "neutral": 0.1}]])
    shares = consensus.core_distribution(pred, valid, mask_array(1, INVENTORY[:6]))
    np.testing.assert_allclose(shares[0], [0.1, 0, 0, 0, 0, 0, 0, 0], atol=1e-6)


def test_the_core_holds_at_most_the_labels_that_have_weight():
    assert core_of([{"joy": 0.5, "fear": 0.5}, None]) == {"joy", "fear"}
    np.testing.assert_allclose(reward([{"joy": 0.5, "fear": 0.5}, {"joy": 1.0}]), [1.0, 0.5])
    assert core_of([None, None]) == set()
    np.testing.assert_array_equal(reward([None, None]), [0, 0])


def test_a_top_k_beyond_the_classes_takes_all_with_weight():
    assert core_of(GOLDEN_GROUP, top_k=50) == {"joy", "surprise", "neutral"}


def test_an_invalid_row_of_nan_changes_nothing():
    pred, valid = pred_arrays([GOLDEN_GROUP])
    for kind in ("count", "mass"):
        clean = consensus_reward(pred, valid, mask_array(1), kind=kind)
        dirty = consensus_reward(pred.at[0, 3].set(jnp.nan), valid, mask_array(1), kind=kind)
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("top_k", 0), ("presence", 1.5), ("kind", "votes"), ("core", "median"), ("divide", "nine")],
)
def test_wrong_settings_are_refused(setting, value):
    with pytest.raises(Exception, match=f"{setting}|{value}"):
        reward(GOLDEN_GROUP, **{setting: value})


def test_core_excludes_gold_needs_a_core_without_any_gold_label():
    core = jnp.array([[True, False, False], [True, True, False], [False, False, False]])
    gold = jnp.array([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert consensus.core_excludes_gold(core, gold).tolist() == [True, False, False]


def test_collapse_entropy_is_that_of_the_mean_over_prompts_with_a_core():
    shares = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert float(consensus.collapse_entropy(shares)) == pytest.approx(np.log(2), abs=1e-6)
    assert float(consensus.collapse_entropy(shares[:1])) == pytest.approx(0.0, abs=1e-6)
    assert float(consensus.collapse_entropy(shares[2:])) == 0.0


def test_reward_correlation_leaves_lost_rollouts_out():
    r1 = jnp.array([[0.0, 0.5, 1.0], [0.2, 9.0, 0.1]])
    r2 = jnp.array([[0.1, 0.4, 0.3], [0.9, jnp.nan, 0.2]])
    present = jnp.array([[True, True, True], [True, False, True]])
    expected = np.corrcoef([0.0, 0.5, 1.0, 0.2, 0.1], [0.1, 0.4, 0.3, 0.9, 0.2])[0, 1]
    assert float(consensus.reward_correlation(r1, r2, present)) == pytest.approx(expected, abs=1e-5)
    assert float(consensus.reward_correlation(jnp.ones((2, 3)), r1, present)) == 0.0

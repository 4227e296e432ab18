"""From groups of completions to rewards and advantages, against numbers worked by hand."""

import functools

import numpy as np
import pytest

from selfemo_jax.compiles import CompileCounter
from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP
from selfemo_jax.rollout.engine import Group
from selfemo_jax.scoring import Scored, make_scorer, score_groups
from tests import fabricated
from tests.fabricated import codec, completion, group, prompt, sample, settings, synthetic, text

MALFORMED = "<emotion>joy:1.00</emotion> and that is all"
GOLDEN = (
    text([("joy", 1.0)]),
    text([("joy", 0.7), ("surprise", 0.3)]),
    text([("surprise", 0.6), ("neutral", 0.4)]),
    MALFORMED,
)
"""The group of the method's golden numbers (section 1.3), for gold joy."""
R1 = (1.0, 0.538462, 0.0, 0.0)
R2 = (0.333333, 0.666667, 0.666667, 0.0)
LOST = Group(request_id="lost", error="the server is gone")


def scored(config, samples, groups, *, step=1, total_steps=1, num_classes=8, scorer=None) -> Scored:
    return score_groups(
        samples,
        [prompt(of=s.id) for s in samples],
        groups,
        codec(),
        scorer or make_scorer(config),
        config,
        num_classes=num_classes,
        step=step,
        total_steps=total_steps,
    )


def golden(*, step=1, total_steps=1, **sections) -> Scored:
    return scored(
        settings(**sections),
        [sample(gold={"joy": 1.0})],
        [group("a", GOLDEN)],
        step=step,
        total_steps=total_steps,
    )


def near(found, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=tolerance)


def test_the_golden_group_has_the_rewards_and_advantages_of_the_method():
    found = golden()
    near(found.r1[0], R1)
    near(found.r2[0], R2)
    near(found.rewards[0], (1.166667, 0.871795, 0.333333, 0.0))
    near(found.advantages[0], (1.093442, 0.531449, -0.494798, -1.130093), 2e-5)
    assert found.valid.tolist() == [[True, True, True, False]]
    assert found.metrics["reward/lambda"] == 0.5


def test_prompts_of_a_rare_label_count_more_and_their_rewards_do_not_change():
    joy, fear = sample(1, gold={"joy": 1.0}), sample(2, gold={"joy": 0.2, "fear": 0.8})
    pair = [joy, fear], [group("a", GOLDEN), group("b", (*GOLDEN[:2], text([("fear", 1.0)]), MALFORMED))]
    plain = scored(settings(), *pair)
    config = settings(advantages={"class_power": 1.0})
    found = scored(config, *pair, scorer=make_scorer(config, [joy, joy, joy, fear]))
    # Frequencies 3 and 1: 1/3 and 1 over their mean over the four inputs, 1/2.
    near(found.advantages, plain.advantages * np.array([[2 / 3], [2.0]]), 1e-6)
    np.testing.assert_array_equal(found.rewards, plain.rewards)
    assert np.abs(plain.advantages).min() > 0.1


def test_without_class_power_the_inputs_are_not_counted():
    config = settings()
    one = [sample(gold={"fear": 1.0})], [group("a", (*GOLDEN[:2], text([("fear", 1.0)]), MALFORMED))]
    counted = scored(config, *one, scorer=make_scorer(config, [sample(gold={"joy": 1.0})] * 3 + one[0]))
    np.testing.assert_array_equal(counted.advantages, scored(config, *one).advantages)


def test_lambda_grows_with_the_step_over_the_total():
    config = settings()
    scorer = make_scorer(config)
    arguments = (config, [sample(gold={"joy": 1.0})], [group("a", GOLDEN)])
    half = scored(*arguments, step=3, total_steps=6, scorer=scorer)
    assert half.metrics["reward/lambda"] == 0.25
    near(half.advantages[0], (1.194718, 0.434736, -0.647273, -0.982181), 2e-5)
    first = scored(*arguments, step=1, total_steps=50, scorer=scorer)
    near(first.rewards[0], np.array(R1) + 0.01 * np.array(R2))
    last = scored(*arguments, step=50, total_steps=50, scorer=scorer)
    near(last.rewards[0], np.array(R1) + 0.5 * np.array(R2))


def test_steps_of_a_run_share_one_compilation():
    config = settings()
    scorer = make_scorer(config)
    counter = CompileCounter()
    try:
        scored(config, [sample(gold={"joy": 1.0})], [group("a", GOLDEN)], scorer=scorer)
        assert counter.take()["compile/count"] >= 1
        for step in (2, 3):
            other = [text([("fear", 1.0)])] * 3 + [MALFORMED]
            scored(
                config,
                [sample(step, labels=EMORYNLP, gold={"sad": 0.5})],
                [group("b", other)],
                step=step,
                total_steps=9,
                scorer=scorer,
            )
        assert counter.take() == {"compile/count": 0.0, "compile/seconds": 0.0}
    finally:
        counter.close()


def two_lists() -> tuple:
    samples = [
        sample(gold={"joy": 1.0}),
        synthetic(sample(labels=IEMOCAP, gold={"happy": 0.8}), iteration=1),
    ]
    answers = (
        text([("happy", 0.5), ("bogus", 0.5)]),
        text([("sad", 1.0)]),
        text([("happy", 1.0)]),
        text([("happy", 0.5), ("sad", 0.5)]),
    )
    return samples, [group("a", GOLDEN), group("b", answers)]


def test_prompts_of_unequal_label_lists_keep_to_their_own_lists():
    samples, groups = two_lists()
    found = scored(settings(), samples, groups)
    near(found.r1, (R1, (1 / 3, 0.0, 1.0, 1 / 3)))
    # Core of the second group: happy .5, sad .375. "bogus" has .125, above all others, and is not in it.
    near(found.r2, (R2, (0.5, 0.5, 0.5, 1.0)))
    near(found.advantages[0], (1.093442, 0.531449, -0.494798, -1.130093), 2e-5)
    second = np.array((1 / 3, 0.0, 1.0, 1 / 3)) + 0.5 * np.array((0.5, 0.5, 0.5, 1.0))
    near(found.advantages[1], (second - second.mean()) / (second.std(ddof=1) + 1e-6), 2e-5)


def test_a_label_outside_the_list_takes_its_weight_from_the_named_ones_and_is_never_core():
    answers = [text([("joy", 0.5), ("bogus", 0.5)]), text([("bogus", 1.0)])] * 2
    found = scored(settings(), [sample(gold={"joy": 1.0})], [group("a", answers)])
    assert found.valid.all()
    near(found.r1[0], (1 / 3, 0.0, 1 / 3, 0.0))
    near(found.r2[0], (1.0, 0.0, 1.0, 0.0))
    assert found.metrics["parse/W_UNK_LABEL"] == 1.0


def test_a_lost_group_is_absent_from_advantages_and_every_mean():
    samples, groups = two_lists()
    alone = scored(settings(), samples[:1], groups[:1])
    found = scored(settings(), samples, [groups[0], LOST])
    assert found.present.tolist() == [[True] * 4, [False] * 4]
    assert found.completions[1] == () and found.answers[1] == () and found.texts[1] == ()
    near(found.advantages, (alone.advantages[0], (0.0,) * 4))
    differing = {"group/lost": (0.0, 1.0)}
    for name, value in alone.metrics.items():
        before, after = differing.get(name, (value, value))
        assert (name, alone.metrics[name], found.metrics[name]) == (
            name,
            before,
            pytest.approx(after, abs=1e-6),
        )
    assert set(found.metrics) - set(alone.metrics) == {"data/iemocap", "data/synthetic", "data/depth_1"}


def test_a_lost_group_does_not_dilute_the_share_of_cores_without_the_gold():
    wrong = group("a", [text([("fear", 1.0)])] * 4)
    found = scored(settings(), [sample(n, gold={"joy": 1.0}) for n in range(2)], [wrong, LOST])
    assert found.metrics["group/core_excludes_gold"] == 1.0
    assert found.metrics["group/zero_variance"] == 1.0


def test_a_step_without_any_group_has_finite_numbers():
    found = scored(settings(), [sample(gold={"joy": 1.0})], [LOST])
    assert all(np.isfinite(value) for value in found.metrics.values())
    assert not found.advantages.any()


def test_malformed_answers_are_counted_by_code_and_earn_the_fail_value():
    cut = completion(text([("joy", 1.0)]), finish="length")
    twice = text([("joy", 1.0)]).replace("joy:1.00", "joy:1.00, joy:0.50")
    found = scored(
        settings(reward={"fail_value": -1.0, "consensus": "off"}),
        [sample(gold={"joy": 1.0})],
        [group("a", [text([("joy", 1.0)]), cut, twice, MALFORMED])],
    )
    near(found.r1[0], (1.0, -1.0, -1.0, -1.0))
    assert found.valid.tolist() == [[True, False, False, False]]
    codes = {name: value for name, value in found.metrics.items() if name.startswith("parse/")}
    assert codes == {
        "parse/valid": 0.25,
        "parse/E_LENGTH": 0.25,
        "parse/E_DUP_LABEL": 0.25,
        "parse/E_NO_SELF": 0.25,
        "parse/E_NO_REPLY": 0.25,
        "parse/E_TRAILING": 0.25,
    }
    assert found.metrics["completion/stopped"] == 0.75
    assert found.metrics["answer/num_labels"] == 1.0


def test_the_entropy_of_what_groups_agree_on_is_told_by_data_set():
    samples, groups = two_lists()
    samples.append(sample(1, gold={"joy": 1.0}))
    found = scored(settings(), samples, [*groups, group("c", [text([("joy", 1.0)])] * 4)]).metrics
    # Group a: joy (1 + .7) / 3, surprise (.3 + .6) / 3, neutral .4 / 3 over its valid answers; group c: joy.
    # Both are of MELD and are averaged first.
    meld = (np.array([1.7, 0.9, 0.4]) / 3 + [1.0, 0.0, 0.0]) / 2
    assert found["group/collapse_entropy/meld"] == pytest.approx(-(meld * np.log(meld)).sum(), abs=1e-5)
    # Group b names a label outside the list, whose weight is no part of what is agreed on: happy 2, sad 1.5.
    iemocap = np.array([2.0, 1.5]) / 3.5
    expected = -(iemocap * np.log(iemocap)).sum()
    assert found["group/collapse_entropy/iemocap"] == pytest.approx(expected, abs=1e-5)
    collapsed = scored(settings(), samples[2:], [group("c", [text([("joy", 1.0)])] * 4)]).metrics
    assert collapsed["group/collapse_entropy/meld"] == pytest.approx(0.0, abs=1e-6)


def test_the_variety_of_replies_is_that_of_valid_answers():
    says = functools.partial(text, [("joy", 1.0)])
    groups = [
        group("a", [says(reply="We row home."), says(reply="we row home"), MALFORMED, MALFORMED]),
        group("b", [says(reply="Never!"), MALFORMED, MALFORMED, MALFORMED]),
    ]
    found = scored(settings(), [sample(n, gold={"joy": 1.0}) for n in range(2)], groups).metrics
    # Words: we, row, home twice and never; pairs: two, each twice.
    assert found["reply/distinct_1"] == pytest.approx(4 / 7)
    assert found["reply/distinct_2"] == pytest.approx(2 / 4)
    # Two are alike and one is like none; that one is alone in its group.
    assert found["reply/self_bleu"] == pytest.approx(2 / 3)
    assert found["reply/self_bleu_in_group"] == pytest.approx(1.0)
    none = scored(settings(), [sample(gold={"joy": 1.0})], [group("a", [MALFORMED] * 4)]).metrics
    assert not any(name.startswith("reply/") for name in none)


def test_the_consensus_reward_of_wrong_answers_is_told_where_there_are_any():
    # Of the golden group the third answer is wrong; the malformed one says nothing.
    assert golden().metrics["reward/r2_of_wrong"] == pytest.approx(R2[2], abs=1e-5)
    right = scored(settings(), [sample(gold={"joy": 1.0})], [group("c", [text([("joy", 1.0)])] * 4)])
    assert "reward/r2_of_wrong" not in right.metrics


def test_metrics_are_split_by_data_set_by_origin_and_by_depth():
    samples, groups = two_lists()
    samples.append(synthetic(sample(1, gold={"fear": 1.0}), iteration=2, depth=2))
    found = scored(settings(), samples, [*groups, group("c", [text([("fear", 1.0)])] * 4)]).metrics
    r1 = {"a": sum(R1) / 4, "b": (1 + 2 / 3) / 4, "c": 1.0}
    expected = {
        "data/meld": 2,
        "data/iemocap": 1,
        "data/original": 1,
        "data/synthetic": 2,
        "reward/r1/meld": (r1["a"] + r1["c"]) / 2,
        "reward/r1/iemocap": r1["b"],
        "reward/r1/original": r1["a"],
        "reward/r1/synthetic": (r1["b"] + r1["c"]) / 2,
        "data/depth_1": 1,
        "data/depth_2": 1,
        "reward/r1/depth_1": r1["b"],
        "reward/r1/depth_2": r1["c"],
        "reward/r1": sum(r1.values()) / 3,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "weight", "rewards"),
    [
        ({"preset": "paper"}, 1.0, np.add(R1, R2)),
        ({"preset": "convex"}, 0.5, (np.array(R1) + R2) / 2),
        ({"preset": "paper", "lambda_max": 0.2}, 0.2, np.array(R1) + 0.2 * np.array(R2)),
        ({"preset": "robust", "combine": "convex"}, 0.5, (np.array(R1) + R2) / 2),
        ({"preset": "convex", "combine": "additive"}, 0.5, np.array(R1) + 0.5 * np.array(R2)),
        ({"consensus": "off"}, 0.0, R1),
    ],
    ids=["paper", "convex", "lambda_max", "robust made convex", "convex made additive", "consensus off"],
)
def test_presets_and_what_overrides_them(reward, weight, rewards):
    found = golden(reward=reward)
    assert found.metrics["reward/lambda"] == pytest.approx(weight)
    near(found.rewards[0], rewards)


def test_without_consensus_r2_is_zero():
    assert not golden(reward={"consensus": "off"}).r2.any()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"preset": "robust"}, 1 / 3),
        ({"preset": "paper"}, 1.0),
        ({"preset": "robust", "presence": 0.01}, 1.0),
        ({"preset": "paper", "presence": 0.05}, 1 / 3),
    ],
    ids=["robust", "paper", "robust at .01", "paper at .05"],
)
def test_padding_the_list_pays_only_below_the_presence_threshold(reward, expected):
    padded = text([("joy", 0.98), ("surprise", 0.01), ("neutral", 0.01)])
    found = scored(settings(reward=reward), [sample(gold={"joy": 1.0})], [group("a", [padded, *GOLDEN[1:]])])
    near(found.r1[0, 0], 0.98 / 1.02)
    near(found.r2[0, 0], expected)


def test_mass_consensus_adds_weights_in_place_of_counting():
    near(golden(reward={"consensus": "mass"}).r2[0], (1.0, 1.0, 1.0, 0.0))


def test_a_constant_schedule_does_not_wait():
    found = golden(reward={"lambda_schedule": "constant"}, step=1, total_steps=100)
    assert found.metrics["reward/lambda"] == 0.5


def test_accuracy_as_the_primary_reward_is_one_for_the_heaviest_label():
    near(golden(reward={"primary": "accuracy"}).r1[0], (1.0, 1.0, 0.0, 0.0))


def test_a_reward_of_ones_own_is_imported_and_stands_in_place_of_r1(tmp_path, monkeypatch):
    (tmp_path / "half_rewards.py").write_text(
        "import jax.numpy as jnp\n"
        "def listed(pred, gold, valid, class_mask):\n"
        "    named = (pred > 0) & class_mask[:, None, :]\n"
        "    return named.sum(axis=-1).astype(jnp.float32) / 4 + 9.0 * (~valid)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = golden(reward={"function": "half_rewards:listed", "consensus": "off"})
    # An answer outside the grammar earns the fail value, whatever the function says of it.
    near(found.r1[0], (0.25, 0.5, 0.5, 0.0))


def test_a_reward_that_cannot_be_imported_is_refused():
    with pytest.raises(ValueError, match="cannot import no_such_rewards"):
        make_scorer(settings(reward={"function": "no_such_rewards:f"}))


@pytest.mark.parametrize("scale", ["r1", "parts"])
def test_the_scale_of_advantages_reaches_the_kernel(scale):
    found = golden(advantages={"scale": scale})
    r1, r2 = np.array(R1), np.array(R2)

    def deviation(r):
        return r - r.mean()

    total = r1 + 0.5 * r2
    expected = {
        "r1": deviation(total) / (r1.std(ddof=1) + 1e-6),
        "parts": deviation(r1) / (r1.std(ddof=1) + 1e-6) + 0.5 * deviation(r2) / (r2.std(ddof=1) + 1e-6),
    }[scale]
    near(found.advantages[0], expected, 2e-5)


def test_texts_are_without_the_end_of_turn():
    assert golden().texts[0] == GOLDEN
    assert fabricated.codec().eos_id == completion(GOLDEN[0]).token_ids[-1]


def test_reward_options_reach_the_kernels():
    config = settings(reward={"primary": "similarity", "similarity": {"joy/surprise": 0.5}})
    found = scored(config, [sample(gold={"joy": 1.0})], [group("a", GOLDEN)])
    # GOLDEN: joy; joy .7, surprise .3; surprise .6, neutral .4; malformed.
    near(found.r1[0], (1.0, 0.85, 0.3, 0.0))
    smoothed = scored(settings(reward={"smoothing": 0.7}), [sample(gold={"joy": 1.0})], [group("a", GOLDEN)])
    # 0.1 is added to each of seven labels on both sides: (1.1 + .6) / 1.7 and, for the wrong one, .7 / 2.7.
    near(smoothed.r1[0][[0, 2]], (1.0, 0.7 / 2.7))
    alike = [text([("joy", 1.0)])] * 4
    thirds = scored(settings(reward={"divide": "top_k"}), [sample(gold={"joy": 1.0})], [group("a", alike)])
    near(thirds.r2[0], [1 / 3] * 4)
    loud = [text([("joy", 0.1)])] * 2 + [text([("fear", 1.0)]), text([("joy", 0.1)])]
    for core, expected in (("mean", [1, 1, 0, 1]), ("raw_mean", [0, 0, 1, 0])):
        config = settings(reward={"core": core, "top_k": 1})
        near(scored(config, [sample(gold={"joy": 1.0})], [group("a", loud)]).r2[0], expected)

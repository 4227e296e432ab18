"""Intervals and tests: equal to scikit-learn, scipy and statsmodels, and right about chance."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import accuracy_score, f1_score

from selfemo_jax.algo import metrics
from selfemo_jax.study.significance import (
    SCORES,
    accuracy,
    dialogue_counts,
    difference,
    draw,
    estimate,
    holm,
    macro_f1,
    mcnemar_exact,
    mean_of_sums,
    over_seeds,
    paired_t,
    samples,
    sums_by_dialogue,
    weighted_f1,
)

LABELS = ("joy", "anger", "fear", "neutral")


def invented(rng: np.random.Generator, num: int = 60, dialogues: int = 7) -> list[dict]:
    """Predictions of which some are no label at all."""
    said = [*LABELS, None, "bored"]
    return [
        {
            "id": f"set/test/d{rng.integers(dialogues)}/{place}",
            "gold": LABELS[rng.integers(3)],
            "prediction": said[rng.integers(len(said))],
        }
        for place in range(num)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn_on_random_predictions(seed):
    found = invented(np.random.default_rng(seed))
    gold = [p["gold"] for p in found]
    said = [p["prediction"] if p["prediction"] in LABELS else "none" for p in found]
    counts = dialogue_counts(found, LABELS).sum(0)
    assert accuracy(counts) == pytest.approx(accuracy_score(gold, said))
    for function, average in ((weighted_f1, "weighted"), (macro_f1, "macro")):
        expected = f1_score(gold, said, labels=list(LABELS), average=average, zero_division=0)
        assert function(counts) == pytest.approx(expected)
    assert macro_f1(counts) == pytest.approx(
        float(metrics.macro_f1(jnp.asarray(counts, jnp.int32))), abs=1e-6
    )


def test_a_bootstrap_sample_is_the_score_of_the_repeated_dialogues():
    found = invented(np.random.default_rng(1), num=40, dialogues=4)
    counts = dialogue_counts(found, LABELS)
    names = sorted({p["id"].rsplit("/", 1)[0] for p in found})
    draws = draw(len(names), num=6, seed=3)
    for score in SCORES.values():
        got = samples([counts], score, draws)
        for sample, weights in zip(got, draws.dialogues, strict=True):
            repeated = [p for p in found for _ in range(int(weights[names.index(p["id"].rsplit("/", 1)[0])]))]
            assert sample == pytest.approx(score(dialogue_counts(repeated, LABELS).sum(0)))


def test_seeds_are_drawn_with_the_dialogues():
    runs = [np.array([[[1.0, 1.0]], [[0.0, 1.0]]]), np.array([[[0.0, 1.0]], [[0.0, 1.0]]])]
    draws = draw(2, 2, num=400, seed=0)
    got = samples(runs, mean_of_sums, draws)
    # The first run scores d0 / 2 where d0 is how often its only right dialogue was drawn; the second 0.
    assert np.allclose(got, draws.dialogues[:, 0] / 2 * draws.runs[:, 0] / 2)
    assert estimate([runs], mean_of_sums, num=400).value == pytest.approx(0.25)


def test_sets_count_equally_whatever_their_size():
    small, large = np.array([[[1.0, 1.0]]]), np.array([[[0.0, 50.0]], [[0.0, 49.0]]])
    assert estimate([[small], [large]], mean_of_sums, num=100).value == pytest.approx(0.5)


def test_a_run_is_drawn_with_all_its_sets():
    right, wrong = np.tile([[[1.0, 1.0]]], (10, 1, 1)), np.tile([[[0.0, 1.0]]], (10, 1, 1))
    runs = [right, wrong, wrong]
    # All three draws take the right run in 1 of 27 samples, more than 2.5 %; two sets whose runs are drawn
    # apart would both do so in 1 of 729.
    assert estimate([runs], mean_of_sums).interval == (0.0, 1.0)
    assert estimate([runs, runs], mean_of_sums).interval == (0.0, 1.0)
    one, other = (draw(5, 3, num=50, part=part) for part in (0, 1))
    assert np.array_equal(one.runs, other.runs) and not np.array_equal(one.dialogues, other.dialogues)


def test_sums_by_dialogue_by_hand():
    sums = sums_by_dialogue([1.0, 0.5, 0.0], ["s/t/b/0", "s/t/a/0", "s/t/b/1"])
    assert sums.tolist() == [[[0.5, 1.0]], [[1.0, 2.0]]]
    assert mean_of_sums(sums.sum(0)) == pytest.approx(0.5)
    sums = sums_by_dialogue([1.0, 0.5, 0.0], ["s/t/b/0", "s/t/a/0", "s/t/b/1"], [1, 0, 0])
    assert sums.tolist() == [[[0.5, 1.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]]
    # The groups' means are .25 and 1; without dialogue b there is nothing of the second.
    assert mean_of_sums(sums.sum(0)) == pytest.approx(0.625) and np.isnan(mean_of_sums(sums[0]))


def simulated(rng: np.random.Generator, dialogues: int, length: int) -> np.ndarray:
    """Right answers by dialogue [D, 1, 2]; dialogues are easy or hard, 0.5 on average."""
    ease = rng.beta(1.0, 1.0, size=dialogues)
    return np.stack([rng.binomial(length, ease), np.full(dialogues, length)], axis=-1)[:, None, :].astype(
        float
    )


def test_intervals_over_dialogues_hold_the_truth_where_those_over_utterances_do_not():
    rng, held, naive = np.random.default_rng(0), 0, 0
    for trial in range(300):
        sums = simulated(rng, dialogues=40, length=12)
        found = estimate([[sums]], mean_of_sums, num=300, seed=trial)
        held += found.interval[0] <= 0.5 <= found.interval[1]
        half = 1.96 * np.sqrt(found.value * (1 - found.value) / sums[..., 1].sum())
        naive += abs(found.value - 0.5) <= half
    assert 0.90 <= held / 300 <= 0.985
    assert naive / 300 < 0.75


def test_a_paired_bootstrap_finds_no_difference_where_there_is_none_and_finds_one_where_it_is():
    rng, false, true = np.random.default_rng(1), 0, 0
    for trial in range(200):
        first, second = simulated(rng, 40, 12), simulated(rng, 40, 12)
        false += difference([[first]], [[second]], mean_of_sums, num=300, seed=trial).p < 0.05
        better = first.copy()
        better[..., 0] = np.minimum(better[..., 0] + rng.integers(0, 3, (40, 1)), 12)
        true += difference([[first]], [[better]], mean_of_sums, num=300, seed=trial).p < 0.05
    assert false / 200 < 0.11
    assert true / 200 > 0.95


def test_a_paired_difference_of_equal_systems_is_exactly_nothing():
    counts = dialogue_counts(invented(np.random.default_rng(2), dialogues=10), LABELS)
    assert len(counts) == 10
    found = difference([[counts]], [[counts]], weighted_f1, num=200)
    assert (found.value, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)


def test_fewer_than_ten_dialogues_in_any_set_have_no_interval_and_no_p():
    sums = simulated(np.random.default_rng(0), 10, 12)
    assert estimate([[sums]], mean_of_sums, num=100).interval is not None
    for sets in ([[sums[:9]]], [[sums], [sums[:1]]]):
        found = estimate(sets, mean_of_sums, num=100)
        assert found.interval is None and 0 < found.value < 1
        found = difference(sets, [[np.ones_like(part[0])] for part in sets], mean_of_sums, num=100)
        assert found.interval is found.p is None and found.value > 0


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 9), (10, 2), (40, 41)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(won, lost):
    first = [False] * won + [True] * lost + [True, False]
    second = [True] * won + [False] * lost + [True, False]
    p = min(1.0, 2 * binom.cdf(min(won, lost), won + lost, 0.5)) if won + lost else 1.0
    assert mcnemar_exact(first, second) == (won, lost, pytest.approx(p))


def test_mcnemar_refuses_unequal_inputs():
    with pytest.raises(ValueError, match="same inputs"):
        mcnemar_exact([True], [True, False])


def test_holm_by_hand():
    # Sorted .01, .02, .04: times 3, 2, 1, and never below the one before.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([]) == [] and holm([None, None]) == [None, None]
    # A test that has no p is no member of the family.
    assert holm([0.04, None, 0.01]) == [pytest.approx(0.04), None, pytest.approx(0.02)]


def test_seeds_by_hand():
    found = over_seeds([50.0, 52.0, 54.0])
    # t(0.975, 2) = 4.30265, standard error 2 / sqrt(3).
    assert (found["mean"], found["sd"]) == (52.0, 2.0)
    assert found["high"] - 52.0 == pytest.approx(4.30265 * 2 / 3**0.5, abs=1e-4)
    assert over_seeds([50.0])["low"] is None
    assert paired_t([1.0, 2.0], [2.0, 3.0]) is None
    assert paired_t([0.8, 0.9], [0.7, 0.8]) is None, "a tenth less in both, but for rounding"
    # Gaps 1, 2, 3: t = 2 / (1 / sqrt(3)), two degrees of freedom.
    assert paired_t([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)

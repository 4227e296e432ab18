"""Variety of replies, by hand and against a plain reading of the definition."""

import math
from collections import Counter

import numpy as np
import pytest

from selfemo_jax.data.diversity import distinct, self_bleu, words


def plain(replies: list[str], place: int) -> float:
    """BLEU of one reply against the others, word by word."""
    mine, others = words(replies[place]), [words(r) for n, r in enumerate(replies) if n != place and words(r)]
    logs = []
    for n in range(1, min(4, len(mine)) + 1):
        grams = Counter(mine[i : i + n] for i in range(len(mine) - n + 1))
        has = [Counter(o[i : i + n] for i in range(len(o) - n + 1)) for o in others]
        matched = sum(min(count, max(h[gram] for h in has)) for gram, count in grams.items())
        if n == 1 and not matched:
            return 0.0
        logs.append(math.log((matched or 0.1) / (len(mine) - n + 1)))
    closest = min((abs(len(o) - len(mine)), len(o)) for o in others)[1]
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - closest / len(mine)))


def test_distinct_counts_different_n_grams_over_all():
    assert distinct(["We row far.", "we row FAR"], 2) == 2 / 4
    assert distinct(["We row far.", "we row FAR", "Home"], 1) == 4 / 7
    assert distinct(["Home"], 2) == distinct([], 1) == 0.0


def test_self_bleu_of_three_replies_by_hand():
    found = self_bleu(["We row home now.", "we row home late", "Never!"])
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples and no four (0.1 of 1).
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert found.tolist() == pytest.approx([expected, expected, 0.0])


def test_a_word_counts_as_often_as_another_reply_has_it():
    # "row" three times against two in the second and one in the third; pairs row-row twice against once.
    found = self_bleu(["row row row", "row row", "row"])
    assert found[0] == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    # Orders end with the reply; the closest length to 2 is 1 or 3, of which the shorter costs nothing.
    assert found[1] == pytest.approx(1.0)
    assert found[2] == pytest.approx(math.exp(1 - 2))


def test_short_replies_that_are_all_the_same_are_wholly_alike():
    assert self_bleu(["I see.", "i see", "I SEE!"]).tolist() == pytest.approx([1.0] * 3)


def test_only_replies_of_the_same_group_are_compared():
    replies = ["we row home now", "we row home now", "we row home now", "hello there"]
    found = self_bleu(replies, [0, 1, 1, 2])
    assert np.isnan(found[[0, 3]]).all() and found[1] == found[2] == pytest.approx(1.0)
    assert np.isnan(self_bleu(["", "we row"], None)).all(), "one that is said and one that is not"
    assert len(self_bleu([])) == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_replies_have_the_bleu_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    replies = [" ".join(rng.choice(list("abcdef"), rng.integers(1, 9))) for _ in range(30)]
    groups = rng.integers(0, 4, len(replies)).tolist()
    assert self_bleu(replies).tolist() == pytest.approx([plain(replies, n) for n in range(30)])
    found = self_bleu(replies, groups)
    for n, group in enumerate(groups):
        members = [place for place, other in enumerate(groups) if other == group]
        expected = plain([replies[place] for place in members], members.index(n))
        assert found[n] == pytest.approx(expected)

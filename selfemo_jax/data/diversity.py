"""How varied replies are: distinct n-grams, and self-BLEU. A low entropy of the policy may be confidence or
collapse; these tell them apart."""

from collections.abc import Iterable, Sequence

import numpy as np

MOST = 4
"""Longest n-gram of self-BLEU."""
SMOOTHING = 0.1
"""Matches that count where an order has none (method 1 of Chen and Cherry 2014)."""


def words(text: str) -> tuple[str, ...]:
    """Its words in lower case, without punctuation."""
    kept = "".join(character if character.isalnum() else " " for character in text.lower())
    return tuple(kept.split())


def distinct(replies: Iterable[str], n: int) -> float:
    """Share of word n-grams of all replies together that are different; 0 without any (Li et al., 2016)."""
    grams, total = set(), 0
    for reply in replies:
        found = words(reply)
        grams.update(zip(*(found[place:] for place in range(n)), strict=False))
        total += max(0, len(found) - n + 1)
    return len(grams) / total if total else 0.0


def self_bleu(replies: Sequence[str], groups: Sequence[int] | None = None) -> np.ndarray:
    """[N] BLEU of each reply against all others of its group (by default all replies are one): 1 where
    another says the same, near 0 where no two share words (Zhu et al., 2018).

    Clipped precisions of word n-grams up to `MOST`, or to the reply's length, so that "I see." said by all
    has 1 and not a smoothed 0; their geometric mean, times the brevity penalty against the closest length.
    NaN for a reply without words and for one that is alone in its group.
    """
    spoken = [words(reply) for reply in replies]
    lengths = np.array([len(one) for one in spoken], int)
    of = np.zeros(len(replies), int) if groups is None else np.asarray(groups, int)
    known = {word: place for place, word in enumerate(dict.fromkeys(w for one in spoken for w in one))}
    tokens = np.array([known[word] for one in spoken for word in one], int)
    owner = np.repeat(np.arange(len(spoken)), lengths)
    score, grams = np.zeros(len(spoken)), np.zeros(len(tokens), int)
    orders, nothing = np.minimum(lengths, MOST), np.zeros(len(spoken), bool)
    for n in range(1, MOST + 1):
        if len(tokens) < n:
            break
        # An n-gram is the n-1-gram before it and its last word; one that reaches into the next reply is none.
        grams = grams[: len(tokens) - n + 1] * max(1, len(known)) + tokens[n - 1 :]
        grams = np.unique(grams, return_inverse=True)[1]
        whole = owner[: len(grams)] == owner[n - 1 :]
        matched = _matched(grams[whole], owner[: len(grams)][whole], of, len(spoken))
        total = np.maximum(lengths - n + 1, 1)
        precision = np.where(matched > 0, matched, SMOOTHING) / total
        score += np.where(n <= orders, np.log(precision), 0.0)
        if n == 1:
            nothing = matched == 0
    others = (of[:, None] == of[None, :]) & (lengths > 0)[None, :]
    np.fill_diagonal(others, False)
    alone = ~others.any(axis=1) | (lengths == 0)
    if alone.all():
        return np.full(len(spoken), np.nan)
    # Of two lengths that are as close the shorter one counts, as in BLEU.
    distance = 2 * np.abs(lengths[:, None] - lengths[None, :]) + (lengths[None, :] > lengths[:, None])
    closest = lengths[np.where(others, distance, np.iinfo(int).max).argmin(axis=1)]
    size = np.maximum(lengths, 1)
    brevity = np.minimum(0.0, 1 - closest / size)
    found = np.where(nothing, 0.0, np.exp(score / np.maximum(orders, 1) + brevity))
    return np.where(alone, np.nan, found)


def _matched(grams: np.ndarray, owner: np.ndarray, of: np.ndarray, num: int) -> np.ndarray:
    """[num] n-grams of each reply that another of its group has too, each as often as the one that has it
    most."""
    if not len(grams):
        return np.zeros(num, int)
    pairs, counts = np.unique(grams * num + owner, return_counts=True)
    gram, reply = pairs // num, pairs % num
    place = np.unique(gram * (of.max() + 1) + of[reply], return_inverse=True)[1]
    # By n-gram and group the replies that hold it most often come first.
    order = np.lexsort((-counts, place))
    sorted_place = place[order]
    first = np.searchsorted(sorted_place, np.arange(place.max() + 1))
    most, leader = counts[order][first], reply[order][first]
    following = np.minimum(first + 1, len(order) - 1)
    has_second = sorted_place[following] == np.arange(len(first))
    has_second &= following > first
    second = np.where(has_second, counts[order][following], 0)
    by_others = np.where(leader[place] == reply, second[place], most[place])
    return np.bincount(reply, weights=np.minimum(counts, by_others), minlength=num).astype(int)

"""Intervals and tests for scores: bootstrap over dialogues, McNemar, Holm.

Utterances of a dialogue are not independent, so whole dialogues are drawn with replacement, never
utterances. A score is a function of counts that add up over dialogues (a confusion, or sums and numbers), so
that all bootstrap samples are one product. With runs of several seeds the seeds are drawn too. With fewer
than `MIN_DIALOGUES` dialogues in a data set there is no interval and no p-value: None, shown as "-".

Shape letters: R runs (seeds), D dialogues, C classes, S bootstrap samples, N inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfemo_jax.reporting.scores import (
    MIN_DIALOGUES,
    accuracy,
    count,
    dialogue_of,
    macro_f1,
    weighted_f1,
)

__all__ = [
    "FEW",
    "MIN_DIALOGUES",
    "SCORES",
    "Draws",
    "Estimate",
    "accuracy",
    "difference",
    "dialogue_counts",
    "draw",
    "estimate",
    "holm",
    "macro_f1",
    "mcnemar_exact",
    "mean_of_sums",
    "over_seeds",
    "paired_t",
    "samples",
    "sums_by_dialogue",
    "weighted_f1",
]

NUM_SAMPLES = 5000
FEW = f"-: fewer than {MIN_DIALOGUES} dialogues say too little of others for an interval or a bootstrap p"
"""Why a table lacks them."""
Score = Callable[[np.ndarray], np.ndarray]
"""Counts ``[..., X, Y]`` -> scores ``[...]``."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How often each bootstrap sample takes each dialogue and each run."""

    dialogues: np.ndarray
    """[S, D]; a row adds up to D."""
    runs: np.ndarray
    """[S, R]; a row adds up to R."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, or a difference of two, with its 95 % bootstrap interval."""

    value: float
    interval: tuple[float, float] | None
    """None with fewer than `MIN_DIALOGUES` dialogues in a data set."""
    p: float | None = None
    """Two-sided p-value of a difference; None for a single value, and without an interval."""


SCORES: Mapping[str, Score] = {"accuracy": accuracy, "weighted_f1": weighted_f1, "macro_f1": macro_f1}


def dialogue_counts(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> np.ndarray:
    """Confusions ``[D, C, C + 1]`` by dialogue, dialogues in the order of their names; the last column is
    for what is no label."""
    return count(predictions, labels).confusion


def sums_by_dialogue(
    values: Sequence[float], ids: Sequence[str], groups: Sequence[int] | None = None
) -> np.ndarray:
    """Sum and number of values of each dialogue and group ``[D, X, 2]``, for `mean_of_sums`; ``ids`` are
    those of the inputs, ``groups`` the place of each value's group (default: all in one)."""
    names, place = np.unique([dialogue_of({"id": name}) for name in ids], return_inverse=True)
    group = np.zeros(len(ids), int) if groups is None else np.asarray(groups)
    sums = np.zeros((len(names), group.max() + 1, 2))
    np.add.at(sums, (place, group), np.stack([np.asarray(values, float), np.ones(len(ids))], axis=-1))
    return sums


def mean_of_sums(sums: np.ndarray) -> np.ndarray:
    """Mean value of each group, averaged over the groups, ``[..., X, 2]`` (sum, number) -> ``[...]``; NaN
    where a sample drew nothing of a group."""
    total, number = sums[..., 0], sums[..., 1]
    means = np.divide(total, number, out=np.full_like(total, np.nan, float), where=number > 0)
    return means.mean(-1)


def draw(
    num_dialogues: int, num_runs: int = 1, *, num: int = NUM_SAMPLES, seed: int = 0, part: int = 0
) -> Draws:
    """Bootstrap samples: dialogues and runs, each drawn with replacement.

    Another ``part`` (data set) has other dialogues, but the same runs: a run is drawn with all its sets.
    """

    def times(rng: np.random.Generator, number: int) -> np.ndarray:
        return rng.multinomial(number, np.full(number, 1 / number), size=num).astype(float)

    return Draws(
        dialogues=times(np.random.default_rng([seed, 0, part]), num_dialogues),
        runs=times(np.random.default_rng([seed, 1]), num_runs),
    )


def samples(runs: Sequence[np.ndarray], score: Score, draws: Draws) -> np.ndarray:
    """The score of each bootstrap sample ``[S]``, averaged over the drawn runs; a run is ``[D, X, Y]``."""
    scores = np.stack([score(np.tensordot(draws.dialogues, run, axes=1)) for run in runs], axis=1)
    return (scores * draws.runs).sum(1) / draws.runs.sum(1)


def point(runs: Sequence[np.ndarray], score: Score) -> float:
    """The score of all dialogues, averaged over the runs."""
    return float(np.mean([score(run.sum(0)) for run in runs]))


def estimate(
    sets: Sequence[Sequence[np.ndarray]], score: Score, *, num: int = NUM_SAMPLES, seed: int = 0
) -> Estimate:
    """A score with its interval, averaged over data sets, whose dialogues are drawn apart.

    sets: for each data set the counts ``[D, X, Y]`` of each run (one run: its dialogues alone are drawn).
    """
    value = float(np.mean([point(runs, score) for runs in sets]))
    if not _enough(sets):
        return Estimate(value=value, interval=None)
    drawn = np.mean([_set_samples(runs, score, num, seed, i) for i, runs in enumerate(sets)], axis=0)
    return Estimate(value=value, interval=_bounds(drawn))


def difference(
    first: Sequence[Sequence[np.ndarray]],
    second: Sequence[Sequence[np.ndarray]],
    score: Score,
    *,
    num: int = NUM_SAMPLES,
    seed: int = 0,
) -> Estimate:
    """Second less first on the same dialogues: a paired bootstrap.

    Both sides take the same dialogues in each sample, and the same runs where they have equally many (runs
    with the same seeds belong together). p is twice the share of samples on the wrong side of 0, with one
    added to both counts.
    """
    value = float(np.mean([point(b, score) - point(a, score) for a, b in zip(first, second, strict=True)]))
    if not _enough(first):
        return Estimate(value=value, interval=None)
    drawn = np.mean(
        [
            _set_samples(there, score, num, seed, i) - _set_samples(here, score, num, seed, i)
            for i, (here, there) in enumerate(zip(first, second, strict=True))
        ],
        axis=0,
    )
    least = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Estimate(value=value, interval=_bounds(drawn), p=float(min(1.0, 2 * (least + 1) / (num + 1))))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """(inputs that only the second got right, only the first, exact two-sided p)."""
    # statsmodels brings pandas along; the other studies start without it.
    from statsmodels.stats.contingency_tables import mcnemar

    before, after = np.asarray(first, bool), np.asarray(second, bool)
    if before.shape != after.shape:
        raise ValueError(f"{before.size} answers beside {after.size}; McNemar's test needs the same inputs")
    won, lost = int((~before & after).sum()), int((before & ~after).sum())
    table = [[int((before & after).sum()), lost], [won, int((~before & ~after).sum())]]
    if not won + lost:
        return won, lost, 1.0
    return won, lost, float(mcnemar(table, exact=True).pvalue)  # pyrefly: ignore[missing-attribute]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over a family: the tests that have a p; None stays None."""
    from statsmodels.stats.multitest import multipletests

    known = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if p is None else float(next(adjusted)) for p in p_values]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the 95 % interval of Student's t over the seeds; the latter are None for
    one seed."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired_t(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test over runs with the same seeds; None where there is no spread to
    judge by."""
    from scipy import stats

    gaps = np.subtract(second, first)
    # Equal gaps of unequal scores differ in their last bits.
    if len(gaps) < 2 or np.ptp(gaps) < 1e-9:
        return None
    return float(stats.ttest_rel(second, first).pvalue)


def _enough(sets: Sequence[Sequence[np.ndarray]]) -> bool:
    return all(len(runs[0]) >= MIN_DIALOGUES for runs in sets)


def _set_samples(runs: Sequence[np.ndarray], score: Score, num: int, seed: int, part: int) -> np.ndarray:
    return samples(runs, score, draw(len(runs[0]), len(runs), num=num, seed=seed, part=part))


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)

"""Intervals of an ablation's arms, and each arm against the reference, from the predictions of their runs.

Accuracy, averaged over data sets and seeds: a bootstrap over seeds and dialogues, paired for differences (the
same dialogues, and the same seeds where both arms have them), and the paired t-test over seeds. Holm's
correction is over the arms. With fewer than ten dialogues in a set the bootstrap is left out, and the table
says so. With few seeds the t-test can hardly find anything, and the bootstrap takes their
spread for a little smaller than it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.study.compare import percent_bounds
from selfemo_jax.study.reading import Predictions, read_predictions
from selfemo_jax.study.seeds import counts_by_set
from selfemo_jax.study.significance import FEW, accuracy, difference, estimate, holm, paired_t, point

TESTS = ("p_bootstrap", "p_bootstrap_holm", "p_t")
Runs = Mapping[str, Mapping[int, Path]]
"""Arm -> seed -> folder of its finished run."""


def with_tests(
    rows: Sequence[Mapping[str, Any]], runs: Runs, *, split: str, reference: str
) -> tuple[list[dict[str, Any]], str]:
    """The rows of the arms' table with ``mean ci``, ``difference ci`` and p-values beside their means, and a
    sentence that says what they are.

    Where a run's predictions are missing, or the runs answered different inputs, the rows stay as they are
    and the sentence says which.
    """
    try:
        tested = _tested(rows, runs, split=split, reference=reference)
    except ValueError as error:
        return [dict(row) for row in rows], f"no intervals: {error}"
    compared = [row for row in tested if "p_bootstrap" in row]
    for row, p in zip(compared, holm([row["p_bootstrap"] for row in compared]), strict=True):
        row["p_bootstrap_holm"] = p
    if compared:
        # Every row has every column, the reference too.
        tested = [dict.fromkeys(TESTS) | row for row in tested]
        tested = [{name: row[name] for name in (*_others(row), *TESTS)} for row in tested]
    words = (
        "[ , ]: 95 % bootstrap over seeds and dialogues; p_bootstrap: paired, against the reference, then "
        "with Holm's correction over the arms; p_t: paired t-test over seeds"
    )
    return tested, f"{words}; {FEW}" if any(row["mean ci"] is None for row in tested) else words


def _tested(
    rows: Sequence[Mapping[str, Any]], runs: Runs, *, split: str, reference: str
) -> list[dict[str, Any]]:
    systems = {
        arm: {
            seed: read_predictions(folder, split=split, name=f"{arm}, seed {seed}")
            for seed, folder in members.items()
        }
        for arm, members in runs.items()
    }
    base = systems.get(reference, {})
    tested: list[dict[str, Any]] = []
    for row in rows:
        members = systems[row["arm"]]
        counts = list(counts_by_set(list(members.values())).values())
        found = estimate(counts, accuracy)
        extra: dict[str, Any] = {"mean ci": percent_bounds(found)}
        shared = sorted(base.keys() & members.keys())
        if row["arm"] != reference and shared:
            extra |= _against([base[seed] for seed in shared], [members[seed] for seed in shared])
        tested.append({**row, **extra})
    return tested


def _others(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name not in TESTS]


def _against(first: Sequence[Predictions], second: Sequence[Predictions]) -> dict[str, Any]:
    """The second arm's runs less the first's, seed by seed."""
    together = counts_by_set([*first, *second])
    here = [runs[: len(first)] for runs in together.values()]
    there = [runs[len(first) :] for runs in together.values()]
    gap = difference(here, there, accuracy)
    means = [
        [sum(point([runs[seed]], accuracy) for runs in side) / len(side) for seed in range(len(first))]
        for side in (here, there)
    ]
    return {
        "difference ci": percent_bounds(gap),
        "p_bootstrap": gap.p,
        "p_t": paired_t(*means),
    }

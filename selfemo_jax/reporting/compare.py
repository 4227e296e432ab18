"""Tables over several runs: each against the first, and means over seeds of the same settings."""

import statistics
from collections.abc import Sequence
from typing import Any

from selfemo_jax.reporting.reading import number
from selfemo_jax.reporting.runs import RunReport
from selfemo_jax.reporting.scores import compare, holm, of_part

NOT_SETTINGS = ("seed", "run_dir", "time_limit", "platform")
"""What may differ between runs that count as seeds of one another; the note may not, or a plumbing run could
enter a mean."""


def comparisons(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Every run against the first on each split and data set that both answered, and on the parts of a set;
    both families of p-values are Holm-corrected over the rows of whole sets."""
    rows = []
    for place, run in enumerate(runs[1:], start=1):
        for score in runs[0].summary["scores"]:
            where = {key: score[key] for key in ("split", "set", "part")}
            before, after = (
                of_part(side.predictions.get(score["split"], ()), score["set"], score["part"])
                for side in (runs[0], run)
            )
            found = compare(before, after, score["labels"])
            if found is not None:
                rows.append({"first": 0, "second": place, **where, **found})
    whole = [row for row in rows if not row["part"]]
    for family in ("p_bootstrap", "p_mcnemar"):
        for row, adjusted in zip(whole, holm([row[family] for row in whole]), strict=True):
            row[f"{family}_holm"] = number(adjusted, 5)
    return rows


def seed_groups(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the scores of runs whose settings differ in the seed alone."""
    groups: dict[tuple, list[int]] = {}
    for place, run in enumerate(runs):
        settings = {k: v for k, v in run.summary["settings"].items() if k not in NOT_SETTINGS}
        groups.setdefault(tuple(sorted(settings.items())), []).append(place)
    rows = []
    for members in groups.values():
        if len({runs[place].summary["settings"].get("seed") for place in members}) < 2:
            continue
        scored = [
            {(s["split"], s["set"], s["part"]): s for s in runs[place].summary["scores"]} for place in members
        ]
        for where in scored[0]:
            row: dict[str, Any] = {"runs": members, **dict(zip(("split", "set", "part"), where, strict=True))}
            for key in ("accuracy", "weighted_f1", "macro_f1"):
                values = [found[where][key] for found in scored if where in found]
                known = [value for value in values if value is not None]
                if len(known) > 1:
                    row[key] = [number(statistics.mean(known)), number(statistics.stdev(known)), len(known)]
            rows.append(row)
    return rows

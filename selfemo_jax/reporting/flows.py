"""How a policy's confusions change from phase to phase: which label is taken for another more often, and to
where its answers flow.

Every phase that ends with dev scores leaves its answers to the dev subset (`DEV_ANSWERS`); the inputs are
the same ones each time, so that phases are compared answer by answer. All tests are exact McNemar tests: of
the answers that changed in one of two opposite ways, is one way more frequent than chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfemo_jax.reporting.reading import Notices, read_json, read_lines
from selfemo_jax.reporting.scores import holm, mcnemar_p

DEV_ANSWERS = "dev_predictions.jsonl"
ALARM = 0.05
"""A pair whose confusion grew with a smaller corrected p raises an alarm."""
LEAST = 6
"""Changed answers below which no exact test can reach `ALARM`, whichever way they went: such pairs are not
in the family that is corrected. How many changed says nothing about the way."""

Answers = Mapping[str, Mapping[str, tuple[str, str | None]]]
"""Data set -> input's id -> gold and predicted label; None outside the grammar."""


@dataclass(frozen=True, kw_only=True)
class PhaseAnswers:
    """What the policy answered at the end of a phase."""

    phase: str
    answers: Answers


def phase_answers(run_dir: Path, notices: Notices) -> list[PhaseAnswers]:
    """Those of the finished phases of a run, in their order."""
    found = []
    for path in sorted((run_dir / "phases").glob(f"*/{DEV_ANSWERS}")):
        if not (path.parent / "DONE").exists():
            continue
        sets: dict[str, dict[str, tuple[str, str | None]]] = {}
        for line in read_lines(path, notices):
            name, gold, said = line.get("id"), line.get("gold"), line.get("prediction")
            if isinstance(name, str) and isinstance(gold, str):
                sets.setdefault(str(line.get("dataset")), {})[name] = (gold, said)
        if sets:
            found.append(PhaseAnswers(phase=path.parent.name.partition("_")[2], answers=sets))
    return found


def label_lists(run_dir: Path, phases: Sequence[PhaseAnswers], notices: Notices) -> dict[str, list[str]]:
    """Label list of each data set: that of the run's scores, else every label that occurs."""
    scored: dict[str, list[str]] = {}
    final = read_json(run_dir / "eval" / "final.json", notices)
    for split in ((final or {}).get("splits") or {}).values():
        for name, scores in (split.get("sets") or {}).items():
            scored[name] = list(scores.get("per_class") or {})
    lists = {}
    for name in sorted({name for one in phases for name in one.answers}):
        pairs = [pair for one in phases for pair in one.answers.get(name, {}).values()]
        occurring = {gold for gold, _ in pairs}
        known = scored.get(name) or []
        said = {label for _, label in pairs if label}
        lists[name] = known if occurring <= set(known) else sorted(occurring | said)
    return lists


def steps_between(phases: Sequence[PhaseAnswers]) -> list[tuple[PhaseAnswers, PhaseAnswers]]:
    """Each phase with the next; and the first with the last round of RL, between which a slow change adds
    up."""
    pairs = list(zip(phases, phases[1:], strict=False))
    rounds = [one for one in phases if one.phase.startswith("rl_")]
    return [*pairs, *([(rounds[0], rounds[-1])] if len(rounds) > 2 else [])]


def changes(
    before: PhaseAnswers, after: PhaseAnswers, labels: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """What changed, one object a data set over the inputs that both answered.

    ``before`` and ``after``: confusions [C, C + 1], rows gold, the last column for answers of no label.
    ``pairs``, those that changed: of gold one answered as the other, how many before and after, how many
    ``came`` and ``went``, p, Holm's p over all pairs of all sets, and the alarm. ``flows``: answers that
    moved from one label to the other and back, whatever the gold, with p and Holm's p.
    """
    found: list[dict[str, Any]] = []
    for name, order in labels.items():
        here, there = before.answers.get(name, {}), after.answers.get(name, {})
        common = [key for key in here if key in there and here[key][0] == there[key][0]]
        if not common:
            continue
        place = {label: index for index, label in enumerate(order)}
        trios = [
            (place[here[key][0]], *(place.get(str(side[key][1]), len(order)) for side in (here, there)))
            for key in common
        ]
        matrices = [[[0] * (len(order) + 1) for _ in order] for _ in range(2)]
        for gold, first, second in trios:
            matrices[0][gold][first] += 1
            matrices[1][gold][second] += 1
        found.append(
            {
                "from": before.phase,
                "to": after.phase,
                "set": name,
                "inputs": len(common),
                "labels": list(order),
                "before": matrices[0],
                "after": matrices[1],
                "pairs": _pairs(trios, order, matrices),
                "flows": _flows(trios, order),
            }
        )
    for rows in (
        [row for one in found for row in one["pairs"]],
        [row for one in found for row in one["flows"]],
    ):
        _correct(rows)
    for one in found:
        for row in one["pairs"]:
            corrected = row["p_holm"]
            row["alarm"] = corrected is not None and corrected < ALARM and row["came"] > row["went"]
    return found


def _pairs(
    trios: Sequence[tuple[int, int, int]], order: Sequence[str], matrices: Sequence[Sequence[Sequence[int]]]
) -> list[dict[str, Any]]:
    rows = []
    for gold, label in enumerate(order):
        for said, other in enumerate(order):
            came = sum(g == gold and first != said and second == said for g, first, second in trios)
            went = sum(g == gold and first == said and second != said for g, first, second in trios)
            counts = [matrix[gold][said] for matrix in matrices]
            if gold == said or not (came or went):
                continue
            rows.append(
                {"gold": label, "read as": other, "before": counts[0], "after": counts[1], "came": came,
                 "went": went, "p": mcnemar_p(came, went)}
            )  # fmt: skip
    return rows


def _flows(trios: Sequence[tuple[int, int, int]], order: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for one, label in enumerate(order):
        for other in range(one + 1, len(order)):
            there = sum((first, second) == (one, other) for _, first, second in trios)
            back = sum((first, second) == (other, one) for _, first, second in trios)
            if there or back:
                names = (label, order[other]) if there >= back else (order[other], label)
                rows.append(
                    {"out of": names[0], "into": names[1], "moved": max(there, back),
                     "back": min(there, back), "p": mcnemar_p(there, back)}
                )  # fmt: skip
    return rows


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    ways = [("came", "went") if "came" in row else ("moved", "back") for row in rows]
    family = [row for row, (one, other) in zip(rows, ways, strict=True) if row[one] + row[other] >= LEAST]
    for row in rows:
        row["p_holm"] = None
    for row, value in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = value

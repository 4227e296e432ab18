"""Are two systems different? Scores with intervals and paired tests, from the predictions of evaluations.

    python -m selfemo_jax.study compare RUN_A RUN_B [RUN ...] [--split SPLIT] [--out DIR]

A system is a run, a folder that `selfemo_jax.evaluate` wrote, or a predictions file, whose name or ids say
its split; all are of one split. Each further one is compared with the first on the inputs that both answered:
accuracy by McNemar's exact test, scores by a paired bootstrap over dialogues. Holm's correction is over all
comparisons and data sets of the table, for each kind of test; the row over all sets and those of parts of a
set (shared, clean) stand outside that family. With fewer than ten dialogues in a set there is no interval and
no p of the bootstrap, and the tables say so.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.study import showing
from selfemo_jax.study.reading import Predictions, by_part, joined_notes, read_predictions, short_names
from selfemo_jax.study.significance import (
    FEW,
    MIN_DIALOGUES,
    NUM_SAMPLES,
    SCORES,
    Estimate,
    dialogue_counts,
    difference,
    estimate,
    holm,
    mcnemar_exact,
)

ALL_SETS = "mean of sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study compare``."""
    words = "run, evaluation's folder or predictions file; the first is what the others are compared with"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=words)
    words = "split whose predictions are compared; default: of folders test, of a file its own"
    parser.add_argument("--split", help=words)
    parser.add_argument("--names", nargs="+", help="names for the table; default: of the folders")
    parser.add_argument("--lenient", action="store_true", help="the forgiving reading of answers")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="bootstrap samples")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the first run")


def main(args: argparse.Namespace) -> int:
    """Print both tables, write ``compare.json``, ``compare.md`` and ``compare.png``."""
    if len(args.runs) < 2:
        raise ValueError("compare: name two or more runs; for one, selfemo_jax.report shows its intervals")
    if args.names and len(args.names) != len(args.runs):
        raise ValueError(f"--names has {len(args.names)} names for {len(args.runs)} runs")
    if args.samples < 100:
        raise ValueError(f"--samples is {args.samples}; expected 100 or more")
    names = args.names or short_names(args.runs)
    label = "lenient" if args.lenient else "prediction"
    systems = [
        read_predictions(source, split=args.split, name=name, label=label)
        for source, name in zip(args.runs, names, strict=True)
    ]
    split = one_split(systems)
    note = joined_notes([system.note for system in systems])
    whole = score_rows(systems, num=args.samples)
    parts = [by_part(system) for system in systems]
    scores = [*whole, *score_rows(parts, num=args.samples, mean=False)]
    tests = test_rows(systems, parts, num=args.samples)
    folder = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or folder / "study"
    reading = "lenient" if args.lenient else "strict"
    titles = (
        showing.titled(f"{split}, {reading}: scores in percent, 95 % intervals over dialogues", note),
        showing.titled(f"each against {names[0]}: differences in points, p and Holm's correction", note),
    )
    for title, rows in zip(titles, (scores, tests), strict=True):
        showing.print_table(title, rows)
    remark = FEW if any(row["dialogues"] < MIN_DIALOGUES for row in (*scores, *tests)) else ""
    if remark:
        print(remark)
    content = {"note": note, "split": split, "reading": reading, "bootstrap_samples": args.samples}
    content["remark"] = remark
    showing.write_json(out / "compare.json", {**content, "scores": scores, "significance": tests})
    pages = [showing.markdown(title, rows) for title, rows in zip(titles, (scores, tests), strict=True)]
    showing.atomic_write(out / "compare.md", "\n".join([*pages, *([f"{remark}\n"] if remark else [])]))
    draw_scores(out / "compare.png", whole, title=titles[0])
    print(f"written: {out}/compare.json, .md, .png")
    return 0


def one_split(systems: Sequence[Predictions]) -> str:
    """The split of all systems; ValueError where they answered different ones."""
    for other in systems[1:]:
        if other.split != systems[0].split:
            raise ValueError(
                f"{other.name} answered the {other.split} split and {systems[0].name} the "
                f"{systems[0].split} split: compare answers to one split (--split names that of folders)"
            )
    return systems[0].split


def score_rows(systems: Sequence[Predictions], *, num: int, mean: bool = True) -> list[dict[str, Any]]:
    """One row for each system and data set: scores with intervals; and with ``mean`` one over its sets."""
    rows = []
    for system in systems:
        counts = {
            name: [dialogue_counts(list(lines.values()), system.labels[name])]
            for name, lines in sorted(system.sets.items())
        }
        parts = [(name, [runs]) for name, runs in counts.items()]
        if mean and len(counts) > 1:
            parts.append((ALL_SETS, list(counts.values())))
        for name, sets in parts:
            row: dict[str, Any] = {"run": system.name, "set": name}
            row["n"] = int(sum(runs[0].sum() for runs in sets))
            row["dialogues"] = sum(len(runs[0]) for runs in sets)
            for score, function in SCORES.items():
                found = estimate(sets, function, num=num)
                row[score] = percent(found.value)
                row[f"{score} ci"] = percent_bounds(found)
            rows.append(row)
    return rows


def test_rows(
    systems: Sequence[Predictions], parts_of: Sequence[Predictions], *, num: int
) -> list[dict[str, Any]]:
    """One row for each further system and data set, against the first, then for each part of a set; Holm's
    correction is over the former. ``parts_of`` are the systems by part."""
    rows: list[dict[str, Any]] = []
    for other in systems[1:]:
        pairs = {name: common(systems[0], other, name) for name in sorted(systems[0].sets)}
        pairs = {name: pair for name, pair in pairs.items() if pair is not None}
        if not pairs:
            raise ValueError(
                f"{other.name} and {systems[0].name} answered no input in common: evaluate both on the same "
                "data"
            )
        parts = [([name], name) for name in pairs]
        if len(pairs) > 1:
            parts.append((list(pairs), ALL_SETS))
        for names, shown in parts:
            rows.append({"run": other.name, "set": shown} | _test([pairs[name] for name in names], num=num))
    single = [row for row in rows if row["set"] != ALL_SETS]
    for family in ("p_mcnemar", "p_bootstrap"):
        for row, p in zip(single, holm([row[family] for row in single]), strict=True):
            row[f"{family}_holm"] = p
    for other in parts_of[1:]:
        for name in parts_of[0].sets:
            if (pair := common(parts_of[0], other, name)) is not None:
                rows.append({"run": other.name, "set": name} | _test([pair], num=num))
    order = ["run", "set", "n", "dialogues", "difference accuracy", "difference accuracy ci", "won", "lost"]
    order += ["p_mcnemar", "p_mcnemar_holm", "difference w-F1", "difference w-F1 ci"]
    order += ["p_bootstrap", "p_bootstrap_holm"]
    return [{name: row.get(name) for name in order} for row in rows]


Pair = tuple[list[Any], list[Any], tuple[str, ...]]
"""Lines of both systems on the same inputs, and the labels."""


def common(first: Predictions, second: Predictions, name: str) -> Pair | None:
    """Both systems' lines on the inputs of a set that both answered; None without any."""
    here, there = first.sets[name], second.sets.get(name, {})
    ids = [key for key in here if key in there]
    for key in ids:
        if here[key]["gold"] != there[key]["gold"]:
            raise ValueError(
                f"{key}: gold {here[key]['gold']} in {first.name} and {there[key]['gold']} in {second.name}; "
                "the two were scored on different data"
            )
    labels = tuple(dict.fromkeys((*first.labels[name], *second.labels.get(name, ()))))
    return ([here[key] for key in ids], [there[key] for key in ids], labels) if ids else None


def _test(pairs: Sequence[Pair], *, num: int) -> dict[str, Any]:
    first = [[dialogue_counts(here, labels)] for here, _, labels in pairs]
    second = [[dialogue_counts(there, labels)] for _, there, labels in pairs]
    sides = (
        [line for here, _, _ in pairs for line in here],
        [line for _, there, _ in pairs for line in there],
    )
    right = [[line["prediction"] == line["gold"] for line in lines] for lines in sides]
    won, lost, p = mcnemar_exact(*right)
    gaps = {name: difference(first, second, SCORES[name], num=num) for name in ("accuracy", "weighted_f1")}
    row: dict[str, Any] = {"n": len(right[0]), "dialogues": sum(len(runs[0]) for runs in first)}
    for name, shown in (("accuracy", "accuracy"), ("weighted_f1", "w-F1")):
        row[f"difference {shown}"] = percent(gaps[name].value)
        row[f"difference {shown} ci"] = percent_bounds(gaps[name])
    return row | {"won": won, "lost": lost, "p_mcnemar": p, "p_bootstrap": gaps["weighted_f1"].p}


def percent(value: float) -> float:
    """A share as percent with four digits behind the point."""
    return round(100 * value, 4)


def percent_bounds(found: Estimate) -> list[float] | None:
    """Both ends of an interval as percent; None where there is none."""
    return [percent(bound) for bound in found.interval] if found.interval else None


def draw_scores(path: Path, rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Accuracy and weighted F1 of each system with their intervals, a group of points for each set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = showing.new_figure(10, 4)
    figure.suptitle(title, fontsize="small")
    for axes, score in zip(figure.subplots(1, 2), ("accuracy", "weighted_f1"), strict=True):
        for place, run in enumerate(runs):
            mine = [row for row in rows if row["run"] == run]
            x = [sets.index(row["set"]) + 0.6 * (place + 0.5) / len(runs) - 0.3 for row in mine]
            y = [row[score] for row in mine]
            bounds = [row[f"{score} ci"] or [row[score]] * 2 for row in mine]
            low = [max(0.0, value - bound[0]) for value, bound in zip(y, bounds, strict=True)]
            high = [max(0.0, bound[1] - value) for value, bound in zip(y, bounds, strict=True)]
            axes.errorbar(x, y, yerr=[low, high], fmt="o", capsize=3, label=run)
        axes.set(title=score.replace("_", " "), ylabel="percent")
        axes.set_xticks(range(len(sets)), sets, rotation=20, ha="right")
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize="small", frameon=False)
    showing.save_figure(figure, path)

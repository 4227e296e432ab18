"""Confusion by iteration: which labels are taken for each other more often from phase to phase.

    python -m selfemo_jax.study confusions RUN [--phases rl_1 rl_final] [--out DIR]

Self-play declares the gold of its own inputs, so a confusion that is consistent may be reinforced (sad and
frustrated). Every phase leaves its answers to the dev subset, whose labels are human, and whose inputs are
the same each time. From one phase to the next are told: the change of the confusion matrix; for each pair,
gold one read as the other, how many such answers came and went, with an exact McNemar test; and the flow,
answers that moved from one label to another and back whatever the gold, with the same test for a flow that
goes one way. Holm's correction is over all pairs of all data sets of a step between phases. A pair whose
confusion grew at a corrected p below 0.05 is an alarm. The tests take inputs for independent, which those of
one dialogue hardly are.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.reporting.flows import (
    DEV_ANSWERS,
    PhaseAnswers,
    changes,
    label_lists,
    phase_answers,
    steps_between,
)
from selfemo_jax.study import showing
from selfemo_jax.study.reading import run_note

MOST = 12
"""Rows of a printed table; the files hold all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study confusions``."""
    parser.add_argument("run", type=Path, help="folder of a run with its phases")
    words = "phases that are compared, each with the one after it; default: all that were scored"
    parser.add_argument("--phases", nargs="+", help=words)
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the run")


def main(args: argparse.Namespace) -> int:
    """Print alarms and tables, write ``confusions.json`` and ``confusions.png``."""
    phases, labels = read_phases(args.run, args.phases)
    found = [change for before, after in steps_between(phases) for change in changes(before, after, labels)]
    if not found:
        raise ValueError(f"{args.run}: its phases answered no common dev input")
    note = run_note(args.run)
    pairs, flows = rows_of(found, "pairs"), rows_of(found, "flows")
    alarms = alarm_lines(found)
    titles = (
        showing.titled("confusions that changed most, dev subset", note),
        showing.titled("flow of answers from label to label, dev subset", note),
    )
    for title, rows in zip(titles, (pairs, flows), strict=True):
        if rows:
            showing.print_table(title, rows[:MOST])
        else:
            print(f"{title}: none")
        if len(rows) > MOST:
            print(f"{len(rows) - MOST} more rows are in confusions.json")
    for line in alarms or ["no confusion grew more than by chance"]:
        print(line)
    out = args.out or args.run / "study"
    content = {"note": note, "alarms": "; ".join(alarms), "pairs": pairs, "flows": flows}
    kept = ("from", "to", "set", "inputs", "labels", "before", "after")
    matrices = [{name: one[name] for name in kept} for one in found]
    showing.write_json(out / "confusions.json", {**content, "matrices": matrices})
    draw(out / "confusions.png", found, note=note)
    print(f"written: {out}/confusions.json, .png")
    return 0


def read_phases(
    run_dir: Path, names: Sequence[str] | None
) -> tuple[list[PhaseAnswers], dict[str, list[str]]]:
    """The phases that are compared, in the run's order, and the label list of each data set."""
    notices: list[str] = []
    phases = phase_answers(run_dir, notices)
    if notices:
        raise ValueError(f"{run_dir}: {notices[0]}; the run wrote it, it is damaged")
    known = [one.phase for one in phases]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"--phases {' '.join(unknown)}: {run_dir} has {', '.join(known) or 'none'}")
    chosen = [one for one in phases if not names or one.phase in names]
    if len(chosen) < 2:
        raise ValueError(
            f"{run_dir}: {len(chosen)} of its finished phases left {DEV_ANSWERS}, a change needs two; a run "
            "with a dev split writes it when it scores at the end of a phase"
        )
    labels = label_lists(run_dir, chosen, notices)
    if notices:
        raise ValueError(f"{run_dir}: {notices[0]}")
    return chosen, labels


def rows_of(found: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The ``pairs`` or ``flows`` of all changes, the smallest p first."""
    rows = [
        {"from": one["from"], "to": one["to"], "set": one["set"]} | row for one in found for row in one[kind]
    ]
    ways = ("came", "went") if kind == "pairs" else ("moved", "back")
    return sorted(rows, key=lambda row: (row["p"], -row[ways[0]] - row[ways[1]]))


def alarm_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each confusion that grew beyond chance."""
    return [
        f"alarm: {one['set']}, {one['from']} to {one['to']}: {row['gold']} read as {row['read as']} "
        f"{row['before']} -> {row['after']} ({row['came']} came, {row['went']} went, Holm's p "
        f"{row['p_holm']:.4f})"
        for one in found
        for row in one["pairs"]
        if row["alarm"]
    ]


def draw(path: Path, found: Sequence[Mapping[str, Any]], *, note: str) -> None:
    """The change of each confusion in percent of its row: a row of panels for each step between phases."""
    steps = list(dict.fromkeys((one["from"], one["to"]) for one in found))
    sets = list(dict.fromkeys(one["set"] for one in found))
    figure = showing.new_figure(4.2 * len(sets), 0.4 + 3.9 * len(steps))
    title = "change of the confusion on dev, percent of the gold label's inputs"
    figure.suptitle(showing.titled(title, note), fontsize="small", wrap=True)
    panels = figure.subplots(len(steps), len(sets), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for one in found:
        axes = panels[steps.index((one["from"], one["to"]))][sets.index(one["set"])]
        axes.set_axis_on()
        before, after = np.array(one["before"], float), np.array(one["after"], float)
        share = 100 * (after - before) / np.maximum(before.sum(axis=1, keepdims=True), 1)
        most = max(1.0, float(np.abs(share).max()))
        axes.imshow(share, cmap="PuOr_r", vmin=-most, vmax=most)
        for (row, column), value in np.ndenumerate(after - before):
            if value:
                ink = "white" if abs(share[row, column]) > 0.6 * most else "black"
                axes.text(column, row, f"{value:+.0f}", ha="center", va="center", fontsize=7, color=ink)
        heads = [*one["labels"], "none"]
        axes.set_xticks(range(len(heads)), heads, rotation=90, fontsize=7)
        axes.set_yticks(range(len(one["labels"])), one["labels"], fontsize=7)
        axes.set_title(f"{one['set']}: {one['from']} to {one['to']}", fontsize=8)
    showing.save_figure(figure, path)

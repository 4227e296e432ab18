"""Mean reward by persona cluster (Table 3), with intervals over dialogues and numbers.

    python -m selfemo_jax.study personas SYSTEM [SYSTEM ...] [--clusters DIR] [--answers KIND] [--out DIR]

A system is a run, or the folder of an evaluation of any checkpoint or endpoint. Each answer belongs to the
persona of its responder; `study clusters` says which cluster that persona is in (``persona_clusters.jsonl``,
of the first system unless ``--clusters`` names a folder). Of a run that recorded rollouts those of its last
RL steps are read, over training inputs; else what `selfemo_jax.evaluate` wrote: with ``--samples N`` groups
of N answers, otherwise one greedy answer to each input. For those the clusters must hold the personas of that
split (`study clusters --splits test`). r1 is the weighted IoU of an answer; R, the whole reward with the
consensus, is of groups alone: both are named, each in its own column, and systems whose answers were drawn in
different ways are said to be so. Answers of a dialogue are not independent: the intervals draw dialogues, and
there are none with fewer than ten. The clusters of the table are chosen once for all systems, so that their
averages are over the same ones: those with the most personas in the clustering, as the paper counts them,
among those that every system answered for (systems without any clustered answer aside). Answers whose
responder has no persona, or one of no cluster, are counted apart.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.study import showing
from selfemo_jax.study.compare import percent, percent_bounds
from selfemo_jax.study.earned import (
    KINDS,
    NOISE,
    UNKNOWN,
    Clusters,
    Earned,
    System,
    read_clusters,
    read_system,
)
from selfemo_jax.study.reading import joined_notes, short_names
from selfemo_jax.study.significance import FEW, NUM_SAMPLES, estimate, mean_of_sums, sums_by_dialogue

OTHER = {NOISE: "in no cluster", UNKNOWN: "responder without a clustered persona"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study personas``."""
    words = "folder of a run, or of an evaluation, or a file of its answers"
    parser.add_argument("runs", nargs="+", type=Path, metavar="SYSTEM", help=words)
    words = "folder of `study clusters`; default: study/ in the first system"
    parser.add_argument("--clusters", type=Path, help=words)
    words = "which answers are read; default: the first of these that a system has"
    parser.add_argument("--answers", choices=KINDS, help=words)
    parser.add_argument("--split", default="test", help="split of evaluations")
    parser.add_argument("--last", type=int, default=20, help="RL steps at the end of a run that count")
    parser.add_argument("--most", type=int, default=5, help="clusters of the table, by number of personas")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="bootstrap samples")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the first system")


def main(args: argparse.Namespace) -> int:
    """Print the table, write ``persona_rewards.json``, ``.md`` and ``.png``."""
    if args.last < 1 or args.most < 1:
        raise ValueError(f"--last {args.last} and --most {args.most}: expected 1 or more")
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    clusters = read_clusters(args.clusters or first / "study")
    systems = [
        read_system(source, clusters, name=name, kind=args.answers, split=args.split, last=args.last)
        for source, name in zip(args.runs, short_names(args.runs), strict=True)
    ]
    chosen = chosen_clusters(systems, clusters, most=args.most)
    rows = [
        {"run": system.name} | row
        for system in systems
        for row in cluster_rows(system.earned, clusters, chosen, num=args.samples)
    ]
    names = ", ".join(clusters.names.get(c, str(c)) for c in chosen) or "none"
    told = [f"clusters with the most personas among those that every system answered for: {names}"]
    told += remarks(systems)
    if any(row.get("r1 ci", ()) is None for row in rows):
        told.append(FEW)
    note = joined_notes([system.note for system in systems])
    kinds = list(dict.fromkeys(system.answers for system in systems))
    title = showing.titled(
        f"mean reward and accuracy in percent by the responder's persona cluster: {'; '.join(kinds)}", note
    )
    showing.print_table(title, rows)
    averaged = [
        {"run": system.name, "answers": system.answers, "r1": "weighted IoU of each answer",
         "R": system.reward or None}
        for system in systems
    ]  # fmt: skip
    showing.print_table("what is averaged", averaged)
    for line in told:
        print(line)
    out = args.out or first / "study"
    content = {"note": note, "remarks": "; ".join(told), "averaged": averaged, "clusters": rows}
    showing.write_json(out / "persona_rewards.json", content)
    text = showing.markdown(title, rows) + "\n" + showing.markdown("what is averaged", averaged)
    showing.atomic_write(out / "persona_rewards.md", text)
    draw(out / "persona_rewards.png", rows, title=title)
    print(f"written: {out}/persona_rewards.json, .md, .png")
    return 0


def remarks(systems: Sequence[System]) -> list[str]:
    """What a reader of the table must know: systems that do not compare, personas that were not told, answers
    without a cluster."""
    told = [
        f"{system.name}: it was not told the personas "
        f"({'data.persona is false' if system.kind == 'rollouts' else 'eval.persona is none'})"
        for system in systems
        if not system.told
    ]
    told += [
        f"{system.name}: no responder has a clustered persona; `study clusters --splits {system.split}` "
        f"clusters those of its inputs"
        for system in systems
        if all(one.cluster == UNKNOWN for one in system.earned)
    ]
    if len({system.answers for system in systems}) > 1:
        words = "; ".join(f"{system.name}: {system.answers}" for system in systems)
        told.append(f"these rows do not compare, their answers differ ({words}); --answers names one kind")
    elif len({system.reward for system in systems}) > 1:
        told.append("R does not compare, its settings differ (see what is averaged); r1 does")
    return told


def chosen_clusters(systems: Sequence[System], clusters: Clusters, *, most: int) -> list[int]:
    """The clusters of the table: at most ``most`` of those that every system answered for, systems without
    any clustered answer aside, by number of personas in the clustering."""
    answered = [{one.cluster for one in system.earned if one.cluster >= 0} for system in systems]
    known = [found for found in answered if found]
    common = set.intersection(*known) if known else set()
    personas = Counter(clusters.of_persona.values())
    return sorted(common, key=lambda c: (-personas[c], c))[:most]


def cluster_rows(
    earned: Sequence[Earned], clusters: Clusters, chosen: Sequence[int], *, num: int
) -> list[dict[str, Any]]:
    """One row for each of the chosen clusters, for their mean (each counting once, as the paper's average),
    for the other clusters, for noise, and for all answers together."""
    by_cluster: dict[int, list[Earned]] = {}
    for one in earned:
        by_cluster.setdefault(one.cluster, []).append(one)
    mine = [c for c in chosen if c in by_cluster]
    rows = [_row(clusters.names.get(c, str(c)), by_cluster[c], num=num) for c in mine]
    if rows:
        rows.append(_mean_row([by_cluster[c] for c in mine], rows, num=num))
    others = [c for c in sorted(by_cluster) if c >= 0 and c not in mine]
    if others:
        rows.append(
            _row(f"{len(others)} other clusters", [one for c in others for one in by_cluster[c]], num=num)
        )
    rows += [_row(OTHER[c], by_cluster[c], num=num) for c in (NOISE, UNKNOWN) if c in by_cluster]
    return [*rows, _row("all answers", earned, num=num)]


def _row(name: str, earned: Sequence[Earned], *, num: int) -> dict[str, Any]:
    ids = [f"{one.root}/0" for one in earned]
    row: dict[str, Any] = {"cluster": name, "answers": len(earned), "dialogues": len(set(ids))}
    for key, values in _averaged(earned).items():
        found = estimate([[sums_by_dialogue(values, ids)]], mean_of_sums, num=num)
        row[key] = percent(found.value)
        row[f"{key} ci"] = percent_bounds(found)
    return row


def _mean_row(
    groups: Sequence[Sequence[Earned]], rows: Sequence[Mapping[str, Any]], *, num: int
) -> dict[str, Any]:
    """The mean over clusters, whose dialogues are drawn together; an interval where each cluster has one."""
    earned = [one for group in groups for one in group]
    places = [place for place, group in enumerate(groups) for _ in group]
    ids = [f"{one.root}/0" for one in earned]
    row: dict[str, Any] = {"cluster": f"mean of these {len(groups)}", "answers": len(earned)}
    row["dialogues"] = len(set(ids))
    for key, values in _averaged(earned).items():
        found = estimate([[sums_by_dialogue(values, ids, places)]], mean_of_sums, num=num)
        row[key] = percent(found.value)
        row[f"{key} ci"] = percent_bounds(found) if all(one[f"{key} ci"] for one in rows) else None
    return row


def _averaged(earned: Sequence[Earned]) -> dict[str, list[float]]:
    """The values behind each column; R only where every answer has one."""
    found: dict[str, list[float]] = {
        "r1": [one.r1 for one in earned],
        "accuracy": [float(one.right) for one in earned],
    }
    totals = [one.total for one in earned if one.total is not None]
    return found | ({"R": totals} if len(totals) == len(earned) else {})


def draw(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """r1 of each row with its interval, one colour a run; where there are groups, R in a panel of its own."""
    scores = [score for score in ("r1", "R") if any(score in row for row in rows)]
    figure = showing.new_figure(9, 1 + 0.35 * len(rows))
    figure.suptitle(title, fontsize="small", wrap=True)
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for axes, score in zip(
        figure.subplots(1, len(scores), sharey=True, squeeze=False)[0], scores, strict=True
    ):
        for place, row in enumerate(rows):
            if score not in row:
                continue
            low, high = row.get(f"{score} ci") or (row[score], row[score])
            error = [[max(0.0, row[score] - low)], [max(0.0, high - row[score])]]
            colour = f"C{runs.index(row['run'])}"
            axes.errorbar(row[score], place, xerr=error, fmt="o", capsize=3, color=colour)
        axes.set(xlabel=f"mean {score}, percent")
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), [_short(row, runs) for row in rows], fontsize="small")
        axes.set_ylim(len(rows) - 0.5, -0.5)
    showing.save_figure(figure, path)


def _short(row: Mapping[str, Any], runs: Sequence[str]) -> str:
    name = row["cluster"] if len(row["cluster"]) < 48 else row["cluster"][:45] + "..."
    return f"{name} ({row['answers']})" if len(runs) == 1 else f"{row['run']}: {name} ({row['answers']})"

"""Rollouts of a run to look at: the best, the worst, those that disagree, those outside the grammar.

    python -m selfemo_jax.browse RUN [--step last] [--show best] [--num 5] [filters]
    python -m selfemo_jax.browse RUN --step first --against last

A step is a global step, `first`, `last`, or a phase's name for its last step. `--against` takes another step,
another run, or RUN:STEP, and compares the two, input by input where both answered the same. Filters apply to
both sides. `--json` prints the chosen rollouts as JSON lines.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfemo_jax.rollout.records import FOLDER, step_file
from selfemo_jax.run_note import joined_notes, run_note
from selfemo_jax.selfplay.show import PALETTE, plain, said, weights

KINDS = ("best", "worst", "disagreeing", "malformed")
Rollout = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An input of a step and its rollouts."""

    history: tuple[tuple[str, str], ...]
    rollouts: tuple[Rollout, ...]

    @property
    def sample_id(self) -> str:
        """The input's id."""
        return self.rollouts[0]["sample_id"]

    @property
    def mean_r1(self) -> float:
        """Mean primary reward of the group."""
        return sum(rollout["r1"] for rollout in self.rollouts) / len(self.rollouts)

    @property
    def disagreement(self) -> float:
        """Share of the rollouts whose heaviest emotion is not the group's most frequent one; malformed
        answers are a class of their own."""
        counts = Counter(label_of(rollout) for rollout in self.rollouts)
        return 1 - max(counts.values()) / len(self.rollouts)


def main(argv: Sequence[str] | None = None) -> int:
    """Browse; returns the exit status."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        if arguments.num < 1:
            raise ValueError(f"--num is {arguments.num}; expected 1 or more")
        run = Path(arguments.run)
        step, note = find_step(run, arguments.step), run_note(run)
        groups = chosen(load_step(run, step), arguments, where=f"{run}, step {step}")
        if arguments.against is not None:
            other_run, other_step = _other(run, arguments.against)
            where = f"{other_run}, step {other_step}"
            others = chosen(load_step(other_run, other_step), arguments, where=where)
            names = (f"{run.name}:{step}", f"{other_run.name}:{other_step}")
            if note := joined_notes([note, run_note(other_run)]):
                console.print(note, markup=False, soft_wrap=True)
            compare(groups, others, names, console, num=arguments.num)
            return 0
        shown = pick(groups, arguments.show, arguments.num, code=arguments.code)
        if arguments.json:
            for _, rollouts in shown:
                for rollout in rollouts:
                    print(json.dumps({"note": note, **rollout} if note else rollout, ensure_ascii=False))
            return 0
        if note:
            console.print(note, markup=False, soft_wrap=True)
        console.print(summary([groups], [f"{run.name}:{step}"]))
        for group, rollouts in shown:
            show_group(group, rollouts, console)
        if not shown:
            console.print(f"no rollouts to show as {arguments.show}", markup=False)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_step(run: Path, words: str) -> int:
    """The global step that ``words`` mean; ValueError names the steps that have rollouts."""
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; expected a run's")
    steps = sorted(int(path.stem.removeprefix("step_")) for path in (run / FOLDER).glob("step_*.jsonl"))
    if not steps:
        raise ValueError(f"{run}: no rollouts in {run / FOLDER}; expected the folder of a run that sampled")
    if words in ("first", "last"):
        return steps[0 if words == "first" else -1]
    phases: dict[str, list[int]] = {}
    for line in _lines(run / "metrics.jsonl"):
        if line["step"] in set(steps):
            phases.setdefault(line["phase"], []).append(line["step"])
    if words in phases:
        return phases[words][-1]
    if words.isdigit() and int(words) in steps:
        return int(words)
    there = "; ".join(f"{name}: {found[0]} to {found[-1]}" for name, found in phases.items())
    raise ValueError(
        f"--step {words}: {run} has no rollouts of it; expected first, last, a phase or one of its steps "
        f"({there or f'{steps[0]} to {steps[-1]}'})"
    )


def load_step(run: Path, step: int) -> list[Answers]:
    """The groups of a step in the order of the batch."""
    groups: list[list[Rollout]] = []
    for line in _lines(step_file(run, step, "jsonl")):
        if line["idx"] == 0:
            groups.append([])
        groups[-1].append(line)
    return [
        Answers(
            history=tuple((speaker, text) for speaker, text in group[0]["history"] or ()),
            rollouts=tuple(group),
        )
        for group in groups
    ]


def chosen(groups: Sequence[Answers], arguments: argparse.Namespace, *, where: str) -> list[Answers]:
    """The groups that the filters leave: those of an input as a whole, those of an answer where any answer
    fits. ValueError where none is left."""

    def fits(group: Answers) -> bool:
        first = group.rollouts[0]
        whole = {
            "set": arguments.set in (None, first["dataset"]),
            "origin": arguments.origin in (None, first["origin"]),
            "gold": arguments.gold in (None, heaviest(first["gold"])),
            "id": arguments.id is None or arguments.id in first["sample_id"],
        }
        said_so = arguments.text is None or any(
            arguments.text.lower() in text.lower()
            for text in (*(rollout["text"] for rollout in group.rollouts), *(t for _, t in group.history))
        )
        labels = {label_of(rollout) for rollout in group.rollouts}
        codes = {code for rollout in group.rollouts for code in rollout["parse"]["codes"]}
        return (
            all(whole.values())
            and said_so
            and arguments.label in (None, *labels)
            and arguments.code in (None, *codes)
        )

    found = [group for group in groups if fits(group)]
    if not found:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        there = {name: sorted({r[name] for r in rollouts}) for name in ("dataset", "origin")}
        raise ValueError(
            f"{where}: none of its {len(groups)} inputs passes the filters; it holds sets "
            f"{', '.join(there['dataset'])}, origins {', '.join(there['origin'])}"
        )
    return found


def pick(
    groups: Sequence[Answers], kind: str, num: int, *, code: str | None = None
) -> list[tuple[Answers, list[Rollout]]]:
    """``num`` groups of a kind, each with the rollouts that show it.

    best: the answer with the highest reward R; worst: the valid one with the lowest; disagreeing: all answers
    of the group; malformed: the answers outside the grammar, with ``code`` if it is given. Ties go to the
    earlier input.
    """
    found: list[tuple[float, Answers, list[Rollout]]] = []
    for group in groups:
        valid = [rollout for rollout in group.rollouts if rollout["parse"]["valid"]]
        if kind == "best" and valid:
            best = max(valid, key=lambda rollout: rollout["R"])
            found.append((-best["R"], group, [best]))
        elif kind == "worst" and valid:
            worst = min(valid, key=lambda rollout: rollout["R"])
            found.append((worst["R"], group, [worst]))
        elif kind == "disagreeing" and group.disagreement > 0:
            found.append((-group.disagreement, group, list(group.rollouts)))
        elif kind == "malformed" and len(valid) < len(group.rollouts):
            wrong = [rollout for rollout in group.rollouts if not rollout["parse"]["valid"]]
            wrong = [rollout for rollout in wrong if code is None or code in rollout["parse"]["codes"]]
            found += [(-len(wrong), group, wrong)] if wrong else []
    found.sort(key=lambda item: item[0])
    return [(group, rollouts) for _, group, rollouts in found[:num]]


def compare(
    left: Sequence[Answers], right: Sequence[Answers], names: Sequence[str], console: Console, *, num: int
) -> None:
    """Print both sides' numbers, then the shared inputs whose mean r1 differs most, with the best answer of
    each."""
    console.print(summary([left, right], names))
    others = {group.sample_id: group for group in right}
    pairs = [(group, others[group.sample_id]) for group in left if group.sample_id in others]
    if not pairs:
        console.print("no input was answered on both sides")
        return
    pairs.sort(key=lambda pair: -abs(pair[1].mean_r1 - pair[0].mean_r1))
    console.print(f"{len(pairs)} inputs were answered on both sides; those that differ most:")
    for one, other in pairs[:num]:
        _show_history(one, console)
        for name, group in zip(names, (one, other), strict=True):
            best = max(group.rollouts, key=lambda rollout: rollout["R"])
            console.print(f"  {name}: mean r1 {group.mean_r1:.2f}", markup=False)
            console.print(_answer(best))


def summary(sides: Sequence[Sequence[Answers]], names: Sequence[str]) -> Table:
    """A column for each side: counts, rewards, codes, labels, replies."""
    table = Table(title_justify="left")
    table.add_column("rollouts")
    for name in names:
        table.add_column(name)
    columns = [_numbers(groups) for groups in sides]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


def show_group(group: Answers, rollouts: Sequence[Rollout], console: Console) -> None:
    """Print an input and some of its answers."""
    _show_history(group, console)
    for rollout in rollouts:
        console.print(_answer(rollout))


def label_of(rollout: Rollout) -> str:
    """The heaviest emotion of an answer; ``malformed`` outside the grammar."""
    return heaviest(rollout["parse"]["emotion"]) if rollout["parse"]["valid"] else "malformed"


def heaviest(pairs: dict[str, float]) -> str:
    """The label of the largest weight, the first of equals."""
    return max(pairs, key=lambda label: pairs[label])


def _numbers(groups: Sequence[Answers]) -> dict[str, str]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    num = max(1, len(rollouts))
    valid = [rollout for rollout in rollouts if rollout["parse"]["valid"]]
    codes = Counter(code for rollout in rollouts for code in rollout["parse"]["codes"])
    replies = [rollout["parse"]["response"] for rollout in valid]
    words = sum(len(reply.split()) for reply in replies) / max(1, len(replies))
    return {
        "inputs, rollouts": f"{len(groups)}, {len(rollouts)}",
        "inside the grammar": f"{len(valid) / num:.1%}",
        "mean r1, r2, R": ", ".join(
            f"{sum(r[key] for r in rollouts) / num:.3f}" for key in ("r1", "r2", "R")
        ),
        "mean disagreement": f"{sum(g.disagreement for g in groups) / max(1, len(groups)):.3f}",
        "labels": _counts(label_of(rollout) for rollout in valid),
        "gold": _counts(heaviest(group.rollouts[0]["gold"]) for group in groups),
        "codes": ", ".join(f"{code} {count}" for code, count in codes.most_common(5)) or "-",
        "replies": f"{words:.1f} words, {len(set(replies))} of {len(replies)} distinct",
    }


def _counts(labels: Iterable[str]) -> str:
    return ", ".join(f"{label} {count}" for label, count in Counter(labels).most_common(5)) or "-"


def _show_history(group: Answers, console: Console) -> None:
    first = group.rollouts[0]
    people = dict.fromkeys(speaker for speaker, _ in group.history)
    colours = {speaker: PALETTE[place % len(PALETTE)] for place, speaker in enumerate(people)}
    console.print()
    console.rule(Text(f"{group.sample_id} ({first['origin']})"), align="left")
    for speaker, text in group.history:
        console.print(said(speaker, text, colours))
    console.print(f"  gold {weights(first['gold'])}", markup=False)


def _answer(rollout: Rollout) -> Text:
    read = rollout["parse"]
    numbers = (
        f"r1 {rollout['r1']:.2f}, r2 {rollout['r2']:.2f}, R {rollout['R']:.2f}, A {rollout['advantage']:.2f}"
    )
    if not read["valid"]:
        codes = " ".join(read["codes"])
        return Text.assemble((f"  #{rollout['idx']} {codes}\n", "red"), f"    {rollout['text']!r}")
    return Text.assemble(
        (
            f"  #{rollout['idx']} sees {weights(read['emotion'])}; feels {weights(read['self_emotion'])}; ",
            "dim",
        ),
        (f"{numbers}\n", "dim"),
        f"    {plain(read['response'])}",
    )


def _other(run: Path, words: str) -> tuple[Path, int]:
    """The run and step that `--against` names."""
    path, _, step = words.rpartition(":")
    if Path(words).is_dir():
        return Path(words), find_step(Path(words), "last")
    if path:
        return Path(path), find_step(Path(path), step)
    return run, find_step(run, words)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a run")
    with path.open(encoding="utf-8") as file:
        # The last line of a run that is going on may be half written.
        return [json.loads(line) for line in file if line.endswith("\n") and line.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfemo_jax.browse", description="Look at a run's rollouts.")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--step", default="last", help="a global step, first, last, or a phase's name")
    parser.add_argument("--show", choices=KINDS, default="best", help="what to look for")
    parser.add_argument("--num", type=int, default=5, help="inputs shown at most")
    parser.add_argument("--against", metavar="STEP|RUN|RUN:STEP", help="compare with these rollouts")
    parser.add_argument("--set", help="only inputs of this data set")
    parser.add_argument("--origin", choices=("original", "synthetic"), help="only inputs of this origin")
    parser.add_argument("--gold", help="only inputs whose heaviest gold label is this")
    parser.add_argument("--id", help="only inputs whose id holds these characters")
    parser.add_argument("--text", help="only inputs whose history or answers hold these characters")
    parser.add_argument("--label", help="only inputs of which an answer names this label heaviest")
    parser.add_argument("--code", help="only inputs of which an answer has this code, as E_LENGTH")
    parser.add_argument("--json", action="store_true", help="print the chosen rollouts as JSON lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())

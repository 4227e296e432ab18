"""What the harvests of a run left, held against what a harvest must be.

    python -m selfemo_jax.selfplay stats RUN [--num 10] [--least 300] [--json]

For each harvest: proposed, accepted and rejected by reason, rewards of original and synthetic inputs apart,
labels beside the human ones, replies beside human replies, and ten accepted inputs. A check that fails is
printed as failed, and the exit status is 1.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfemo_jax.appendlog import read_json
from selfemo_jax.data.inputs import Sample
from selfemo_jax.run_note import run_note
from selfemo_jax.selfplay.hygiene import repeats
from selfemo_jax.selfplay.show import plain, said, weights
from selfemo_jax.selfplay.store import read_store

MOST_OF_A_LABEL = 2.0
"""A label's share among training inputs, as a multiple of its human share, at most."""
LEAST_MEDIAN = 4
"""Words of the median reply, at least."""
LEAST_DISTINCT = 0.6
"""distinct-2 of the replies as a share of that of as many human replies, at least."""
MOST_REPEATED = 0.05
"""Share of accepted replies that nearly repeat one accepted before, at most."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something a harvest must be."""

    what: str
    found: str
    expected: str
    passed: bool


def main(argv: Sequence[str]) -> int:
    """Print; 1 when a check failed, 2 for a folder without harvests or a file that cannot be read."""
    arguments = _parser().parse_args(argv)
    try:
        return _show(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _show(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    harvests, note = load_harvests(run), run_note(run)
    rewards = rewards_by_origin(run)
    repeated = repeated_replies(run)
    found = {
        name: checks(report, least=arguments.least, repeated=repeated.get(iteration_of(name)))
        for name, report in harvests.items()
    }
    if arguments.json:
        content = {
            name: {
                "checks": [vars(check) for check in found[name]],
                "report": {key: value for key, value in report.items() if key != "places"},
            }
            for name, report in harvests.items()
        }
        result = {"note": note, "harvests": content, "rewards": rewards}
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        for name, report in harvests.items():
            _print(console, counts_table(name, report), note)
            _print(console, labels_table(name, report), note)
            _print(console, checks_table(name, found[name]), note)
            for sample in some_inputs(run, report, arguments.num):
                show(sample, console)
        _print(console, rewards_table(rewards), note)
    return 0 if all(check.passed for listed in found.values() for check in listed) else 1


def _print(console: Console, table: Table, note: str) -> None:
    """The table under the words that its numbers carry, which its title might break in two."""
    if note:
        console.print(note, markup=False, soft_wrap=True)
    console.print(table)


def load_harvests(run: Path) -> dict[str, dict[str, Any]]:
    """The report of each harvest that ended, by its phase; ValueError where there is none."""
    reports = sorted(run.glob("phases/*/harvest.json"))
    if not reports:
        raise ValueError(
            f"{run}: no phases/*/harvest.json; expected a run's folder whose first harvest has ended "
            "(flywheel.iterations 1 or more)"
        )
    return {path.parent.name: read_json(path) for path in reports}


def iteration_of(name: str) -> int:
    """Of a harvest's phase folder: 1 of ``02_harvest_1``."""
    return int(name.rpartition("_")[2])


def repeated_replies(run: Path) -> dict[int, float]:
    """Iteration -> share of the replies accepted in it that are nearly one accepted before in the run."""
    records = list(read_store(run / "flywheel.jsonl", accepted=True))
    seen: dict[int, list[bool]] = {}
    for record, repeated in zip(records, repeats([record["reply"] for record in records]), strict=True):
        seen.setdefault(record["iteration"], []).append(repeated)
    return {iteration: sum(found) / len(found) for iteration, found in seen.items()}


def checks(report: Mapping[str, Any], *, least: int, repeated: float | None) -> list[Check]:
    """What the accepted inputs of a harvest must be: enough, in balance, talkative, varied, not repeated;
    ``repeated`` is their share in `repeated_replies`, None without any."""
    ratio, replies, human = report["largest_label_ratio"], report["replies"], report["human_replies"]
    relative = replies["distinct_2"] / human["distinct_2"] if human["distinct_2"] else 0.0
    some = replies["num"] > 0
    return [
        Check(
            what="accepted inputs",
            found=f"{report['accepted']} ({report['training']} to train on, {report['heldout']} held out)",
            expected=f"at least {least}",
            passed=report["accepted"] >= least,
        ),
        Check(
            what="largest share of a label against its human share",
            found="a label that no human gave" if ratio is None else f"{ratio:.2f}",
            expected=f"at most {MOST_OF_A_LABEL:g}",
            passed=some and ratio is not None and ratio <= MOST_OF_A_LABEL,
        ),
        Check(
            what="median words of a reply",
            found=f"{replies['median_words']:g} (human {human['median_words']:g})",
            expected=f"at least {LEAST_MEDIAN}",
            passed=replies["median_words"] >= LEAST_MEDIAN,
        ),
        Check(
            what="distinct-2 against as many human replies",
            found=f"{relative:.2f} ({replies['distinct_2']:.3f}, human {human['distinct_2']:.3f})",
            expected=f"at least {LEAST_DISTINCT:g}",
            passed=relative >= LEAST_DISTINCT,
        ),
        Check(
            what="near-duplicates after acceptance",
            found="no reply" if repeated is None else f"{repeated:.1%}",
            expected=f"at most {MOST_REPEATED:.0%}",
            passed=repeated is not None and repeated <= MOST_REPEATED,
        ),
    ]


def rewards_by_origin(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Phase -> original or synthetic -> mean r1, and how many prompts it is over; phases that sampled."""
    sums: dict[str, dict[str, list[float]]] = {}
    path = run / "metrics.jsonl"
    # The last line of a run that is going on may be half written.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for line in map(json.loads, lines):
        for origin in ("original", "synthetic"):
            r1, number = line.get(f"reward/r1/{origin}"), line.get(f"data/{origin}", 0.0)
            if r1 is not None and number:
                total = sums.setdefault(line["phase"], {}).setdefault(origin, [0.0, 0.0])
                total[0] += r1 * number
                total[1] += number
    return {
        phase: {
            origin: {"r1": total / number, "prompts": number} for origin, (total, number) in found.items()
        }
        for phase, found in sums.items()
    }


def some_inputs(run: Path, report: Mapping[str, Any], num: int) -> list[Sample]:
    """Accepted training inputs of a harvest, drawn once and for all."""
    chosen = report["places"]["training"]
    chosen = set(random.Random(0).sample(chosen, min(num, len(chosen))))
    records = read_store(run / "flywheel.jsonl", accepted=True)
    # An iteration's children have ids of their own, so one store may hold all.
    samples = [Sample.from_json(r["sample"]) for r in records if r["sample"]["id"] in chosen]
    return samples[:num]


def counts_table(name: str, report: Mapping[str, Any]) -> Table:
    """Proposed, accepted, rejected by reason, and what became of the accepted."""
    table = Table(title=f"{name}: {report['proposed']} proposed", title_justify="left")
    for column in ("outcome", "inputs", "share"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    rows = {"accepted": report["accepted"]}
    rows |= {f"rejected: {reason}": count for reason, count in report["rejected"].items()}
    for outcome, count in rows.items():
        table.add_row(outcome, str(count), f"{count / max(1, report['proposed']):.1%}")
    table.add_section()
    places = {"to train on": report["training"], "held out": report["heldout"]}
    places |= {f"left out: {reason}": count for reason, count in report["left_out"].items()}
    for place, count in places.items():
        table.add_row(place, str(count), "")
    for depth, counts in report["by_depth"].items():
        table.add_row(f"turn {depth}", f"{counts['accepted']} of {counts['proposed']}", "")
    return table


def labels_table(name: str, report: Mapping[str, Any]) -> Table:
    """Each label's share among humans, before and after the choice of training inputs, and its ratio."""
    table = Table(title=f"{name}: share of each label", title_justify="left")
    columns = ("set", "label", "human", "declared", "accepted", "training", "training / human")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    labels = report["labels"]
    for dataset, human in labels["human"].items():
        for label in sorted(human, key=lambda label: -human[label]):
            shares = [labels[column].get(dataset, {}).get(label, 0.0) for column in columns[2:6]]
            ratio = f"{shares[-1] / shares[0]:.2f}" if shares[0] else "-"
            table.add_row(dataset, label, *(f"{share:.3f}" for share in shares), ratio)
    return table


def checks_table(name: str, found: Sequence[Check]) -> Table:
    """A row for each check, failed ones in red."""
    table = Table(title=f"{name}: checks", title_justify="left")
    for column in ("", "found", "expected", "verdict"):
        table.add_column(column)
    for check in found:
        style = None if check.passed else "bold red"
        table.add_row(
            check.what, check.found, check.expected, "passed" if check.passed else "FAILED", style=style
        )
    return table


def rewards_table(rewards: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Mean r1 of original and synthetic inputs by phase."""
    table = Table(title="mean r1 by origin of the input", title_justify="left")
    for column in ("phase", "original", "prompts", "synthetic", "prompts"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, found in rewards.items():
        cells: list[str] = []
        for origin in ("original", "synthetic"):
            one = found.get(origin)
            cells += [f"{one['r1']:.3f}", f"{one['prompts']:.0f}"] if one else ["-", "0"]
        table.add_row(phase, *cells)
    return table


def show(sample: Sample, console: Console) -> None:
    """An accepted input: the turn that was answered, the reply, its declared gold, who is asked next."""
    console.print()
    console.rule(f"{sample.id} (generated turn {sample.depth})", align="left")
    for speaker, text in sample.history[-3:]:
        console.print(said(speaker, text, {}))
    console.print(f"  gold {weights(sample.gold)}; {plain(sample.responder)} answers next", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfemo_jax.selfplay stats", description="Measure the harvests of a run."
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--num", type=int, default=10, help="accepted inputs to print of each harvest")
    parser.add_argument("--least", type=int, default=300, help="accepted inputs that a harvest must have")
    parser.add_argument("--json", action="store_true", help="print everything but the inputs as JSON")
    return parser

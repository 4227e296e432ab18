"""Arms of an ablation, or baselines: every config of a folder trained with several seeds, and their table
(Table 2, and what Table 1 compares).

    python -m selfemo_jax.study arms --config-dir configs/ablations/tiny --seeds 3
    python -m selfemo_jax.study arms --config-dir configs/baselines/smollm2_135m --only full sft vanilla_grpo

An arm is a file; the reference is ``full.yaml``, in the folder or above it, and the table names the keys in
which an arm differs from it. Runs that are finished are not run again and interrupted ones go on, so the
command may be stopped and given again; runs of other settings in their place are refused. Intervals and
paired tests against the reference are those of `arm_tests`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config_io import read_config
from selfemo_jax.study import showing
from selfemo_jax.study.arm_tests import with_tests
from selfemo_jax.study.same_settings import check_made_by, differences

REFERENCE = "full"
OUTSIDE = ("run_dir", "note", "seed")
"""Settings in which arms may differ without being another method."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    path: Path
    changes: Mapping[str, tuple[Any, Any]]
    """Dotted key -> value in the reference and here; empty for the reference."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run of an arm."""

    scores: Mapping[str, Mapping[str, Any]]
    """Data set -> its scores on the split."""
    synthetic: int
    """Synthetic inputs that the last phase could draw from."""
    note: str
    seconds: float
    """Of all its steps and of the scoring at its end, without the start of the process; those of stopped
    attempts are counted too."""

    def mean(self, metric: str) -> float:
        """Mean over the data sets."""
        return statistics.fmean(result[metric] for result in self.scores.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study arms``."""
    parser.add_argument("--config-dir", type=Path, required=True, help="folder of the arms' configs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, with seeds 0, 1, ...")
    words = "folder of the runs' folder; default: runs/ablations for configs/ablations/NAME, and so on"
    parser.add_argument("--out", type=Path, help=words)
    parser.add_argument("--only", nargs="+", help="names of arms; default: all of the folder")
    parser.add_argument("--split", default="test", help="split of the table")
    parser.add_argument(
        "train_args", nargs="*", help="after --: further settings of every run, as --a.b=value"
    )


def main(args: argparse.Namespace) -> int:
    """Train what is missing, print the table, write it as ``arms.json`` and ``arms.md``."""
    arms = find_arms(args.config_dir)
    if unknown := sorted(set(args.only or ()) - {arm.name for arm in arms}):
        raise ValueError(
            f"--only {' '.join(unknown)}: no such arm in {args.config_dir}; there are "
            f"{', '.join(arm.name for arm in arms)}"
        )
    arms = tuple(arm for arm in arms if not args.only or arm.name in args.only)
    reference = reference_of(args.config_dir)
    folder = folder_of(reference, args.out)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for seed, arm in itertools.product(range(args.seeds), arms):
        check_made_by(run_dir_of(folder, arm, seed), train_words(arm, seed, args.train_args))
    for seed in range(args.seeds):
        for arm in arms:
            run_dir = run_dir_of(folder, arm, seed)
            if outcome_of(run_dir, args.split) is None:
                console.print(f"{arm.name}, seed {seed}: training in {run_dir}", highlight=False)
                train(arm, seed, run_dir, args.train_args, compiled=folder / "compiled")
    outcomes = {
        arm.name: [outcome_of(run_dir_of(folder, arm, seed), args.split) for seed in range(args.seeds)]
        for arm in arms
    }
    rows = table_rows(arms, outcomes)
    runs = {
        arm.name: {
            seed: run_dir_of(folder, arm, seed)
            for seed, outcome in enumerate(outcomes[arm.name])
            if outcome is not None
        }
        for arm in arms
    }
    rows, remark = with_tests(rows, runs, split=args.split, reference=REFERENCE)
    notes = [outcome.note for found in outcomes.values() for outcome in found if outcome is not None]
    note = "; ".join(dict.fromkeys(note for note in notes if note))
    parts = part_rows(outcomes)
    titles = [
        f"accuracy on {what}, {args.seeds} seeds{f' - {note}' if note else ''}"
        for what in (args.split, f"parts of {args.split}")
    ]
    content = {"note": note, "title": titles[0], "reference": str(reference), "remark": remark}
    # A folder of arms below that of the reference has a table of its own beside its runs.
    place = folder / args.config_dir.resolve().relative_to(reference.resolve().parent)
    place.mkdir(parents=True, exist_ok=True)
    atomic_write(place / "arms.json", json.dumps({**content, "arms": rows, "parts": parts}, indent=1) + "\n")
    tables = list(zip(titles, (rows, parts) if parts else (rows,), strict=False))
    atomic_write(place / "arms.md", "\n".join(markdown(title, found) for title, found in tables))
    for title, found in tables:
        console.print(rich_table(title, found))
    console.print(f"reference: {reference}; {remark}", highlight=False, markup=False)
    return 0


def reference_of(folder: Path) -> Path:
    """``full.yaml`` in the folder or in one above it, up to two."""
    candidates = [place / f"{REFERENCE}.yaml" for place in (folder, *folder.resolve().parents[:2])]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"--config-dir {folder}: no {REFERENCE}.yaml there or above; it is the arm that others are "
            "compared with"
        )
    return found


def folder_of(reference: Path, out: Path | None) -> Path:
    """Where the runs of a reference and its arms lie; folders of one kind have one folder above them, so that
    ``full`` of an ablation is not taken for that of a baseline."""
    home = reference.resolve().parent
    return (out or Path("runs") / home.parent.name) / home.name


def find_arms(folder: Path) -> tuple[Arm, ...]:
    """The reference and the arms of a folder, each with the keys in which it differs."""
    if not folder.is_dir():
        raise ValueError(f"--config-dir {folder}: no such folder")
    reference = reference_of(folder)
    full = read_config(reference)
    paths = [path for path in sorted(folder.glob("*.yaml")) if path.resolve() != reference.resolve()]
    arms = [Arm(name=REFERENCE, path=reference, changes={})]
    for path in paths:
        name = path.resolve().relative_to(reference.resolve().parent).with_suffix("").as_posix()
        changed = differences(full, read_config(path))
        changes = {key: both for key, both in changed.items() if key not in OUTSIDE}
        arms.append(Arm(name=name, path=path, changes=changes))
    return tuple(arms)


def run_dir_of(folder: Path, arm: Arm, seed: int) -> Path:
    """Where the run of an arm with a seed lies."""
    return folder / arm.name / f"seed_{seed}"


def train_words(arm: Arm, seed: int, further: Sequence[str]) -> list[str]:
    """The settings of a run, as `selfemo_jax.train` takes them."""
    return ["--config", str(arm.path), f"--seed={seed}", *further]


def train(arm: Arm, seed: int, run_dir: Path, further: Sequence[str], *, compiled: Path) -> None:
    """Train in a process of its own, going on where it was stopped.

    ValueError where it fails; its output is in ``train.log`` beside the run's files.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "selfemo_jax.train", *train_words(arm, seed, further)]
    command += [f"--run_dir={run_dir}", "--resume=auto"]
    # Arms differ in little: what one has compiled serves the others.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with (run_dir / "train.log").open("a") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, env=cache | os.environ
        ).returncode
    if status:
        raise ValueError(
            f"arm {arm.name}, seed {seed}: training ended with status {status}; its output is in "
            f"{run_dir / 'train.log'}; once that is mended, the command goes on from there"
        )


def outcome_of(run_dir: Path, split: str) -> Outcome | None:
    """The scores of a run; None while it is not finished. ValueError where it did not score the split."""
    final = run_dir / "eval" / "final.json"
    if not final.exists():
        return None
    try:
        content = json.loads(final.read_text(encoding="utf-8"))
        note, splits = str(content["note"]), content["splits"]
        sets = {name: scored["sets"] for name, scored in splits.items()}
        seconds = sum(scored.get("seconds", 0.0) for scored in splits.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{final}: not what a run writes at its end; it is damaged. Remove it, and the command scores "
            "the run anew"
        ) from None
    if split not in sets:
        raise ValueError(f"{run_dir}: scored on {', '.join(sets)}, not on {split}; set eval.final_splits")
    return Outcome(
        scores=sets[split],
        synthetic=sum(_synthetic(path) for path in sorted(run_dir.glob("phases/*/harvest.json"))),
        note=note,
        seconds=_seconds_of_steps(run_dir) + seconds,
    )


def table_rows(
    arms: Sequence[Arm],
    outcomes: Mapping[str, Sequence[Outcome | None]],
) -> list[dict[str, Any]]:
    """One flat row an arm: what it changes, accuracy in percent (mean and standard deviation over seeds) by
    data set and over them, difference of the mean to the reference, weighted F1, synthetic inputs."""
    rows: list[dict[str, Any]] = []
    reference: float | None = None
    for arm in arms:
        finished = [outcome for outcome in outcomes[arm.name] if outcome is not None]
        if not finished:
            continue
        row: dict[str, Any] = {"arm": arm.name, "changes": described(arm), "seeds": len(finished)}
        row["synthetic"] = round(statistics.fmean(outcome.synthetic for outcome in finished))
        for dataset in sorted(finished[0].scores):
            values = [100 * outcome.scores[dataset]["accuracy"] for outcome in finished]
            row[dataset], row[f"{dataset} sd"] = _mean_sd(values)
        row["mean"], row["mean sd"] = _mean_sd([100 * outcome.mean("accuracy") for outcome in finished])
        reference = row["mean"] if arm.name == REFERENCE else reference
        row["difference"] = None if reference is None else round(row["mean"] - reference, 2)
        row["w-F1"], row["w-F1 sd"] = _mean_sd([100 * outcome.mean("weighted_f1") for outcome in finished])
        row["seconds a run"] = round(statistics.fmean(outcome.seconds for outcome in finished))
        rows.append(row)
    return rows


def part_rows(outcomes: Mapping[str, Sequence[Outcome | None]]) -> list[dict[str, Any]]:
    """One row for each arm and part of a data set that is told in two: accuracy and weighted F1 in percent,
    mean and deviation over seeds."""
    rows: list[dict[str, Any]] = []
    for arm, found in outcomes.items():
        scored = [outcome.scores for outcome in found if outcome is not None]
        for name in sorted(scored[0]) if scored else ():
            told = [sets[name].get("parts") or {} for sets in scored]
            alike = len(told[0]) > 1 and all(parts.keys() == told[0].keys() for parts in told)
            for part in told[0] if alike else ():
                row: dict[str, Any] = {"arm": arm, "set": f"{name}, {part}", "seeds": len(told)}
                row["n"] = told[0][part]["num"]
                for key, shown in (("accuracy", "accuracy"), ("weighted_f1", "w-F1")):
                    row[shown], row[f"{shown} sd"] = _mean_sd([100 * parts[part][key] for parts in told])
                rows.append(row)
    return rows


def described(arm: Arm) -> str:
    """What an arm changes, in words."""
    return ", ".join(f"{key} {here}" for key, (_, here) in arm.changes.items()) or "-"


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as the table shows it: means with their deviations or intervals in one cell."""
    shown = {}
    for name, value in row.items():
        if name.endswith((" sd", " ci")):
            continue
        deviation = row.get(f"{name} sd", "absent")
        if deviation == "absent":
            text = showing.cell(name, value)
        else:
            text = f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"
        shown[name] = showing.with_bounds(text, row, name)
    return shown


def rich_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table for a terminal."""
    table = Table(title=title, title_justify="left")
    shown = [cells(row) for row in rows]
    for name in shown[0] if shown else ():
        table.add_column(name, justify="left" if name in ("arm", "changes") else "right")
    for row in shown:
        table.add_row(*row.values())
    return table


def markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page."""
    shown = [cells(row) for row in rows]
    lines = [f"**{title}**", ""]
    if shown:
        lines += ["| " + " | ".join(shown[0]) + " |", "|" + "---|" * len(shown[0])]
        lines += ["| " + " | ".join(row.values()) + " |" for row in shown]
    return "\n".join(lines) + "\n"


def _mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    deviation = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return round(statistics.fmean(values), 2), deviation


def _synthetic(harvest: Path) -> int:
    try:
        return int(json.loads(harvest.read_text(encoding="utf-8"))["training"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{harvest}: not what a harvest writes; it is damaged. Put back a copy of it, or remove the run"
        ) from None


def _seconds_of_steps(run_dir: Path) -> float:
    """Of the steps that count, and of those after the last checkpoint that a resume put aside."""
    files = [run_dir / "metrics.jsonl", *run_dir.glob("orphaned/*/metrics.jsonl")]
    # A killed process may leave half a line.
    texts = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in files if path.exists()]
    return sum(json.loads(line).get("time/step", 0.0) for lines in texts for line in lines)

"""The same settings with several seeds, and what the scores are then worth.

    python -m selfemo_jax.study seeds --n 3 [--out DIR] [train flags]

Every flag that is not the study's goes to `selfemo_jax.train`, as ``--config FILE`` or ``--rl.steps 80``.
Finished runs are not run again and interrupted ones go on, so the command may be stopped and given again;
with other train flags than the runs were made with it refuses. Each score gets its mean and standard
deviation over seeds, the interval of Student's t over seeds (dialogues held fixed), and a bootstrap interval
over seeds and dialogues together. Resampling few seeds understates their spread (by 1/n of its variance); the
t interval does not. With fewer than ten dialogues in a set the bootstrap interval is left out.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.appendlog import atomic_write, read_json
from selfemo_jax.study import showing
from selfemo_jax.study.compare import ALL_SETS, percent, percent_bounds
from selfemo_jax.study.reading import Predictions, by_part, joined_notes, read_predictions
from selfemo_jax.study.same_settings import check_alike, check_made_by
from selfemo_jax.study.significance import (
    FEW,
    NUM_SAMPLES,
    SCORES,
    dialogue_counts,
    estimate,
    over_seeds,
    point,
)

FLAGS_FILE = "flags.json"
SAME_INPUTS = "runs are taken together or in pairs where they have the same data and splits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study seeds``."""
    parser.add_argument("--n", type=int, default=3, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--split", default="test", help="split of the table")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="bootstrap samples")
    parser.add_argument(
        "--only-aggregate", action="store_true", help="train nothing, aggregate what is there"
    )


def main(args: argparse.Namespace, further: Sequence[str] = ()) -> int:
    """Train what is missing, print the table, write ``seeds.json`` and ``seeds.md``."""
    if args.n < 1:
        raise ValueError(f"--n is {args.n}; expected 1 or more")
    taken = [word for word in further if word.partition("=")[0] in ("--seed", "--run_dir", "--resume")]
    if taken:
        raise ValueError(f"{' '.join(taken)}: the study gives each run its seed, folder and --resume itself")
    runs = {seed: args.out / f"seed_{seed}" for seed in range(args.first, args.first + args.n)}
    if not args.only_aggregate:
        same_flags(args.out, further)
        for seed, run_dir in runs.items():
            check_made_by(run_dir, [*further, f"--seed={seed}"])
        keep_flags(args.out, further)
        for seed, run_dir in runs.items():
            train(seed, run_dir, further, compiled=args.out / "compiled")
    finished = {seed: run_dir for seed, run_dir in runs.items() if (run_dir / "eval" / "final.json").exists()}
    if not finished:
        raise ValueError(f"{args.out}: none of the {args.n} runs is finished")
    if missing := sorted(runs.keys() - finished.keys()):
        print(f"not finished, left out: seeds {', '.join(map(str, missing))}")
    check_alike(list(finished.values()))
    systems = {
        seed: read_predictions(run_dir, split=args.split, name=f"seed {seed}")
        for seed, run_dir in finished.items()
    }
    note = joined_notes([system.note for system in systems.values()])
    rows = rows_of(list(systems.values()), num=args.samples)
    title = showing.titled(f"{args.split}: {len(systems)} seeds, percent", note)
    showing.print_table(title, rows)
    remark = FEW if any(row["seeds and dialogues"] is None for row in rows) else ""
    if remark:
        print(remark)
    each = [
        {"seed": seed} | scores_of(system) for seed, system in systems.items()
    ]  # fmt: skip
    showing.print_table(showing.titled("each seed, mean of sets", note), each)
    content = {
        "note": note,
        "split": args.split,
        "train_flags": " ".join(further),
        "remark": remark,
        "scores": rows,
        "seeds": each,
    }
    showing.write_json(args.out / "seeds.json", content)
    page = showing.markdown(title, rows)
    showing.atomic_write(args.out / "seeds.md", f"{page}\n{remark}\n" if remark else page)
    print(f"written: {args.out}/seeds.json, .md")
    return 0


def same_flags(out: Path, further: Sequence[str]) -> None:
    """ValueError where the folder's runs were made with other flags, or another content of their config; a
    training that failed before it began has left no run."""
    path = out / FLAGS_FILE
    if not path.exists() or not any(out.glob("seed_*/config.yaml")):
        return
    before, flags = read_json(path), flags_of(further)
    if before != flags:
        given = before.get("flags") if isinstance(before, dict) else before
        what = "another config" if given == flags["flags"] else f"flags {given}"
        raise ValueError(
            f"{out}: its runs were made with {what}; runs of different settings are no seeds of one "
            "another. Name another --out"
        )


def keep_flags(out: Path, further: Sequence[str]) -> None:
    """Write down what the folder's runs are made with."""
    atomic_write(out / FLAGS_FILE, json.dumps(flags_of(further)) + "\n")


def flags_of(further: Sequence[str]) -> dict[str, Any]:
    """The flags, and a digest of the config file that they name."""
    return {"flags": list(further), "config": _config_digest(further)}


def train(seed: int, run_dir: Path, further: Sequence[str], *, compiled: Path) -> None:
    """Train in a process of its own, going on where it was stopped; nothing for a finished run. ValueError
    where it fails; its output is in ``train.log`` of the run."""
    if (run_dir / "eval" / "final.json").exists():
        return
    print(f"seed {seed}: training in {run_dir}", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "selfemo_jax.train", *further]
    command += [f"--seed={seed}", f"--run_dir={run_dir}", "--resume=auto"]
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
            f"seed {seed}: training ended with status {status}; its output is in {run_dir / 'train.log'}; "
            "once that is mended, the command goes on from there"
        )


def rows_of(systems: Sequence[Predictions], *, num: int) -> list[dict[str, Any]]:
    """Rows of the data sets, of their mean, and of their parts where every run tells the same ones."""
    rows, parts = seed_rows(systems, num=num), [by_part(system) for system in systems]
    if all(part.sets.keys() == parts[0].sets.keys() for part in parts):
        rows += seed_rows(parts, num=num, mean=False)
    return rows


def seed_rows(systems: Sequence[Predictions], *, num: int, mean: bool = True) -> list[dict[str, Any]]:
    """One row for each data set and score: mean and deviation over seeds, both intervals; and with ``mean``
    for the mean over sets."""
    counts = counts_by_set(systems)
    parts: list[tuple[str, list[str]]] = [(name, [name]) for name in counts]
    if mean and len(counts) > 1:
        parts.append((ALL_SETS, list(counts)))
    rows = []
    for shown, names in parts:
        for score, function in SCORES.items():
            per_seed = [
                100 * sum(point([counts[name][run]], function) for name in names) / len(names)
                for run in range(len(systems))
            ]
            both = estimate([counts[name] for name in names], function, num=num)
            of_seeds = over_seeds(per_seed)
            rows.append(
                {
                    "set": shown,
                    "score": score,
                    "seeds": len(systems),
                    "mean": of_seeds["mean"],
                    "sd": of_seeds["sd"],
                    "t over seeds": None if of_seeds["sd"] is None else [of_seeds["low"], of_seeds["high"]],
                    "seeds and dialogues": percent_bounds(both),
                }
            )
    return rows


def counts_by_set(systems: Sequence[Predictions]) -> dict[str, list[Any]]:
    """Data set -> confusions by dialogue of each run; ValueError where runs answered different inputs."""
    counts = {}
    first = systems[0]
    for other in systems[1:]:
        if other.sets.keys() != first.sets.keys():
            here, there = (", ".join(sorted(system.sets)) for system in (first, other))
            raise ValueError(
                f"{other.name} answered inputs of {there}, {first.name} of {here}: {SAME_INPUTS}"
            )
    for name, lines in sorted(first.sets.items()):
        for other in systems[1:]:
            if other.sets[name].keys() != lines.keys():
                raise ValueError(
                    f"{other.name} and {first.name} answered different inputs of {name}: {SAME_INPUTS}"
                )
        labels = tuple(dict.fromkeys(label for system in systems for label in system.labels[name]))
        counts[name] = [dialogue_counts(list(system.sets[name].values()), labels) for system in systems]
    return counts


def scores_of(system: Predictions) -> Mapping[str, float]:
    """Scores of one run in percent, averaged over its data sets."""
    counts = counts_by_set([system])
    return {
        score: percent(sum(point(runs, function) for runs in counts.values()) / len(counts))
        for score, function in SCORES.items()
    }


def _config_digest(further: Sequence[str]) -> str | None:
    words = list(further)
    for place, word in enumerate(words):
        path = word.partition("=")[2] if word.startswith("--config=") else None
        if word == "--config" and place + 1 < len(words):
            path = words[place + 1]
        if path and Path(path).is_file():
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return None

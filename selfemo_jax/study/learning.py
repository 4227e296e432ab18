"""Does RL teach? Greedy r1 on fixed held-out inputs before and after it, over seeds, with two controls.

An arm is a run's configuration with a few settings changed: ``base`` as it is, ``lr0`` with a learning rate
of 0 in every RL phase, ``shuffled`` with the gold labels permuted among the training inputs. Each arm is
trained with each seed by a process of its own; finished runs are not run again. What is compared are the
weights that the cold start left and the policy that the run reports (the best of its last phase by dev
score), on whole held-out splits, input by input. The rise is that on test alone. Dev is told apart: the
policy was selected on it, so that chance looks like a rise there.

The difference has two standard errors: over seeds (the spread of the seeds' mean differences) and over
dialogues (differences averaged over seeds, inputs of a dialogue taken together). A rise counts when it is
above twice the larger of them. Fewer than ten dialogues have no such error, and nothing is said of a rise.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from selfemo_jax.algo.rewards import weighted_iou
from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config_io import load_config
from selfemo_jax.data.label_arrays import answers_to_arrays, gold_to_array
from selfemo_jax.parts import build_parts, make_engine, weights_of
from selfemo_jax.run_biographies import with_biographies
from selfemo_jax.run_data import load_data
from selfemo_jax.scores import greedy_answers
from selfemo_jax.study import showing
from selfemo_jax.study.reading import joined_notes, run_note
from selfemo_jax.study.same_settings import check_made_by
from selfemo_jax.study.significance import FEW, MIN_DIALOGUES

TEST, DEV = "test", "dev"
SELECTED = f"{DEV} (selected on)"
"""The key of dev's numbers in ``learning.json``."""
ARMS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "lr0": ("--optim.lr=0",),
    "shuffled": ("--data.shuffle_gold=true",),
}


@dataclass(frozen=True, kw_only=True)
class Rise:
    """Greedy r1 after minus before, over seeds and inputs."""

    before: tuple[float, ...]
    """Mean r1 of each seed after the cold start."""
    after: tuple[float, ...]
    """Mean r1 of each seed at the end."""
    se_seeds: float | None
    """Standard error of the mean difference over seeds; None for one seed."""
    se_dialogues: float | None
    """Standard error of the mean difference over dialogues; None with fewer than `MIN_DIALOGUES`."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(np.mean(self.after) - np.mean(self.before))

    @property
    def holds(self) -> bool | None:
        """Whether r1 rose by more than twice the larger standard error; None without one over dialogues."""
        if self.se_dialogues is None:
            return None
        return self.mean > 2 * max(self.se_dialogues, self.se_seeds or 0.0)


def rise(before: np.ndarray, after: np.ndarray, roots: Sequence[str]) -> Rise:
    """Compare r1 [S, N] of S seeds on N inputs; ``roots`` names the dialogue of each input.

    The error over dialogues is that of a ratio of sums over clusters (linearised):
    sqrt(D / (D - 1) sum_d (s_d - m n_d)^2) / N with s_d the summed difference of dialogue d, n_d its inputs,
    m the mean difference and D the number of dialogues; None with fewer than `MIN_DIALOGUES`.
    """
    if before.shape != after.shape or before.shape[1] != len(roots):
        raise ValueError(
            f"r1 before {before.shape}, after {after.shape} and {len(roots)} roots do not match: give one "
            "row a seed and one column an input"
        )
    difference = after - before
    num_seeds, num_inputs = difference.shape
    by_seed = difference.mean(axis=1)
    _, cluster = np.unique(list(roots), return_inverse=True)
    residual = np.bincount(cluster, difference.mean(axis=0) - difference.mean())
    num_clusters = len(residual)
    se_dialogues = None
    if num_clusters >= MIN_DIALOGUES:
        spread = float((residual**2).sum()) * num_clusters / (num_clusters - 1)
        se_dialogues = math.sqrt(spread) / num_inputs
    return Rise(
        before=tuple(map(float, before.mean(axis=1))),
        after=tuple(map(float, after.mean(axis=1))),
        se_seeds=float(by_seed.std(ddof=1) / math.sqrt(num_seeds)) if num_seeds > 1 else None,
        se_dialogues=se_dialogues,
    )


Measured = dict[str, np.ndarray | list[str]]
"""``{"roots": N names, "before": [N], "after": [N]}``: greedy r1 on the N inputs of a split."""


def held_out_r1(run_dir: Path, splits: Sequence[str]) -> dict[str, Measured]:
    """Greedy r1 of a finished run's cold start and of its reported policy on each whole split; ValueError
    where the run has no cold start."""
    best = find_checkpoint(str(run_dir))
    config, _ = load_config([], prog="selfemo_jax.study", base=lambda _: best.config_file)
    config = best.settings(config)
    cold = next(iter(sorted((run_dir / "phases").glob("*_cold"))), None)
    if cold is None:
        raise ValueError(f"{run_dir}: no cold start to compare with; set cold_start.source")
    parts, data = build_parts(config), with_biographies(config, load_data(config))
    engine = make_engine(parts)
    result: dict[str, Measured] = {
        split: {"roots": [sample.root_id for sample in data.split(split)]} for split in splits
    }
    try:
        for version, (name, folder) in enumerate({"before": cold / "weights", "after": best.weights}.items()):
            engine.update_policy(weights_of(parts, folder), version=version)
            for split in splits:
                samples = data.split(split)
                inventories = [sample.inventory for sample in samples]
                gold = gold_to_array([s.gold for s in samples], inventories, num_classes=data.num_classes)
                answers = [[p.answer] for p in greedy_answers(engine, samples, parts.codec, config)]
                pred, valid = answers_to_arrays(answers, inventories, num_classes=data.num_classes)
                r1 = weighted_iou(jnp.asarray(pred), jnp.asarray(gold), jnp.asarray(valid))
                result[split][name] = np.asarray(r1, np.float64)[:, 0]
    finally:
        engine.close()
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study's flags."""
    parser.add_argument("--config", help="config to train; default: the bundled tiny.yaml")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs")


def main(args: argparse.Namespace) -> int:
    """Run the study; returns the exit status."""
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; expected 1 or more")
    config = ["--config", args.config] if args.config else []
    study(args.arms, range(args.seeds), args.out, train_args=config)
    return 0


def study(arms: Sequence[str], seeds: Sequence[int], folder: Path, *, train_args: Sequence[str]) -> None:
    """Train each arm with each seed (finished ones are kept, interrupted ones resumed), compare, print and
    write ``learning.json``: the rises on test, and apart from them those on dev, which say nothing of whether
    one holds."""
    results: dict[str, dict[str, Rise]] = {TEST: {}, DEV: {}}
    note = ""
    for arm in arms:
        measured = []
        for seed in seeds:
            run_dir = folder / f"{arm}_{seed}"
            _train(run_dir, [*train_args, *ARMS[arm], f"--seed={seed}"])
            measured.append(held_out_r1(run_dir, list(results)))
        sizes = {}
        for split, found in results.items():
            before, after = (np.stack([run[split][name] for run in measured]) for name in ("before", "after"))
            found[arm] = rise(before, after, list(measured[0][split]["roots"]))
            sizes[split] = before.shape[1]
        note = joined_notes([note, *(run_note(folder / f"{arm}_{seed}") for seed in seeds)])
        title = f"greedy r1 on {TEST} ({sizes[TEST]} inputs)"
        _print(results[TEST], showing.titled(title, note), decides=True)
        title = f"greedy r1 on {DEV}, which the reported policy was selected on ({sizes[DEV]} inputs)"
        _print(results[DEV], showing.titled(title, note), decides=False)
        on_test = {
            name: vars(value) | {"mean": value.mean, "holds": value.holds}
            for name, value in results[TEST].items()
        }
        on_dev = {name: vars(value) | {"mean": value.mean} for name, value in results[DEV].items()}
        content = {"note": note, "splits": [TEST], "arms": on_test, SELECTED: on_dev}
        showing.write_json(folder / "learning.json", content)


def _train(run_dir: Path, arguments: Sequence[str]) -> None:
    check_made_by(run_dir, arguments)
    if (run_dir / "eval" / "final.json").exists():
        return
    resume = ["--resume", "auto"] if run_dir.exists() else []
    command = [sys.executable, "-m", "selfemo_jax.train", *arguments, "--run_dir", str(run_dir), *resume]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise ValueError(f"{' '.join(command)} ended with {status}; its output is in {log.name}")


def _print(results: Mapping[str, Rise], title: str, *, decides: bool) -> None:
    table = Table()
    columns = ["arm", "after cold start", "after RL", "difference", "SE seeds", "SE dialogues"]
    for column in [*columns, "rise"] if decides else columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, value in results.items():
        table.add_row(
            name,
            " ".join(f"{number:.3f}" for number in value.before),
            " ".join(f"{number:.3f}" for number in value.after),
            f"{value.mean:+.4f}",
            *("-" if error is None else f"{error:.4f}" for error in (value.se_seeds, value.se_dialogues)),
            *([showing.cell("rise", value.holds)] if decides else []),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    # Above the table and not in it, where it would be broken to the table's width.
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    if any(value.se_dialogues is None for value in results.values()):
        console.print(FEW, highlight=False)

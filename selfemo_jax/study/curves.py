"""Accuracy and IoU over training (Fig. 5): curves, how rough they are, and whether they go together.

    python -m selfemo_jax.study curves RUN [RUN ...] [--phases rl_1 rl_final] [--out DIR]

From the dev scores that runs log every `eval.every` steps: for each data set greedy accuracy, weighted F1 and
r1 (weighted IoU), and the mean reward r1 of the training rollouts. A curve is one training: phases that go on
from one another; a phase that starts again, from the base or the cold start, begins a curve of its own. The
first point is the last dev score of the phase whose weights it starts from. Of each curve are told the rise
(last less first), its rank correlation with the step, and its roughness: the standard deviation of the
changes from one score to the next, divided by the curve's range. A smooth rise of n points has a small
roughness; pure noise has one of about 0.5. Dev accuracy is set against dev r1 and against the training reward
by Spearman's rank correlation. With `eval.selfemo` a curve of its own, ``selfemo``, is over the synthetic
inputs that were held out: their gold was declared by the policy, so they are part of no mean, and as every
harvest adds some, the curve is of the last phase that has them.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.config_io import read_config
from selfemo_jax.phases import SELFEMO, Phase, plan
from selfemo_jax.study import showing
from selfemo_jax.study.reading import joined_notes, read_metrics, run_note, short_names

SHOWN = ("accuracy", "r1")
WINDOW = 10
"""Training steps, this one and those before it, that the training reward beside a dev score is averaged
over."""
EXACT = 8
"""Points up to which a rank correlation's p is counted over all orders."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Phases of a run that go on from one another."""

    phases: tuple[str, ...]
    lines: tuple[Mapping[str, Any], ...]
    """What their steps logged, behind the dev score of what they started from, if that was scored."""

    @property
    def name(self) -> str:
        """The phases in one word."""
        return " + ".join(self.phases)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One score over the steps at which it was measured."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``study curves``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--phases", nargs="+", help="phases that count; default: those of RL")
    parser.add_argument("--out", type=Path, help="folder; default: study/ in the first run")


def main(args: argparse.Namespace) -> int:
    """Print the table of curves, write ``curves.json`` and ``curves.png``."""
    names = short_names(args.runs)
    curves: dict[str, list[list[Curve]]] = {}
    rows, together, points = [], [], []
    for run_dir, name in zip(args.runs, names, strict=True):
        curves[name] = []
        for training in drawable(trainings(run_dir, args.phases), where=run_dir):
            found = dev_curves(training)
            curves[name].append(found)
            of = {"run": name, "phases": training.name}
            rows += [of | {"curve": curve.name} | described(curve) for curve in found]
            together += [of | row for row in agreement(found, training.lines)]
            points += [
                of | {"curve": curve.name, "step": int(step), "value": float(value)}
                for curve in found
                for step, value in zip(curve.steps, curve.values, strict=True)
            ]
    note = joined_notes([run_note(run_dir) for run_dir in args.runs])
    out = args.out or args.runs[0] / "study"
    titles = (
        showing.titled("scores on the dev subset over training, in percent", note),
        showing.titled("rank correlation of dev accuracy with", note),
    )
    showing.print_table(titles[0], rows)
    showing.print_table(titles[1], together)
    content = {"note": note, "curves": rows, "agreement": together, "points": points}
    showing.write_json(out / "curves.json", content)
    draw(out / "curves.png", curves, note=note)
    print(f"written: {out}/curves.json, .png")
    return 0


def trainings(run_dir: Path, phases: Sequence[str] | None) -> list[Training]:
    """The trainings that the named phases of a run make up, or those phases that log a reward and update
    weights."""
    lines = read_metrics(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: no config.yaml, which says what each phase starts from")
    known = list(dict.fromkeys(str(line["phase"]) for line in lines))
    if unknown := sorted(set(phases or ()) - set(known)):
        raise ValueError(f"--phases {' '.join(unknown)}: {run_dir} has {', '.join(known)}")
    chosen = phases or {line["phase"] for line in lines if "reward/r1" in line and "loss" in line}
    if not chosen:
        raise ValueError(f"{run_dir}: no phase of RL among {', '.join(known)}; name phases by --phases")
    chains: list[list[Phase]] = []
    for phase in plan(read_config(run_dir / "config.yaml")):
        if phase.name not in chosen:
            continue
        if chains and chains[-1][-1].name == phase.init:
            chains[-1].append(phase)
        else:
            chains.append([phase])
    return [_training(chain, lines) for chain in chains]


def _training(chain: Sequence[Phase], lines: Sequence[Mapping[str, Any]]) -> Training:
    names = tuple(phase.name for phase in chain)
    own = [line for line in lines if line["phase"] in names]
    before = [line for line in lines if line["phase"] == chain[0].init and "dev/wf1" in line][-1:]
    # Scored when its own phase ended; here it is what this training had before its first step.
    began = {"step": own[0]["step"] - 1, "phase": chain[0].init}
    start = [began | {key: value for key, value in line.items() if key.startswith("dev/")} for line in before]
    return Training(phases=names, lines=(*start, *own))


def drawable(found: Sequence[Training], *, where: Path) -> list[Training]:
    """Those with two dev scores; ValueError without any."""
    counts = {one.name: sum("dev/wf1" in line for line in one.lines) for one in found}
    kept = [one for one in found if counts[one.name] >= 2]
    few = ", ".join(f"{name} {number}" for name, number in counts.items() if number < 2)
    advice = "a curve needs two; train with a smaller eval.every (or name more by --phases)"
    if not kept:
        raise ValueError(f"{where}: dev scores are too few ({few}): {advice}")
    if few:
        print(f"{where}: left out for too few dev scores ({few}): {advice}")
    return kept


def dev_curves(training: Training) -> list[Curve]:
    """Accuracy, weighted F1 and r1 of each data set and their mean over sets."""
    scored = [line for line in training.lines if "dev/wf1" in line]
    steps = np.array([line["step"] for line in scored])
    names = [name.split("/") for line in scored for name in line if name.startswith("dev/")]
    sets = sorted({parts[1] for parts in names if len(parts) == 3} - {SELFEMO})
    curves = []
    for score in ("accuracy", "r1", "wf1"):
        per_set = np.array([[line.get(f"dev/{name}/{score}", np.nan) for line in scored] for name in sets])
        for name, values in zip(sets, per_set, strict=True):
            known = ~np.isnan(values)
            curves.append(Curve(name=f"{name} {score}", steps=steps[known], values=values[known]))
        curves.append(Curve(name=f"mean {score}", steps=steps, values=np.nanmean(per_set, axis=0)))
    return curves + _selfemo_curves(scored)


def _selfemo_curves(scored: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Accuracy and r1 on the held-out synthetic inputs, where the last phase that has them was scored twice
    or more."""
    held = [line for line in scored if f"dev/{SELFEMO}/accuracy" in line]
    held = [line for line in held if line["phase"] == held[-1]["phase"]]
    if len(held) < 2:
        return []
    steps = np.array([line["step"] for line in held])
    return [
        Curve(
            name=f"{SELFEMO} {score}",
            steps=steps,
            values=np.array([line[f"dev/{SELFEMO}/{score}"] for line in held]),
        )
        for score in SHOWN
    ]


def described(curve: Curve) -> dict[str, Any]:
    """First, last and best value in percent, the rise, Spearman's correlation with the step, roughness."""
    values = 100 * curve.values
    correlation, p = spearman(curve.steps, values)
    return {
        "points": len(values),
        "first": float(values[0]),
        "last": float(values[-1]),
        "best": float(values.max()),
        "difference": float(values[-1] - values[0]),
        "spearman with step": correlation,
        "p": p,
        "roughness": roughness(values),
    }


def roughness(values: np.ndarray) -> float | None:
    """Standard deviation of first differences divided by the range; None for a flat curve or below three
    points."""
    spread = float(np.ptp(values)) if len(values) else 0.0
    if len(values) < 3 or spread == 0:
        return None
    return float(np.std(np.diff(values)) / spread)


def spearman(first: np.ndarray, second: np.ndarray) -> tuple[float | None, float | None]:
    """Rank correlation and its two-sided p; None where one side is constant or there are under three
    points.

    p is exact, over all orders, up to `EXACT` points, where Student's t is far off (0 for three points in
    order, whose p is 1/3). It takes the points for independent, which neighbours on a curve hardly are.
    """
    from scipy import stats

    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None, None
    found = stats.spearmanr(first, second)
    if len(first) > EXACT:
        return float(found.statistic), float(found.pvalue)
    here, there = (stats.rankdata(side) - (len(side) + 1) / 2 for side in (first, second))
    orders = np.array(list(itertools.permutations(there)))
    as_far = np.abs(orders @ here) >= abs(there @ here) - 1e-9
    return float(found.statistic), float(as_far.mean())


def agreement(curves: Sequence[Curve], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether accuracy goes with r1: dev accuracy of each set against its dev r1, and the mean dev accuracy
    against the training reward of the `WINDOW` steps up to it."""
    by_name = {curve.name: curve for curve in curves}
    rows = []
    for curve in curves:
        name, _, score = curve.name.rpartition(" ")
        if score == "accuracy":
            correlation, p = spearman(by_name[f"{name} r1"].values, curve.values)
            rows.append(_agreement(name, "dev r1", len(curve.values), correlation, p))
    rewards = [(line["step"], line["reward/r1"]) for line in lines if "reward/r1" in line]
    accuracy = by_name["mean accuracy"]
    pairs = []
    for step, value in zip(accuracy.steps, accuracy.values, strict=True):
        near = [reward for at, reward in rewards if step - WINDOW < at <= step]
        if near:
            pairs.append((float(np.mean(near)), float(value)))
    correlation, p = spearman(*np.array(pairs).T) if len(pairs) >= 3 else (None, None)
    rows.append(_agreement("mean", f"training r1 ({WINDOW} steps)", len(pairs), correlation, p))
    return rows


def _agreement(
    name: str, other: str, points: int, correlation: float | None, p: float | None
) -> dict[str, Any]:
    return {"set": name, "with": other, "points": points, "spearman": correlation, "p": p}


def draw(path: Path, curves: Mapping[str, Sequence[Sequence[Curve]]], *, note: str) -> None:
    """Two panels, accuracy and IoU: a colour for each data set (and run), a line for each of its
    trainings."""
    figure = showing.new_figure(10, 4)
    figure.suptitle(showing.titled("dev subset over training", note), fontsize="small")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, score in zip(panels, SHOWN, strict=True):
        colours: dict[str, str] = {}
        for run, of_run in curves.items():
            for curve in (curve for found in of_run for curve in found):
                name, _, kind = curve.name.rpartition(" ")
                if kind != score:
                    continue
                bold = name == "mean" and len(curves) == 1
                label = name if len(curves) == 1 else f"{run}: {name}"
                again = label in colours
                colour = colours.setdefault(label, "black" if bold else f"C{len(colours) % 10}")
                axes.plot(
                    curve.steps, 100 * curve.values, marker=".", color=colour,
                    linewidth=2.5 if bold else 1.0, label=None if again else label,
                )  # fmt: skip
        title = {"accuracy": "accuracy", "r1": "weighted IoU (r1)"}[score]
        axes.set(title=title, xlabel="step", ylabel="percent")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small", frameon=False)
    showing.save_figure(figure, path)

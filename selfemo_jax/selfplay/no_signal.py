"""Synthetic inputs that taught nothing when RL asked them (method 3.3, the filter after one pass).

The emotions that a policy declares become the gold of its reply and are checked by nobody. Where every group
of answers then earns next to nothing, the label probably contradicts the reply; where all answers are right,
nothing is left to learn.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from selfemo_jax.data.inputs import Sample
from selfemo_jax.phases import Phase, last_steps, record_of
from selfemo_jax.rollout.records import step_file


def inputs_without_signal(
    samples: Sequence[Sample], run_dir: Path, plan: tuple[Phase, ...], phase: Phase, *, tau_low: float
) -> list[str]:
    """Ids of the inputs that the RL of earlier iterations asked in vain.

    Only finished phases count, so that a phase has the same inputs however often it is taken up again, and a
    harvest those of the RL before it.
    """
    earlier = [p for p in plan[: phase.index] if p.kind == "rl" and p.iteration < phase.iteration]
    steps = [
        step
        for p in earlier
        for step in last_steps(run_dir, plan, p.name, most=record_of(run_dir, p)["steps"])
    ]
    ids = {sample.id for sample in samples}
    return asked_in_vain(group_rewards(run_dir, steps), ids, tau_low=tau_low)


def asked_in_vain(
    rewards: Mapping[str, Sequence[Sequence[float]]], ids: set[str], *, tau_low: float
) -> list[str]:
    """Those of ``ids`` that were asked and whose groups all have a mean r1 below ``tau_low``, or all an r1 of
    1 throughout; sorted. ``rewards``: input -> r1 of each of its groups."""

    def useless(groups: Sequence[Sequence[float]]) -> bool:
        low = all(np.mean(group) < tau_low for group in groups)
        return low or all(min(group) >= 1.0 for group in groups)

    return sorted(name for name in ids if rewards.get(name) and useless(rewards[name]))


def group_rewards(run_dir: Path, steps: Sequence[int]) -> dict[str, list[list[float]]]:
    """Input -> r1 of the rollouts of each of its groups in these global steps; ValueError where a record is
    missing."""
    found: dict[str, list[list[float]]] = {}
    for step in steps:
        path = step_file(run_dir, step, "jsonl")
        if not path.exists():
            raise ValueError(
                f"flywheel.tau_low: {path} is missing; it needs the rollouts of every step of RL "
                "(rollout.keep all)"
            )
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, filter(str.strip, file)):
                groups = found.setdefault(line["sample_id"], [])
                if line["idx"] == 0:
                    groups.append([])
                groups[-1].append(line["r1"])
    return found

"""The plan of a run as data, and the folder that each finished phase leaves.

`plan` turns the configuration into the tuple of phases of Algorithm 1. A finished phase leaves
``phases/NN_name/``: its weights as a converted folder, ``phase.json`` (steps, scores, the state of the logs)
and, last of all, ``DONE``. What has no ``DONE`` did not happen.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfemo_jax.appendlog import atomic_write, read_json
from selfemo_jax.config import Config
from selfemo_jax.distributed import barrier, is_first

BASE = "base"
ORIGINAL = "original"
SELFEMO = "selfemo"
"""The held-out synthetic inputs, where they are scored or answered as a split."""
DONE = "DONE"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of a run with one optimizer, one schedule and one reference policy.

    Example: ``Phase(index=1, kind="rl", name="rl_1", iteration=1, init="cold", buffer=("original",))``.
    """

    index: int
    kind: Literal["labels", "sft", "rl", "harvest"]
    name: str
    iteration: int
    init: str
    """Name of the phase whose weights it starts from, and which is its frozen reference; ``base`` is before
    all."""
    buffer: tuple[str, ...]
    """What its inputs are drawn from: ``original``, and the harvests by name."""
    steps: int | None = None
    """Steps that the configuration fixes; None means epochs over the buffer."""

    @property
    def folder(self) -> str:
        """Name of its folder under ``phases/``."""
        return f"{self.index:02d}_{self.name}"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: ``step`` steps of phase ``phase`` are done, ``global_step`` over all phases."""

    phase: int
    step: int
    global_step: int


def plan(config: Config) -> tuple[Phase, ...]:
    """The phases of method 3.2: labels (on request) and cold start, then per iteration RL, harvest and (by
    `retrain.method`) SFT, then the final RL, whose buffer holds the last harvest; for a baseline those up to
    the cold start, or none. Without self-play on all originals (`control`) the one RL phase starts from the
    weights that the final RL of the method starts from."""
    phases: list[Phase] = []
    if config.phases == "none":
        return ()

    def add(kind, name, iteration, init, buffer, steps=None) -> str:
        phases.append(
            Phase(
                index=len(phases),
                kind=kind,
                name=name,
                iteration=iteration,
                init=init,
                buffer=buffer,
                steps=steps,
            )
        )
        return name

    wheel, retrain, rl_steps = config.flywheel, config.flywheel.retrain, config.rl.steps
    alone = wheel.control == "all_original"
    num_iterations = 0 if alone else wheel.iterations
    cold = BASE
    # From the base nothing would use a cold start: in the method it is there for what plays.
    if config.phases == "cold" or not (alone and retrain.init == "base"):
        if config.cold_start.labels.epochs:
            cold = add("labels", "labels", 0, BASE, (ORIGINAL,))
        if config.cold_start.source != "none":
            cold = add("sft", "cold", 0, cold, (ORIGINAL,))
    if config.phases == "cold":
        return tuple(phases)
    harvests: list[str] = []
    current = cold
    for iteration in range(1, num_iterations + 2):
        final = iteration == num_iterations + 1
        buffer = (ORIGINAL, *harvests)
        starts = {"base": BASE, "cold": cold, "current": current}
        init = starts[retrain.init] if harvests or alone else cold
        if harvests and retrain.method != "grpo":
            init = current = add("sft", f"sft_{iteration}", iteration, init, tuple(harvests))
        if not harvests or retrain.method != "sft":
            current = add("rl", "rl_final" if final else f"rl_{iteration}", iteration, init, buffer, rl_steps)
        if not final:
            harvests.append(add("harvest", f"harvest_{iteration}", iteration, current, buffer))
    return tuple(phases)


def phase_dir(run_dir: Path, phase: Phase) -> Path:
    """Folder of a phase."""
    return run_dir / "phases" / phase.folder


def kept_dir(run_dir: Path, phase: Phase, step: int, *, every: int, total: int) -> Path | None:
    """Where the policy after ``step`` stays, if it does: the last one is what the phase leaves anyway."""
    stays = every > 0 and step % every == 0 and step < total
    return phase_dir(run_dir, phase) / "steps" / f"{step:06d}" if stays else None


def is_done(run_dir: Path, phase: Phase) -> bool:
    """Whether the phase finished: its marker is written after everything else."""
    return (phase_dir(run_dir, phase) / DONE).exists()


def first_open(run_dir: Path, phases: tuple[Phase, ...]) -> int:
    """Index of the first phase that is not done; ``len(phases)`` when all are."""
    return next((phase.index for phase in phases if not is_done(run_dir, phase)), len(phases))


def begin(run_dir: Path, phase: Phase) -> Path:
    """An empty folder for the phase; what an interrupted attempt left is removed."""
    folder = phase_dir(run_dir, phase)
    if is_first():
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    barrier("phase")
    return folder


def finish(run_dir: Path, phase: Phase, record: dict[str, Any]) -> None:
    """Write the phase's record, then its marker."""
    folder = phase_dir(run_dir, phase)
    if is_first():
        atomic_write(folder / "phase.json", json.dumps(record, indent=1) + "\n")
        atomic_write(folder / DONE, "")
    barrier("phase")


def record_of(run_dir: Path, phase: Phase) -> dict[str, Any]:
    """The record of a finished phase."""
    return read_json(phase_dir(run_dir, phase) / "phase.json")


def last_steps(run_dir: Path, phases: tuple[Phase, ...], name: str, *, most: int) -> range:
    """Global steps of the last ``most`` steps of a finished phase."""
    (phase,) = (phase for phase in phases if phase.name == name)
    record = record_of(run_dir, phase)
    end = record["position"]["global_step"]
    return range(end - min(most, record["steps"]) + 1, end + 1)

"""The settings of a run: one tree of frozen dataclasses.

`config_io.load_config` fills it from YAML and the command line; `config_check.validate` looks at what the
fields say together. Nothing here touches a file or a device.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.data import DataSection, OutputSection
from selfemo_jax.settings.experts import Expert, Persona
from selfemo_jax.settings.model import Batch, Lora, ModelSection, Optim
from selfemo_jax.settings.numbers import Natural, Positive
from selfemo_jax.settings.objective import RL, Advantages, Loss, Reward
from selfemo_jax.settings.record import Checkpoint, Eval, Log
from selfemo_jax.settings.rollout import Rollout
from selfemo_jax.settings.selfplay import ColdStart, Flywheel


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    run_dir: str | None = None
    """Folder of everything the run writes; null: runs/<name of the config file>."""
    seed: Natural = 0
    """Every random draw comes from it."""
    mesh: str = "1"
    """Devices: 8 means fsdp=8; or name the axes, as fsdp=4,tp=2."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to run; auto takes what JAX finds first."""
    time_limit: Positive | None = None
    """Minutes after which training stops cleanly and is scored; null: none."""
    note: str = ""
    """Words stamped on every score."""
    phases: Literal["all", "cold", "none"] = "all"
    """What is trained before the scores: the whole method, the cold start alone (supervised baselines), or
    nothing (zero-shot)."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    output: OutputSection = field(default_factory=OutputSection)
    expert: Expert = field(default_factory=Expert)
    persona: Persona = field(default_factory=Persona)
    cold_start: ColdStart = field(default_factory=ColdStart)
    reward: Reward = field(default_factory=Reward)
    advantages: Advantages = field(default_factory=Advantages)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    lora: Lora = field(default_factory=Lora)
    rl: RL = field(default_factory=RL)
    batch: Batch = field(default_factory=Batch)
    rollout: Rollout = field(default_factory=Rollout)
    flywheel: Flywheel = field(default_factory=Flywheel)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)


MESH_AXES = ("data", "fsdp", "tp")


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes of a mesh in the order (data, fsdp, tp): `"8"` is fsdp 8; `"fsdp=4,tp=2"` names its axes.

    ValueError for another axis, an axis named twice or a size that is not a positive whole number.
    """
    hint = "write a number of devices (8) or axes (fsdp=4,tp=2)"
    text = text.strip()
    if re.fullmatch(r"[1-9][0-9]*", text):
        text = f"fsdp={text}"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*=\s*([1-9][0-9]*)\s*", part)
        if match is None:
            raise ValueError(f"mesh {text!r}: cannot read {part!r}; {hint}")
        axis, size = match.groups()
        if axis not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; the axes are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh {text!r}: axis {axis} is given twice; {hint}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def num_devices(mesh: str) -> int:
    """Devices a mesh text asks for."""
    return math.prod(parse_mesh(mesh).values())

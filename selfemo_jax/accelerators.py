"""What this machine has, told without asking JAX: some settings must stand before its first device exists."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
MEMORY_SHARE = 0.92
"""Of a GPU's memory, for JAX's arrays and temporaries. JAX takes 0.75 unless told, also where it does not
preallocate. The rest is for the CUDA context, code, NCCL and cuBLAS; how much those need is a guess."""
LEAST_BESIDE = 0.2
"""Share below which a trainer beside a server is a mistake: the server's default leaves less."""
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""JAX's name for the share, and its former one; both at once are an error of JAX."""


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The NVIDIA GPUs that a process with these variables sees, by number or name."""
    present = tuple(str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*")))))
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return present
    if "-1" in named:
        return ()
    return tuple(name.strip() for name in named.split(",") if name.strip())[: len(present)]


def platform_of(asked: str, environ: Mapping[str, str] = os.environ) -> str:
    """``cpu`` or ``gpu``: what JAX will compute on where ``auto``, ``cpu`` or ``gpu`` was asked for."""
    if asked != "auto":
        return asked
    if environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return "cpu"
    has_plugin = any(importlib.util.find_spec(name) for name in PLUGINS)
    return "gpu" if has_plugin and visible_gpus(environ) else "cpu"


def memory_share(environ: Mapping[str, str] = os.environ, *, taken: float = 0.0) -> float:
    """The share of a GPU's memory that a run with these variables may fill; where they say nothing, less what
    a server on the same GPU has ``taken``."""
    usual = MEMORY_SHARE - taken
    return next((float(environ[name]) for name in MEMORY_VARIABLES if environ.get(name)), usual)


def memory_settings(environ: Mapping[str, str] = os.environ, *, taken: float = 0.0) -> dict[str, str]:
    """What to add to them so that JAX takes that share; nothing where the user has chosen one. ValueError
    where trainer and server do not fit."""
    chosen = next((name for name in MEMORY_VARIABLES if environ.get(name)), None)
    share = memory_share(environ, taken=taken)
    if taken and (share + taken > 1 or share < LEAST_BESIDE):
        what = f"{chosen} gives JAX {share:g}" if chosen else f"that leaves JAX {share:.2g}"
        raise ValueError(
            f"rollout.sidecar.memory_share is {taken:g} of each GPU, on GPUs that the trainer uses too, and "
            f"{what}; expected at most 1 together and at least {LEAST_BESIDE} for JAX: lower memory_share to "
            ".35, say, or name other GPUs in rollout.sidecar.devices and hide them from JAX with "
            "CUDA_VISIBLE_DEVICES"
        )
    return {} if chosen else {MEMORY_VARIABLES[0]: f"{share:.3g}"}

"""What this machine has, told without asking JAX: some settings must stand before its first device exists."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
MEMORY_SHARE = 0.92
"""Of a GPU's memory, for JAX's arrays and temporaries. JAX takes 0.75 unless told, also where it does not
preallocate. The rest is for the CUDA context, code, NCCL and cuBLAS; how much those need is a guess."""
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


def memory_share(environ: Mapping[str, str] = os.environ) -> float:
    """The share of a GPU's memory that a run with these variables may fill."""
    return next((float(environ[name]) for name in MEMORY_VARIABLES if environ.get(name)), MEMORY_SHARE)


def memory_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to add to them so that JAX takes that share; nothing where the user has chosen one."""
    if any(environ.get(name) for name in MEMORY_VARIABLES):
        return {}
    return {MEMORY_VARIABLES[0]: str(MEMORY_SHARE)}

"""Which devices a run uses. `prepare` must come before the first question that anyone asks JAX about
devices."""

import contextlib
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from selfemo_jax.model.sharding import make_mesh

# XLA aborts the process when one simulated device is a minute late, which happens where many share few cores.
_PATIENCE = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": "120",
    "--xla_cpu_collective_call_terminate_timeout_seconds": "3600",
}


def prepare(axes: Mapping[str, int], *, platform: str) -> tuple[Mesh, str]:
    """The mesh of the axes' sizes and a line that says what it is made of.

    On a CPU, missing devices are simulated; on GPUs too few are a ValueError that says what was found.
    """
    wanted = int(np.prod(list(axes.values())))
    flags = os.environ.get("XLA_FLAGS", "")
    added = [f"{name}={value}" for name, value in _PATIENCE.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()
    if platform != "auto":
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else "cpu")
    # Where devices exist already (a test, a notebook) what is there must do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without the CUDA plugin JAX fails by an assertion of its own.
        raise ValueError(
            f"platform {platform}: JAX finds no such device ({error or 'no plugin for it'}); install "
            "jax[cuda12], or set platform to cpu"
        ) from error
    mesh = make_mesh(axes, devices)
    shape = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    kind = devices[0].device_kind
    if devices[0].platform == "cpu" and wanted > 1:
        cores = len(os.sched_getaffinity(0))
        return mesh, f"mesh {shape}: {wanted} CPU devices are simulated on {cores} cores"
    return mesh, f"mesh {shape} of {len(devices)} {kind}"

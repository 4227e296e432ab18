"""Which devices a run uses. `prepare` must come before the first question that anyone asks JAX about
devices."""

import contextlib
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from selfemo_jax.accelerators import memory_settings, platform_of
from selfemo_jax.distributed import local_share
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.xla_flags import with_applied

THREADS_PER_DEVICE = 4


def prepare(axes: Mapping[str, int], *, platform: str, taken: float = 0.0) -> tuple[Mesh, str]:
    """The mesh of the axes' sizes and a line that says what it is made of.

    On a CPU, missing devices are simulated; on GPUs too few are a ValueError that says what was found. Of
    several processes each brings the same share of the mesh. On GPUs this process takes `MEMORY_SHARE` of
    their memory, less the share ``taken`` by a server on the same, unless the environment says how much.
    """
    wanted = int(np.prod(list(axes.values())))
    share = local_share(wanted)
    expected, flags = platform_of(platform), os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = with_applied(flags, platform=expected, several=wanted > 1)
    if expected == "gpu":
        os.environ |= memory_settings(taken=taken)
    if platform != "auto":
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else "cpu")
    os.environ |= thread_settings(share)
    # Where devices exist already (a test, a notebook) what is there must do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", share)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without the CUDA plugin JAX fails by an assertion of its own.
        raise ValueError(
            f"platform {platform}: JAX finds no such device ({error or 'no plugin for it'}); install "
            "jax[cuda12], or set platform to cpu"
        ) from error
    mesh = make_mesh(axes, devices)
    if jax.process_count() > 1 and len(mesh.local_devices) != share:
        raise ValueError(
            f"--mesh asks for {wanted} devices of {jax.process_count()} processes, {share} each, but this "
            f"one has {jax.local_device_count()} of {len(devices)}; ask for --mesh {len(devices)}, or hide "
            "devices with CUDA_VISIBLE_DEVICES"
        )
    shape = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    kind = devices[0].device_kind
    if devices[0].platform == "cpu" and wanted > 1:
        cores = len(os.sched_getaffinity(0))
        return mesh, f"mesh {shape}: {wanted} CPU devices are simulated on {cores} cores{_hosts()}"
    return mesh, f"mesh {shape} of {len(devices)} {kind}{_hosts()}"


def thread_settings(num_devices: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that give XLA threads enough for so many simulated CPU devices.

    A collective holds a thread until all devices are there, and a device may be in several at once, as in a
    loop and beside it. With XLA's own choice, the larger of cores and devices, all threads can be taken by
    devices that wait for one that gets none: the run hangs.
    """
    if num_devices == 1 or "NPROC" in environ:
        return {}
    return {"NPROC": str(max(os.cpu_count() or 1, THREADS_PER_DEVICE * num_devices))}


def _hosts() -> str:
    number = jax.process_count()
    return f", {jax.local_device_count()} in each of {number} processes" if number > 1 else ""

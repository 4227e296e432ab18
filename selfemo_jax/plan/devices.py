"""The accelerators that a plan may be made for: published figures, with their source.

Peaks and memory bandwidths are those that MFU is counted with (`model/flops.py`). Efficiencies are guesses,
said to be so wherever they are printed; measure them with `tools/bench_throughput.py` and pass your own.
"""

import difflib
import os
from dataclasses import dataclass, replace

from selfemo_jax.accelerators import memory_share
from selfemo_jax.model.flops import DEVICES

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanDevice:
    """One device, and its way to the others."""

    name: str
    memory: float
    """Bytes, as CUDA counts them: a little less than `nvidia-smi` shows, and not the number of the name."""
    flops: float
    """Dense bfloat16 FLOP/s (float32 for the CPU)."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the other devices of a host, one way."""
    source: str
    share: float = 0.94
    """Of the memory, that a run may fill: what JAX is told to take of a GPU (`accelerators.MEMORY_SHARE`, or
    the variable of the environment); of a CPU what the system leaves, a guess."""
    float32_share: float = 0.5
    """Of the rate, that float32 products reach: half of it in TF32, which XLA takes for them on these GPUs
    unless asked for more."""

    @property
    def usable(self) -> float:
        """Bytes that a run may fill."""
        return self.memory * self.share

    def flops_of(self, dtype: str) -> float:
        """FLOP/s of products in a type."""
        return self.flops * (self.float32_share if dtype == "float32" else 1.0)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What share of a peak is reached; guesses until measured."""

    train: float = 0.40
    """Of the FLOP/s, in the update."""
    forward: float = 0.45
    """Of the FLOP/s, in log-probs and prefill."""
    decode: float = 0.50
    """Of the memory's bandwidth, in decoding."""
    link: float = 0.70
    """Of the link, in collectives."""


def _device(name: str, memory_gib: float, link: float, source: str) -> PlanDevice:
    peak = DEVICES[name]
    return PlanDevice(
        name=name, memory=memory_gib * GIB, flops=peak.flops, bandwidth=peak.bandwidth, link=link,
        source=source,
    )  # fmt: skip


PLAN_DEVICES: dict[str, PlanDevice] = {
    "h200": _device("H200", 139.8, 450e9, "NVIDIA H200 data sheet: SXM, 141 GB, NVLink 900 GB/s"),
    "h100": _device("H100", 79.2, 450e9, "NVIDIA H100 data sheet: SXM, 80 GB, NVLink 900 GB/s"),
    "h100-pcie": _device("H100 PCIe", 79.2, 64e9, "NVIDIA H100 data sheet: PCIe 5, 128 GB/s"),
    "a100": _device("A100", 79.2, 300e9, "NVIDIA A100 data sheet: 80 GB, NVLink 600 GB/s both ways"),
    "l40s": _device("L40S", 44.4, 32e9, "NVIDIA L40S data sheet: PCIe 4, 64 GB/s both ways"),
    "l4": _device("L4", 22.0, 32e9, "NVIDIA L4 data sheet: PCIe 4, 64 GB/s both ways"),
}  # fmt: skip
"""By the name that ``--device`` takes."""


def plan_device(name: str, *, num_devices: int = 1, taken: float = 0.0) -> PlanDevice:
    """A device of the table, less the share ``taken`` by servers, or ``cpu``: this machine cut into
    ``num_devices``, its speed a guess."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0))
        return PlanDevice(
            name="CPU",
            memory=memory / num_devices,
            flops=60e9 * cores / num_devices,
            bandwidth=20e9 / num_devices,
            link=5e9 / num_devices,
            float32_share=1.0,
            source=f"this machine, {cores} cores over {num_devices} devices; 60 GFLOP/s a core is a guess",
        )
    if name.lower() not in PLAN_DEVICES:
        known = [*PLAN_DEVICES, "cpu"]
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"--device {name}: not in the table; {hint}")
    return replace(PLAN_DEVICES[name.lower()], share=memory_share(taken=taken))

"""XLA flags by platform and mesh, each with where it was measured; what was not measured is not set.

    python -m selfemo_jax.xla_flags

prints the table. `devices.prepare` sets the rows that are `applied`, and leaves what the user has set. To try
a row, put its flags into XLA_FLAGS and compare two runs of `tools/bench_throughput.py`; a row is applied once
its number stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FlagRow:
    """Flags for one kind of device and mesh."""

    platform: str
    """``cpu`` or ``gpu``."""
    several: bool | None
    """For meshes of several devices, of one, or (None) of any number."""
    flags: tuple[str, ...]
    purpose: str
    measured: str
    """Machine, command and number, or ``not measured``."""
    applied: bool = False
    """Whether runs set them by themselves."""


_NOT_MEASURED = "not measured: no GPU was at hand"
TABLE = (
    FlagRow(
        platform="cpu",
        several=None,
        flags=(
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
            "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
        ),
        purpose="XLA aborts when one simulated device is a minute late, as on shared cores",
        measured="for patience, not for speed: 8 simulated devices on 2 loaded cores run to their end",
        applied=True,
    ),
    FlagRow(
        platform="cpu",
        several=False,
        flags=("--xla_cpu_enable_fast_math=true",),
        purpose="reordered sums",
        measured="2 Zen 3 cores, training step of a prototype, 3 rounds: 0.93 to 1.08 of the time, as all "
        "others tried (onednn, xnnpack, vector width, fusion emitters, concurrency scheduler): noise",
    ),
    FlagRow(
        platform="gpu",
        several=False,
        flags=("--xla_gpu_triton_gemm_any=true",),
        purpose="Triton for every matrix product that it supports",
        measured=_NOT_MEASURED,
    ),
    FlagRow(
        platform="gpu",
        several=True,
        flags=(
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
        ),
        purpose="weights of the next layer on their way (fsdp) while this one computes",
        measured=_NOT_MEASURED,
    ),
    FlagRow(
        platform="gpu",
        several=True,
        flags=(
            "--xla_gpu_threshold_for_windowed_einsum_mib=0",
            "--xla_gpu_multi_streamed_windowed_einsum=true",
        ),
        purpose="products cut up so that the sums over tp overlap with them",
        measured=_NOT_MEASURED,
    ),
)


def with_applied(current: str) -> str:
    """The value of XLA_FLAGS with the applied rows added, but for flags that it already names."""
    named = {word.split("=")[0] for word in current.split()}
    added = [flag for row in TABLE if row.applied for flag in row.flags if flag.split("=")[0] not in named]
    return " ".join([*current.split(), *added])


def lines() -> list[str]:
    """The table in words."""
    number: Mapping[bool | None, str] = {True: "several devices", False: "one device", None: "any mesh"}
    found = []
    for row in TABLE:
        found.append(f"{row.platform}, {number[row.several]}: {row.purpose}{' (set)' if row.applied else ''}")
        found += [f"    {flag}" for flag in row.flags]
        found.append(f"    {row.measured}")
    return found


if __name__ == "__main__":
    print("\n".join(lines()))

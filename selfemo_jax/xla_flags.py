"""XLA flags by platform and mesh, each with where it was measured; what was not measured is not set.

    python -m selfemo_jax.xla_flags                    # the table
    python -m selfemo_jax.xla_flags --list gpu one     # the flags of each row to try there, a row a line

`devices.prepare` sets the rows of its platform and mesh that are `applied`, and leaves what the user has set.
A row is tried by `tools/bench_throughput.py --jax_flags=...` against a run without it, as `.ci/gpu` does for
those of one GPU; it is applied once its number stands here.
"""

import argparse
from collections.abc import Mapping, Sequence
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


def rows_for(platform: str, *, several: bool, table: Sequence[FlagRow] = TABLE) -> list[FlagRow]:
    """The rows for a platform and a mesh of one or of several devices."""
    return [row for row in table if row.platform == platform and row.several in (None, several)]


def with_applied(current: str, *, platform: str, several: bool, table: Sequence[FlagRow] = TABLE) -> str:
    """The value of XLA_FLAGS with the applied rows for the platform and mesh added, but for flags that it
    already names."""
    named = {word.split("=")[0] for word in current.split()}
    rows = [row for row in rows_for(platform, several=several, table=table) if row.applied]
    added = [flag for row in rows for flag in row.flags if flag.split("=")[0] not in named]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or the rows of a platform and mesh that are not applied."""
    parser = argparse.ArgumentParser(prog="python -m selfemo_jax.xla_flags")
    parser.add_argument("--list", nargs=2, metavar=("cpu|gpu", "one|several"), help="rows to try there")
    chosen = parser.parse_args(argv).list
    if chosen is None:
        print("\n".join(lines()))
        return
    platform, number = chosen
    if platform not in ("cpu", "gpu") or number not in ("one", "several"):
        parser.error(f"--list {platform} {number}: expected cpu or gpu, then one or several")
    for row in rows_for(platform, several=number == "several"):
        if not row.applied:
            print(" ".join(row.flags))


if __name__ == "__main__":
    main()

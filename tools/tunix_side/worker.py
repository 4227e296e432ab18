"""The process of tunix's side; started by the driver, talked to as `selfemo_jax/bench/worker.py` says."""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import jax

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "qwix", "numpy", "jax-cuda12-plugin")


class TunixSide:
    """One process's first device."""

    def describe(self) -> dict[str, Any]:
        """Versions, device, flags."""
        device = jax.devices()[0]
        return {
            "side": "tunix",
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "python": sys.version.split()[0],
            "platform": device.platform,
            "device": device.device_kind,
            "num_devices": 1,
            "cores": len(os.sched_getaffinity(0)),
            "flags": {name: os.environ[name] for name in ("XLA_FLAGS",) if name in os.environ},
        }

    def peak_bytes(self) -> int | None:
        """Most bytes of the device that were in use."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def profile(self, run: Any, folder: str) -> list[tuple[str, float]]:
        """One run's trace for XProf or TensorBoard; its operations are not summed up here."""
        with jax.profiler.trace(folder):
            run()
        return []

    def open(self, case: dict[str, Any]) -> Any:
        """The whole step, which is all that this side does; ImportError where tunix is not installed."""
        if case["phase"] != "rl_step":
            raise ValueError(f"tunix takes part in rl_step alone, not in {case['phase']}")
        from . import grpo

        return grpo.Step(case)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--protocol", required=True, help="selfemo_jax/bench/worker.py")
    parser.add_argument("--platform", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--precision", default="default")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("bench_worker", args.protocol)
    assert spec is not None and spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    answers = protocol.take_stdout()
    if args.platform != "auto":
        jax.config.update("jax_platforms", "cuda" if args.platform == "gpu" else "cpu")
    if args.precision != "default":
        jax.config.update("jax_default_matmul_precision", args.precision)
    protocol.serve(TunixSide(), commands=sys.stdin, answers=answers)

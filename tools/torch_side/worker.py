"""The process of the PyTorch side; started by the driver, talked to as `selfemo_jax/bench/worker.py` says.

Several devices are one process each; the first talks to the driver and hands each command to the others.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PACKAGES = ("torch", "transformers", "trl", "accelerate", "flash-attn", "liger-kernel", "triton", "numpy")


class Run:
    """A phase ready to run; closing it drops what it holds."""

    def __init__(self, run: Callable[[], dict[str, Any]]):
        self._run: Callable[[], dict[str, Any]] | None = run

    def __call__(self) -> dict[str, Any]:
        assert self._run is not None
        return self._run()

    def close(self) -> None:
        self._run = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TorchSide:
    """One process's device."""

    def __init__(self, device: torch.device):
        self._device = device

    def describe(self) -> dict[str, Any]:
        """Versions, device, flags."""
        cuda = self._device.type == "cuda"
        return {
            "side": "torch",
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "python": sys.version.split()[0],
            "platform": "gpu" if cuda else "cpu",
            "device": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "num_devices": dist.get_world_size() if dist.is_initialized() else 1,
            "cores": len(os.sched_getaffinity(0)),
            "flags": {
                "threads": torch.get_num_threads(),
                "matmul": torch.get_float32_matmul_precision(),
                "attention": _attentions(cuda),
            }
            | {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "LD_PRELOAD") if name in os.environ},
        }

    def peak_bytes(self) -> int | None:
        """Most bytes of the device that were in use."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def profile(self, run: Run, folder: str) -> list[tuple[str, float]]:
        """One run's trace for TensorBoard or chrome://tracing, and the operations by their time."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        with profile(activities=activities) as found:
            run()
        Path(folder).mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(Path(folder) / "trace.json"))
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        averages = found.key_averages()
        (Path(folder) / "operations.txt").write_text(averages.table(sort_by=order, row_limit=20))
        items = sorted(((one.key, getattr(one, order) / 1e6) for one in averages), key=lambda item: -item[1])
        return items[:10]

    def open(self, case: dict[str, Any]) -> Run:
        """The contestant of a case; ImportError where a library that it needs is not installed."""
        phase = case["phase"]
        if dist.is_initialized() and phase not in ("logprobs", "rl_update", "sft_update", "products"):
            raise ValueError(f"{phase} runs on one device on this side")
        return Run(_maker(phase, trl=case.get("trl", False))(case, self._device))


def _maker(phase: str, *, trl: bool) -> Callable[..., Callable[[], dict[str, Any]]]:
    """What builds a phase; only what the phase needs is imported."""
    if phase == "products":
        return products
    if trl:
        from .trl_step import trl_run

        return trl_run
    from . import rows, sampling

    return {
        "logprobs": rows.logprob_run,
        "rl_update": rows.update_run,
        "sft_update": rows.update_run,
        "generate": sampling.generate_run,
        "refresh": sampling.refresh_run,
        "rl_step": sampling.step_run,
    }[phase]


def products(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """The best rate of one large matrix product, as a peak for devices whose peak is not published."""
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device).to(getattr(torch, case["dtype"]))

    def run() -> dict[str, float]:
        taken = []
        for _ in range(6):
            began = time.perf_counter()
            x @ x
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
        return {"flops_per_s": 2.0 * size**3 / min(taken)}

    return run


def _attentions(cuda: bool) -> list[str]:
    """What this side can use, the plain one first."""
    found = ["sdpa"]
    if cuda:
        found.append("flex_attention")
        if importlib.util.find_spec("flash_attn") is not None:
            found.append("flash_attention_2")
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(first: bool, source: Any) -> Iterator[str]:
    """The driver's commands, in every process."""
    while True:
        line = [source.readline() if first else None]
        if dist.is_initialized():
            dist.broadcast_object_list(line)
        if not line[0]:
            return
        yield line[0]


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--protocol", required=True, help="selfemo_jax/bench/worker.py")
    parser.add_argument("--platform", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("bench_worker", args.protocol)
    assert spec is not None and spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    answers = protocol.take_stdout()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = args.platform != "cpu" and torch.cuda.is_available()
    if args.platform == "gpu" and not cuda:
        raise SystemExit("this environment's torch finds no GPU")
    found = torch.cuda.device_count()
    if cuda and found < world:
        # Every process ends here: one alone would leave the others waiting for it.
        raise SystemExit(f"{world} GPUs are asked for; this environment's torch finds {found}")
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank > 0:
        answers = open(os.devnull, "w")  # noqa: SIM115
    protocol.serve(TorchSide(device), commands=_lines(rank == 0, sys.stdin), answers=answers)
    if world > 1:
        dist.destroy_process_group()

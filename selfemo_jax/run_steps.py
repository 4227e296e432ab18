"""What is measured and told of the steps of a run: seconds, tokens/s, compilations, traces, a forecast."""

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from selfemo_jax.compiles import CompileCounter
from selfemo_jax.config import Config
from selfemo_jax.distributed import is_first
from selfemo_jax.lengths import report_lengths
from selfemo_jax.phases import Phase
from selfemo_jax.profiling import StepProfiler
from selfemo_jax.runlog import RunLog

Item = TypeVar("Item")


class StepWatch:
    """Follows the steps of one phase after the other; holds the profiler and listens to the compiler."""

    def __init__(self, config: Config, log: RunLog):
        self._config, self._log = config, log
        self._compiles = CompileCounter()
        steps = config.log.profile_steps if is_first() else None
        self._profiler = StepProfiler(steps, log.run_dir / "profile")
        self._began = time.perf_counter()
        self._item: Any = None
        self._told: Phase | None = None

    def follow(
        self, phase: Phase, items: Iterator[Item], *, total: int, done: int, number: Callable[[], int]
    ) -> Iterator[Item]:
        """The items, with progress from ``done`` towards ``total``; the wait for each is the time of the
        rollout, or of the data. ``number`` gives the global step that the next one is."""
        waited = "data" if phase.kind in ("sft", "labels") else "rollout"
        iterator = iter(items)
        with self._log.phase(phase.name, total=total, done=done):
            while True:
                self._began = time.perf_counter()
                self._profiler.begin(number())
                try:
                    with self._log.timer(waited):
                        item = next(iterator)
                except StopIteration:
                    return
                self._item = item
                yield item

    def end(self, number: int, *, tokens: float, wait_for: Any) -> dict[str, float]:
        """Metrics of the global step that ends now."""
        seconds = time.perf_counter() - self._began
        if folder := self._profiler.end(number, wait_for):
            self._log.say(f"profile of step {number} and before: {folder}")
        speed = {"time/step": seconds, "perf/tokens_per_s": tokens / seconds}
        return speed | peak_memory() | self._compiles.take()

    def forecast(self, phase: Phase, *, left: int, total: int, seconds: float) -> None:
        """Once a phase: how long the rest takes at most, and how long prompts and completions are."""
        if phase == self._told:
            return
        self._told = phase
        minutes = seconds * left / 60
        self._log.say(f"{phase.name}: {total} steps, the rest takes at most {minutes:.1f} min")
        report_lengths(self._item, phase, self._config, self._log)

    def close(self) -> None:
        self._compiles.close()
        self._profiler.close()


def peak_memory() -> dict[str, float]:
    """The most memory in GiB that this process ever held, and the most of any of its devices, where they
    tell it: a CPU does not."""
    found = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if peaks := [peak for peak in told if peak is not None]:
        found["memory/device_peak_gib"] = max(peaks) / 2**30
    return found

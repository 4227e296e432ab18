"""Traces of chosen steps by the JAX profiler, for XProf, TensorBoard or Perfetto; what they say in short."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from selfemo_jax.config_check import parse_steps


class StepProfiler:
    """Records the steps ``FIRST:LAST`` into ``folder``; None records nothing. A resumed run that begins
    between them records the rest."""

    def __init__(self, steps: str | None, folder: Path):
        self._steps = None if steps is None else parse_steps(steps)
        self._folder = folder
        self._on = False

    def begin(self, step: int) -> None:
        """Before a step: start recording if it is one of them."""
        if self._steps is not None and not self._on and self._steps[0] <= step <= self._steps[1]:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def end(self, step: int, wait_for: Any = None) -> Path | None:
        """After a step: stop recording at the last, once ``wait_for`` is computed; the folder if that was
        so."""
        if self._steps is None or not self._on or step < self._steps[1]:
            return None
        jax.block_until_ready(wait_for)
        self.close()
        return self._folder

    def close(self) -> None:
        """Write what was recorded so far."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def largest_items(folder: Path, *, num: int = 10) -> list[tuple[str, float]]:
    """Names of the compiled operations of the newest trace under ``folder`` with their seconds, summed over
    all threads, largest first; numbers at the ends of names are left out."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    seconds: dict[str, float] = {}
    for name, nanoseconds in _operations(data):
        seconds[name] = seconds.get(name, 0.0) + nanoseconds / 1e9
    return sorted(seconds.items(), key=lambda item: -item[1])[:num]


def _operations(data: Any) -> Iterable[tuple[str, float]]:
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                named = dict(event.stats)
                if "hlo_op" not in named:
                    continue
                kind = str(named["hlo_op"]).rstrip("0123456789").rstrip(".")
                yield kind, event.duration_ns

"""How the benchmark talks to the process of a side: one JSON object a line, down its stdin and up a pipe.

Standard library only: the PyTorch side loads this file by its path, from an environment of its own, so that
both sides are driven, timed and read by the same lines.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Contestant(Protocol):
    """One way to do one phase's work on one side, built and compiled."""

    def __call__(self) -> dict[str, float]:
        """Do the work once and wait for it. What it returns beside "loss" and the like: keys that end in
        ``_s`` are seconds of parts of it."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Side(Protocol):
    """What a side's process must offer."""

    def describe(self) -> dict[str, Any]:
        """Versions, device, flags."""
        ...

    def open(self, case: dict[str, Any]) -> Contestant:
        """Build a contestant; ValueError or ImportError where this side cannot do it."""
        ...

    def peak_bytes(self) -> int | None:
        """Most bytes of the accelerator in use so far; None on a CPU."""
        ...

    def profile(self, run: Contestant, folder: str) -> list[tuple[str, float]]:
        """Run once and write a trace to the folder; the largest operations and their seconds."""
        ...


def serve(side: Side, *, commands: Any, answers: Any) -> None:
    """Answer commands until there are none left. An exception ends the command, not the process."""
    contestants: dict[str, Contestant] = {}
    for line in commands:
        request = json.loads(line)
        try:
            answer = _answer(side, contestants, request)
        # The driver tells what went wrong, and goes on with the other contestants.
        except Exception as error:
            trace = traceback.format_exc()
            print(trace, file=sys.stderr, flush=True)
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:2000]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for contestant in contestants.values():
        contestant.close()


def _answer(side: Side, contestants: dict[str, Contestant], request: dict[str, Any]) -> dict[str, Any]:
    command = request["command"]
    if command == "describe":
        return side.describe() | {"allocator": allocator_of(os.environ)}
    name = request["name"]
    if command == "open":
        began = time.perf_counter()
        contestant = side.open(request["case"])
        built = time.perf_counter()
        try:
            first = contestant()
        except BaseException:
            contestant.close()
            raise
        contestants[name] = contestant
        return {"build_s": built - began, "first_s": time.perf_counter() - built, "values": first}
    if name not in contestants:
        raise ValueError(f"{name} is not open: the process that held it ended, or it never opened")
    if command == "run":
        return {"runs": [timed(contestants[name]) for _ in range(request["num"])]}
    if command == "profile":
        return {"items": side.profile(contestants[name], request["folder"])}
    if command == "close":
        contestants.pop(name).close()
        gc.collect()
        return {"peak_bytes": side.peak_bytes(), "peak_host_bytes": peak_host_bytes()}
    raise ValueError(f"unknown command {command!r}")


def allocator_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which an environment chooses or sets the C library's allocator."""
    return {
        name: value
        for name, value in environ.items()
        if name in ("GLIBC_TUNABLES", "LD_PRELOAD") or name.startswith("MALLOC_")
    }


def timed(run: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """One run: seconds by the clock and of the processor, and what it returned."""
    began, used = time.perf_counter(), time.process_time()
    values = run()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "values": values,
    }


def peak_host_bytes() -> int:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_stdout() -> Any:
    """The process's stdout for answers alone; whatever libraries print goes to stderr instead."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return private

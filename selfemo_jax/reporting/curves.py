"""Metrics of a run as columns, its phases, and where its time went."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_POINTS = 3000
"""Points of a curve beyond which neighbours are averaged."""
SHARES = ("parse/", "harvest/", "data/")
"""Families of shares and counts of which a step logs only those above zero."""
COVERS_THE_STEP = ("time/step",)
"""Timers that hold the others."""

Line = Mapping[str, Any]


def phases(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Name, first and last global step of each phase, in order."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if not found or found[-1]["name"] != line["phase"]:
            found.append({"name": line["phase"], "first": line["step"], "last": line["step"]})
        found[-1]["last"] = line["step"]
    return found


def columns(lines: Sequence[Line], *, most: int = MOST_POINTS) -> dict[str, Any]:
    """``steps`` and one list of the same length per metric, None where a step did not log it.

    Above ``most`` steps neighbours within a phase are averaged, so that sparse metrics stay.
    """
    names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "phase")))
    lines = [_with_zeros(line, names) for line in lines]
    buckets = _buckets(lines, max(1, -(-len(lines) // most)))
    series: dict[str, list[float | None]] = {}
    for name in names:
        values = [_mean([line.get(name) for line in bucket]) for bucket in buckets]
        if any(value is not None for value in values):
            series[name] = values
    return {"steps": [bucket[-1]["step"] for bucket in buckets], "series": series}


def phase_times(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Steps, seconds and seconds by timer of each phase; ``other`` is what no timer saw."""
    rows = []
    for phase in phases(lines):
        inside = [line for line in lines if phase["first"] <= line["step"] <= phase["last"]]
        names = dict.fromkeys(name for line in inside for name in line if name.startswith("time/"))
        parts = {
            name.removeprefix("time/"): _total(inside, name) for name in names if name not in COVERS_THE_STEP
        }
        seconds = _total(inside, "time/step") or sum(parts.values())
        # A timer of the save at a phase's end is logged with the next phase's first step.
        parts["other"] = max(0.0, seconds - sum(parts.values()))
        rows.append(
            {
                "phase": phase["name"],
                "steps": len(inside),
                "seconds": round(seconds, 2),
                "parts": {name: round(value, 3) for name, value in parts.items() if value > 0},
                "compile_seconds": round(_total(inside, "compile/seconds"), 2),
                "tokens": int(_total(inside, "batch/tokens")),
            }
        )
    return rows


def peaks(lines: Sequence[Line]) -> dict[str, float]:
    """The largest value of each ``memory/`` metric: a run that was resumed measures anew."""
    found: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("memory/") and isinstance(value, int | float):
                found[name] = max(value, found.get(name, value))
    return found


def _with_zeros(line: Line, names: Sequence[str]) -> Line:
    """The line with the shares and counts that a step leaves out because they are zero."""
    zeros = {}
    for family in SHARES:
        if any(name.startswith(family) for name in line):
            zeros |= {name: 0.0 for name in names if name.startswith(family)}
    return {**zeros, **line}


def _buckets(lines: Sequence[Line], size: int) -> list[list[Line]]:
    buckets: list[list[Line]] = []
    for line in lines:
        if not buckets or len(buckets[-1]) == size or buckets[-1][0]["phase"] != line["phase"]:
            buckets.append([])
        buckets[-1].append(line)
    return buckets


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]
    return float(f"{sum(known) / len(known):.5g}") if known else None


def _total(lines: Sequence[Line], name: str) -> float:
    return sum(value for line in lines if isinstance(value := line.get(name), int | float))

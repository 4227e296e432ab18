"""What a benchmark found, as one JSON object: rows, ratios, growth; and a comparison with an earlier one."""

import dataclasses
import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.bench.contestants import LOSS, OPTIM
from selfemo_jax.bench.settings import BACKENDS, BenchSettings
from selfemo_jax.model import flops as flop_counts

Row = dict[str, Any]
FORMAT = 1
SAME_WORK = (
    "model", "dtype", "groups", "group_size", "prompt", "completion", "row_tokens", "prefix_row_tokens",
    "micro_tokens", "logits_budget_mib", "remat", "seed", "devices",
)  # fmt: skip
"""Settings in which two results must agree to be compared."""
GENERATED = ("prefill", "decode", "rollout")
"""Rows of the phase generate."""


def measured(phase: str, seconds: Sequence[float], *, tokens: int | None, flops: float | None) -> Row:
    """Medians and spread of one contestant's timed runs of a phase."""
    median = statistics.median(seconds)
    return {
        "phase": phase,
        "seconds": list(seconds),
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "tokens": tokens,
        # Decoding is a difference of two runs: where it is below the noise there is no rate.
        "tokens_per_s": None if tokens is None or median <= 0 else tokens / median,
        "flops": flops,
    }


def assemble(
    settings: BenchSettings,
    *,
    rows: list[Row],
    sides: Mapping[str, Any],
    left_out: list[Any],
    unavailable: list[Any],
    profiles: list[Any],
    disagreements: list[str],
    peak: Mapping[str, Any],
    began: str,
    load: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole result; each row gains its MFU, and decoding on a GPU its share of the memory floor."""
    # Several devices of a CPU are the same cores, whose peak was measured with all of them.
    on_cpu = all(side["platform"] == "cpu" for side in sides.values())
    for row in rows:
        if row["flops"] is not None and row["median_s"] > 0:
            num_devices = 1 if on_cpu else row["devices"]
            row["mfu"] = flop_counts.mfu(
                row["flops"], row["median_s"], peak=peak["flops_per_s"], num_devices=num_devices
            )
        if row["phase"] == "decode" and "bytes_per_s" in peak:
            row["floor_share"] = decode_floor(settings, row) / peak["bytes_per_s"] / row["median_s"]
    commit, dirty = _commit()
    return {
        "format": FORMAT,
        "time": began,
        "commit": commit,
        "dirty": dirty,
        "settings": dataclasses.asdict(settings),
        "model": dataclasses.asdict(settings.model_config),
        "objective": {"loss": dataclasses.asdict(LOSS), "optim": dataclasses.asdict(OPTIM)},
        "sides": dict(sides),
        "peak": dict(peak),
        "load": dict(load),
        "rows": rows,
        "ratios": ratios(rows),
        "growth": growth(rows),
        "left_out": left_out,
        "unavailable": unavailable,
        "profiles": profiles,
        "disagreements": disagreements,
    }


def decode_floor(settings: BenchSettings, row: Row) -> float:
    """Bytes that a device must read in all steps of a decode: weights whole, and the caches of its groups,
    prompts once for a group."""
    sizes = dataclasses.replace(settings, **row["point"])
    total = 0.0
    for sampled in range(1, sizes.completion):
        total += flop_counts.decode_bytes(
            settings.model_config,
            prompts=[sizes.prompt] * -(-sizes.groups // row["devices"]),
            group_size=sizes.group_size,
            sampled=float(sampled),
            itemsize=2 if settings.dtype == "bfloat16" else 4,
        )
    return total


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times as fast each JAX row is: as PyTorch on the same layout, as the fastest PyTorch, and as
    TRL and tunix; round by round, so that what slows a round slows both."""
    found = []
    for ours in rows:
        if ours["side"] != "jax":
            continue
        same = [r for r in rows if (r["phase"], r["point"]) == (ours["phase"], ours["point"])]
        theirs = sorted((r for r in same if r["side"] == "torch"), key=lambda r: r["median_s"])
        rivals = {row["label"]: row for row in theirs if row["layout"] == ours["layout"]}
        rivals |= {row["label"]: row for row in theirs[:1]}
        rivals |= {row["label"]: row for row in same if row["side"] in ("trl", "tunix")}
        for label, row in rivals.items():
            pairs = list(zip(ours["seconds"], row["seconds"], strict=False))
            if min(map(min, pairs)) <= 0:
                continue
            by_round = [b / a for a, b in pairs]
            one = {
                "phase": ours["phase"], "point": ours["point"], "side": "jax", "layout": ours["layout"],
                "ours": ours["label"], "theirs": label,
                "median": statistics.median(by_round), "min": min(by_round), "max": max(by_round),
                "fastest_torch": bool(theirs) and label == theirs[0]["label"],
            }  # fmt: skip
            # Several devices of PyTorch are as many processes, and one of them counts its own seconds.
            if "cpu_seconds" in ours and "cpu_seconds" in row and row["devices"] == 1:
                cpu = [b / a for a, b in zip(ours["cpu_seconds"], row["cpu_seconds"], strict=False)]
                one["cpu_median"] = statistics.median(cpu)
            found.append(one)
    return found


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Exponent of the cost in each swept setting: the slope of log seconds over log value (1: linear).

    The unswept point belongs to every sweep.
    """
    found = []
    names = sorted({name for row in rows for name in row["point"]})
    # Not the label: which way of PyTorch was fastest may change along a sweep.
    lines = sorted({(row["phase"], row["side"], row["layout"]) for row in rows})
    for name in names:
        for line in lines:
            of_line = [r for r in rows if (r["phase"], r["side"], r["layout"]) == line and r["median_s"] > 0]
            swept = {r["point"][name]: r["median_s"] for r in of_line if name in r["point"]}
            base = [r for r in of_line if not r["point"]]
            if base and swept:
                swept[base[0]["base"][name]] = base[0]["median_s"]
            if len(swept) < 2:
                continue
            x, y = [math.log(v) for v in swept], [math.log(s) for s in swept.values()]
            slope = statistics.linear_regression(x, y).slope
            phase, side, layout = line
            found.append(
                {"setting": name, "phase": phase, "side": side, "layout": layout, "exponent": slope,
                 "seconds": {str(value): swept[value] for value in sorted(swept)}}
            )  # fmt: skip
    return found


def check_same_work(old: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError where an earlier result is not of the work that ``settings`` ask for."""
    if old.get("format") != FORMAT:
        raise ValueError(f"--compare: format {old.get('format')!r}; this version writes and reads {FORMAT}")
    differ = [name for name in SAME_WORK if old["settings"].get(name) != settings[name]]
    if differ:
        raise ValueError(f"--compare: the two differ in {', '.join(differ)}; run the same settings")


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], *, threshold: float, by: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each row of both with its change (0.1: a tenth slower than before), worst first; and what only the old
    one has, with whether the new one's settings asked for it too.

    ``by`` ratio compares how far ahead of the fastest PyTorch JAX is, for results of different or busy
    machines; seconds and cpu_seconds ask for the same devices. ValueError where the two cannot be compared.
    """
    check_same_work(old, new["settings"])
    if by != "ratio":
        for side, found in new["sides"].items():
            before = old["sides"].get(side, found)
            mine, theirs = ((one["device"], one["num_devices"], one["cores"]) for one in (found, before))
            if mine != theirs:
                raise ValueError(
                    f"--compare: {side} ran on {theirs}, now on {mine}; use --compare_by ratio, "
                    "which compares JAX with PyTorch within each result"
                )
    before, after = _measures(old, by), _measures(new, by)
    changes = [
        {"what": key, "old": before[key], "new": value, "change": value / before[key] - 1.0,
         "regressed": value / before[key] - 1.0 > threshold}
        for key, value in after.items() if key in before
    ]  # fmt: skip
    seats, measured_now = _seats(old, by), _seats(new, by)
    missing = [
        {"what": key, "asked": _asked(seats[key], new["settings"])}
        for key in before
        if key not in measured_now
    ]
    if not changes and not any(one["asked"] for one in missing):
        raise ValueError(
            f"--compare: the two have nothing in common: {', '.join(before) or 'nothing'} there, "
            f"{', '.join(after) or 'nothing'} here"
        )
    return sorted(changes, key=lambda one: -one["change"]), missing


def _measures(result: Mapping[str, Any], by: str) -> dict[str, float]:
    """What is compared, lower is better; a decode below the noise has no number."""
    if by == "ratio":
        return {_seat(one): 1.0 / one["median"] for one in ratios(result["rows"]) if one["fastest_torch"]}
    value: Callable[[Row], Any] = {
        "seconds": lambda row: row["median_s"],
        "cpu_seconds": lambda row: statistics.median(row["cpu_seconds"]) if row.get("cpu_seconds") else None,
    }[by]
    rows = ((_seat(row), value(row)) for row in result["rows"])
    return {name: seconds for name, seconds in rows if seconds and seconds > 0}


def _seats(result: Mapping[str, Any], by: str) -> dict[str, Row]:
    """The rows that what is compared comes from."""
    rows = {_seat(row): row for row in result["rows"]}
    if by != "ratio":
        return rows
    rivals = [(row["phase"], row["point"]) for row in result["rows"] if row["side"] == "torch"]
    return {
        name: row
        for name, row in rows.items()
        if row["side"] == "jax" and (row["phase"], row["point"]) in rivals
    }


def _asked(row: Row, settings: Mapping[str, Any]) -> bool:
    """Whether these settings ask for such a row."""
    phase = "generate" if row["phase"] in GENERATED else row["phase"]
    backends = {"jax": ("jax", "both"), "tunix": BACKENDS if settings.get("tunix_python") else ()}
    return (
        phase in settings["phases"]
        and settings["backend"] in backends.get(row["side"], ("torch", "both"))
        and row["layout"] in ("", *settings["layouts"])
        and all(value in settings["sweep"].get(name, ()) for name, value in row["point"].items())
    )


def _seat(row: Row) -> str:
    """Who ran what; not which way it was done, since another may be the fastest now."""
    return _name(row["phase"], f"{row['side']} {row['layout']}".strip(), row["point"])


def _name(phase: str, who: str, point: Mapping[str, int]) -> str:
    at = ", ".join(f"{name}={value}" for name, value in point.items())
    return f"{phase}: {who}" + (f" ({at})" if at else "")


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout, and whether tracked files differ from it; None outside one."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parents[2]
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None

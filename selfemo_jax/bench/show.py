"""A benchmark's result for people: tables, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: Mapping[str, Any], console: Console) -> None:
    """Rows, ratios, growth, and what could not take part."""
    peak = result["peak"]
    for side, found in result["sides"].items():
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        memory = "".join(f"; {name}={value}" for name, value in found.get("allocator", {}).items())
        console.print(
            f"{side}: {found['num_devices']} x {found['device']}, {found['cores']} cores; {versions}{memory}"
        )
    before, after = (result["load"][when][0] for when in ("before", "after"))
    changed = " with changes" if result["dirty"] else ""
    console.print(
        f"peak {peak['flops_per_s'] / 1e12:.3g} TFLOP/s ({peak['source']}); load {before:.1f} before, "
        f"{after:.1f} after; commit {str(result['commit'])[:10]}{changed}"
    )
    table = Table(title="Seconds of one run, median and range")
    for name in ("phase", "", "at", "median s", "range", "tokens/s", "GFLOP", "MFU", "first run s"):
        table.add_column(name, justify="left" if name in ("phase", "", "at") else "right")
    for row in result["rows"]:
        table.add_row(
            row["phase"],
            row["label"],
            _point(row["point"]),
            f"{row['median_s']:.4g}",
            f"{row['min_s']:.4g} to {row['max_s']:.4g}",
            "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
            "" if row["flops"] is None else f"{row['flops'] / 1e9:.4g}",
            f"{row['mfu']:.1%}" if "mfu" in row else "",
            f"{row['first_s']:.1f}",
        )
    console.print(table)
    if result["ratios"]:
        table = Table(title="How many times as fast as PyTorch, TRL and tunix, round by round")
        for name in ("phase", "JAX", "against", "at", "median", "range", "CPU seconds"):
            table.add_column(name)
        for one in result["ratios"]:
            table.add_row(
                one["phase"],
                one["ours"],
                one["theirs"] + (" (fastest)" if one["fastest_torch"] else ""),
                _point(one["point"]),
                f"{one['median']:.2f}",
                f"{one['min']:.2f} to {one['max']:.2f}",
                f"{one['cpu_median']:.2f}" if "cpu_median" in one else "",
            )
        console.print(table)
    for row in result["rows"]:
        if "floor_share" in row:
            console.print(f"{row['label']}: decode takes the memory floor / {row['floor_share']:.1%}")
    for one in result["growth"]:
        who = f"{one['phase']}, {one['side']} {one['layout']}".strip()
        console.print(f"{who}: seconds grow as {one['setting']}^{one['exponent']:.2f}")
    for one in result["left_out"]:
        instead = f"{one['instead']} {one['its_seconds']:.3g}"
        console.print(f"{one['phase']}: left out {one['label']}, {one['seconds']:.3g} s, for {instead}")
    for one in result["profiles"]:
        if "error" in one:
            console.print(f"{one['phase']}: no trace of {one['label']}: {one['error'][:300]}")
            continue
        items = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in one["items"][:3])
        items = items or "see its trace"
        console.print(f"{one['phase']}: {one['label']}, largest: {items}")
    for one in result["unavailable"]:
        console.print(f"{one['phase']}: {one['label']} did not take part: {one['error'][:300]}")


def show_changes(
    changes: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """The comparison with an earlier result."""
    table = Table(title="Against the earlier result (lower is better)")
    for name in ("what", "before", "now", "change", ""):
        table.add_column(name)
    for one in changes:
        verdict = "REGRESSED" if one["regressed"] else ""
        table.add_row(one["what"], f"{one['old']:.4g}", f"{one['new']:.4g}", f"{one['change']:+.1%}", verdict)
    console.print(table)
    for one in missing:
        why = "asked for, and MISSING" if one["asked"] else "not asked for"
        console.print(f"measured before and not now: {one['what']} ({why})")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bars of seconds by phase with their range, and a line for each sweep. ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = [row for row in result["rows"] if not row["point"]]
    phases = list(dict.fromkeys(row["phase"] for row in base))
    swept = list(dict.fromkeys(one["setting"] for one in result["growth"]))
    columns = max(1, len(phases))
    figure, axes = plt.subplots(
        1 + len(swept), columns, figsize=(3.4 * columns, 3.2 * (1 + len(swept))), squeeze=False
    )
    colours = {"jax": "#4269d0", "torch": "#ef6f2e", "trl": "#9c6b4e", "tunix": "#3c9d6b"}
    for axis, phase in zip(axes[0], phases, strict=False):
        rows = [row for row in base if row["phase"] == phase]
        low = [row["median_s"] - row["min_s"] for row in rows]
        high = [row["max_s"] - row["median_s"] for row in rows]
        axis.barh(
            [row["label"] for row in rows],
            [row["median_s"] for row in rows],
            xerr=(low, high),
            color=[colours[row["side"]] for row in rows],
        )
        axis.invert_yaxis()
        axis.set_title(phase)
        axis.set_xlabel("s")
        axis.tick_params(axis="y", labelsize=7)
    for line, setting in zip(axes[1:], swept, strict=True):
        for axis, phase in zip(line, phases, strict=False):
            for one in result["growth"]:
                if (one["setting"], one["phase"]) == (setting, phase):
                    x, y = [int(value) for value in one["seconds"]], list(one["seconds"].values())
                    label = f"{one['side']} {one['layout']}: {one['exponent']:.2f}"
                    axis.plot(
                        x, y, marker="o", label=label, color=None if one["layout"] else colours[one["side"]]
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(setting)
            axis.set_title(phase)
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _point(point: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())

"""How studies show what they found: a table in the terminal, the same as Markdown, JSON, and pictures."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from selfemo_jax.appendlog import atomic_write

Row = Mapping[str, Any]


def titled(title: str, note: str) -> str:
    """A title with the note that its numbers carry."""
    return f"{title} - {note}" if note else title


def cell(name: str, value: Any) -> str:
    """A value as a table shows it: p-values with four digits, other fractions with two, bounds in
    brackets."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if name.startswith("p_") or name == "p":
            return "<0.0001" if value < 0.0001 else f"{value:.4f}"
        return f"{value:+.2f}" if name.startswith("difference") else f"{value:.2f}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(cell('', part) for part in value)}]"
    return str(value)


def shown(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows of strings with the same columns; ``<name> ci`` is put beside the value of ``<name>``, ``[-]``
    where a value has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    result = []
    for row in rows:
        line = {}
        for name in columns:
            if name.endswith(" ci") and name.removesuffix(" ci") in columns:
                continue
            line[name] = with_bounds(cell(name, row.get(name)), row, name)
        result.append(line)
    return result


def with_bounds(text: str, row: Row, name: str) -> str:
    """The text of a value with its interval behind it."""
    if row.get(name) is None or f"{name} ci" not in row:
        return text
    bounds = row[f"{name} ci"]
    return f"{text} {cell('', bounds) if bounds else '[-]'}"


def print_table(title: str, rows: Sequence[Row], *, width: int = 200) -> None:
    """The table in the terminal, under its title on one line: a note that is broken in two is not found."""
    lines = shown(rows)
    table = Table()
    for name in lines[0] if lines else ():
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for line in lines:
        table.add_row(*line.values())
    console = Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)


def markdown(title: str, rows: Sequence[Row]) -> str:
    """The table for a page."""
    lines = shown(rows)
    text = [f"**{title}**", ""]
    if lines:
        text += ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
        text += [
            "| " + " | ".join(value.replace("|", "\\|") for value in line.values()) + " |" for line in lines
        ]
    return "\n".join(text) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A study's result; the report reads lists of flat objects in it as tables."""
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def new_figure(width: float, height: float) -> Figure:
    """A picture that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture; its kind follows from the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

"""Lenient reading of what a run wrote: a report of a damaged or unfinished run says what it lacks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Notices = list[str]
"""What a reader of the report must know about the files behind it; readers append to it."""


_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def parse(text: str) -> Any:
    """JSON, with NaN and infinities as None; ValueError where it is none."""
    return _DECODER.decode(text)


def read_json(path: Path, notices: Notices) -> Any:
    """The file's content; None without the file, and with a notice where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} cannot be read: {error}")
        return None


def read_lines(path: Path, notices: Notices) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are counted in one notice."""
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = parse(line.decode("utf-8"))
            except ValueError:
                found = None
            if isinstance(found, dict):
                yield found
            else:
                damaged += 1
    if damaged:
        notices.append(f"{path.name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")


def number(value: Any, digits: int = 4) -> float | None:
    """A rounded number; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return round(float(value), digits) if value == value and abs(value) != float("inf") else None

"""The same blind comparison for people: a CSV to fill in, its key, and the way back.

The sheet holds items in a seeded order, each with two candidates in a seeded order; which side is which
stands in the key alone, which stays away from whoever fills in the sheet. Reading back checks that every item
is there once, that nobody changed what was to be judged, and that each verdict is A, B or tie.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.study.judge_prompt import TASKS, candidate

COLUMNS = ("item", "question", "person", "conversation", "candidate_A", "candidate_B", "verdict", "comment")
JUDGED = ("question", "person", "conversation", "candidate_A", "candidate_B")
KEY_FIELDS = ("id", "task", "A", "B", "sha256")
FORMULA = ("=", "+", "-", "@", "\t")
"""A cell that begins with one of these is run by spreadsheet programs; a quote goes before it."""

Outcome = str
"""``first``, ``second`` or ``tie``."""


def key_of(sheet: Path) -> Path:
    """Where the key of a sheet lies: beside it."""
    return sheet.with_name(f"{sheet.stem}_key.json")


def export_sheet(
    sheet: Path, pairs: Sequence[Mapping[str, Any]], *, seed: int, num: int | None = None
) -> int:
    """Write a sheet and its key; returns the number of items. ValueError where a sheet is there already,
    which somebody may have filled in."""
    for path in (sheet, key_of(sheet)):
        if path.exists():
            raise ValueError(f"{path} exists; verdicts in it would be lost. Name another file")
    rng = random.Random(f"judge sheet/{seed}")
    items = [(pair, task) for pair in pairs for task in TASKS]
    rng.shuffle(items)
    rows, key = [], {}
    for number, (pair, task) in enumerate(items[:num], start=1):
        name = f"{number:04d}"
        sides = ["first", "second"]
        rng.shuffle(sides)
        row = {
            "item": name,
            "question": task.asks,
            "person": f"{pair['responder']}: {pair.get('persona') or 'nothing special is known'}",
            "conversation": "\n".join(f"{who}: {text}" for who, text in pair["history"]),
            "candidate_A": candidate(pair[sides[0]], task),
            "candidate_B": candidate(pair[sides[1]], task),
            "verdict": "",
            "comment": "",
        }
        rows.append({column: _guarded(value) for column, value in row.items()})
        key[name] = {"id": pair["id"], "task": task.name, "A": sides[0], "B": sides[1], "sha256": digest(row)}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    # Spreadsheet programs take a CSV without this mark for Latin-1.
    atomic_write(sheet, "\ufeff" + buffer.getvalue())
    atomic_write(key_of(sheet), json.dumps({"seed": seed, "items": key}, indent=1) + "\n")
    return len(rows)


def read_sheet(sheet: Path) -> dict[tuple[str, str], Outcome]:
    """(input's id, task) -> which side was preferred. ValueError lists everything that is wrong."""
    if not sheet.is_file():
        raise ValueError(f"{sheet}: no such file; --export-sheet writes one to fill in")
    if not key_of(sheet).is_file():
        raise ValueError(f"{key_of(sheet)}: no such file; it lay beside the sheet when that was written")
    key = _read_key(key_of(sheet))
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in COLUMNS[:-1] if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{sheet}: column {', '.join(lacking)} is missing; save it as CSV with commas")
        rows = list(reader)
    problems, found = [], {}
    seen: set[str] = set()
    for row in rows:
        name = (row["item"] or "").strip().removeprefix("'").zfill(4)
        verdict = (row["verdict"] or "").strip().lower()
        if name not in key:
            problems.append(f"item {row['item']!r} is not of this sheet")
        elif name in seen:
            problems.append(f"item {name} occurs twice")
        elif digest({column: row[column] or "" for column in JUDGED}) != key[name]["sha256"]:
            problems.append(f"item {name}: what was to be judged has changed")
        elif verdict not in ("a", "b", "tie"):
            words = f"is {row['verdict']!r}" if verdict else "is empty"
            problems.append(f"item {name}: the verdict {words}; expected A, B or tie")
        elif (key[name]["id"], key[name]["task"]) in found:
            problems.append(f"item {name} asks {key[name]['task']} of {key[name]['id']} a second time")
        else:
            outcome = "tie" if verdict == "tie" else key[name][verdict.upper()]
            found[key[name]["id"], key[name]["task"]] = outcome
        seen.add(name)
    problems += [f"item {name} is missing" for name in key if name not in seen]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{sheet}: {'; '.join(problems[:10])}{more}")
    return found


def _read_key(path: Path) -> dict[str, dict[str, str]]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return {name: {field: str(item[field]) for field in KEY_FIELDS} for name, item in items.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: not what --export-sheet writes beside a sheet; it is damaged. Put back a copy, or "
            "export the sheet under another name with the same --seed and --sheet-items: that one's key fits"
        ) from None


def digest(row: Mapping[str, str]) -> str:
    """SHA-256 of what is judged, blind to white space and the guarding quote, which programs change."""
    parts = [" ".join(row[column].removeprefix("'").split()) for column in JUDGED]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _guarded(value: str) -> str:
    return f"'{value}" if value.startswith(FORMULA) else value

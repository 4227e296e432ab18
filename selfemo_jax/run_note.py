"""The words that every number of a run carries, such as `plumbing run, not a result`."""

from collections.abc import Sequence
from pathlib import Path

import yaml


def run_note(folder: Path) -> str:
    """The note of the run that a folder is, or lies in: also of a phase or checkpoint inside it."""
    for place in (folder.resolve(), *folder.resolve().parents[:3]):
        path = place / "config.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return str(content.get("note") or "") if isinstance(content, dict) else ""
    return ""


def joined_notes(notes: Sequence[str]) -> str:
    """Each note once."""
    return "; ".join(dict.fromkeys(part for note in notes for part in note.split("; ") if part))

"""Digests of the files of a folder, and what is said when they are others."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_digests(folder: Path) -> dict[str, str]:
    """Path inside ``folder`` -> SHA-256, of all files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        return dict(
            zip([str(path.relative_to(folder)) for path in paths], pool.map(_file_digest, paths), strict=True)
        )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """ValueError naming the files of ``folder`` that are missing or not those of ``expected``."""
    found = file_digests(folder)
    wrong = [
        f"{name} has another SHA-256" if name in found else f"{name} is missing"
        for name, digest in expected.items()
        if found.get(name) != digest
    ]
    if not wrong:
        return
    shown = ", ".join(wrong[:8]) + (f", and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    raise ValueError(
        f"{folder}: not as it was written: {shown}; the files are damaged, copy or make them anew"
    )

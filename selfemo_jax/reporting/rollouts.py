"""Recorded rollouts as columns in blocks: small to write, and decoded block by block in the page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.reporting.reading import Notices, number, read_lines

BLOCK_ROWS = 4000
"""Rollouts of one compressed block: the page stays responsive between two of them."""

FIELDS = ("group", "idx", "text", "predicted", "codes", "valid", "finish", "r1", "r2", "R", "advantage")
GROUP_FIELDS = ("step", "sample", "dataset", "origin", "history", "gold", "version")


def step_files(run_dir: Path) -> list[Path]:
    """Files of recorded texts in the order of their steps."""
    found = (run_dir / "rollouts").glob("step_*.jsonl")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")))


def choose_steps(files: Sequence[Path], *, most: int) -> tuple[list[Path], int]:
    """Evenly spaced steps, the last among them, that hold about ``most`` rollouts together; and how many
    rollouts there are in all."""
    counts = [path.read_bytes().count(b"\n") for path in files]
    total = sum(counts)
    if total <= most or not files:
        return list(files), total
    kept = max(1, int(len(files) * most / total))
    places = {len(files) - 1 - int(place) for place in np.arange(kept) * len(files) / kept}
    return [path for place, path in enumerate(files) if place in places], total


def blocks(files: Sequence[Path], run: int, notices: Notices) -> Iterator[dict[str, Any]]:
    """Blocks of columns; ``group`` of a row counts from the block's first group, and a group is never cut.

    The history of a prompt stands once, with its group.
    """
    rows, groups = _empty(FIELDS), _empty(GROUP_FIELDS)
    last = None
    for path in files:
        for line in read_lines(path, notices):
            if "sample_id" not in line or not isinstance(line.get("text"), str):
                continue
            key = (line.get("step"), line["sample_id"])
            if key != last or line.get("idx") == 0:
                if len(rows["idx"]) >= BLOCK_ROWS:
                    yield {"run": run, "rows": rows, "groups": groups}
                    rows, groups = _empty(FIELDS), _empty(GROUP_FIELDS)
                last = key
                _add_group(groups, line)
            _add_row(rows, line, len(groups["step"]) - 1)
    if rows["idx"]:
        yield {"run": run, "rows": rows, "groups": groups}


def _empty(names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names}


def _add_group(groups: dict[str, list[Any]], line: Mapping[str, Any]) -> None:
    groups["step"].append(line.get("step"))
    groups["sample"].append(str(line["sample_id"]))
    groups["dataset"].append(str(line.get("dataset", "")))
    groups["origin"].append(str(line.get("origin", "")))
    groups["history"].append(line.get("history") or [])
    groups["gold"].append(weights(line.get("gold")))
    groups["version"].append(", ".join(map(str, line.get("policy_versions") or [])))


def _add_row(rows: dict[str, list[Any]], line: Mapping[str, Any], group: int) -> None:
    read = line.get("parse") or {}
    # An invalid answer has no label, as in the strict scores, whatever its emotion field says.
    emotion = (read.get("emotion") or {}) if read.get("valid") else {}
    rows["group"].append(group)
    rows["idx"].append(line.get("idx"))
    rows["text"].append(line["text"])
    rows["predicted"].append(max(emotion, key=emotion.__getitem__) if emotion else "")
    rows["codes"].append(" ".join(read.get("codes") or ()))
    rows["valid"].append(int(bool(read.get("valid"))))
    rows["finish"].append(str(line.get("finish", "")))
    for name in ("r1", "r2", "R", "advantage"):
        rows[name].append(number(line.get(name)))


def weights(labels: Any) -> dict[str, float | None]:
    """Weighted labels with rounded weights, the heaviest first."""
    if not isinstance(labels, Mapping):
        return {}
    found = {str(name): number(value, 3) for name, value in labels.items()}
    return dict(sorted(found.items(), key=lambda pair: -(pair[1] or 0.0)))


def sampled_tokens(run_dir: Path) -> tuple[int, int]:
    """Tokens of all recorded completions, and the number of steps whose arrays are still there."""
    tokens = steps = 0
    for path in (run_dir / "rollouts").glob("step_*.npz"):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                tokens += int(arrays["lengths"].sum())
                steps += 1
        # zipfile, zlib and numpy raise a dozen kinds between them for a cut or overwritten file.
        except Exception:
            continue
    return tokens, steps

"""Outputs of studies as tables: significance, persona clusters, arms, whatever they hold.

A study's JSON is read by its shape, not by its kind: a list of flat objects is a table, and so is an object
of flat objects, whose keys become the first column. A pair of bounds beside a mean is an interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.reporting.reading import Notices, number, read_json, read_lines

MOST_ROWS = 500
MOST_POINTS = 2000
"""Personas of a picture beyond which evenly chosen ones are drawn."""
DRAWN = "points"
"""What a study's picture is drawn of: the curves of the run hold it, and a table of it hides the others."""
BOUNDS = (("low", "high"), ("ci_low", "ci_high"), ("lower", "upper"), ("lo", "hi"))
PAIRS = ("ci", "interval", "ci95", "confidence_interval")


def study_files(path: Path) -> list[Path]:
    """JSON files of a study: the file itself, or those of a folder."""
    return sorted(path.glob("*.json")) if path.is_dir() else [path]


def run_studies(folder: Path) -> list[Path]:
    """Outputs of studies that lie in a run's own folder."""
    return sorted((folder / "study").rglob("*.json"))


def tables(path: Path, notices: Notices, *, of: str = "") -> list[dict[str, Any]]:
    """Tables of a study's file: title, kind (clusters, significance or table), columns and rows. ``of`` names
    the run in whose folder it lies."""
    content = read_json(path, notices)
    found = []
    note = str(content.get("note") or "") if isinstance(content, Mapping) else ""
    for where, rows in _walk(content, ()):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        title = " / ".join((path.stem, *where))
        found.append(
            {
                "title": title,
                "source": f"{of}: {path.name}" if of else path.name,
                "note": note,
                "kind": _kind(title, columns),
                "columns": columns,
                "rows": [[row.get(name) for name in columns] for row in rows[:MOST_ROWS]],
                "left_out": max(0, len(rows) - MOST_ROWS),
                "interval": _interval(columns),
            }
        )
    if content is not None and not found:
        notices.append(f"{path.name} holds no table that can be shown")
    return found


def persona_map(folder: Path, notices: Notices) -> dict[str, Any] | None:
    """The picture of a run's persona clusters: points with their cluster (-1 for none) and sentence, and the
    names by cluster; None where no study has made one."""
    study = folder / "study"
    clusters = read_json(study / "clusters.json", notices)
    if not isinstance(clusters, Mapping) or not isinstance(clusters.get("clusters"), list):
        return None
    points = [
        [
            number(line["point"][0]),
            number(line["point"][1]),
            line.get("cluster"),
            str(line.get("persona", "")),
        ]
        for line in read_lines(study / "persona_clusters.jsonl", notices)
        if isinstance(line.get("point"), list) and len(line["point"]) == 2
    ]
    if not points:
        return None
    step = max(1, -(-len(points) // MOST_POINTS))
    names = {
        row.get("cluster"): str(row.get("name")) for row in clusters["clusters"] if isinstance(row, Mapping)
    }
    return {
        "num": len(points),
        "points": points[::step],
        "names": names,
        "embedding": clusters.get("embedding"),
    }


def _walk(node: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    if isinstance(node, Mapping):
        if len(node) > 1 and all(isinstance(value, Mapping) and _flat(value) for value in node.values()):
            yield where, [{"name": name, **value} for name, value in node.items()]
            return
        scalars = {name: value for name, value in node.items() if _scalar(value) and name != "note"}
        if where == () and scalars:
            yield ("values",), [{"name": name, "value": value} for name, value in scalars.items()]
        elif _flat(node) and scalars:
            yield where, [dict(node)]
            return
        for name, value in node.items():
            if where == () and name == DRAWN:
                continue
            yield from _walk(value, (*where, str(name)))
    elif isinstance(node, list) and node and all(isinstance(item, Mapping) for item in node):
        if all(map(_flat, node)):
            yield where, [dict(item) for item in node]
        else:
            for place, item in enumerate(node):
                yield from _walk(item, (*where, str(item.get("name", place))))


def _flat(node: Mapping[str, Any]) -> bool:
    return bool(node) and all(_scalar(value) or _pair(value) for value in node.values())


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(map(_scalar, value))


def _kind(title: str, columns: Sequence[str]) -> str:
    words = f"{title} {' '.join(columns)}".lower()
    if "cluster" in words:
        return "clusters"
    return "significance" if any(name in words for name in ("mcnemar", "holm", "p_value")) else "table"


def _interval(columns: Sequence[str]) -> list[str] | None:
    """Columns of mean and bounds: three names, or two where the bounds stand in one column."""
    means = [name for name in columns if name in ("mean", "value", "difference", "r1", "mean_r1", "reward")]
    for mean in means[:1]:
        for low, high in BOUNDS:
            if low in columns and high in columns:
                return [mean, low, high]
        for pair in PAIRS:
            if pair in columns:
                return [mean, pair]
    return None

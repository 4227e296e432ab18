"""What studies read of runs: metrics, notes, predictions. A file that is missing or damaged is an error that
says which, and what would make it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfemo_jax.run_note import joined_notes, run_note

Line = Mapping[str, Any]
ENDING = "_predictions.jsonl"
ROUNDING = 1e-5
"""Of scores that were made in single precision; one answer of a split is more."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The answers of one system to a split."""

    name: str
    split: str
    note: str
    """Words that every number made of them carries; empty when there are none."""
    labels: Mapping[str, tuple[str, ...]]
    """Data set -> its label list, in order."""
    sets: Mapping[str, Mapping[str, Line]]
    """Data set -> input's id -> the line of ``predictions.jsonl``."""


def read_jsonl(path: Path, *, hint: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file. ValueError names the file, the line and what to do."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: expected one JSON object a line; {hint}")
            records.append(record)
    return records


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order."""
    hint = "expected the folder of a run (--run_dir of a training)"
    lines = read_jsonl(run_dir / "metrics.jsonl", hint=hint)
    if not lines:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} is empty: the run has taken no step")
    return lines


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(found[-depth:]) for found in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.resolve().name} ({place})" for place, path in enumerate(paths, start=1)]


def predictions_file(source: Path, split: str) -> Path:
    """The predictions in a run, in an evaluation's folder, or the file itself."""
    if source.is_file():
        return source
    names = (source / "eval" / f"{split}{ENDING}", source / f"{split}{ENDING}")
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{source}: no {split}{ENDING} in it or in its eval/; `python -m selfemo_jax.evaluate "
            f"--checkpoint {source} --split {split}` writes it"
        )
    return found


def read_predictions(source: Path, *, split: str | None, name: str, label: str = "prediction") -> Predictions:
    """The answers of a run (or folder, or file) to a split; ``label`` names the field with the predicted
    label, ``prediction`` (strict) or ``lenient``.

    Without a ``split`` a folder is read for test, and a file for its own: its name says it
    (``dev_predictions.jsonl``), else the ids of its inputs. The label lists come from the scores beside them
    (``<split>.json``), else from the gold labels. ValueError where a file's split is another than the given
    one, and where a run's folder holds other predictions than its final scores were made of; a file that is
    named itself is taken as it is.
    """
    path = predictions_file(source, split or "test")
    sets: dict[str, dict[str, Line]] = {}
    for number, line in enumerate(read_jsonl(path, hint="selfemo_jax.evaluate writes it anew"), start=1):
        if not all(isinstance(line.get(key), str) for key in ("id", "dataset", "gold")) or label not in line:
            raise ValueError(f"{path}: record {number} lacks id, dataset, gold or {label}")
        for key in ("prediction", label, "part"):
            if not isinstance(line.get(key), str | None):
                raise ValueError(
                    f"{path}: record {number} has {key} {line[key]!r}; expected a word or null. "
                    "selfemo_jax.evaluate writes it anew"
                )
        members = sets.setdefault(line["dataset"], {})
        if line["id"] in members:
            raise ValueError(f"{path}: record {number} answers {line['id']} a second time")
        members[line["id"]] = {**line, "prediction": line[label], "strict": line.get("prediction")}
    if not sets:
        raise ValueError(f"{path} holds no prediction")
    found = split_of(path, sets)
    if split not in (None, found):
        raise ValueError(
            f"{path} holds answers to the {found} split, but {split} was asked for (--split): name the file "
            f"of the {split} split"
        )
    split = found
    if source.is_dir():
        _check_final(path, sets, split=split)
    scores = scores_beside(path, split)
    labels = {}
    for dataset, lines in sets.items():
        listed = tuple((scores.get("sets") or {}).get(dataset, {}).get("per_class") or ())
        gold = sorted({line["gold"] for line in lines.values()})
        labels[dataset] = listed if set(gold) <= set(listed) else tuple(gold)
    note = joined_notes([str(scores.get("note") or ""), run_note(path.parent)])
    return Predictions(name=name, split=split, note=note, labels=labels, sets=sets)


def scores_beside(path: Path, split: str) -> Mapping[str, Any]:
    """The scores beside an evaluation's answers; empty where there are none."""
    beside = path.with_name(f"{split}.json")
    if not beside.is_file():
        return {}
    scores: Mapping[str, Any] = {}
    try:
        scores = json.loads(beside.read_text(encoding="utf-8"))
        whole = all(isinstance(one, dict) for one in (scores.get("sets") or {}).values())
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{beside}: not the scores of an evaluation; selfemo_jax.evaluate writes it anew")
    return scores


def split_of(path: Path, sets: Mapping[str, Mapping[str, Line]]) -> str:
    """The split that predictions are of: the file's name says it, else the ids (``dataset/split/...``).
    ValueError where neither does."""
    if path.name.endswith(ENDING):
        return path.name.removesuffix(ENDING)
    ids = [(name, f"{dataset}/") for dataset, lines in sets.items() for name in lines]
    found = {name.removeprefix(start).split("/")[0] if name.startswith(start) else "" for name, start in ids}
    if len(found) > 1 or "" in found:
        raise ValueError(
            f"{path}: neither its name nor the ids of its inputs say which split it is of; expected "
            f"SPLIT{ENDING}, or ids DATASET/SPLIT/DIALOGUE/TURN of one split. Rename the file"
        )
    return found.pop()


def by_part(system: Predictions) -> Predictions:
    """The same answers with each part of a data set as a set of its own, `meld, clean`; without the sets that
    are not told in two parts."""
    found: dict[str, dict[str, Line]] = {}
    labels = {}
    for name, lines in sorted(system.sets.items()):
        parts = sorted({line["part"] for line in lines.values() if line.get("part")})
        for part in parts if len(parts) > 1 else ():
            shown = f"{name}, {part}"
            found[shown] = {key: line for key, line in lines.items() if line.get("part") == part}
            labels[shown] = system.labels[name]
    return replace(system, sets=found, labels=labels)


def _check_final(path: Path, sets: Mapping[str, Mapping[str, Line]], *, split: str) -> None:
    """ValueError where the run's final scores of the split are not those of these predictions."""
    final, run_dir = path.with_name("final.json"), path.parent.parent
    if not final.is_file():
        return
    try:
        scored = json.loads(final.read_text(encoding="utf-8"))["splits"].get(split)
        wanted = {name: one["accuracy"] for name, one in scored["sets"].items()} if scored else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{final}: not what a run writes at its end; it is damaged") from None
    if wanted is None:
        return
    found = {
        name: sum(line["strict"] == line["gold"] for line in lines.values()) / len(lines)
        for name, lines in sets.items()
    }
    for name in sorted({*wanted, *found}):
        here, there = found.get(name), wanted.get(name)
        if here is None or there is None or abs(here - there) > ROUNDING:
            words = ["none" if value is None else f"{100 * value:.2f} %" for value in (here, there)]
            raise ValueError(
                f"{path}: accuracy on {name} is {words[0]}, and {words[1]} in {final.name}: another "
                "evaluation has written over what the run's final scores were made of. `python -m "
                f"selfemo_jax.evaluate --checkpoint {run_dir} --split {split}` answers again under the run's "
                "own settings; to compare these predictions name the file"
            )

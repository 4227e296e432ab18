"""Dialogues of your own: a folder with a label list and one JSON object a line for each dialogue.

    my_corpus/
      dataset.json     {"name": "my_corpus", "labels": ["calm", "tense", "Glad"]}      2 to 32 labels
      train.jsonl dev.jsonl test.jsonl      any of them may be missing

    {"dialogue_id": "d1", "turns": [{"speaker": "Ann", "text": "Hello.", "label": "calm"},
                                    {"speaker": "Ben", "text": "Hi!", "labels": {"Glad": 0.8, "calm": 0.2}},
                                    {"speaker": "Ann", "text": "So."}],
     "personas": {"Ann": "Ann is a patient nurse."}, "theme": "a morning at the clinic"}

A turn has one `label`, or weighted `labels`, or neither: then it is context. `personas` and `theme` may be
left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from selfemo_jax.data.checks import (
    Cleaning,
    Notes,
    check_length,
    check_not_empty,
    check_split_ids,
    clean_text,
    did_you_mean,
    place,
    read_label,
    read_text,
)
from selfemo_jax.data.dialogues import SPLITS, Corpus, Dialogue, LabelSet, Turn, label_set, make_corpus
from selfemo_jax.data.dialogues import speakers as distinct_speakers

_SAMPLE = files("selfemo_jax") / "sample"
_DIALOGUE_KEYS = ("dialogue_id", "turns", "personas", "theme")
_TURN_KEYS = ("speaker", "text", "label", "labels")
_DATASET_KEYS = ("name", "labels")


def read_folder(folder: Path, *, encoding: str = "utf-8", splits: Sequence[str] = SPLITS) -> Corpus:
    """A corpus from a folder in the format above.

    Raises:
        ValueError: a file breaks the format; the message names file, line and remedy.
        FileNotFoundError: no dataset.json, or none of the split files.
    """
    notes = Notes()
    labels = read_label_set(folder / "dataset.json", notes)
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    if not any(path.exists() for path in paths.values()):
        names = ", ".join(path.name for path in paths.values())
        raise FileNotFoundError(f"{folder} has none of {names}; add at least one.")
    found = {}
    for split, path in paths.items():
        if not path.exists():
            notes.infos.append(f"{place(path)} does not exist: {split} is empty.")
            continue
        lines = read_text(path, notes, encoding=encoding).split("\n")
        found[split] = read_lines(
            lines, place(path), dataset=labels.name, split=split, label_set=labels, notes=notes
        )
    check_split_ids(found, folder.name)
    return make_corpus(labels, found, **notes.report())


def read_label_set(path: Path, notes: Notes) -> LabelSet:
    """The label list of `dataset.json`, in the file's order and spelling."""
    where = place(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist; write {{"name": "{path.parent.name}", "labels": ["first", "second"]}} '
            f"to it, with the labels of your corpus."
        )
    text = read_text(path, notes)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}:{error.lineno}: not valid JSON ({error.msg}).") from None
    _check_keys(record, _DATASET_KEYS, ("name", "labels"), where)
    name, words = record["name"], record["labels"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"{where}: name is {name!r}; expected letters, digits, '_', '-' and '.' only.")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: labels is {words!r}; expected a list of strings.")
    try:
        return label_set(name, words)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_lines(
    lines: Iterable[str],
    where: str,
    *,
    dataset: str,
    split: str,
    label_set: LabelSet | None,
    notes: Notes,
) -> tuple[Dialogue, ...]:
    """Dialogues from JSON lines; blank lines are passed over.

    Args:
        lines: one JSON object each.
        where: how messages name the source.
        dataset: name given to the dialogues.
        split: split given to the dialogues.
        label_set: the labels that may occur; None leaves every turn unlabelled, as for prediction.
        notes: gathers repairs.
    """
    cleaning = Cleaning()
    first: dict[str, int] = {}
    dialogues = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{at}: not valid JSON ({error.msg} at column {error.colno}); expected one dialogue a line."
            ) from None
        dialogue = _read_dialogue(record, at, dataset, split, label_set, cleaning)
        if dialogue.dialogue_id in first:
            raise ValueError(
                f"{where}:{first[dialogue.dialogue_id]} and :{number}: dialogue "
                f"'{dialogue.dialogue_id}' occurs "
                f"twice. Rename or delete one of them."
            )
        first[dialogue.dialogue_id] = number
        dialogues.append(dialogue)
    cleaning.note(where, notes)
    return tuple(dialogues)


def find_folder(name: str, root: Path | None) -> Path:
    """The folder of that path, from the working directory or else from `root`."""
    known = ("meld", "emorynlp", "iemocap", "sample")
    tried = [Path(name)] + ([Path(root) / name] if root is not None else [])
    for path in tried:
        if path.is_file():
            raise ValueError(f"{path} is a file; give the folder that holds it beside dataset.json.")
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"data set '{name}'{did_you_mean(name, known)} is none of {', '.join(known)} and no folder "
        f"(looked for {', '.join(map(str, tried))})."
    )


def sample_names() -> tuple[str, ...]:
    """The bundled corpora, as `load_corpus` names them."""
    folders = (folder for folder in _SAMPLE.iterdir() if folder.joinpath("dataset.json").is_file())
    return tuple(sorted(f"sample/{folder.name}" for folder in folders))


def read_sample(name: str, **options: Any) -> Corpus:
    """One of the bundled, invented corpora. ValueError on a name that is none."""
    names = sample_names()
    if f"sample/{name}" not in names:
        raise ValueError(
            f"'sample/{name}' is no bundled corpus; expected one of {', '.join(names)} (load_corpora "
            f"reads all of them as 'sample')."
        )
    with as_file(_SAMPLE / name) as folder:
        return read_folder(folder, **options)


def _read_dialogue(
    record: Any, at: str, dataset: str, split: str, labels: LabelSet | None, cleaning: Cleaning
) -> Dialogue:
    _check_keys(record, _DIALOGUE_KEYS, ("dialogue_id", "turns"), at)
    dialogue_id = record["dialogue_id"]
    if type(dialogue_id) not in (str, int) or not str(dialogue_id).strip():
        raise ValueError(f"{at}: dialogue_id is {dialogue_id!r}; expected a string.")
    dialogue_id = str(dialogue_id).strip()
    turns = record["turns"]
    if not isinstance(turns, list):
        raise ValueError(f"{at}: turns of '{dialogue_id}' is {turns!r}; expected a list.")
    if not turns:
        raise ValueError(f"{at}: dialogue '{dialogue_id}' has no utterances. Add turns or delete the line.")
    check_length(len(turns), at, dialogue_id)
    dialogue = Dialogue(
        dataset=dataset,
        split=split,
        dialogue_id=dialogue_id,
        turns=tuple(
            _read_turn(t, at, i, dialogue_id, labels, cleaning) for i, t in enumerate(turns, start=1)
        ),
        personas=_read_personas(record.get("personas") or {}, at, dialogue_id),
        theme=_read_theme(record.get("theme"), at, dialogue_id),
    )
    names = distinct_speakers(dialogue)
    for name in dialogue.personas:
        if name not in names:
            raise ValueError(
                f"{at}: persona for '{name}'{did_you_mean(name, names)}, who does not speak in "
                f"'{dialogue_id}' "
                f"(speakers: {', '.join(names)})."
            )
    return dialogue


def _read_turn(
    record: Any, at: str, index: int, dialogue_id: str, labels: LabelSet | None, cleaning: Cleaning
) -> Turn:
    here = f"{at}: utterance {index} of '{dialogue_id}'"
    _check_keys(record, _TURN_KEYS, ("speaker", "text"), here)
    for key in ("speaker", "text"):
        if not isinstance(record[key], str):
            raise ValueError(f"{here}: {key} is {record[key]!r}; expected a string.")
    text = clean_text(record["text"], at, f"utterance {index} of '{dialogue_id}'", cleaning)
    check_not_empty(text, at, index, dialogue_id)
    speaker = clean_text(record["speaker"], at, f"speaker {index} of '{dialogue_id}'", cleaning)
    if not speaker:
        raise ValueError(f"{here}: speaker is empty; expected a name.")
    given = None if labels is None else _read_labels(record, here, labels, cleaning)
    return Turn(speaker=speaker, text=text, labels=given, turn_id=str(index - 1))


def _read_labels(
    record: Mapping[str, Any], here: str, labels: LabelSet, cleaning: Cleaning
) -> dict[str, float] | None:
    label, weighted = record.get("label"), record.get("labels")
    if label is not None and weighted is not None:
        raise ValueError(f"{here} has both 'label' and 'labels'; keep one.")
    if label is not None:
        if not isinstance(label, str):
            raise ValueError(f"{here}: label is {label!r}; expected a string.")
        return {read_label(label, here, labels, labels.name, cleaning): 1.0}
    if weighted is None:
        return None
    if not isinstance(weighted, dict) or not weighted:
        raise ValueError(f'{here}: labels is {weighted!r}; expected an object such as {{"label": 0.7}}.')
    weights: dict[str, float] = {}
    for word, weight in weighted.items():
        name = read_label(word, here, labels, labels.name, cleaning)
        if name in weights:
            raise ValueError(f"{here}: label '{name}' is given twice.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise ValueError(
                f"{here}: '{word}' has weight {weight!r}; expected a number above 0 and at most 1."
            )
        weights[name] = float(weight)
    return weights


def _read_personas(record: Any, at: str, dialogue_id: str) -> dict[str, str]:
    sentences = record.values() if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in sentences):
        raise ValueError(f"{at}: personas of '{dialogue_id}' is not an object of speaker -> sentence.")
    return {name.strip(): " ".join(text.split()) for name, text in record.items()}


def _read_theme(theme: Any, at: str, dialogue_id: str) -> str | None:
    if theme is not None and not isinstance(theme, str):
        raise ValueError(f"{at}: theme of '{dialogue_id}' is {theme!r}; expected a string.")
    return " ".join(theme.split()) or None if theme is not None else None


def _check_keys(record: Any, known: Sequence[str], required: Sequence[str], at: str) -> None:
    if not isinstance(record, dict):
        needed = ", ".join(required)
        raise ValueError(f"{at}: found {type(record).__name__}; expected an object with {needed}.")
    for key in record:
        if key not in known:
            near = did_you_mean(key, known)
            raise ValueError(f"{at}: unknown key '{key}'{near}. The keys are {', '.join(known)}.")
    for key in required:
        if key not in record:
            raise ValueError(f"{at}: missing key '{key}' (found: {', '.join(record)}).")

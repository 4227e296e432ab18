"""IEMOCAP (doi:10.1007/s10579-008-9076-6) in the forms that licensed users hold.

    release folder   Session1..5/dialog/{transcriptions,EmoEvaluation}/*.txt
    *.pkl            IEMOCAP_features.pkl (a tuple of 9) or iemocap.pkl (a list of 6)
    JSON, a split    {dialogue: {labels, sentences, genders}} or [[{text, speaker, label?}, ...], ...]

The release and the tuple are split by the dialogue ids of `iemocap_splits.json`; the others carry their own
split. The release supports 5,112/646/1,622 labelled turns; the pickles' 5,163/647/1,623 hold 53 more 'happy'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from selfemo_jax.data.checks import (
    Cleaning,
    Notes,
    check_length,
    check_sizes,
    check_split_ids,
    place,
    read_text,
)
from selfemo_jax.data.dialogues import IEMOCAP, SPLITS, Corpus, Dialogue, make_corpus
from selfemo_jax.data.iemocap_release import is_release, make_turn, read_release
from selfemo_jax.data.restricted_pickle import load_pickle

PICKLES = {"train": 5163, "dev": 647, "test": 1623}
RELEASE = {"train": 5112, "dev": 646, "test": 1622}
TURN_LISTS = {"train": 4778, "dev": 980, "test": 1622}

_MARKS = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test",)}


def read_iemocap(path: Path, *, context: str = "all", encoding: str = "utf-8") -> Corpus:
    """IEMOCAP from a release folder, a pickle, a folder with one pickle, or a folder with one JSON file a
    split.

    Args:
        path: the folder or the pickle.
        context: "all" keeps turns without one of the six labels as unlabelled context; "labelled" deletes
            them, as the pickles do.
        encoding: of the text files of the release.

    Raises:
        ValueError: a file is in none of the forms, or is damaged; the message names it and the remedy.
        FileNotFoundError: the folder holds none of the forms.
    """
    if context not in ("all", "labelled"):
        raise ValueError(f"IEMOCAP: context is {context!r}; expected 'all' or 'labelled'.")
    notes = Notes()
    release = next((p for p in (path, path / "IEMOCAP_full_release") if is_release(p)), None)
    pickles = [path] if path.is_file() else sorted(path.glob("*.pkl"))
    jsons = {} if path.is_file() else _json_paths(path)
    if release:
        found, published = _by_list(read_release(release, notes, encoding=encoding), release.name), RELEASE
    elif len(pickles) == 1:
        found, published = _read_pickle(pickles[0], notes), PICKLES
    elif jsons:
        found, published = _read_jsons(jsons, notes)
    else:
        what = f"{len(pickles)} pickles" if pickles else "none of them"
        raise FileNotFoundError(
            f"{path}: expected Session1..5 of the IEMOCAP release, one .pkl, or one .json for each of "
            f"train, dev and test; found {what}."
        )
    if context == "labelled":
        found = {split: _drop_unlabelled(dialogues, notes) for split, dialogues in found.items()}
    check_split_ids(found, "IEMOCAP")
    sizes = {
        s: sum(t.labels is not None for d in dialogues for t in d.turns) for s, dialogues in found.items()
    }
    if release:
        _note_extra_happy(sizes, notes)
    check_sizes("IEMOCAP", sizes, published, notes)
    return make_corpus(IEMOCAP, found, **notes.report())


@cache
def split_ids() -> Mapping[str, tuple[str, ...]]:
    """Split -> dialogue ids of the usual partition: Session 5 is test, 12 of the others are dev."""
    text = files("selfemo_jax.data").joinpath("iemocap_splits.json").read_text(encoding="utf-8")
    return {split: tuple(ids) for split, ids in json.loads(text).items()}


def _by_list(dialogues: Sequence[Dialogue], where: str) -> dict[str, tuple[Dialogue, ...]]:
    owner = {dialogue_id: split for split, ids in split_ids().items() for dialogue_id in ids}
    for dialogue in dialogues:
        if dialogue.dialogue_id not in owner:
            raise ValueError(
                f"{where}: dialogue '{dialogue.dialogue_id}' is not one of IEMOCAP's 151; expected ids "
                f"such as 'Ses01F_impro01'. Use the file names of the release."
            )
    return {
        split: tuple(replace(d, split=split) for d in dialogues if owner[d.dialogue_id] == split)
        for split in SPLITS
    }


def _note_extra_happy(sizes: Mapping[str, int], notes: Notes) -> None:
    for split, count in RELEASE.items():
        if sizes[split] == count:
            notes.warnings.append(
                f"IEMOCAP {split} has {count:,} utterances, not the {PICKLES[split]:,} of the COSMIC "
                f"pickles: see docs (53 extra 'happy')."
            )


def _drop_unlabelled(dialogues: Sequence[Dialogue], notes: Notes) -> tuple[Dialogue, ...]:
    kept = [replace(d, turns=tuple(t for t in d.turns if t.labels)) for d in dialogues]
    dropped = sum(len(d.turns) for d in dialogues) - sum(len(d.turns) for d in kept)
    if dropped:
        notes.skipped["turns without one of the six labels"] += dropped
    return tuple(d for d in kept if d.turns)


def _read_pickle(path: Path, notes: Notes) -> dict[str, tuple[Dialogue, ...]]:
    data = path.read_bytes()
    notes.files[place(path)] = hashlib.sha256(data).hexdigest()
    where = path.name
    content = load_pickle(data, where)
    if isinstance(content, tuple) and len(content) == 9:
        _, speakers, labels, _, _, _, sentences, *lists = content
        train, test = (_dialogue_ids(ids, f"{where}: element {i}") for i, ids in enumerate(lists, start=7))
        owner = {dialogue_id: split for split, ids in split_ids().items() for dialogue_id in ids}
        ids = {
            "train": [i for i in train if owner.get(i) != "dev"],
            "dev": [i for i in train if owner.get(i) == "dev"],
            "test": test,
        }
        elements = (7, 8)
    elif isinstance(content, list) and len(content) == 6:
        speakers, labels, sentences, *lists = content
        train, test, dev = (
            _dialogue_ids(ids, f"{where}: element {i}") for i, ids in enumerate(lists, start=3)
        )
        ids = {"train": train, "dev": dev, "test": test}
        elements = (3, 4)
    else:
        size = f" of {len(content)}" if isinstance(content, (list, tuple, dict)) else ""
        raise ValueError(
            f"{where}: found a {type(content).__name__}{size}; expected the tuple of 9 of "
            f"IEMOCAP_features.pkl or the list of 6 of COSMIC's iemocap.pkl."
        )
    if len(train) < len(test):
        raise ValueError(
            f"{where}: element {elements[0]} has {len(train)} dialogues and element {elements[1]} has "
            f"{len(test)}: train and test look swapped (COSMIC order is train, test, valid)."
        )
    tables = [("speakers", speakers), ("labels", labels), ("sentences", sentences)]
    for name, table in tables:
        if not isinstance(table, dict):
            raise ValueError(
                f"{where}: {name} is a {type(table).__name__}; expected a dict keyed by dialogue."
            )
    cleaning = Cleaning()
    found = {}
    for split, split_dialogues in ids.items():
        for dialogue_id in split_dialogues:
            for name, table in tables:
                if dialogue_id not in table:
                    raise ValueError(f"{where}: dialogue '{dialogue_id}' of {split} has no {name}.")
        found[split] = tuple(
            _columns(i, speakers[i], labels[i], sentences[i], split, f"{where}: {i}", cleaning)
            for i in sorted(split_dialogues)
        )
    cleaning.note(where, notes)
    return found


def _dialogue_ids(found: Any, at: str) -> list[str]:
    if not _is_list(found) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{at} is {found!r:.60}; expected a list of dialogue ids such as 'Ses01F_impro01'.")
    return list(found)


def _is_list(found: Any) -> bool:
    """Whether it is a collection of things in a row, as a list or an array."""
    return isinstance(found, Collection) and not isinstance(found, (str, bytes, Mapping))


def _columns(
    dialogue_id: str,
    genders: Sequence[Any],
    labels: Sequence[Any],
    sentences: Sequence[Any],
    split: str,
    at: str,
    cleaning: Cleaning,
) -> Dialogue:
    for name, column in (("speakers", genders), ("labels", labels), ("sentences", sentences)):
        if not _is_list(column):
            raise ValueError(f"{at}: {name} is {column!r:.60}; expected a list, one a turn.")
    if not len(genders) == len(labels) == len(sentences):
        raise ValueError(
            f"{at}: {len(genders)} speakers, {len(labels)} labels and {len(sentences)} sentences; "
            f"expected as many of each."
        )
    if not len(sentences):
        raise ValueError(f"{at}: dialogue '{dialogue_id}' has no utterances.")
    check_length(len(sentences), at, dialogue_id)
    turns = tuple(
        make_turn(dialogue_id, _gender(g, at), text, _label(label, at), f"{dialogue_id}_{i}", at, cleaning)
        for i, (g, label, text) in enumerate(zip(genders, labels, sentences, strict=True))
    )
    return Dialogue(dataset="iemocap", split=split, dialogue_id=dialogue_id, turns=turns)


def _gender(value: Any, at: str) -> str:
    """F or M, from the letter or from a one-hot (M first)."""
    if isinstance(value, str):
        return value
    row = list(value) if hasattr(value, "__len__") else []
    if len(row) >= 2 and sum(map(bool, row)) == 1 and row.index(1) < 2:
        return "MF"[row.index(1)]
    raise ValueError(f"{at}: speaker is {value!r}; expected 'M' or 'F'.")


def _label(value: Any, at: str) -> str | None:
    """The label of an index in the pickles' order, of a code or of a name; None and -1 are unlabelled."""
    if value is None or isinstance(value, str):
        return value or None
    if not hasattr(value, "__index__") or not -1 <= int(value) < len(IEMOCAP.labels):
        raise ValueError(
            f"{at}: label is {value!r}; expected 0 to {len(IEMOCAP.labels) - 1} "
            f"({', '.join(IEMOCAP.labels)})."
        )
    return None if int(value) == -1 else IEMOCAP.labels[int(value)]


def _json_paths(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        for split, marks in _MARKS.items():
            if any(mark in path.stem.lower() for mark in marks):
                if split in found:
                    raise ValueError(
                        f"{folder}: both {found[split].name} and {path.name} look like {split}; keep "
                        f"one of them."
                    )
                found[split] = path
    return found


def _read_jsons(
    paths: Mapping[str, Path], notes: Notes
) -> tuple[dict[str, tuple[Dialogue, ...]], Mapping[str, int]]:
    missing = [split for split in SPLITS if split not in paths]
    if missing:
        folder = next(iter(paths.values())).parent
        raise FileNotFoundError(f"{folder} has no .json file for {', '.join(missing)}; put all three there.")
    found, published = {}, PICKLES
    for split in SPLITS:
        where = place(paths[split])
        text = read_text(paths[split], notes)
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}:{error.lineno}: not valid JSON ({error.msg}).") from None
        cleaning = Cleaning()
        if isinstance(content, dict):
            found[split] = tuple(
                _columns(i, *_json_columns(d, f"{where}: {i}"), split, f"{where}: {i}", cleaning)
                for i, d in content.items()
            )
        elif isinstance(content, list):
            published = TURN_LISTS
            found[split] = tuple(
                _turn_list(d, split, f"{where}: dialogue {i}", cleaning)
                for i, d in enumerate(content, start=1)
            )
        else:
            raise ValueError(
                f"{where}: found {type(content).__name__}; expected an object by dialogue or a list of lists."
            )
        cleaning.note(where, notes)
    return found, published


def _json_columns(record: Any, at: str) -> tuple[list[Any], list[Any], list[Any]]:
    try:
        return record["genders"], record["labels"], record["sentences"]
    except (KeyError, TypeError):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{at}: expected labels, sentences and genders (found: {keys}).") from None


def _turn_list(turns: Any, split: str, at: str, cleaning: Cleaning) -> Dialogue:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{at} has no utterances; expected a list of {{text, speaker, label}}.")
    check_length(len(turns), at, at)
    made, names = [], set()
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"text", "speaker"} <= set(turn):
            raise ValueError(f"{at}, utterance {index + 1}: expected an object with text and speaker.")
        dialogue_id, _, gender = str(turn["speaker"]).rpartition("_")
        names.add(dialogue_id)
        if len(names) > 1 or gender not in ("F", "M"):
            raise ValueError(
                f"{at}, utterance {index + 1}: speaker is {turn['speaker']!r}; expected the dialogue's "
                f"id and F or M, such as 'Ses04M_script03_2_F'."
            )
        label = _label(turn.get("label"), at)
        made.append(
            make_turn(dialogue_id, gender, turn["text"], label, f"{dialogue_id}_{index}", at, cleaning)
        )
    return Dialogue(dataset="iemocap", split=split, dialogue_id=names.pop(), turns=tuple(made))

"""EmoryNLP (arXiv:1708.04299): `emorynlp_{train,dev,test}_final.csv` of declare-lab/MELD, data/emorynlp.

The CSV files hold the utterances with a subtitle time only. `context="json"` puts the others back as
unlabelled context, from `emotion-detection-{trn,dev,tst}.json` of emorynlp/emotion-detection, so that the
same utterances are scored. Published scores use the context of the CSV files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.data.checks import (
    Cleaning,
    Notes,
    check_length,
    check_not_empty,
    check_rows,
    check_sizes,
    check_split_ids,
    clean_text,
    place,
    read_csv,
    read_int,
    read_label,
    read_text,
)
from selfemo_jax.data.dialogues import EMORYNLP, SPLITS, Corpus, Dialogue, Turn, make_corpus
from selfemo_jax.data.manifest import note_digests

COLUMNS = ("Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode")
PUBLISHED = {"train": 7551, "dev": 954, "test": 984}
FULL_RELEASE = {"train": 9934, "dev": 1344, "test": 1328}
JSON_NAMES = {"train": "trn", "dev": "dev", "test": "tst"}


def read_emorynlp(
    folder: Path, *, context: str = "csv", encoding: str = "utf-8", splits: Sequence[str] = SPLITS
) -> Corpus:
    """EmoryNLP from its files. A dialogue is a scene, named as in the JSON release: s01_e15_c01.

    Args:
        folder: holds the CSV files, and the JSON files for `context="json"`.
        context: "csv", the context of published scores; or "json", with the utterances that the CSV files
        lack
            as unlabelled context. There, a split without JSON is read from its CSV (warning), and a split
            without CSV is the full release, every utterance labelled (warning).
        encoding: of the CSV files.
        splits: which of train, dev and test to read.

    Raises:
        ValueError: a file is not EmoryNLP's, or is damaged; the message names file, line and remedy.
        FileNotFoundError: a split's file is missing.
    """
    if context not in ("csv", "json"):
        raise ValueError(f"EmoryNLP: context is {context!r}; expected 'csv' or 'json'.")
    notes = Notes()
    found = {split: _read_split(folder, split, context, encoding, notes) for split in splits}
    check_split_ids(found, "EmoryNLP")
    sizes = {
        s: sum(t.labels is not None for d in dialogues for t in d.turns) for s, dialogues in found.items()
    }
    full = [split for split in sizes if sizes[split] == FULL_RELEASE[split]]
    if full:
        counts = "/".join(f"{sizes[split]:,}" for split in full)
        notes.warnings.append(
            f"EmoryNLP {', '.join(full)}: {counts} rows: this is the full emotion-detection release; "
            f"published ERC "
            f"results use the 7,551/954/984 subset in declare-lab/MELD."
        )
    check_sizes("EmoryNLP", {s: n for s, n in sizes.items() if s not in full}, PUBLISHED, notes)
    note_digests(notes)
    return make_corpus(EMORYNLP, found, **notes.report())


def _read_split(folder: Path, split: str, context: str, encoding: str, notes: Notes) -> tuple[Dialogue, ...]:
    csv_path = folder / f"emorynlp_{split}_final.csv"
    json_path = folder / f"emotion-detection-{JSON_NAMES[split]}.json"
    if context == "csv":
        return _read_csv(csv_path, split, encoding, notes)
    if not json_path.exists():
        notes.warnings.append(
            f"{place(json_path)} does not exist: {split} has the context of its CSV file only."
        )
        return _read_csv(csv_path, split, encoding, notes)
    scenes = _read_json(json_path, split, notes)
    if not csv_path.exists():
        notes.warnings.append(f"{place(csv_path)} does not exist: every utterance of {split} is labelled.")
        return scenes
    return _add_context(_read_csv(csv_path, split, encoding, notes), scenes, place(json_path), notes)


def _read_csv(path: Path, split: str, encoding: str, notes: Notes) -> tuple[Dialogue, ...]:
    where = place(path)
    text = read_text(path, notes, encoding=encoding)
    advice = f"Use data/emorynlp/{path.name} of declare-lab/MELD."
    rows = list(read_csv(text, where, COLUMNS, advice=advice))
    keys = []
    for line, row in rows:
        number = {name: read_int(row, name, f"{where}:{line}") for name in COLUMNS[3:]}
        scene = _scene_id(number["Season"], number["Episode"], number["Scene_ID"])
        keys.append((line, scene, number["Utterance_ID"]))
    check_rows(where, keys, names=("scene", "Utterance_ID"))

    cleaning = Cleaning()
    turns: dict[str, list[tuple[int, Turn]]] = {}
    for (line, row), (_, scene, utterance_id) in zip(rows, keys, strict=True):
        at = f"{where}:{line}"
        names = _read_speakers(row["Speaker"], at)
        turn = _make_turn(names, row["Utterance"], row["Emotion"], utterance_id, scene, at, cleaning)
        turns.setdefault(scene, []).append((utterance_id, turn))
    cleaning.note(where, notes)
    resorted = sum([i for i, _ in entries] != sorted(i for i, _ in entries) for entries in turns.values())
    if resorted:
        notes.warnings.append(f"{where}: {resorted} scenes were not in order of Utterance_ID; sorted by it.")
    _note_gaps(where, [[i for i, _ in entries] for entries in turns.values()], notes)
    scenes = {scene: [turn for _, turn in sorted(e, key=lambda x: x[0])] for scene, e in turns.items()}
    return _dialogues(scenes, split, where)


def _note_gaps(where: str, scenes: Sequence[Sequence[int]], notes: Notes) -> None:
    missing = [max(ids) - min(ids) + 1 - len(ids) for ids in scenes]
    if any(missing):
        notes.infos.append(
            f"{where}: {sum(n > 0 for n in missing)} scenes have gaps in Utterance_ID "
            f"({sum(missing):,} utterances "
            f"without a subtitle time are not in the file)."
        )


def _read_json(path: Path, split: str, notes: Notes) -> tuple[Dialogue, ...]:
    where = place(path)
    text = read_text(path, notes)
    try:
        release = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}:{error.lineno}: not valid JSON ({error.msg}); take a fresh copy."
        ) from None
    cleaning = Cleaning()
    scenes: dict[str, list[Turn]] = {}
    try:
        entries = [s for episode in release["episodes"] for s in episode["scenes"]]
        utterances = [
            (str(s["scene_id"]), str(u["utterance_id"]), u["speakers"], u["transcript"], u["emotion"])
            for s in entries
            for u in s["utterances"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: not the emotion-detection layout ({type(error).__name__}: {error}); expected "
            f"episodes > scenes > utterances with utterance_id, speakers, transcript and emotion."
        ) from None
    check_rows(where, [(1, scene, u) for scene, u, *_ in utterances], names=("scene", "utterance"))
    for scene, utterance_id, names, transcript, emotion in utterances:
        at = f"{where}: {utterance_id}"
        number = utterance_id.rpartition("_u")[2]
        if not number.isdigit():
            raise ValueError(f"{at}: expected an utterance_id such as 's01_e15_c01_u001'.")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{at}: speakers is {names!r}; expected a list such as ['Ross Geller'].")
        for key, value in (("transcript", transcript), ("emotion", emotion)):
            if not isinstance(value, str):
                raise ValueError(f"{at}: {key} is {value!r:.60}; expected text.")
        turn = _make_turn(names, transcript, emotion, int(number), scene, at, cleaning)
        scenes.setdefault(scene, []).append(turn)
    cleaning.note(where, notes)
    return _dialogues(scenes, split, where)


def _make_turn(
    names: Sequence[str], text: str, emotion: str, utterance_id: int, scene: str, at: str, cleaning: Cleaning
) -> Turn:
    utterance = clean_text(text, at, "utterance", cleaning)
    check_not_empty(utterance, at, utterance_id, scene)
    label = read_label(emotion, at, EMORYNLP, "EmoryNLP", cleaning)
    speaker = clean_text(" and ".join(names), at, "speaker", cleaning)
    return Turn(speaker=speaker, text=utterance, labels={label: 1.0}, turn_id=str(utterance_id))


def _add_context(
    labelled: Sequence[Dialogue], scenes: Sequence[Dialogue], where: str, notes: Notes
) -> tuple[Dialogue, ...]:
    """The labelled dialogues with the other turns of their scene as unlabelled context."""
    by_id = {scene.dialogue_id: scene for scene in scenes}
    dialogues, added = [], 0
    for dialogue in labelled:
        if dialogue.dialogue_id not in by_id:
            raise ValueError(
                f"{where}: scene {dialogue.dialogue_id} of the CSV file is missing; take a fresh copy."
            )
        kept = {turn.turn_id: turn for turn in dialogue.turns}
        turns: list[Turn] = []
        for turn in by_id[dialogue.dialogue_id].turns:
            own = kept.pop(turn.turn_id, None)
            if own is not None and own != turn:
                raise ValueError(
                    f"{where}: utterance {turn.turn_id} of scene {dialogue.dialogue_id} differs from "
                    f"the CSV file's; "
                    f"use the two releases of the same corpus."
                )
            added += own is None
            turns.append(own or Turn(speaker=turn.speaker, text=turn.text, turn_id=turn.turn_id))
        if kept:
            raise ValueError(
                f"{where}: scene {dialogue.dialogue_id} lacks utterance {next(iter(kept))} of the CSV file."
            )
        dialogues.append(
            Dialogue(
                dataset="emorynlp", split=dialogue.split, dialogue_id=dialogue.dialogue_id, turns=tuple(turns)
            )
        )
    unscored = len(scenes) - len(labelled)
    if unscored:
        notes.skipped[f"scenes of {where} without a scored utterance"] = unscored
    notes.infos.append(f"{where}: {added:,} utterances added as unlabelled context.")
    return tuple(dialogues)


def _dialogues(scenes: dict[str, list[Turn]], split: str, where: str) -> tuple[Dialogue, ...]:
    for scene, turns in scenes.items():
        check_length(len(turns), where, scene)
    return tuple(
        Dialogue(dataset="emorynlp", split=split, dialogue_id=scene, turns=tuple(turns))
        for scene, turns in scenes.items()
    )


def _scene_id(season: int, episode: int, scene: int) -> str:
    return f"s{season:02d}_e{episode:02d}_c{scene:02d}"


def _read_speakers(field: str, at: str) -> list[str]:
    error = ValueError(f'{at}: Speaker "{field}" is not a list literal such as "[\'Ross Geller\']".')
    try:
        names: Any = ast.literal_eval(field)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise error from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise error
    return names

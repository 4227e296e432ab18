"""MELD (arXiv:1810.02508): `{train,dev,test}_sent_emo.csv` of declare-lab/MELD, data/MELD."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from selfemo_jax.data.checks import (
    Cleaning,
    Notes,
    check_length,
    check_not_empty,
    check_rows,
    check_sizes,
    clean_text,
    place,
    read_csv,
    read_int,
    read_label,
    read_text,
)
from selfemo_jax.data.dialogues import MELD, SPLITS, Corpus, Dialogue, Turn, make_corpus
from selfemo_jax.data.manifest import note_digests

COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
PUBLISHED = {"train": 9989, "dev": 1109, "test": 2610}
# The corrupt or missing video clips that multimodal copies leave out.
DROPPED_CLIPS = {"train": (125, 3), "dev": (110, 7)}


def read_meld(folder: Path, *, encoding: str = "utf-8", splits: Sequence[str] = SPLITS) -> Corpus:
    """MELD from its three files. Dialogue ids restart in each split; Utterance_ID orders the rows, never
    time.

    Raises:
        ValueError: a file is not MELD's, or is damaged; the message names file, line and remedy.
        FileNotFoundError: a split's file is missing (`splits` asks for fewer).
    """
    notes = Notes()
    found = {split: _read_split(folder / f"{split}_sent_emo.csv", split, encoding, notes) for split in splits}
    sizes = {split: sum(len(d.turns) for d in dialogues) for split, dialogues in found.items()}
    for split, (dialogue_id, utterance_id) in DROPPED_CLIPS.items():
        if sizes.get(split) == PUBLISHED[split] - 1:
            turns = {t.turn_id for d in found[split] if d.dialogue_id == str(dialogue_id) for t in d.turns}
            if str(utterance_id) not in turns:
                notes.warnings.append(
                    f"MELD {split} has {sizes.pop(split):,} utterances, the published split has "
                    f"{PUBLISHED[split]:,}: 'dia{dialogue_id}_utt{utterance_id}' is missing "
                    f"(dropped by multimodal preprocessing)."
                )
    check_sizes("MELD", sizes, PUBLISHED, notes)
    note_digests(notes)
    return make_corpus(MELD, found, **notes.report())


def _read_split(path: Path, split: str, encoding: str, notes: Notes) -> tuple[Dialogue, ...]:
    where = place(path)
    text = read_text(path, notes, encoding=encoding)
    dyadic = "Old_Dialogue_ID" in text.partition("\n")[0]
    fresh = f"se data/MELD/{path.name}."
    advice = f"This looks like the dyadic variant (data/MELD_Dyadic); u{fresh}" if dyadic else f"U{fresh}"
    rows = list(read_csv(text, where, COLUMNS, advice=advice))
    if dyadic:
        raise ValueError(f"{where}:1: column 'Old_Dialogue_ID' is not one of MELD's. {advice}")
    keys = [
        (line, *(read_int(row, column, f"{where}:{line}") for column in ("Dialogue_ID", "Utterance_ID")))
        for line, row in rows
    ]
    check_rows(where, keys, names=("Dialogue_ID", "Utterance_ID"))

    cleaning = Cleaning()
    turns: dict[int, list[tuple[int, Turn, str]]] = {}
    for (line, row), (_, dialogue_id, utterance_id) in zip(rows, keys, strict=True):
        at = f"{where}:{line}"
        utterance = clean_text(row["Utterance"], at, "utterance", cleaning)
        check_not_empty(utterance, at, utterance_id + 1, f"dialogue {dialogue_id}")
        speaker = clean_text(row["Speaker"], at, "speaker", cleaning)
        if not speaker:
            raise ValueError(f"{at}: Speaker is empty; expected a name.")
        label = read_label(row["Emotion"], at, MELD, "MELD", cleaning)
        turn = Turn(speaker=speaker, text=utterance, labels={label: 1.0}, turn_id=str(utterance_id))
        turns.setdefault(dialogue_id, []).append((utterance_id, turn, row.get("StartTime", "")))
    cleaning.note(where, notes, hint=", MELD copies older than 2020-11")
    _note_order(where, list(turns.values()), notes)
    dialogues = []
    for dialogue_id, entries in turns.items():
        check_length(len(entries), where, str(dialogue_id))
        ordered = tuple(turn for _, turn, _ in sorted(entries, key=lambda entry: entry[0]))
        dialogues.append(Dialogue(dataset="meld", split=split, dialogue_id=str(dialogue_id), turns=ordered))
    return tuple(dialogues)


def _note_order(where: str, dialogues: Sequence[Sequence[tuple[int, Turn, str]]], notes: Notes) -> None:
    backwards = resorted = with_gaps = absent = late = 0
    for entries in dialogues:
        ids = [utterance_id for utterance_id, _, _ in entries]
        times = [_seconds(time) for _, _, time in entries]
        backwards += sum(before > after for before, after in zip(times, times[1:], strict=False))
        resorted += ids != sorted(ids)
        missing = max(ids) + 1 - len(ids)
        with_gaps += missing > 0
        absent += missing
        late += min(ids) > 0
    if resorted:
        notes.warnings.append(f"{where}: {resorted} dialogues were not in order of Utterance_ID; sorted.")
    if backwards:
        notes.warnings.append(
            f"{where}: {backwards} turns have a StartTime earlier than the turn before; "
            f"file order (Utterance_ID) is kept."
        )
    if with_gaps:
        notes.infos.append(
            f"{where}: {with_gaps} dialogues have gaps in Utterance_ID "
            f"({absent} utterances absent from the release)."
        )
    if late:
        notes.infos.append(f"{where}: {late} dialogues do not start at Utterance_ID 0.")


def _seconds(time: str) -> float:
    """Seconds of 'H:MM:SS,mmm'; not a number when the file has no such time, which compares as in order."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+)[,.](\d+)", time)
    if not match:
        return math.nan
    hours, minutes, seconds, fraction = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(f"{seconds}.{fraction}")

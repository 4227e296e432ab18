"""The IEMOCAP release: transcriptions joined with the evaluators' majority labels, and who speaks.

The F or M in a dialogue's name says who wears the markers; the speaker is in the last part of the turn's
name: Ses01F_impro01_M000 is spoken by the man.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from selfemo_jax.data.checks import (
    Cleaning,
    Notes,
    check_length,
    clean_text,
    did_you_mean,
    read_label,
    read_text,
)
from selfemo_jax.data.dialogues import IEMOCAP, Dialogue, Turn

NAMES = {
    "Ses01": ("Mary", "James"),
    "Ses02": ("Patricia", "John"),
    "Ses03": ("Jennifer", "Robert"),
    "Ses04": ("Linda", "Michael"),
    "Ses05": ("Elizabeth", "William"),
}
"""Session -> names given to the female and the male actor, as in EmoBERTa (arXiv:2108.12009)."""

CODES = {
    "hap": "happy",
    "sad": "sad",
    "neu": "neutral",
    "ang": "angry",
    "exc": "excited",
    "fru": "frustrated",
}
"""Codes of the six scored labels."""
UNSCORED = ("xxx", "sur", "fea", "dis", "oth")

_TURN = re.compile(r"^(Ses0[1-5][FM]_(?:impro|script)\w+_([FM])\w*\d+)\s+\[(\d+\.\d+)-(\d+\.\d+)\]:\s*(.*)$")
_LABEL = re.compile(r"^\[\d+\.\d+ - \d+\.\d+\]\t(\w+)\t(\w{3})\t\[[\d.]+, [\d.]+, [\d.]+\]$")


def is_release(folder: Path) -> bool:
    """Whether the folder holds Session1 to Session5, or some of them."""
    return any((folder / f"Session{i}" / "dialog").is_dir() for i in range(1, 6))


def read_release(folder: Path, notes: Notes, *, encoding: str = "utf-8") -> tuple[Dialogue, ...]:
    """Every dialogue under the folder, its split still empty, turns by start time (ties: file order).

    Turns whose majority label is none of the six, or that have no label, are unlabelled context.
    """
    cleaning, codes, dialogues = Cleaning(), Counter[str](), []
    for session in sorted(folder.glob("Session[1-5]")):
        for path in sorted((session / "dialog" / "transcriptions").glob("*.txt")):
            if not path.name.startswith("._"):
                labels = session / "dialog" / "EmoEvaluation" / path.name
                dialogues.append(_read_dialogue(path, labels, folder, encoding, notes, cleaning, codes))
    cleaning.note(folder.name, notes)
    notes.infos.append(
        f"IEMOCAP release: {sum(len(d.turns) for d in dialogues):,} turns transcribed, "
        f"{sum(codes.values()) - codes['absent']:,} in EmoEvaluation, {codes['absent']} without an entry "
        f"(48 in the full release)."
    )
    context = {code: codes[code] for code in (*UNSCORED, "absent") if codes[code]}
    if context:
        kinds = ", ".join(f"{code} {count:,}" for code, count in context.items())
        notes.infos.append(
            f"IEMOCAP release: {sum(context.values()):,} turns are unlabelled context ({kinds})."
        )
    return tuple(dialogues)


def speaker_name(dialogue_id: str, gender: str, at: str) -> str:
    """The name of the actor of that gender in the dialogue's session. ValueError if there is none."""
    session = dialogue_id[:5]
    if session not in NAMES or gender not in ("F", "M"):
        raise ValueError(
            f"{at}: no speaker {gender!r} in dialogue '{dialogue_id}'; expected F or M in Ses01 to Ses05."
        )
    return NAMES[session]["FM".index(gender)]


def make_turn(
    dialogue_id: str, gender: str, text: Any, label: str | None, turn_id: str, at: str, cleaning: Cleaning
) -> Turn:
    """One checked turn; `label` is a code or a full name, None for context."""
    if not isinstance(text, str):
        raise ValueError(f"{at}: the text is {text!r}; expected a string.")
    clean = clean_text(text, at, "utterance", cleaning)
    if not clean:
        raise ValueError(f"{at}: utterance {turn_id} of '{dialogue_id}' is empty. Take a fresh copy.")
    labels = None
    if label is not None:
        labels = {read_label(CODES.get(label, label), at, IEMOCAP, "IEMOCAP", cleaning): 1.0}
    return Turn(speaker=speaker_name(dialogue_id, gender, at), text=clean, labels=labels, turn_id=turn_id)


def _read_dialogue(
    transcript: Path,
    evaluation: Path,
    root: Path,
    encoding: str,
    notes: Notes,
    cleaning: Cleaning,
    codes: Counter[str],
) -> Dialogue:
    dialogue_id = transcript.stem
    labels = _read_labels(evaluation, root, dialogue_id, encoding, notes)
    where = transcript.relative_to(root).as_posix()
    starts: dict[str, tuple[float, int]] = {}
    turns: dict[str, Turn] = {}
    for number, line in enumerate(read_text(transcript, notes, encoding=encoding).splitlines(), start=1):
        at = f"{where}:{number}"
        match = _TURN.match(line)
        if not match:
            if line.startswith("Ses"):
                raise ValueError(
                    f"{at}: found {line[:60]!r}; expected 'Ses01F_impro01_F000 [006.2901-008.2357]: text'."
                )
            # Lines such as 'M: ...' belong to no turn; glued to a neighbour they would change its text.
            notes.skipped["transcription lines without a turn id"] += 1
            continue
        turn_id, gender, start, _, text = match.groups()
        if turn_id.rpartition("_")[0] != dialogue_id:
            raise ValueError(f"{at}: turn '{turn_id}' is not of dialogue '{dialogue_id}'; take a fresh copy.")
        if turn_id in turns:
            raise ValueError(
                f"{where}:{starts[turn_id][1]} and :{number}: turn '{turn_id}' occurs twice. Delete one."
            )
        code = labels.pop(turn_id, (0, "absent"))[1]
        codes[code] += 1
        turns[turn_id] = make_turn(dialogue_id, gender, text, CODES.get(code), turn_id, at, cleaning)
        starts[turn_id] = (float(start), number)
    for turn_id, (number, _) in labels.items():
        raise ValueError(
            f"{evaluation.relative_to(root).as_posix()}:{number}: turn '{turn_id}' has a label but no "
            f"line in transcriptions/{transcript.name}. Take a fresh copy of both files."
        )
    if not turns:
        raise ValueError(f"{where}: dialogue '{dialogue_id}' has no utterances. Take a fresh copy.")
    check_length(len(turns), where, dialogue_id)
    ordered = tuple(turns[turn_id] for turn_id in sorted(turns, key=starts.__getitem__))
    return Dialogue(dataset="iemocap", split="", dialogue_id=dialogue_id, turns=ordered)


def _read_labels(
    path: Path, root: Path, dialogue_id: str, encoding: str, notes: Notes
) -> dict[str, tuple[int, str]]:
    """Turn id -> (line, code)."""
    where = path.relative_to(root).as_posix()
    labels: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(read_text(path, notes, encoding=encoding).splitlines(), start=1):
        if not line.startswith("["):
            continue
        match = _LABEL.match(line)
        if not match:
            raise ValueError(
                f"{where}:{number}: found {line[:80]!r}; expected "
                f"'[6.2901 - 8.2357]<TAB>{dialogue_id}_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]'."
            )
        turn_id, code = match.groups()
        if code not in CODES and code not in UNSCORED:
            known = (*CODES, *UNSCORED)
            raise ValueError(
                f"{where}:{number}: unknown emotion '{code}'{did_you_mean(code, known)}. "
                f"IEMOCAP has: {', '.join(known)}."
            )
        if turn_id in labels:
            raise ValueError(
                f"{where}:{labels[turn_id][0]} and :{number}: turn '{turn_id}' occurs twice. Delete one."
            )
        labels[turn_id] = (number, code)
    return labels

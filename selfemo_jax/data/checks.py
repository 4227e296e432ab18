"""What every reader checks: encodings, control codes, labels, limits, ids, contiguity.

An error is a ValueError that says where (file:line, physical lines), what was found, what was expected and
what to do. What is repaired or doubted is counted in `Notes` and ends in the `IngestReport`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfemo_jax.data.dialogues import Dialogue, LabelSet

MAX_CHARS = 2000
MAX_TURNS = 500

# A UTF-8 continuation byte read as Latin-1 or as cp1252.
_CONTINUATION = "\u0080-\u00bf" + re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore"))
_MOJIBAKE = re.compile(f"[\u00e2\u00e3][{_CONTINUATION}]{{2}}|[\u00c2\u00c3][{_CONTINUATION}]")
_C1 = re.compile("[\u0080-\u009f]")
_C0 = re.compile("[\u0000-\u001f\u007f\u2028\u2029]+")


@dataclass(kw_only=True)
class Notes:
    """What one reading gathers for its report."""

    repairs: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    files: dict[str, str] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Fields of `IngestReport`."""
        lists = {key: tuple(getattr(self, key)) for key in ("repairs", "warnings", "infos")}
        return {**lists, "skipped": dict(self.skipped), "files": dict(self.files)}


@dataclass(kw_only=True)
class Cleaning:
    """Counts of the repairs inside one file."""

    c1: Counter[str] = field(default_factory=Counter)
    c1_texts: int = 0
    blanks: int = 0
    controls: int = 0
    stripped: int = 0
    label_case: int = 0

    def note(self, where: str, notes: Notes, *, hint: str = "") -> None:
        """Add one line for each kind of repair that happened."""
        if self.c1_texts:
            kinds = ", ".join(
                f"{n:,} x U+{ord(c):04X} -> U+{ord(_cp1252(c)):04X}" for c, n in self.c1.most_common()
            )
            line = (
                f"{where}: {self.c1_texts:,} utterances contain U+0080-U+009F (cp1252 punctuation stored as "
                f"control codes{hint}); repaired: {kinds}."
            )
            notes.repairs.append(line)
            notes.warnings.append(line)
        for count, what in (
            (self.blanks, "U+00A0 replaced by a blank"),
            (self.controls, "line breaks or control characters replaced by a blank"),
            (self.stripped, "blanks at the ends removed"),
            (self.label_case, "labels differ from the list in letter case or blanks; accepted"),
        ):
            if count:
                notes.repairs.append(f"{where}: {count:,} x {what}.")


def place(path: Path) -> str:
    """How messages name a file: its folder and name."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def read_text(path: Path, notes: Notes, *, encoding: str = "utf-8") -> str:
    """The file's text without a byte-order mark. ValueError on bytes that are not of the encoding."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of that name.")
    data = path.read_bytes()
    notes.files[place(path)] = hashlib.sha256(data).hexdigest()
    return decode(data, place(path), notes, encoding=encoding)


def decode(data: bytes, where: str, notes: Notes, *, encoding: str = "utf-8") -> str:
    """Decode bytes strictly, without a byte-order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and encoding == "utf-8":
        raise ValueError(f"{where}: the file is UTF-16; re-save as UTF-8 or pass encoding='utf-16'.")
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        notes.repairs.append(f"BOM removed from {where}.")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"{where}: byte 0x{data[error.start]:02X} at offset {error.start} is not {encoding.upper()}."
        if encoding == "utf-8":
            advice = "The file is probably Windows-1252; re-save as UTF-8 or pass encoding='cp1252'."
        else:
            advice = "Leave `encoding` out if the file is UTF-8."
        raise ValueError(f"{found} {advice}") from None


def clean_text(text: str, where: str, what: str, cleaning: Cleaning) -> str:
    """The text with repaired control codes. ValueError if a wrong decoding mangled it or it is too long."""
    if len(text) > MAX_CHARS:
        raise ValueError(
            f"{where}: {what} has {len(text):,} characters (limit {MAX_CHARS:,}); an unbalanced quote is "
            f"suspected. Look for a stray '\"' at or before this line."
        )
    mangled = _MOJIBAKE.search(text)
    if mangled:
        raise ValueError(
            f"{where}: {what} contains {mangled.group()!r}: the file was decoded with the wrong encoding "
            f"before it was saved. Take a fresh copy of the file."
        )
    if "\ufffd" in text:
        raise ValueError(
            f"{where}: {what} contains U+FFFD: characters were lost when the file was decoded. "
            f"Take a fresh copy of the file."
        )
    codes = _C1.findall(text)
    if codes:
        for code in codes:
            if not _cp1252(code):
                raise ValueError(
                    f"{where}: {what} contains the control code U+{ord(code):04X}, which is no cp1252 "
                    f"character; take a fresh copy of the file."
                )
        cleaning.c1.update(codes)
        cleaning.c1_texts += 1
        text = _C1.sub(lambda match: _cp1252(match.group()), text)
    if "\u00a0" in text:
        cleaning.blanks += text.count("\u00a0")
        text = text.replace("\u00a0", " ")
    if _C0.search(text):
        cleaning.controls += 1
        text = _C0.sub(" ", text)
    if text != text.strip():
        cleaning.stripped += 1
        text = text.strip()
    return text


def _cp1252(code: str) -> str:
    return code.encode("latin-1").decode("cp1252", errors="ignore")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest known word, or nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    return f" (did you mean '{lower[near[0]]}'?)" if near else ""


def read_label(word: str, where: str, labels: LabelSet, title: str, cleaning: Cleaning) -> str:
    """The lower-case label. ValueError for a word not in the list; letter case is forgiven and counted."""
    if word in labels.display:
        return labels.labels[labels.display.index(word)]
    folded = word.strip().lower()
    if folded in labels.labels:
        cleaning.label_case += 1
        return folded
    raise ValueError(
        f"{where}: unknown emotion '{word}'{did_you_mean(word, labels.display)}. "
        f"{title} has: {', '.join(labels.display)}."
    )


def read_csv(
    text: str, where: str, required: Sequence[str], *, advice: str = ""
) -> Iterator[tuple[int, dict[str, str]]]:
    """(physical line where the row starts, column -> field) of each row.

    ValueError on a missing column, a row of another length, and broken quotes.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(reader, [])]
    for name in required:
        if name not in header:
            raise ValueError(
                f"{where}:1: missing column '{name}'{did_you_mean(name, header)} "
                f"(found: {', '.join(header)}). {advice or 'Use the published file.'}"
            )
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{where}:{line}: not valid CSV ({error}); an unbalanced quote is suspected."
            ) from None
        if row is None:
            return
        if not row:
            continue
        longest = max(map(len, row))
        if longest > MAX_CHARS:
            raise ValueError(
                f"{where}:{line}: a field has {longest:,} characters (limit {MAX_CHARS:,}); an unbalanced "
                f"quote is suspected. Look for a stray '\"' at or before this line."
            )
        if len(row) != len(header):
            raise ValueError(
                f"{where}:{line}: {len(row)} fields, expected {len(header)} ({', '.join(header)}). "
                f"Put utterances that contain commas in double quotes."
            )
        yield line, dict(zip(header, row, strict=True))


def read_int(row: Mapping[str, str], column: str, where: str) -> int:
    """A non-negative integer field."""
    if not re.fullmatch(r"\d+", row[column].strip()):
        raise ValueError(f"{where}: {column} is '{row[column]}'; expected a whole number.")
    return int(row[column])


def check_rows(where: str, keys: Sequence[tuple[int, Hashable, Hashable]], *, names: tuple[str, str]) -> None:
    """ValueError if an (dialogue, utterance) id occurs twice or a dialogue resumes after another one.

    Args:
        where: the file.
        keys: (line, dialogue id, utterance id) in file order.
        names: what the file calls the two ids.
    """
    lines: dict[tuple[Hashable, Hashable], int] = {}
    for line, dialogue, utterance in keys:
        if (dialogue, utterance) in lines:
            raise ValueError(
                f"{where}:{lines[dialogue, utterance]} and :{line}: ({names[0]} {dialogue}, {names[1]} "
                f"{utterance}) occurs twice. Delete one of the rows or take a fresh copy."
            )
        lines[dialogue, utterance] = line
    done: set[Hashable] = set()
    current: Hashable = None
    for index, (line, dialogue, _) in enumerate(keys):
        if index and dialogue != current:
            done.add(current)
        if dialogue in done:
            raise ValueError(
                f"{where}:{line}: dialogue {dialogue} resumes after dialogue {current} started. "
                f"Sort the rows by dialogue and utterance."
            )
        current = dialogue


def check_length(num_turns: int, where: str, dialogue_id: str) -> None:
    """ValueError on a dialogue with more turns than any real one has."""
    if num_turns > MAX_TURNS:
        raise ValueError(
            f"{where}: dialogue {dialogue_id!r} has {num_turns:,} turns (limit {MAX_TURNS}); are several "
            f"dialogues under one id?"
        )


def check_not_empty(text: str, where: str, index: int, dialogue_id: str) -> None:
    """ValueError on an utterance without a character; `index` counts from 1."""
    if not text:
        raise ValueError(
            f"{where}: utterance {index} of '{dialogue_id}' is empty. Give its text or remove the turn."
        )


def check_split_ids(splits: Mapping[str, Sequence[Dialogue]], where: str) -> None:
    """ValueError if two splits hold the same dialogue id. Not for MELD, whose ids restart in each split."""
    owner: dict[str, str] = {}
    for split, dialogues in splits.items():
        for dialogue in dialogues:
            other = owner.setdefault(dialogue.dialogue_id, split)
            if other != split:
                raise ValueError(
                    f"{where}: {other} and {split} share dialogue '{dialogue.dialogue_id}'. "
                    f"Keep each dialogue in one split, or rename it if they differ."
                )


def check_sizes(title: str, found: Mapping[str, int], published: Mapping[str, int], notes: Notes) -> None:
    """Warn about a split whose number of utterances is not the published one."""
    for split, count in found.items():
        expected = published.get(split)
        if expected is not None and count != expected:
            notes.warnings.append(
                f"{title} {split} has {count:,} utterances, the published split has {expected:,}."
            )

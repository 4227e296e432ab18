"""Dialogues, label lists and what a reader reports about the files it read.

Labels are lower case inside the project; `LabelSet.display` keeps the files' spelling for reports. A turn
without labels is context: it is read, never scored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SPLITS = ("train", "dev", "test")
MIN_LABELS, MAX_LABELS = 2, 32

_LABEL = re.compile(r"[a-z]+")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One utterance."""

    speaker: str
    text: str
    labels: Mapping[str, float] | None = None
    """Lower-case label -> weight in (0, 1]; None: unlabelled, context only."""
    turn_id: str = ""
    """The file's own name for the turn, unique inside its dialogue."""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Turns in spoken order. `dialogue_id` is unique inside (dataset, split)."""

    dataset: str
    split: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    personas: Mapping[str, str] = field(default_factory=dict)
    """Speaker -> one sentence."""
    theme: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """The label inventory of one data set, in the order that prompts and label slots use."""

    name: str
    labels: tuple[str, ...]
    """Lower case."""
    display: tuple[str, ...]
    """The files' spelling, same order."""

    def __post_init__(self) -> None:
        if not MIN_LABELS <= len(self.labels) <= MAX_LABELS:
            raise ValueError(
                f"label set '{self.name}' has {len(self.labels)} labels; "
                f"expected {MIN_LABELS} to {MAX_LABELS}."
            )
        if len(self.labels) != len(self.display):
            raise ValueError(
                f"label set '{self.name}': {len(self.labels)} labels, {len(self.display)} spellings; "
                f"give one spelling a label."
            )
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            raise ValueError(
                f"label set '{self.name}' repeats {', '.join(repeated)} (letter case is ignored)."
            )
        for label in self.labels:
            if not _LABEL.fullmatch(label):
                raise ValueError(
                    f"label set '{self.name}': label {label!r} is not one word of the letters a-z, "
                    f"which the answer format 'label:weight' needs; rename it, such as 'veryhappy'."
                )


def label_set(name: str, display: Sequence[str]) -> LabelSet:
    """The label set with the given spellings. ValueError unless 2 to 32 distinct words of letters."""
    return LabelSet(name=name, labels=tuple(word.lower() for word in display), display=tuple(display))


MELD = label_set("meld", ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"))
EMORYNLP = label_set("emorynlp", ("Joyful", "Mad", "Peaceful", "Neutral", "Sad", "Powerful", "Scared"))
IEMOCAP = label_set("iemocap", ("happy", "sad", "neutral", "angry", "excited", "frustrated"))


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What was read, repaired and doubted. Counts are exact; nothing is dropped without a count here."""

    dataset: str
    dialogues: Mapping[str, int] = field(default_factory=dict)
    """Split -> dialogues."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Split -> turns, labelled or not."""
    labelled: Mapping[str, int] = field(default_factory=dict)
    """Split -> turns with a label."""
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> label -> turns whose heaviest label it is, in inventory order."""
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    infos: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What was left out -> how often."""
    leakage: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> SHA-256 of its bytes."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def save(self, path: Path) -> None:
        """Write the report as JSON; the folder is made if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One data set: its label list, its dialogues by split, and the report of the reader."""

    label_set: LabelSet
    splits: Mapping[str, tuple[Dialogue, ...]]
    """train, dev, test -> dialogues; a split that was not given is an empty tuple."""
    report: IngestReport

    @property
    def name(self) -> str:
        """The data set's name, as in `Dialogue.dataset`."""
        return self.label_set.name


def heaviest_label(labels: Mapping[str, float]) -> str:
    """The label of the largest weight; ties go to the first named."""
    return max(labels, key=labels.__getitem__)


def make_corpus(labels: LabelSet, splits: Mapping[str, Sequence[Dialogue]], **report: Any) -> Corpus:
    """A corpus with its counts; `report` are further fields of `IngestReport`."""
    full = {split: tuple(splits.get(split, ())) for split in SPLITS}
    counts: dict[str, dict[str, int]] = {}
    for split, dialogues in full.items():
        counts[split] = dict.fromkeys(labels.labels, 0)
        for dialogue in dialogues:
            for turn in dialogue.turns:
                if turn.labels:
                    counts[split][heaviest_label(turn.labels)] += 1
    return Corpus(
        label_set=labels,
        splits=full,
        report=IngestReport(
            dataset=labels.name,
            dialogues={split: len(dialogues) for split, dialogues in full.items()},
            rows={split: sum(len(d.turns) for d in dialogues) for split, dialogues in full.items()},
            labelled={split: sum(counts[split].values()) for split in full},
            labels=counts,
            **report,
        ),
    )


def speakers(dialogue: Dialogue) -> tuple[str, ...]:
    """Distinct speakers in order of their first turn."""
    return tuple(dict.fromkeys(turn.speaker for turn in dialogue.turns))


def index_speakers(dialogue: Dialogue) -> Dialogue:
    """The dialogue with 'Speaker 1', 'Speaker 2', ... for names, numbered by first turn; personas follow."""
    names = {name: f"Speaker {i}" for i, name in enumerate(speakers(dialogue), start=1)}
    return replace(
        dialogue,
        turns=tuple(replace(turn, speaker=names[turn.speaker]) for turn in dialogue.turns),
        personas={names[name]: text for name, text in dialogue.personas.items() if name in names},
    )


def load_corpus(name: str, root: Path | None = None, **options: Any) -> Corpus:
    """Read one data set.

    Args:
        name: meld, emorynlp or iemocap, read from the folder of that name under `root`; or a folder
            in the project's own format (see `data.jsonl`), relative to the working directory, then to `root`.
            'sample' names the bundled corpora: 'sample/NAME' is one of them.
        root: folder that holds the data sets' folders.
        options: `speaker_style` "name" (default) or "index" for all; the rest goes to the reader, such as
            `context="json"` of EmoryNLP.

    Raises:
        ValueError: a file does not hold what it should; the message names file, line and remedy.
        FileNotFoundError: a file or folder is missing; the message says where it was looked for.
    """
    # The readers need the types above, so they are imported here.
    from selfemo_jax.data import emorynlp, iemocap, jsonl, meld

    speaker_style = options.pop("speaker_style", "name")
    if speaker_style not in ("name", "index"):
        raise ValueError(f"speaker_style is {speaker_style!r}; expected 'name' or 'index'.")
    readers = {"meld": meld.read_meld, "emorynlp": emorynlp.read_emorynlp, "iemocap": iemocap.read_iemocap}
    if name in readers:
        if root is None:
            raise ValueError(
                f"'{name}' needs data.root (or the environment's SELFEMO_DATA), the folder above {name}/."
            )
        folder = Path(root) / name
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder} does not exist; expected the {name} files in it. `python tools/data.py fetch "
                f"--root {root}` gets what is public, and with --list says where the rest comes from."
            )
        corpus = readers[name](folder, **options)
    elif name == "sample" or name.startswith("sample/"):
        corpus = jsonl.read_sample(name.partition("/")[2], **options)
    else:
        corpus = jsonl.read_folder(jsonl.find_folder(name, root), **options)
    if speaker_style == "index":
        indexed = {split: tuple(map(index_speakers, dialogues)) for split, dialogues in corpus.splits.items()}
        corpus = replace(corpus, splits=indexed)
    return corpus


def load_corpora(names: Sequence[str], root: Path | None = None, **options: Any) -> tuple[Corpus, ...]:
    """`load_corpus` of each name; 'sample' stands for all bundled corpora. ValueError on a repeated set."""
    from selfemo_jax.data import jsonl

    expanded = [one for name in names for one in (jsonl.sample_names() if name == "sample" else (name,))]
    corpora = tuple(load_corpus(name, root, **options) for name in expanded)
    found = [corpus.name for corpus in corpora]
    for one in found:
        if found.count(one) > 1:
            raise ValueError(f"data.sets names the data set '{one}' twice; name each set once.")
    return corpora

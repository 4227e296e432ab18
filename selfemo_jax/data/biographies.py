"""What is known of a speaker before a dialogue begins: a short biography from training dialogues.

`train_lines`: counted from the speaker's labelled lines in the training split: how many, how long, which
feelings how often, which words more than others. A training input is told what the other dialogues say, its
own left out, so that neither its labels nor its later turns come back in its prompt; shares are rounded to
tens, so that leaving a line out does not give its label away. `expert`: two sentences by an expert model
that read some of the lines without labels. Speakers with fewer than `MIN_LINES` lines have none.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from selfemo_jax.data.dialogues import Dialogue, heaviest_label
from selfemo_jax.data.inputs import Sample

MIN_LINES = 30
NUM_LABELS = 3
NUM_WORDS = 4
MIN_WORD_COUNT = 5
CANDIDATES = 40
"""Words of a speaker that may be named; which of them are is decided without the input's own dialogue."""
LINES_READ = 40
"""Lines that an expert reads of a speaker."""
LONGEST = 60
"""Words of an expert's biography that are kept."""

_WORD = re.compile(r"[a-z][a-z']{3,}")
Speaker = tuple[str, str]
"""(data set, name)."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Counts over lines of one speaker."""

    num: int = 0
    num_words: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)

    def less(self, other: Lines) -> Lines:
        """The counts without those of ``other``, which are part of them."""
        return Lines(
            num=self.num - other.num,
            num_words=self.num_words - other.num_words,
            labels=self.labels - other.labels,
            words=Counter({word: count - other.words[word] for word, count in self.words.items()}),
        )


@dataclass(frozen=True, kw_only=True)
class Biographies:
    """What is said of whom; `told` puts it into an input."""

    source: str
    """`train_lines`, or the experts that wrote them."""
    speakers: Mapping[Speaker, Lines] = field(default_factory=dict)
    """Counts over all training dialogues; words are those that may be named."""
    own: Mapping[tuple[str, str], Lines] = field(default_factory=dict)
    """(training dialogue, name) -> counts inside it."""
    common: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Data set -> word -> its share of all words there."""
    written: Mapping[Speaker, str] = field(default_factory=dict)
    """By an expert."""

    def about(self, sample: Sample) -> str | None:
        """Of the speaker to recognise; None for one that training hardly knows."""
        speaker = (sample.dataset, sample.target_speaker)
        if speaker in self.written:
            return self.written[speaker]
        lines = self.speakers.get(speaker)
        if lines is None:
            return None
        if own := self.own.get((sample.root_id, sample.target_speaker)):
            lines = lines.less(own)
        return describe(sample.target_speaker, lines, self.common[sample.dataset])

    def told(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """The samples with what is known of their speakers."""
        return tuple(replace(sample, about=self.about(sample)) for sample in samples)


def count_lines(train: Mapping[str, Dialogue]) -> Biographies:
    """Biographies from training dialogues by root id. ValueError for a dialogue of another split."""
    speakers: dict[Speaker, Lines] = {}
    own: dict[tuple[str, str], Lines] = {}
    total: dict[str, Counter[str]] = {}
    for root, dialogue in sorted(train.items()):
        if dialogue.split != "train":
            raise ValueError(f"biographies are made of training dialogues alone; found {root}")
        for name, lines in _lines_of(dialogue).items():
            own[root, name] = lines
            before = speakers.setdefault((dialogue.dataset, name), Lines())
            speakers[dialogue.dataset, name] = _sum(before, lines)
            total.setdefault(dialogue.dataset, Counter()).update(lines.words)
    common = {
        dataset: {word: count / counts.total() for word, count in counts.items()}
        for dataset, counts in total.items()
    }
    known = {speaker: lines for speaker, lines in speakers.items() if lines.num >= MIN_LINES}
    return Biographies(
        source="train_lines",
        speakers={
            speaker: replace(
                lines, words=Counter({w: lines.words[w] for w in _typical(lines, common[speaker[0]])})
            )
            for speaker, lines in known.items()
        },
        own=own,
        common=common,
    )


def describe(name: str, lines: Lines, common: Mapping[str, float]) -> str | None:
    """One line of words; None for fewer than `MIN_LINES` lines."""
    if lines.num < MIN_LINES:
        return None
    shares = [(label, round(10 * count / lines.num) * 10) for label, count in sorted(lines.labels.items())]
    shares = sorted((pair for pair in shares if pair[1]), key=lambda pair: -pair[1])[:NUM_LABELS]
    feelings = ", ".join(f"{label} {share}%" for label, share in shares)
    words = ", ".join(_typical(lines, common)[:NUM_WORDS])
    length = round(lines.num_words / lines.num)
    return f"{name}: {length} words a line; {feelings}" + (f"; says {words}" if words else "")


def lines_to_read(train: Mapping[str, Dialogue], *, seed: int) -> dict[Speaker, tuple[str, ...]]:
    """Lines of each known speaker for an expert, without labels, in their order; drawn by the seed."""
    found: dict[Speaker, list[str]] = {}
    for _, dialogue in sorted(train.items()):
        assert dialogue.split == "train"
        for turn in dialogue.turns:
            found.setdefault((dialogue.dataset, turn.speaker), []).append(turn.text)
    chosen = {}
    for (dataset, name), lines in sorted(found.items()):
        if len(lines) >= MIN_LINES:
            picks = random.Random(f"{seed}/{dataset}/{name}").sample(
                range(len(lines)), min(LINES_READ, len(lines))
            )
            chosen[dataset, name] = tuple(lines[index] for index in sorted(picks))
    return chosen


def expert_messages(name: str, lines: Sequence[str]) -> tuple[str, str]:
    """System and user message that ask for a biography."""
    system = (
        "You describe people from what they say, briefly and without guessing at facts that are not there."
    )
    listed = "\n".join(f"- {line}" for line in lines)
    user = (
        f"These are lines that {name} says in different conversations:\n{listed}\n\n"
        f"In at most two sentences: what is {name} like, how does {name} talk, and which feelings come "
        f"easily to {name}? Write only these sentences."
    )
    return system, user


def kept_words(text: str) -> str | None:
    """An expert's biography on one line, cut to `LONGEST` words; None when it says nothing."""
    words = text.rpartition("</think>")[2].split()
    return " ".join(words[:LONGEST]) or None


def _lines_of(dialogue: Dialogue) -> dict[str, Lines]:
    found: dict[str, Lines] = {}
    for turn in dialogue.turns:
        if turn.labels:
            line = Lines(
                num=1,
                num_words=len(turn.text.split()),
                labels=Counter([heaviest_label(turn.labels)]),
                words=Counter(_WORD.findall(turn.text.lower().replace("\u2019", "'"))),
            )
            found[turn.speaker] = _sum(found.get(turn.speaker, Lines()), line)
    return found


def _sum(one: Lines, other: Lines) -> Lines:
    return Lines(
        num=one.num + other.num,
        num_words=one.num_words + other.num_words,
        labels=one.labels + other.labels,
        words=one.words + other.words,
    )


def _typical(lines: Lines, common: Mapping[str, float]) -> list[str]:
    """Words by how much more often than others the speaker says them, weighted by how often."""
    total = max(1, lines.num_words)
    gain = {
        word: count * math.log(count / total / common[word])
        for word, count in lines.words.items()
        if count >= MIN_WORD_COUNT and count / total > common[word]
    }
    return sorted(gain, key=lambda word: (-gain[word], word))[:CANDIDATES]

"""How much of an evaluation split is in training data, counted line by line: the tables of `tools/data.py
audit`.

Words, informative lines, matches (here: near) and shared dialogues (strict rule) are those of `audit`. Across
sets speakers are compared by their first name, as MELD has no other; inside a set they are not, as IEMOCAP's
actors differ from session to session.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selfemo_jax.data.audit import (
    MIN_JACCARD,
    MIN_WORDS,
    acted_kind,
    num_near,
    root_id,
    shared_dialogues,
    words_of,
)
from selfemo_jax.data.dialogues import Corpus, Dialogue

LONG_WORDS = 6
"""Words from which an exact repetition is no longer small talk."""

Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OwnOverlap:
    """An evaluation split against the training split of its own set."""

    rows: int
    exact: int
    """Rows whose text is a training row's, mostly small talk."""
    long: int
    """Rows of at least `LONG_WORDS` words."""
    long_exact: int
    informative: int
    verbatim: int
    """Informative rows that are a training row word for word."""
    near: int
    """Informative rows near an informative training row, or one contained in the other."""
    dialogues: int
    identical: int
    """Dialogues with an informative row that are a training dialogue, row for row."""
    shared: int
    """Dialogues that share a scene with a training dialogue."""


@dataclass(frozen=True, kw_only=True)
class CrossOverlap:
    """An evaluation split against the training split of another set."""

    dialogues: int
    shared: int
    """Dialogues that share a scene with a training dialogue."""
    rows: int
    rows_in_shared: int
    rows_aligned: int
    """Rows of shared dialogues with a counterpart, in order, in the training dialogue that has most."""
    informative: int
    verbatim: int
    """Informative rows that a training row of the same speaker repeats word for word."""
    near: int
    """Informative rows near an informative training row of the same speaker, or one contained in the
    other."""


def own_overlap(corpus: Corpus, split: str, *, kind: str | None = None) -> OwnOverlap:
    """Counts for one evaluation split of a set, or for its "scripted" or "improvised" dialogues alone."""
    train = corpus.splits["train"]
    evaluation = [d for d in corpus.splits[split] if kind is None or acted_kind(d) == kind]
    known = {words_of(turn.text) for dialogue in train for turn in dialogue.turns}
    whole = {tuple(words_of(turn.text) for turn in dialogue.turns) for dialogue in train}
    lines = [[words_of(turn.text) for turn in dialogue.turns] for dialogue in evaluation]
    rows = [line for dialogue in lines for line in dialogue]
    return OwnOverlap(
        rows=len(rows),
        exact=sum(line in known for line in rows),
        long=sum(len(line) >= LONG_WORDS for line in rows),
        long_exact=sum(len(line) >= LONG_WORDS and line in known for line in rows),
        informative=sum(len(line) >= MIN_WORDS for line in rows),
        verbatim=sum(len(line) >= MIN_WORDS and line in known for line in rows),
        near=num_near(evaluation, train),
        dialogues=len(evaluation),
        identical=sum(
            tuple(dialogue) in whole and any(len(line) >= MIN_WORDS for line in dialogue)
            for dialogue in lines
        ),
        shared=len({pair.first for pair in shared_dialogues(evaluation, train)}),
    )


def cross_overlap(corpus: Corpus, split: str, other: Corpus) -> CrossOverlap:
    """Counts for one evaluation split of ``corpus`` against the training split of ``other``."""
    evaluation, train = corpus.splits[split], other.splits["train"]
    pairs = shared_dialogues(evaluation, train)
    by_root = {root_id(dialogue): dialogue for dialogue in (*evaluation, *train)}
    best: dict[str, int] = defaultdict(int)
    for pair in pairs:
        aligned = num_aligned(_lines(by_root[pair.first]), _lines(by_root[pair.second]))
        best[pair.first] = max(best[pair.first], aligned)
    asked = [line for line in _spoken(evaluation) if len(line[1]) >= MIN_WORDS]
    known: dict[str, list[Words]] = defaultdict(list)
    for speaker, words in _spoken(train):
        if len(words) >= MIN_WORDS:
            known[speaker].append(words)
    index = {speaker: _Index(lines) for speaker, lines in known.items()}
    nothing = _Index(())
    return CrossOverlap(
        dialogues=len(evaluation),
        shared=len(best),
        rows=sum(len(dialogue.turns) for dialogue in evaluation),
        rows_in_shared=sum(len(by_root[root].turns) for root in best),
        rows_aligned=sum(best.values()),
        informative=len(asked),
        verbatim=sum(words in index.get(speaker, nothing).exact for speaker, words in asked),
        near=sum(index.get(speaker, nothing).has_near(words) for speaker, words in asked),
    )


def num_aligned(one: Sequence[Words], other: Sequence[Words]) -> int:
    """Most rows of two dialogues that can be paired in order: equal, or both informative and near or one
    contained in the other."""
    longest = [0] * (len(other) + 1)
    for line in one:
        above = longest
        longest = [0]
        for place, candidate in enumerate(other):
            paired = above[place] + 1 if _paired(line, candidate) else 0
            longest.append(max(paired, above[place + 1], longest[place]))
    return longest[-1]


def tables(corpora: Mapping[str, Corpus]) -> dict[str, dict[str, Any]]:
    """Own and cross overlap of every dev and test split, as JSON types: `set/split` or `set/split <
    other`; of IEMOCAP also `set/split scripted` and `set/split improvised`."""
    own = {
        f"{name}/{split} {kind or ''}".rstrip(): asdict(own_overlap(corpus, split, kind=kind))
        for name, corpus in corpora.items()
        for split in ("dev", "test")
        for kind in (None, *_acted_kinds(corpus.splits[split]))
    }
    return {"own": own, "cross": cross_tables(corpora)}


def cross_tables(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """Overlap of every dev and test split with the training data of the other sets: `set/split < other`."""
    return {
        f"{name}/{split} < {other}": asdict(cross_overlap(corpus, split, corpora[other]))
        for name, corpus in corpora.items()
        for split in ("dev", "test")
        for other in corpora
        if other != name
    }


class _Index:
    """Lines of one speaker, found by the words that they share with another."""

    def __init__(self, lines: Sequence[Words]):
        self.exact = set(lines)
        self._lines = [(words, frozenset(words)) for words in self.exact]
        self._by_word: dict[str, set[int]] = defaultdict(set)
        for number, (_, unique) in enumerate(self._lines):
            for word in unique:
                self._by_word[word].add(number)

    def has_near(self, words: Words) -> bool:
        """Whether a line is near the words, contains them or is contained in them."""
        if words in self.exact:
            return True
        unique = frozenset(words)
        shared: dict[int, int] = defaultdict(int)
        for word in unique:
            for number in self._by_word.get(word, ()):
                shared[number] += 1
        for number, common in shared.items():
            line, own = self._lines[number]
            if common >= MIN_JACCARD * (len(unique) + len(own) - common) - 1e-9:
                return True
            if common == min(len(unique), len(own)) and _contains(words, line):
                return True
        return False


def _acted_kinds(dialogues: Sequence[Dialogue]) -> list[str]:
    return sorted({kind for dialogue in dialogues if (kind := acted_kind(dialogue))}, reverse=True)


def _spoken(dialogues: Sequence[Dialogue]) -> Iterator[tuple[str, Words]]:
    """(first name, words) of every row."""
    for dialogue in dialogues:
        for turn in dialogue.turns:
            yield (turn.speaker.split() or [""])[0].lower(), words_of(turn.text)


def _lines(dialogue: Dialogue) -> list[Words]:
    return [words_of(turn.text) for turn in dialogue.turns]


def _paired(one: Words, other: Words) -> bool:
    if not one or not other:
        return False
    if one == other:
        return True
    if min(len(one), len(other)) < MIN_WORDS:
        return False
    first, second = set(one), set(other)
    common = len(first & second)
    near = common >= MIN_JACCARD * (len(first) + len(second) - common) - 1e-9
    return near or _contains(one, other)


def _contains(one: Words, other: Words) -> bool:
    shorter, longer = sorted((one, other), key=len)
    return f" {' '.join(shorter)} " in f" {' '.join(longer)} "

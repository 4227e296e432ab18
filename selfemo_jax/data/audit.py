"""Which dialogues of one split repeat dialogues of another: the scenes that two corpora share.

Text is lower-cased, apostrophes are dropped, and all else that is no letter or digit parts words. A line is
informative from `MIN_WORDS` words on. Two informative lines match if the Jaccard similarity of their word
sets is at least `MIN_JACCARD`, or the shorter is contained in the longer, word for word. Two dialogues are
shared by the rule

    strict   at least two matches in the same order in both; or a match of the only informative line that one
             of them has, of at least `LONG_LINE` words
    wide     strict; or two lines verbatim in any order; or one line of at least `LONG_LINE` words verbatim;
             or one of at least `LONG_PART` words contained

Scores are told apart by the strict rule; training dialogues are dropped by the wide one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfemo_jax.data.dialogues import Corpus, Dialogue

MIN_WORDS = 5
MIN_JACCARD = 0.6
LONG_LINE = 8
LONG_PART = 12
RULES = ("strict", "wide")
OFFICIAL_OVERLAP = ("iemocap",)
"""Sets whose own splits share their scripts by design: overlap inside them is reported, never dropped."""
SAME_SOURCE = ("meld", "emorynlp")
"""Sets cut from the scripts of one series: what one is scored on stands in the other's training data."""
PARTS = ("shared", "clean", "scripted", "improvised")
"""What evaluation splits are scored in beside the whole, by `scored_parts`."""

_APOSTROPHES = str.maketrans(dict.fromkeys("'\u2019\u2018", ""))
_WORD = re.compile(r"[a-z0-9]+")
_IEMOCAP_KIND = re.compile(r"_(impro|script)")


@dataclass(frozen=True, kw_only=True)
class SharedPair:
    """Two dialogues that hold the same scene."""

    first: str
    """Root id, `dataset/split/dialogue_id`."""
    second: str
    num_matches: int
    """Informative lines that match in the same order."""
    longest: int
    """Words of the longest matching line."""


@dataclass(frozen=True)
class _Line:
    dialogue: int
    turn: int
    words: tuple[str, ...]
    unique: frozenset[str]


@dataclass(frozen=True)
class _Match:
    turns: tuple[int, int]
    num_words: int
    verbatim: bool
    contained: bool


def root_id(dialogue: Dialogue) -> str:
    """`dataset/split/dialogue_id`, as in `Sample.root_id`."""
    return f"{dialogue.dataset}/{dialogue.split}/{dialogue.dialogue_id}"


def words_of(text: str) -> tuple[str, ...]:
    """The words of a line as they are compared."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).lower()))


def title(name: str) -> str:
    """How messages write a data set's name."""
    return {"meld": "MELD", "emorynlp": "EmoryNLP", "iemocap": "IEMOCAP"}.get(name, name)


def acted_kind(dialogue: Dialogue) -> str | None:
    """Whether a dialogue of IEMOCAP is "scripted" or "improvised", by its id; None of those of other sets."""
    kind = _IEMOCAP_KIND.search(dialogue.dialogue_id) if dialogue.dataset == "iemocap" else None
    return {"impro": "improvised", "script": "scripted"}[kind[1]] if kind else None


def shared_dialogues(
    first: Sequence[Dialogue], second: Sequence[Dialogue], *, rule: str = "strict"
) -> tuple[SharedPair, ...]:
    """The pairs, one dialogue of each side, that the rule calls shared, in order of `first`."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}.")
    pairs, lines = [], (_lines(first), _lines(second))
    informative = [Counter(line.dialogue for line in side) for side in lines]
    for (one, other), matches in sorted(_matches(*lines).items()):
        aligned = _longest_chain([match.turns for match in matches])
        only = min(informative[0][one], informative[1][other]) == 1
        strict = aligned >= 2 or (only and max(match.num_words for match in matches) >= LONG_LINE)
        if strict or (rule == "wide" and _is_wide(matches)):
            pairs.append(
                SharedPair(
                    first=root_id(first[one]),
                    second=root_id(second[other]),
                    num_matches=aligned,
                    longest=max(match.num_words for match in matches),
                )
            )
    return tuple(pairs)


def num_near(first: Sequence[Dialogue], second: Sequence[Dialogue]) -> int:
    """How many informative lines of `first` match one of `second`, whoever says them."""
    found = _matches(_lines(first), _lines(second))
    return len({(one, match.turns[0]) for (one, _), matches in found.items() for match in matches})


def decontaminate(
    corpora: Mapping[str, Corpus], *, rule: str = "wide", keep_own: Iterable[str] = OFFICIAL_OVERLAP
) -> tuple[dict[str, Corpus], dict[str, Any]]:
    """The corpora without the training dialogues that repeat a dev or test dialogue of any of them.

    Dev and test stay as they are. Each corpus' report says what it lost.

    Args:
        corpora: name -> corpus, those used together.
        rule: "wide" or "strict".
        keep_own: data sets whose overlap between their own splits is left in.

    Returns:
        The corpora under the same names, and a report of JSON types: `rule`; `dropped`, the root ids; `rows`,
        the turns in them; `messages`; `pairs`, training dialogue, evaluation dialogue and matches.
    """
    kept_own = set(keep_own)
    cleaned: dict[str, Corpus] = {}
    report: dict[str, Any] = {"rule": rule, "dropped": [], "rows": 0, "messages": [], "pairs": []}
    for name, corpus in corpora.items():
        train = corpus.splits["train"]
        doomed: set[str] = set()
        lines = []
        for other in corpora.values():
            if other is corpus and corpus.name in kept_own:
                continue
            pairs = shared_dialogues(train, _evaluation(other), rule=rule)
            hit = {pair.first for pair in pairs}
            report["pairs"].extend(asdict(pair) for pair in pairs)
            doomed |= hit
            if hit:
                lines.append(
                    f"{'training' if other is corpus else 'unified training'}: {len(hit)} of {len(train):,} "
                    f"{title(corpus.name)} train dialogues repeat scenes of {title(other.name)} dev/test; "
                    f"dropped (decontaminate=True)."
                )
        lost = [dialogue for dialogue in train if root_id(dialogue) in doomed]
        report["dropped"].extend(map(root_id, lost))
        report["rows"] += sum(len(dialogue.turns) for dialogue in lost)
        report["messages"].extend(lines)
        ingest = replace(
            corpus.report,
            leakage=(*corpus.report.leakage, *lines),
            skipped={**corpus.report.skipped, "train dialogues dropped by decontamination": len(lost)},
        )
        kept = tuple(dialogue for dialogue in train if root_id(dialogue) not in doomed)
        cleaned[name] = replace(corpus, splits={**corpus.splits, "train": kept}, report=ingest)
    return cleaned, report


def eval_parts(
    corpora: Mapping[str, Corpus], *, beside: Iterable[Corpus] = (), rule: str = "strict"
) -> dict[str, str]:
    """Root id of each dev and test dialogue of the corpora -> "shared" or "clean".

    Shared: some training dialogue of the corpora, or of those `beside` them, holds the same scene. Give the
    corpora as read, before decontamination, so that systems trained either way are scored on the same parts.
    """
    evaluation = [dialogue for corpus in corpora.values() for dialogue in _evaluation(corpus)]
    sources = (*corpora.values(), *beside)
    training = [dialogue for corpus in sources for dialogue in corpus.splits["train"]]
    parts = {root_id(dialogue): "clean" for dialogue in evaluation}
    for pair in shared_dialogues(evaluation, training, rule=rule):
        parts[pair.first] = "shared"
    return parts


def scored_parts(corpora: Mapping[str, Corpus], *, beside: Iterable[Corpus] = ()) -> dict[str, str]:
    """Root id of each dev and test dialogue -> the part that its utterances are scored in, beside the whole.

    IEMOCAP: "scripted" or "improvised", as its scripts are the same in every session, and most scripted lines
    of its test part are in its training part. All other sets: "shared" or "clean" by `eval_parts`. Give
    `beside` what is not trained on but has the same source, so that systems of one set and of several are
    scored on the same parts.
    """
    parts = eval_parts(corpora, beside=beside)
    for corpus in corpora.values():
        for dialogue in _evaluation(corpus):
            if kind := acted_kind(dialogue):
                parts[root_id(dialogue)] = kind
    return parts


def leakage_warnings(corpus: Corpus, *, policy: str = "official") -> tuple[str, ...]:
    """One line for each dev or test dialogue that repeats a training dialogue of its own corpus (strict
    rule).

    Args:
        corpus: one data set.
        policy: "official" reports what the set's own split contains; "strict" makes it a ValueError.
    """
    if policy not in ("official", "strict"):
        raise ValueError(f"policy is {policy!r}; expected 'official' or 'strict'.")
    lines = []
    for pair in shared_dialogues(_evaluation(corpus), corpus.splits["train"]):
        _, split, name = pair.first.split("/", 2)
        other = pair.second.split("/", 2)[2]
        found = (
            f"{split} dialogue {name} shares {pair.num_matches} long "
            f"utterance{'s' if pair.num_matches > 1 else ''} with train dialogue {other}"
        )
        if policy == "strict":
            raise ValueError(
                f"{corpus.name}: {found}. Remove one of them, or allow the split as it is by policy "
                f"'official'."
            )
        lines.append(f"{found} (official split: allowed by policy 'official').")
    return tuple(lines)


def _evaluation(corpus: Corpus) -> tuple[Dialogue, ...]:
    return corpus.splits["dev"] + corpus.splits["test"]


def _lines(dialogues: Sequence[Dialogue]) -> list[_Line]:
    lines = []
    for number, dialogue in enumerate(dialogues):
        for turn_number, turn in enumerate(dialogue.turns):
            words = words_of(turn.text)
            if len(words) >= MIN_WORDS:
                lines.append(_Line(number, turn_number, words, frozenset(words)))
    return lines


def _matches(first: Sequence[_Line], second: Sequence[_Line]) -> dict[tuple[int, int], list[_Match]]:
    """(dialogue of first, dialogue of second) -> their matching lines.

    Candidates come from two indexes over the rarest words, as exact set-similarity joins do: similar sets
    share one of the rarest words that each can spare, and a contained line's rarest word is in the longer
    one.
    """
    frequency = Counter(word for line in (*first, *second) for word in line.unique)

    def rarest(line: _Line) -> list[str]:
        return sorted(line.unique, key=lambda word: (frequency[word], word))

    by_prefix: dict[str, list[int]] = defaultdict(list)
    by_rarest: dict[str, list[int]] = defaultdict(list)
    by_word: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(second):
        words = rarest(line)
        for word in words[: _prefix(len(words))]:
            by_prefix[word].append(number)
        by_rarest[words[0]].append(number)
        for word in words:
            by_word[word].append(number)

    found: dict[tuple[int, int], list[_Match]] = defaultdict(list)
    for line in first:
        words = rarest(line)
        candidates = set(by_word.get(words[0], ()))
        for word in words[: _prefix(len(words))]:
            candidates.update(by_prefix.get(word, ()))
        for word in words:
            candidates.update(by_rarest.get(word, ()))
        for number in candidates:
            match = _match(line, second[number])
            if match:
                found[line.dialogue, second[number].dialogue].append(match)
    return found


def _prefix(num_words: int) -> int:
    """How many of a set's rarest words a set of Jaccard similarity `MIN_JACCARD` must share one of."""
    return num_words - math.ceil(num_words * MIN_JACCARD - 1e-9) + 1


def _match(one: _Line, other: _Line) -> _Match | None:
    common = len(one.unique & other.unique)
    near = common >= MIN_JACCARD * (len(one.unique) + len(other.unique) - common) - 1e-9
    contained = common == min(len(one.unique), len(other.unique)) and _contains(one.words, other.words)
    if not near and not contained:
        return None
    return _Match(
        turns=(one.turn, other.turn),
        num_words=min(len(one.words), len(other.words)),
        verbatim=one.words == other.words,
        contained=contained,
    )


def _contains(one: Sequence[str], other: Sequence[str]) -> bool:
    shorter, longer = sorted((one, other), key=len)
    return f" {' '.join(shorter)} " in f" {' '.join(longer)} "


def _longest_chain(points: Sequence[tuple[int, int]]) -> int:
    """Most points that rise in both coordinates: matches in the same order in both dialogues."""
    ends: list[int] = []
    for _, turn in sorted(points, key=lambda point: (point[0], -point[1])):
        place = bisect_left(ends, turn)
        ends[place : place + 1] = [turn]
    return len(ends)


def _is_wide(matches: Sequence[_Match]) -> bool:
    verbatim = [match.turns for match in matches if match.verbatim]
    return (
        min(len({turn for turn, _ in verbatim}), len({turn for _, turn in verbatim})) >= 2
        or any(match.verbatim and match.num_words >= LONG_LINE for match in matches)
        or any(match.contained and match.num_words >= LONG_PART for match in matches)
    )

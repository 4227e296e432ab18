"""Lenient reading of the emotion field, for the second column of an evaluation report.

Strict scores (`grammar.predicted_label`) are the main ones. Lenient reading forgives the form of the
emotion field and nothing else: an answer without that field, with two of them, out of order, unfinished or
still thinking stays wrong. `instructerc` reproduces the scoring of InstructERC (arXiv 2309.11911), in which
nothing is ever invalid.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Literal

Scoring = Literal["lenient", "instructerc"]

MAX_FIELD = 2000
"""Characters of the emotion field that are read."""
MAX_ITEMS = 32

_TAGS = ("<emotion>", "</emotion>", "<self_emotion>", "</self_emotion>", "<response>", "</response>")
_NUMBER = re.compile(r"[0-9]{0,3}\.?[0-9]{1,8}")
_NEGATION = re.compile(r"(?:(?<!\w)(?:not|no|isn't|without)|n't)\s++$")
_EDGES = " \t\r\n\"'`*_~.,;:!?()[]{}<>|#-“”‘’«»"  # quotes, punctuation and markdown around a label

# Forms of one word; a label of the inventory and another word of its row are aliases of each other.
FORMS = (
    ("sad", "sadness"),
    ("joy", "joyful", "joyous"),
    ("angry", "anger"),
    ("happy", "happiness"),
    ("surprise", "surprised", "surprising"),
    ("fear", "fearful", "feared"),
    ("scared", "scare", "scary"),
    ("disgust", "disgusted", "disgusting"),
    ("neutral", "neutrality"),
    ("excited", "excitement", "exciting"),
    ("frustrated", "frustration", "frustrating"),
    ("peaceful", "peace", "peacefulness"),
    ("powerful", "power", "powerfulness"),
    ("mad", "madness"),
)
FORM_OF = {word: row for row, words in enumerate(FORMS) for word in words}

# The spellings that InstructERC prompts with and matches, by our lower-case label where they differ.
_INSTRUCTERC_SPELLING = {
    "meld": {"sadness": "sad", "joy": "joyful", "anger": "angry"},
    "emorynlp": {
        name: name.capitalize()
        for name in ("joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared")
    },
}


def parse_lenient(
    text: str,
    *,
    dataset: str,
    inventory: Sequence[str],
    max_labels: int = 3,
    scoring: Scoring = "lenient",
    finished: bool = True,
    think_open_in_prompt: bool = False,
) -> tuple[tuple[str, float], ...]:
    """(label, weight) of the emotion field by descending weight, equal ones as listed; () if it cannot be
    read.

    Labels are mapped by `resolve_label`; one that cannot be mapped stays as written (lower case), so that
    an answer whose largest weight it has is wrong. A weight that is no decimal in [0, 1] counts 1, weights
    of one label add up, and the `max_labels` largest are kept. `finished` and `think_open_in_prompt` as in
    `grammar.parse`. Never raises.
    """
    if scoring == "instructerc":
        return ((_instructerc_label(text, dataset, tuple(inventory)), 1.0),)
    field = _emotion_field(text, think_open_in_prompt) if finished else None
    if field is None:
        return ()
    weights: dict[str, float] = {}
    for item in re.split(r"[,;\n]", field[:MAX_FIELD], maxsplit=MAX_ITEMS)[:MAX_ITEMS]:
        name, colon, weight_text = item.rpartition(":")
        if not colon:
            name, weight_text = item, ""
        label, reason = resolve_label(name, dataset=dataset, inventory=inventory)
        if reason == "none" and not name.strip(_EDGES):
            continue
        label = label or name.strip(_EDGES).lower()
        weight_text = weight_text.strip()
        weight = float(weight_text) if _NUMBER.fullmatch(weight_text) else 1.0
        weight = weight if weight <= 1.0 else 1.0
        weights[label] = weights.get(label, 0.0) + weight
    pairs = sorted(
        ((label, weight) for label, weight in weights.items() if weight > 0), key=lambda pair: -pair[1]
    )
    return tuple(pairs[:max_labels])


def lenient_label(pairs: Sequence[tuple[str, float]], inventory: Sequence[str]) -> str | None:
    """The label to score: the first of the largest weight, None if it is outside the inventory."""
    if not pairs:
        return None
    label = max(pairs, key=lambda pair: pair[1])[0]
    return label if label in {name.lower() for name in inventory} else None


def resolve_label(text: str, *, dataset: str, inventory: Sequence[str]) -> tuple[str | None, str]:
    """(label, how): how is exact, synonym or search; or (None, why): why is none, ambiguous or out_of_set.

    The whole text is a label, or a synonym of this dataset; or exactly one label is named in it, as whole
    words and not directly after a negation. No substrings, no edit distance. Data sets without a word list
    know their labels only.
    """
    words = _normalise(text[:MAX_FIELD])
    labels = {label.lower() for label in inventory}
    if words in labels:
        return words, "exact"
    table = _word_table(dataset, tuple(inventory))
    if words in table:
        return table[words], "synonym"
    named: dict[str, None] = {}
    for hit in _word_pattern(dataset, tuple(inventory)).finditer(words):
        if not _NEGATION.search(words[max(0, hit.start() - 24) : hit.start()]):
            named[table[hit.group()]] = None
    if len(named) == 1:
        return next(iter(named)), "search"
    if named:
        return None, "ambiguous"
    return None, "out_of_set" if words in _never_mapped(dataset) else "none"


def _emotion_field(text: str, opened: bool) -> str | None:
    closes = text.count("</think>")
    if closes > 1 or text.count("<think>") > 1 or (closes == 0 and (opened or "<think>" in text)):
        return None
    if closes == 1 and not opened and "<think>" not in text:
        return None
    body = text[text.rfind("</think>") + len("</think>") :] if closes else text
    first = [(body.find(tag), tag) for tag in _TAGS if tag in body]
    if [tag for _, tag in sorted(first)][:2] != ["<emotion>", "</emotion>"]:
        return None
    start, end = body.find("<emotion>") + len("<emotion>"), body.find("</emotion>")
    if body.count("<emotion>") > 1 or body.count("</emotion>") > 1:
        return None
    return body[start:end]


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().replace("’", "'").strip(_EDGES).split())


@lru_cache(maxsize=1)
def _synonyms() -> Mapping[str, Mapping[str, Sequence[str]]]:
    return json.loads(files("selfemo_jax.data").joinpath("synonyms.json").read_text(encoding="utf-8"))


def _never_mapped(dataset: str) -> Sequence[str]:
    return _synonyms()["_never_mapped"].get(dataset.lower(), ())


@lru_cache(maxsize=64)
def _word_table(dataset: str, inventory: tuple[str, ...]) -> Mapping[str, str]:
    labels = {label.lower(): label.lower() for label in inventory}
    lists = {} if dataset.startswith("_") else _synonyms().get(dataset.lower(), {})
    for label, words in lists.items():
        if label.lower() in labels:
            labels.update((word, label.lower()) for word in words)
    return labels


@lru_cache(maxsize=64)
def _word_pattern(dataset: str, inventory: tuple[str, ...]) -> re.Pattern[str]:
    words = sorted(_word_table(dataset, inventory), key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)" if words else r"(?!)")


def _instructerc_label(text: str, dataset: str, inventory: tuple[str, ...]) -> str:
    """First label that is a substring, in the case they print or as our prompt asks for it; else the one at
    the least edit distance."""
    output = _emotion_field(text, "</think>" in text and "<think>" not in text)
    if output is None:
        output = (
            text[text.rfind("</think>") + len("</think>") :].strip() if "</think>" in text else text.strip()
        )
    spelling = _INSTRUCTERC_SPELLING.get(dataset.lower(), {})
    # Our prompts ask for the set's own labels in lower case, which their matching would not know.
    output = re.sub(r"\w+", lambda word: spelling.get(word[0], word[0]), output[:MAX_FIELD])
    names = {spelling.get(label.lower(), label.lower()): label.lower() for label in inventory}
    hits = [(output.find(name), -len(name), name) for name in names if name in output]
    if hits:
        return names[min(hits)[2]]
    return names[min(names, key=lambda name: _edit_distance(output, name))]


def _edit_distance(left: str, right: str) -> int:
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]

"""The answer syntax: strict parser and serialiser.

    completion = [ "<think>" text "</think>" ] answer
    answer     = "<emotion>" pairs "</emotion>"
                 "<self_emotion>" pairs "</self_emotion>" "<response>" reply "</response>"
    pairs      = label ":" weight { "," label ":" weight }          1..max_labels pairs, distinct labels
    weight     = "1" [ "." 1*4"0" ] | "0." 1*4DIGIT                 above zero

White space may stand between blocks and around labels and weights, nowhere else. `parse` never raises,
returns every code of `CODE_TABLE` that applies, and takes time linear in the text: blocks are found by a
search for each literal tag, and at most `MAX_ITEMS` items of a list are looked at.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from selfemo_jax.data.label_arrays import answers_to_arrays, class_mask, gold_to_array
from selfemo_jax.data.lenient import FORM_OF, parse_lenient

__all__ = [
    "CODES",
    "CODE_TABLE",
    "Answer",
    "acceptable",
    "answer_pieces",
    "answers_to_arrays",
    "class_mask",
    "gold_to_array",
    "parse",
    "parse_lenient",
    "predicted_label",
    "serialise",
]

# E_* makes an answer invalid (reward 0, outside the core set), with the one exception of E_UNK_LABEL.
CODE_TABLE: Mapping[str, str] = {
    "E_LENGTH": "sampling stopped at the length limit, so the answer has no end",
    "E_NO_THINK": "thinking is on and there is no think block",
    "E_NO_THINK_END": "the think block is never closed",
    "E_MULTI_THINK": "a second think block, or a </think> or <think> out of place",
    "E_NO_EMOTION": "the emotion block is missing or not closed",
    "E_NO_SELF": "the self_emotion block is missing, not closed or empty",
    "E_NO_REPLY": "the response block is missing, not closed or empty",
    "E_DUP_BLOCK": "a tag of a block occurs more than once",
    "E_ORDER": "the blocks are out of order, nested or closed before they open",
    "E_EMPTY_PAIRS": "a list without any pair, or with all weights 0",
    "E_PAIR": "an item without a label, or with a label that is no word (also an empty item)",
    "E_WEIGHT": "a weight that is missing, 0 beside others, negative, above 1, or not a plain decimal",
    "E_TOO_MANY": "more labels than allowed",
    "E_DUP_LABEL": "the same label twice in one list",
    "E_TRAILING": "text before, between or after the blocks",
    "E_REPLY_TAG": "the reply holds a variant of a tag of the grammar, such as <Emotion > or </response",
    "E_UNK_LABEL": "self_emotion names a label outside the inventory: valid, but never a new gold label",
    "W_UNK_LABEL": "emotion names a label outside the inventory: it counts as a miss",
    "W_ALIAS": "an unknown label is another form of one in the inventory (sadness for sad)",
    "W_CASE": "upper case in a label",
    "W_SPACE": "white space unlike the serialiser's in a list, or not blanks and newlines between blocks",
    "W_LEAK": "the reply holds label:weight text",
    "W_MARKUP": "the reply holds other markup, such as <|name|> or <b>",
    "W_BYTES": "the reply holds control characters or bytes that are not UTF-8",
}
CODES: tuple[str, ...] = tuple(CODE_TABLE)

MAX_ITEMS = 32
"""Items of a list that are looked at; a longer list is E_TOO_MANY whatever the rest says."""
_MAX_LABEL = 48

BLOCKS = ("emotion", "self_emotion", "response")
_TAGS = tuple(tag for name in BLOCKS for tag in (f"<{name}>", f"</{name}>"))
_MISSING = {"emotion": "E_NO_EMOTION", "self_emotion": "E_NO_SELF", "response": "E_NO_REPLY"}

# Possessive runs (`*+`) cannot be given back, so no pattern here backtracks over hostile text.
_WEIGHT = re.compile(r"1(?:\.0{1,4})?|0\.[0-9]{1,4}")
_ZERO = re.compile(r"0(?:\.0{1,4})?")
_WORD = re.compile(r"[^\W\d_]\w*+(?:[ '-]\w++)*+")
_ODD_SPACE = re.compile(r"[^\S \n]")
_LOOSE_TAG = re.compile(r"<\s*+/?+\s*+(?:think|emotion|self_emotion|response)(?![a-z0-9_])", re.IGNORECASE)
_MARKUP = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[a-z][a-z0-9_:-]{0,30}\s{0,4}/?>", re.IGNORECASE)
_NUMBER_AFTER_COLON = re.compile(r":\s*+[.0-9]")
_LAST_WORD = re.compile(r"\w++\Z")
_BAD_BYTES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one completion says, as far as it can be read."""

    valid: bool
    """Fully grammatical: earns a reward, counts in the core set. W_* codes and E_UNK_LABEL leave it True."""
    codes: tuple[str, ...]
    """Every code found, each once, in the order of `CODES`."""
    emotion: tuple[tuple[str, float], ...] = ()
    """(label, weight) of the last speaker, lower case, as listed; labels outside the inventory are kept."""
    self_emotion: tuple[tuple[str, float], ...] = ()
    response: str = ""
    think: str = ""
    unknown: tuple[str, ...] = ()
    """Labels of `emotion` outside the inventory."""


def parse(
    text: str,
    *,
    inventory: Sequence[str],
    max_labels: int = 3,
    thinking: bool = False,
    think_open_in_prompt: bool = False,
    finished: bool = True,
) -> Answer:
    """Read a completion strictly. Never raises; linear in `len(text)`.

    inventory: labels of the prompt, compared in lower case. thinking: a think block is required (else it is
    optional). think_open_in_prompt: the prompt ends inside an open think block, so `<think>` may be absent.
    finished: False when sampling hit the length limit, which is always E_LENGTH.
    """
    found: set[str] = set() if finished else {"E_LENGTH"}
    think, body = _split_think(text, thinking, think_open_in_prompt, found)
    contents = _split_blocks(body, found)
    known = _known_labels(tuple(inventory))
    emotion = self_emotion = ()
    unknown: tuple[str, ...] = ()
    if contents["emotion"] is not None:
        emotion, unknown = _pairs(contents["emotion"], known, max_labels, "W_UNK_LABEL", found)
    if contents["self_emotion"] is not None:
        self_emotion, _ = _pairs(contents["self_emotion"], known, max_labels, "E_UNK_LABEL", found)
        if not contents["self_emotion"].strip():
            found.add("E_NO_SELF")
    response = (contents["response"] or "").strip()
    if contents["response"] is not None:
        _check_reply(response, known, found)
    codes = tuple(code for code in CODES if code in found)
    valid = not any(code.startswith("E_") and code != "E_UNK_LABEL" for code in codes)
    return Answer(
        valid=valid,
        codes=codes,
        emotion=emotion,
        self_emotion=self_emotion,
        response=response,
        think=think,
        unknown=unknown,
    )


def _split_think(text: str, thinking: bool, opened: bool, found: set[str]) -> tuple[str, str]:
    """(think text, what follows it); the opening tag may be in the prompt, the text then starts inside."""
    opening, closing = text.find("<think>"), text.find("</think>")
    if opening < 0 and closing < 0:
        if opened:
            found.add("E_NO_THINK_END")
        elif thinking:
            found.add("E_NO_THINK")
        return "", text
    leads = opening >= 0 and not text[:opening].strip()
    start = opening + len("<think>") if leads else 0
    if opening >= 0 and not leads:
        # Text before the block is no part of it, unless the prompt opened one or the answer has begun.
        plain = (
            not opened
            and (closing < 0 or opening < closing)
            and not any(tag in text[:opening] for tag in _TAGS)
        )
        found.add("E_TRAILING" if plain else "E_MULTI_THINK")
        start = opening + len("<think>") if plain else 0
    if opening < 0 and not opened:
        found.add("E_MULTI_THINK")
    if text.find("<think>", opening + 1) != -1 and opening >= 0 or text.rfind("</think>") != closing:
        found.add("E_MULTI_THINK")
    if closing < 0:
        found.add("E_NO_THINK_END")
        # Where the thought ended is unknown; what follows the first tag of the answer is still read.
        cut = min((at for at in (text.find(tag, start) for tag in _TAGS) if at >= 0), default=len(text))
        return text[start:cut].strip(), text[cut:]
    return text[start : max(closing, start)].strip(), text[text.rfind("</think>") + len("</think>") :]


def _split_blocks(body: str, found: set[str]) -> dict[str, str | None]:
    """Contents of the blocks (None where a block cannot be read), by a search for each literal tag."""
    first: dict[str, int] = {}
    for tag in _TAGS:
        at = body.find(tag)
        if at >= 0:
            first[tag] = at
            if body.find(tag, at + len(tag)) >= 0:
                found.add("E_DUP_BLOCK")
    contents: dict[str, str | None] = dict.fromkeys(BLOCKS)
    for name in BLOCKS:
        opening, closing = f"<{name}>", f"</{name}>"
        if opening not in first or closing not in first:
            found.add(_MISSING[name])
        elif first[closing] < first[opening]:
            found.add("E_ORDER")
        else:
            contents[name] = body[first[opening] + len(opening) : first[closing]]
    in_order = sorted(first, key=first.__getitem__)
    if in_order != [tag for tag in _TAGS if tag in first]:
        found.add("E_ORDER")
    if first:
        _check_outside(body, in_order, first, found)
    return contents


def _check_outside(body: str, in_order: list[str], first: dict[str, int], found: set[str]) -> None:
    outside = [body[: first[in_order[0]]]] if not in_order[0].startswith("</") else []
    last_end, last_tag = max((body.rfind(tag) + len(tag), tag) for tag in first)
    if last_tag.startswith("</"):
        outside.append(body[last_end:])
    for tag, following in zip(in_order, in_order[1:], strict=False):
        if tag.startswith("</") and not following.startswith("</"):
            outside.append(body[first[tag] + len(tag) : first[following]])
    for gap in outside:
        if gap.strip():
            found.add("E_TRAILING")
        elif _ODD_SPACE.search(gap):
            found.add("W_SPACE")


def _pairs(
    content: str, known: Mapping[str, None], max_labels: int, unknown_code: str, found: set[str]
) -> tuple[tuple[tuple[str, float], ...], tuple[str, ...]]:
    items = content.split(",", MAX_ITEMS)[:MAX_ITEMS]
    num_written = sum(1 for item in items if item.strip())
    if num_written == 0:
        found.add("E_EMPTY_PAIRS")
        if len(items) == 1:
            return (), ()
    if num_written > max_labels or len(items) == MAX_ITEMS:
        found.add("E_TOO_MANY")
    pairs: list[tuple[str, float]] = []
    unknown: dict[str, None] = {}
    seen: set[str] = set()
    for position, item in enumerate(items):
        written, colon, weight_text = item.rpartition(":")
        if not colon:
            written, weight_text = weight_text, ""
        written, weight_text = written.strip(), weight_text.strip()
        label = written.lower() if len(written) <= _MAX_LABEL else ""
        if label not in known:
            if not _WORD.fullmatch(label):
                found.add("E_PAIR")
                continue
            found.add(unknown_code)
            if _is_alias(label, known):
                found.add("W_ALIAS")
            unknown[label] = None
        if written != label:
            found.add("W_CASE")
        if colon and item != f"{' ' if position else ''}{written}:{weight_text}":
            found.add("W_SPACE")
        if label in seen:
            found.add("E_DUP_LABEL")
        seen.add(label)
        if _ZERO.fullmatch(weight_text) or _WEIGHT.fullmatch(weight_text):
            pairs.append((label, float(weight_text)))
        else:
            found.add("E_WEIGHT")
    positive = tuple(pair for pair in pairs if pair[1] > 0)
    if pairs and not positive and len(pairs) == num_written:
        found.add("E_EMPTY_PAIRS")
    elif len(positive) < len(pairs):
        found.add("E_WEIGHT")
    return positive, tuple(unknown)


def _check_reply(reply: str, known: Mapping[str, None], found: set[str]) -> None:
    if not reply:
        found.add("E_NO_REPLY")
        return
    if _LOOSE_TAG.search(reply):
        found.add("E_REPLY_TAG")
    elif _MARKUP.search(reply):
        found.add("W_MARKUP")
    if _BAD_BYTES.search(reply):
        found.add("W_BYTES")
    if _leaks(reply, known):
        found.add("W_LEAK")


@lru_cache(maxsize=256)
def _known_labels(inventory: tuple[str, ...]) -> Mapping[str, None]:
    return dict.fromkeys(label.lower() for label in inventory)


def _leaks(reply: str, known: Mapping[str, None]) -> bool:
    """Whether a label, in any of its forms, stands before a colon and a number."""
    for count, hit in enumerate(_NUMBER_AFTER_COLON.finditer(reply)):
        if count == MAX_ITEMS:
            return True
        before = reply[max(0, hit.start() - _MAX_LABEL - 8) : hit.start()].rstrip().lower()
        word = _LAST_WORD.search(before)
        if word and (word[0] in known or _is_alias(word[0], known)):
            return True
        if any(before.endswith(label) for label in known if " " in label or "-" in label or "'" in label):
            return True
    return False


def _is_alias(label: str, known: Iterable[str]) -> bool:
    row = FORM_OF.get(label)
    return row is not None and any(FORM_OF.get(other) == row for other in known)


def answer_pieces(
    emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    self_emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    response: str,
    *,
    think: str | None = None,
    think_open: bool = False,
) -> tuple[tuple[str, str], ...]:
    """The canonical answer as (kind, text) pieces, kind "markup" for tags and "data" for what a model says.

    think None: no think block. think_open: the prompt already holds `<think>`. ValueError for what `parse`
    would refuse.
    """
    reply = response.strip()
    if not reply:
        raise ValueError("serialise: the response is empty; an answer needs a reply")
    if any(tag in reply for tag in ("<think>", "</think>", *_TAGS)) or _LOOSE_TAG.search(reply):
        raise ValueError(f"serialise: the response holds a tag of the answer syntax: {reply[:80]!r}")
    pieces: list[tuple[str, str]] = []
    if think is not None:
        if "<think>" in think or "</think>" in think:
            raise ValueError("serialise: the think text holds <think> or </think>")
        pieces += [
            ("markup", "\n" if think_open else "<think>\n"),
            ("data", think.strip()),
            ("markup", "\n</think>\n\n"),
        ]
    elif think_open:
        raise ValueError("serialise: the prompt opened a think block; pass think (it may be empty)")
    pieces += [
        ("markup", "<emotion>"),
        ("data", _pairs_text(emotion, "emotion")),
        ("markup", "</emotion>\n<self_emotion>"),
        ("data", _pairs_text(self_emotion, "self_emotion")),
        ("markup", "</self_emotion>\n<response>"),
        ("data", reply),
        ("markup", "</response>"),
    ]
    return tuple(pieces)


def serialise(
    emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    self_emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    response: str,
    *,
    think: str | None = None,
) -> str:
    """The canonical text of an answer: labels by descending weight (ties as given), two decimals.

    Weights are in (0, 1]; one that would round to 0.00 is written 0.01. ValueError for what `parse` would
    refuse.
    """
    return "".join(text for _, text in answer_pieces(emotion, self_emotion, response, think=think))


def _pairs_text(pairs: Mapping[str, float] | Iterable[tuple[str, float]], field: str) -> str:
    items: list[tuple[str, float]] = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    if not items:
        raise ValueError(f"serialise: {field} has no label; at least one is needed")
    for label, weight in items:
        if not 0.0 < weight <= 1.0:
            raise ValueError(
                f"serialise: {field} gives {label!r} the weight {weight}; expected above 0, at most 1"
            )
        if not _WORD.fullmatch(label) or label != label.lower() or len(label) > _MAX_LABEL:
            raise ValueError(f"serialise: {field} names {label!r}; expected a lower-case word")
    if len({label for label, _ in items}) < len(items):
        raise ValueError(f"serialise: {field} names a label twice: {items}")
    rounded = [(label, max(round(weight, 2), 0.01)) for label, weight in items]
    return ", ".join(f"{label}:{weight:.2f}" for label, weight in sorted(rounded, key=lambda pair: -pair[1]))


def predicted_label(answer: Answer) -> str | None:
    """Label of the largest weight, the first listed among equals; None if invalid or outside the
    inventory."""
    if not answer.valid or not answer.emotion:
        return None
    label = max(answer.emotion, key=lambda pair: pair[1])[0]
    return None if label in answer.unknown else label


def acceptable(answer: Answer) -> bool:
    """Whether the answer may become a new input: valid, all labels in the inventory, a reply of plain
    words."""
    refused = {"W_UNK_LABEL", "E_UNK_LABEL", "W_LEAK", "W_MARKUP", "W_BYTES"}
    return answer.valid and refused.isdisjoint(answer.codes)

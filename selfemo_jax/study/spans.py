"""Which tokens of an answer belong to which part of it: reasoning, emotion, self-emotion, response."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from selfemo_jax.data.grammar import Answer

PARTS = ("reasoning", "emotion", "self-emotion", "response")
MARKUP = -1
"""Tokens of tags and of white space between blocks, and the end of the turn."""
_TAGS = {"emotion": "emotion", "self-emotion": "self_emotion", "response": "response"}
_LONGEST_CHARACTER = 8
"""Tokens that may be needed for one character, beyond which its bytes are taken for broken."""


def part_ranges(text: str, answer: Answer) -> dict[str, tuple[int, int]]:
    """Ranges of characters of the parts of a valid answer's text, as the parser cuts it.

    ValueError for an answer that is not valid: its parts are not defined.
    """
    if not answer.valid:
        raise ValueError("an answer outside the grammar has no parts")
    ranges: dict[str, tuple[int, int]] = {}
    closing = text.rfind("</think>")
    body = closing + len("</think>") if closing >= 0 else 0
    if closing >= 0:
        opening = text.find("<think>", 0, closing)
        ranges["reasoning"] = (opening + len("<think>") if opening >= 0 else 0, closing)
    for part, tag in _TAGS.items():
        start = text.index(f"<{tag}>", body) + len(f"<{tag}>")
        ranges[part] = (start, text.index(f"</{tag}>", start))
    # What is measured must be what was scored.
    assert text[slice(*ranges["response"])].strip() == answer.response
    assert text[slice(*ranges.get("reasoning", (0, 0)))].strip() == answer.think
    return ranges


def token_ranges(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[int, int]]:
    """Range of characters of each token in ``decode(ids)``.

    Tokens that share a character (parts of its bytes) all get that character's range. ValueError for a
    tokenizer whose tokens have no text of their own.
    """
    ranges: list[tuple[int, int]] = []
    begin, position = 0, 0
    for end in range(1, len(ids) + 1):
        piece = decode(ids[begin:end])
        whole = not piece.endswith("\ufffd") or end - begin >= _LONGEST_CHARACTER or end == len(ids)
        if whole:
            ranges += [(position, position + len(piece))] * (end - begin)
            begin, position = end, position + len(piece)
    if position == len(decode(ids)):
        return ranges
    # Broken bytes, or blanks that only the first token loses: count prefixes, which is slow but always right.
    lengths = [0, *(len(decode(ids[:end])) for end in range(1, len(ids) + 1))]
    if lengths != sorted(lengths):
        raise ValueError("the tokenizer's tokens have no places in its text; spans need a byte-level one")
    return list(zip(lengths, lengths[1:], strict=False))


def token_parts(ranges: Sequence[tuple[int, int]], parts: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Index into `PARTS` of each token, or `MARKUP`: a token belongs to the part that its middle lies in."""
    found = np.full(len(ranges), MARKUP)
    for place, (start, end) in enumerate(ranges):
        middle = (start + end) / 2
        for part, (first, last) in parts.items():
            if first < middle < last and start < end:
                found[place] = PARTS.index(part)
    return found

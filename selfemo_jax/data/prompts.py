"""The policy's prompt, and the completion that supervised training teaches.

A prompt is a list of pieces: our own words and the chat template ("markup"), and what data says ("data":
names, persona, theme, utterances, labels). Data is encoded without added tokens, on one line, and a `<` that
would open a tag of the answer syntax is shown as `‹`, so the model sees the words and nobody sees structure.
The parser reads completions only.

Every line of the history is encoded on its own: the ids of a history begin with those of any earlier part
of it. What changes with the turn (which turn is the last) therefore stands after the history. In the style
"dialogue" nothing before the history depends on the turn, so that all prompts of a dialogue grow on one
trunk, and a long one is read in windows that begin at the same line for many turns.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from selfemo_jax.data.codec import TextCodec, load_codec
from selfemo_jax.data.grammar import answer_pieces
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_notes import LABEL_NOTES

__all__ = [
    "Prompt",
    "PromptTooLong",
    "TextCodec",
    "build_messages",
    "build_prompt",
    "completion_ids",
    "encode_completion",
    "encode_history",
    "load_codec",
    "normalise_reply",
]

Piece = tuple[str, str]
"""(kind, text), kind "markup" or "data"."""
Notes = tuple[tuple[str, str], ...]
"""(label, what it means)."""

STYLES = ("full", "brief", "dialogue")
WINDOW_OVERLAP = 3
"""Lines that a window of a long dialogue repeats from the one before it."""
_TAIL_STEP = 32
_ABOUT_STEP = 128

_TAG_OPENING = re.compile(
    r"<(?=\s*+/?+\s*+(?:think|emotion|self_emotion|response)(?![a-z0-9_]))", re.IGNORECASE
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}

# Labels that suit the worked example, looked for in the inventory.
_HURT = ("sadness", "sad", "disappointed")
_CROSS = ("anger", "angry", "mad", "frustrated")


class PromptTooLong(ValueError):
    """A prompt does not fit with its last turn alone, for which it needs ``num_tokens``."""

    num_tokens = 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    token_ids: tuple[int, ...]
    think_open: bool
    """The prompt ends inside an open think block; pass it to `grammar.parse` as think_open_in_prompt."""
    num_dropped_turns: int
    sample_id: str


def build_prompt(
    sample: Sample,
    codec: TextCodec,
    *,
    max_labels: int,
    max_tokens: int,
    thinking: bool,
    style: str = "full",
    persona: bool = True,
    descriptions: bool = False,
) -> Prompt:
    """The ids of one input, in the chat template of the codec's folder.

    style: "full" states every rule and shows an example; "brief" and "dialogue" give the data alone, for
    models that are trained on it. persona False, or none in the sample: a neutral participant ("brief",
    "dialogue": the name alone); False leaves the theme out too, which is made of the dialogue as well.
    descriptions: say what each label means (`data.label_notes`). What the sample holds `about` the last
    speaker is always told. The oldest turns are dropped to fit `max_tokens`; turns keep their numbers.
    PromptTooLong if even the last turn does not fit.
    """
    if style not in STYLES:
        raise ValueError(f"prompt style {style!r}: expected one of {', '.join(STYLES)}")
    if not sample.history:
        raise ValueError(f"{sample.id}: the history is empty; there is no turn to recognise")
    frame = codec.chat_frame(thinking=thinking)
    traits = _clean(sample.persona or "") if persona else ""
    theme = _clean(sample.theme or "") if persona else ""
    system, opening, closing = _PIECES[style](
        sample, traits, theme, max_labels, thinking, _notes(sample.inventory) if descriptions else ()
    )
    between = frame.between if frame.between is not None else "\n\n"
    head = _encode([("markup", frame.before), *system, ("markup", between), *opening], codec)
    lines = encode_history(sample.history, codec, style=style)
    tail = _encode([*closing, ("markup", frame.after)], codec)

    room = max_tokens - len(head) - len(tail)
    first = None
    if style == "dialogue":
        # The tail's length varies with the responder's name; windows must not.
        step = _ABOUT_STEP if sample.about else _TAIL_STEP
        rounded = -(-len(tail) // step) * step
        first = _window_start(lines, max_tokens - len(head) - rounded)
    if first is None:
        first = len(lines)
        while first > 0 and room >= len(lines[first - 1]):
            first -= 1
            room -= len(lines[first])
    if first == len(lines):
        needed = len(head) + len(lines[-1]) + len(tail)
        error = PromptTooLong(
            f"{sample.id}: the prompt has {needed} tokens with its last turn alone, "
            f"the limit is {max_tokens}; raise data.max_prompt, or use prompt style 'brief'"
        )
        error.num_tokens = needed
        raise error
    return Prompt(
        token_ids=(*head, *(token_id for line in lines[first:] for token_id in line), *tail),
        think_open=frame.think_open,
        num_dropped_turns=first,
        sample_id=sample.id,
    )


def build_messages(
    sample: Sample,
    *,
    max_labels: int,
    thinking: bool,
    style: str = "full",
    persona: bool = True,
    descriptions: bool = False,
) -> tuple[str, str]:
    """System and user message of one input as text, for a server that has its own template; the words of
    `build_prompt` with the whole history."""
    traits, theme = (_clean(text or "") if persona else "" for text in (sample.persona, sample.theme))
    system, opening, closing = _PIECES[style](
        sample, traits, theme, max_labels, thinking, _notes(sample.inventory) if descriptions else ()
    )
    user = [*opening, *(("data", line) for line in _lines(sample.history, style)), *closing]
    return "".join(text for _, text in system), "".join(text for _, text in user)


def encode_history(
    history: Sequence[tuple[str, str]], codec: TextCodec, *, style: str = "full"
) -> tuple[tuple[int, ...], ...]:
    """Ids of each line `Speaker: text`, numbered but in the style "dialogue"; those of turn n do not depend
    on any other turn."""
    return tuple(tuple(codec.encode_data(line)) for line in _lines(history, style))


def _lines(history: Sequence[tuple[str, str]], style: str) -> Iterator[str]:
    number = {"full": "{}. ", "brief": "{} ", "dialogue": ""}[style]
    for turn, (speaker, text) in enumerate(history, 1):
        yield f"{number.format(turn)}{_clean(speaker)}: {_clean(text)}\n"


def _window_start(lines: Sequence[Sequence[int]], room: int) -> int | None:
    """First line of the window that holds the last line; None where that line alone is too long.

    Windows are filled from the first line on, so where one begins depends on the lines before it alone.
    """
    start = used = 0
    for index, line in enumerate(lines):
        used += len(line)
        if used > room:
            start = max(index - WINDOW_OVERLAP, start)
            used = sum(map(len, lines[start : index + 1]))
            while used > room and start < index:
                used -= len(lines[start])
                start += 1
    return start if used <= room else None


def completion_ids(
    emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    self_emotion: Mapping[str, float] | Iterable[tuple[str, float]],
    response: str,
    codec: TextCodec,
    *,
    think: str | None,
    think_open: bool = False,
) -> list[int]:
    """Target ids of a canonical answer, ending in the end-of-turn id; decoded without it they parse to the
    answer.

    think_open: the prompt already opened the think block (`Prompt.think_open`). ValueError as
    `grammar.serialise`.
    """
    return encode_completion(
        answer_pieces(emotion, self_emotion, response, think=think, think_open=think_open), codec
    )


def encode_completion(pieces: Iterable[Piece], codec: TextCodec) -> list[int]:
    """Ids of answer pieces (`grammar.answer_pieces`) and the end-of-turn id."""
    return [*_encode(pieces, codec), codec.eos_id]


def normalise_reply(text: str) -> str:
    """An accepted reply as it is stored: NFC, single blanks, without quotes round the whole."""
    reply = " ".join(unicodedata.normalize("NFC", text).split())
    while len(reply) > 1 and _QUOTES.get(reply[0]) == reply[-1] and reply[0] not in reply[1:-1]:
        if reply[-1] in reply[1:-1]:
            break
        reply = reply[1:-1].strip()
    return reply


def _encode(pieces: Iterable[Piece], codec: TextCodec) -> list[int]:
    ids: list[int] = []
    for kind, text in pieces:
        ids += codec.encode_markup(text) if kind == "markup" else codec.encode_data(text)
    return ids


@lru_cache(maxsize=1 << 16)
def _clean(text: str) -> str:
    return _TAG_OPENING.sub("‹", " ".join(text.split()))


def _full_pieces(
    sample: Sample, traits: str, theme: str, max_labels: int, thinking: bool, notes: Notes
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Pieces of the system message, of the user message before the history, and after it."""
    about = _clean(sample.about or "")
    system = [
        ("markup", "You are"),
        ("data", f" {_clean(sample.responder)}"),
        ("markup", ", one of the people in a conversation. Feel and speak as this person."),
    ]
    if traits:
        system += [("markup", "\nAbout you:"), ("data", f" {traits}")]
    else:
        system += [
            ("markup", "\nNothing special is known about you: an ordinary, even-tempered participant.")
        ]
    opening = [("markup", "Scene:"), ("data", f" {theme}"), ("markup", "\n\n")] if theme else []
    opening += [("markup", "The conversation so far, one numbered turn a line:\n")]
    closing = [
        ("markup", "\nLast turn:"),
        ("data", f" #{len(sample.history)} by {_clean(sample.target_speaker)}"),
        *([("markup", "\nAbout the speaker of it:"), ("data", f" {about}")] if about else []),
        ("markup", "\nEmotion labels:"),
        ("data", f" {', '.join(map(_clean, sample.inventory))}"),
        *([("markup", "\nWhat the labels mean:")] if notes else []),
        *(("data", f"\n- {label}: {words}") for label, words in notes),
        *_rules(tuple(sample.inventory), max_labels, thinking),
    ]
    return system, opening, closing


@lru_cache(maxsize=64)
def _rules(inventory: tuple[str, ...], max_labels: int, thinking: bool) -> tuple[Piece, ...]:
    count = "exactly one label" if max_labels == 1 else f"1 to {max_labels} labels"
    think = (
        "First reason between <think> and </think>: what the last speaker feels, what that does to you, what "
        "you would say. Then write"
        if thinking
        else "Write"
    )
    more = ", label:weight" if max_labels > 1 else ""
    hurt = next((label for label in _HURT if label in inventory), inventory[0])
    cross = next((label for label in _CROSS if label in inventory and label != hurt), inventory[-1])
    shown = f"{hurt}:0.75, {cross}:0.40" if max_labels > 1 and cross != hurt else f"{hurt}:0.75"
    return (
        (
            "markup",
            f"""

Answer three questions, in this order.
1. What does the speaker of the last turn feel in that turn?
2. What do you feel on hearing it, being who you are?
3. What do you say next, true to that feeling and to the conversation?

For questions 1 and 2 give {count} of the list, in lower case, none twice. Each has a weight for how \
strongly it is felt: a decimal above 0 and at most 1, with two digits. Weights need not add up to 1; a \
single clear feeling needs a single label. For question 3 give one turn of plain spoken words: no stage \
directions, no labels, no tags.

{think} exactly these three blocks, with nothing before, between or after them:
<emotion>label:weight{more}</emotion>
<self_emotion>label:weight{more}</self_emotion>
<response>your words</response>

An example from another conversation, whose last turn was "They gave my solo to the new girl, a week before \
the show.":
<emotion>""",
        ),
        ("data", shown),
        ("markup", "</emotion>\n<self_emotion>"),
        ("data", f"{hurt}:0.50"),
        (
            "markup",
            "</self_emotion>\n<response>A week before? After all that practice? "
            "Come on, sit with me.</response>",
        ),
    )


def _brief_pieces(
    sample: Sample, traits: str, theme: str, max_labels: int, thinking: bool, notes: Notes
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    responder = _clean(sample.responder)
    system = [("data", f"{responder}: {traits}" if traits else responder)]
    opening = [("data", f"[{theme}]\n")] if theme else []
    labels = " ".join(map(_clean, sample.inventory))
    last = f"#{len(sample.history)} {_clean(sample.target_speaker)}"
    closing = [("data", f"{labels} {max_labels}\n")]
    closing += [("data", f"{label}: {words}\n") for label, words in notes]
    about = _clean(sample.about or "")
    closing += [("data", f"{last}, {responder}"), *([("data", f"\n{about}")] if about else [])]
    return system, opening, closing


def _dialogue_pieces(
    sample: Sample, traits: str, theme: str, max_labels: int, thinking: bool, notes: Notes
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    responder = _clean(sample.responder)
    system = [("data", f"{' '.join(map(_clean, sample.inventory))} {max_labels}")]
    # Of the data set and not of the turn, so that they may stand before the trunk.
    system += [("data", f"\n{label}: {words}") for label, words in notes]
    opening = [("data", f"[{theme}]\n")] if theme else []
    about = _clean(sample.about or "")
    closing = [("data", f"({about})\n")] if about else []
    return system, opening, [*closing, ("data", f"> {responder}: {traits}" if traits else f"> {responder}")]


_PIECES = {"full": _full_pieces, "brief": _brief_pieces, "dialogue": _dialogue_pieces}


def _notes(inventory: Sequence[str]) -> Notes:
    return tuple((label, LABEL_NOTES[label]) for label in inventory if label in LABEL_NOTES)

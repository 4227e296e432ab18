"""Personas and scenes (equation 4): one sentence for each speaker and a theme, inferred from a dialogue.

An expert reads a piece of a dialogue: a segment of it, or the history of one input. A persona made of a
segment knows what is said later, so it is for training inputs alone; one made of a history knows nothing that
the policy does not see (`history_piece`).
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from selfemo_jax.data.dialogues import Dialogue
from selfemo_jax.data.inputs import Sample
from selfemo_jax.experts.ask import Answer, Question
from selfemo_jax.experts.panel import Panel

THEME = "Theme"
PERSONA_CHARS = (30, 600)
THEME_CHARS = (3, 600)
"""Shortest and longest text taken."""
MAX_BLOCK = 64_000
"""Characters of a block that are read."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)

SYSTEM = """\
You read conversations and work out what kind of person each speaker is. You go by the conversation alone: \
what it does not bear out you leave open, and you never fill a gap with invention or with what you know of \
a book, a film or a series."""

TASK = """\

Describe each of these speakers: {names}.

First think it through in plain prose, speaker by speaker, with the lines that you rely on. Weigh:
- temper: led by reason or by feeling, outgoing or withdrawn, careful or rash, soft or forceful;
- age: a broad band of life at most, such as a teenager or somebody in middle life, never a number;
- gender, if the conversation hints at one; otherwise say that it cannot be told;
- schooling and habits of mind: how the person argues, explains and decides;
- place in the scene: a likely role or trade, where there is a trace of it;
- manner of speech: long or clipped, blunt or roundabout, joking, formal;
- how feelings show: openly, held back, turned into jokes or into anger;
- stance towards each of the others.

Then blend what you found into ONE dense sentence for each speaker, in the third person, without a list and \
without quoting the lines. Say "seems", "probably" or the like where you are not sure. For the whole \
conversation give the theme: one sentence that names, in general words, what it is about and what the people \
are at odds over, if they are.

How such a sentence may sound (do not copy its content):
"A guarded, dry-witted adult, probably used to running things, who seems to hide worry behind teasing, \
speaks in short verdicts, and bends only for people she already trusts."

End with exactly one Python code block. It holds one dict literal and nothing else; its keys are the \
speakers' names exactly as given, and "{theme}":
```python
{{
{lines}
    "{theme}": "..."
}}
```"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an expert reads at once."""

    id: str
    turns: tuple[tuple[str, str], ...]
    """(speaker, text), in spoken order."""

    @property
    def speakers(self) -> tuple[str, ...]:
        """Distinct speakers in order of their first turn."""
        return tuple(dict.fromkeys(speaker for speaker, _ in self.turns))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an expert inferred from a piece."""

    personas: Mapping[str, str]
    """Speaker -> sentence, for every speaker of the piece."""
    theme: str
    source: str
    """Name of the expert."""


def segments(dialogue: Dialogue, root_id: str, *, max_turns: int) -> tuple[tuple[Piece, int, int], ...]:
    """The dialogue cut into as few windows of at most ``max_turns`` turns as possible, of even length, each
    with its first turn and the turn after its last."""
    turns = tuple((turn.speaker, turn.text) for turn in dialogue.turns)
    num = ceil(len(turns) / max_turns)
    bounds = [len(turns) * part // num for part in range(num + 1)]
    return tuple(
        (Piece(id=f"{root_id}#{start}-{end}", turns=turns[start:end]), start, end)
        for start, end in zip(bounds, bounds[1:], strict=False)
    )


def history_piece(sample: Sample, *, max_turns: int) -> Piece:
    """The last turns of the input's own history: nothing that is said after the turn to be recognised."""
    return Piece(id=f"{sample.id}#history", turns=sample.history[-max_turns:])


def persona_question(piece: Piece) -> Question:
    """What an expert is asked about a piece."""
    names = [_line(name) for name in piece.speakers]
    lines = "\n".join(f'    {_quoted(name)}: "...",' for name in names)
    shown = "\n".join(
        f"{number}. {_line(speaker)}: {_line(text)}"
        for number, (speaker, text) in enumerate(piece.turns, start=1)
    )
    task = TASK.format(names=", ".join(names), theme=THEME, lines=lines)
    return Question(id=piece.id, system=SYSTEM, user=f"The conversation:\n{shown}\n{task}")


def parse_scene(text: str, speakers: Sequence[str], *, source: str = "") -> Scene | str:
    """The scene in the last code block of an answer, or in words why it cannot be used.

    Nothing in it is run: the block must be one dict literal of strings whose keys are the speakers and
    ``Theme``, each once.
    """
    # What a reasoning model drafted before it spoke may leave a block open.
    text = text.rpartition("</think>")[2]
    fences = list(_FENCE.finditer(text))
    if len(fences) < 2:
        return "there is no closed code block"
    # Fences come in pairs; an odd one at the end opens a block that was cut off.
    opening, closing = fences[-2:] if len(fences) % 2 == 0 else fences[-3:-1]
    block = text[opening.end() : closing.start()].strip()
    if len(fences) % 2:
        return "the last code block is not closed"
    if len(block) > MAX_BLOCK:
        return f"the code block has {len(block)} characters"
    try:
        tree = ast.parse(block, mode="eval")
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        return f"the code block is no Python literal ({type(error).__name__})"
    if not isinstance(value, dict) or not isinstance(tree.body, ast.Dict):
        return f"the code block holds a {type(value).__name__}, not a dict"
    if len(tree.body.keys) != len(value):
        return "a key stands twice"
    expected = {_line(name): name for name in speakers}
    found = {_line(key): key for key in value if isinstance(key, str)}
    if len(found) != len(value) or set(found) != {*expected, THEME}:
        missing = sorted({*expected, THEME} - set(found))
        extra = sorted(map(str, set(value) - {found.get(name) for name in (*expected, THEME)}))
        return f"the keys do not match: missing {missing}, unknown {extra}"
    bounds = {key: THEME_CHARS if key == THEME else PERSONA_CHARS for key in found}
    sentences = {}
    for key, (low, high) in bounds.items():
        sentence = value[found[key]]
        if not isinstance(sentence, str):
            return f"{key} is no string"
        sentence = " ".join(sentence.split())
        if not low <= len(sentence) <= high:
            return f"{key} has {len(sentence)} characters, not {low} to {high}"
        sentences[key] = sentence
    return Scene(
        personas={expected[key]: sentence for key, sentence in sentences.items() if key != THEME},
        theme=sentences[THEME],
        source=source,
    )


def extract(panel: Panel, pieces: Sequence[Piece]) -> tuple[dict[str, Scene], dict[str, str]]:
    """The scene of each piece by its id, and of each without one the reason.

    An answer that cannot be read is asked for once more; then the piece has none. ExpertError as
    `Panel.ask`.
    """
    scenes: dict[str, Scene] = {}
    reasons: dict[str, str] = {}
    # A speaker of that name would be taken for the theme.
    readable = [piece for piece in pieces if THEME not in map(_line, piece.speakers)]
    reasons |= {piece.id: f"a speaker is called {THEME}" for piece in pieces if piece not in readable}
    questions = {piece.id: persona_question(piece) for piece in readable}
    open_pieces = readable
    for what in ("personas", "personas, second try"):
        answers = panel.ask([questions[piece.id] for piece in open_pieces], what=what) if open_pieces else []
        for piece, given in zip(open_pieces, answers, strict=True):
            found = [_read(answer, piece) for answer in given]
            scene = next((result for result in found if isinstance(result, Scene)), None)
            if scene is not None:
                scenes[piece.id] = scene
                reasons.pop(piece.id, None)
            else:
                reasons[piece.id] = "; ".join(map(str, found))
        open_pieces = [piece for piece in open_pieces if piece.id not in scenes]
        questions = {piece.id: questions[piece.id].again() for piece in open_pieces}
    return scenes, reasons


def _read(answer: Answer, piece: Piece) -> Scene | str:
    if answer.refused is not None:
        return f"refused: {answer.refused}"
    return parse_scene(answer.text, piece.speakers, source=answer.source)


def _line(text: str) -> str:
    # A line of dialogue cannot open or close a code block, nor begin a line of its own.
    return " ".join(text.split()).replace("```", "'''")


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'

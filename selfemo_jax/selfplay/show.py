"""Played dialogues for people: what was said, recognised, declared and rewarded, in the terminal and as
JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from selfemo_jax.data.inputs import Sample
from selfemo_jax.selfplay.flywheel import Candidate

PALETTE = ("cyan", "magenta", "yellow", "green", "blue", "red")


@dataclass(frozen=True, kw_only=True)
class Played:
    """A dialogue and what self-play added to it."""

    opening: Sample
    turns: tuple[Candidate, ...]
    """The judged answer of each turn; all but the last are accepted."""

    def to_json(self) -> dict[str, Any]:
        """One line of ``selfplay.jsonl``."""
        sample = self.opening
        return {
            "id": sample.id,
            "dataset": sample.dataset,
            "theme": sample.theme,
            "history": [list(turn) for turn in sample.history],
            "turns": [_turn_json(candidate) for candidate in self.turns],
        }


def follow(opening: Sequence[Sample], judged: Sequence[Candidate]) -> Iterator[Played]:
    """The dialogues of a play, each with its turns in order."""
    by_parent = {candidate.parent.id: candidate for candidate in judged}
    for sample in opening:
        turns: list[Candidate] = []
        at: Sample | None = sample
        while at is not None and at.id in by_parent:
            turns.append(by_parent[at.id])
            at = turns[-1].child
        yield Played(opening=sample, turns=tuple(turns))


def panel(played: Played) -> Panel:
    """The dialogue as a box: human turns, then each played turn with what it recognised and declared."""
    sample = played.opening
    people = [speaker for speaker, _ in sample.history] + [c.parent.responder for c in played.turns]
    order = {speaker: place for place, speaker in enumerate(dict.fromkeys(people))}
    colours = {speaker: PALETTE[place % len(PALETTE)] for speaker, place in order.items()}
    lines: list[RenderableType] = [said(speaker, text, colours) for speaker, text in sample.history]
    for number, candidate in enumerate(played.turns, start=1):
        lines += _turn_lines(number, candidate, colours)
    title = Text(sample.id if not sample.theme else f"{sample.id}: {sample.theme}")
    return Panel(Group(*lines), title=title, title_align="left")


def said(speaker: str, text: str, colours: Mapping[str, str]) -> Text:
    """A line of a dialogue, the speaker in a colour of its own."""
    return Text.assemble((f"{plain(speaker)}: ", f"bold {colours.get(speaker, 'white')}"), plain(text))


def plain(text: str) -> str:
    """The text without characters that steer a terminal."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def weights(pairs: Mapping[str, float]) -> str:
    """``joy 0.80, fear 0.20``, the heaviest first."""
    ordered = sorted(pairs.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {weight:.2f}" for label, weight in ordered) or "nothing"


def _turn_lines(number: int, candidate: Candidate, colours: Mapping[str, str]) -> list[Text]:
    asked, select = candidate.parent, candidate.select
    if not select:
        return [Text(f"  turn {number}: {candidate.reason}", "dim red")]
    whose = "gold" if asked.depth == 0 else "declared"
    recognised = (
        f"sees {weights(candidate.emotion)} in {asked.target_speaker} ({whose} {weights(asked.gold)})"
    )
    rewards = f"r1 {select['r1']:.2f}, r2 {select['r2']:.2f}, {select['n_valid']} valid"
    accepted = candidate.child is not None
    lines = [
        Text(f"  turn {number}: {asked.responder} {recognised}; {rewards}", "dim"),
        Text(f"  {asked.responder} feels {weights(candidate.declared)}", "dim"),
        said(asked.responder, candidate.reply, colours),
    ]
    return lines if accepted else [*lines, Text(f"  rejected: {candidate.reason}", "red")]


def _turn_json(candidate: Candidate) -> dict[str, Any]:
    asked = candidate.parent
    return {
        "asked_about": asked.target_speaker,
        "gold": dict(asked.gold),
        "depth": asked.depth + 1,
        "responder": asked.responder,
        "persona": asked.persona,
        "emotion": dict(candidate.emotion),
        "declared": dict(candidate.declared),
        "reply": candidate.reply,
        "accepted": candidate.child is not None,
        "reason": candidate.reason,
        **candidate.select,
    }

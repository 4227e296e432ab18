"""Which rollout decodes in which slot and place of the JAX engine: the host's account of the caches' rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfemo_jax.rollout.decode import Caches
from selfemo_jax.rollout.engine import Request
from selfemo_jax.rollout.slots import Layout


@dataclass(kw_only=True, eq=False)
class Prompt:
    """Rollouts of one request that decode from one prefill."""

    request: Request
    rollouts: range


@dataclass(kw_only=True, eq=False)
class Row:
    """One rollout in the making."""

    prompt: Prompt
    rollout: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


Live = Mapping[Prompt, Sequence[tuple[int, Row]]]
"""Live rows by prompt, each with its number slot * W + place."""


@dataclass(kw_only=True, eq=False)
class Board:
    """The rows that decode now and their caches."""

    layout: Layout
    slots: list[Prompt | None]
    rows: list[list[Row | None]]
    prompts: Caches
    caches: Caches
    prompt_length: int
    """P, columns of the prompt caches."""
    length: int
    """T, columns of the completion caches."""
    column: int
    """The next column to write."""

    def live(self) -> Live:
        """The rows that are not finished."""
        found: dict[Prompt, list[tuple[int, Row]]] = {}
        for slot, rows in enumerate(self.rows):
            for place, row in enumerate(rows):
                if row is not None:
                    found.setdefault(row.prompt, []).append((slot * self.layout.width + place, row))
        return found


@dataclass(frozen=True, kw_only=True)
class Seats:
    """A new arrangement, and where in the old one each part comes from (0 where it does not matter)."""

    slots: list[Prompt | None]
    rows: list[list[Row | None]]
    slot_source: list[int]
    row_source: list[list[int]]
    fresh: Mapping[Prompt, list[int]]
    """The slots of each prompt that is still to be prefilled."""


def seat(live: Live, new: Sequence[Prompt], layout: Layout, *, old_width: int) -> Seats:
    """Live rows first, in their old order, then the rollouts of the new prompts."""
    seats = Seats(slots=[], rows=[], slot_source=[], row_source=[], fresh={prompt: [] for prompt in new})
    rows_of = {prompt: list(placed) for prompt, placed in live.items()}
    for prompt in new:
        rows_of[prompt] = [(0, Row(prompt=prompt, rollout=rollout)) for rollout in prompt.rollouts]
    for prompt, placed in rows_of.items():
        for start in range(0, len(placed), layout.width):
            part = placed[start : start + layout.width]
            spare = layout.width - len(part)
            if prompt in seats.fresh:
                seats.fresh[prompt].append(len(seats.slots))
            seats.slots.append(prompt)
            seats.rows.append([row for _, row in part] + [None] * spare)
            seats.slot_source.append(part[0][0] // old_width)
            seats.row_source.append([number for number, _ in part] + [0] * spare)
    for _ in range(layout.slots - len(seats.slots)):
        seats.slots.append(None)
        seats.rows.append([None] * layout.width)
        seats.slot_source.append(0)
        seats.row_source.append([0] * layout.width)
    return seats

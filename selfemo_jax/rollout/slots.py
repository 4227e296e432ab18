"""Which shapes the JAX engine decodes in: few of them, so that each is compiled once.

A layout is S slots of W rows. A slot holds rollouts of one prompt; a prompt with more live rows than W takes
several slots.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

SMALLEST = 4
"""Rows (per data row of the mesh) at which finished rows are no longer compacted away: nothing is saved."""
SHRINK = 0.75
"""A layout is changed for one of at most this share of its rows."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """S slots of W rows."""

    slots: int
    width: int

    @property
    def rows(self) -> int:
        """Rows that are paid for, live or not."""
        return self.slots * self.width


def widths(largest: int) -> tuple[int, ...]:
    """The widths that layouts may have: the largest group, then by quarters down to 1."""
    found = [largest]
    while found[-1] > 1:
        found.append(max(1, found[-1] // 4))
    return tuple(found)


def choose_layout(
    live: Sequence[int], allowed: Sequence[int], *, multiple: int, max_rows: int
) -> Layout | None:
    """The layout with the fewest rows, then the fewest slots, that holds ``live[i]`` rows of prompt i; None
    where none of at most ``max_rows`` rows does.

    Slots are ``multiple`` times a power of two, or the most that ``max_rows`` allows.
    """
    fitting = []
    for width in allowed:
        needed = sum(-(-count // width) for count in live)
        most = max(max_rows // width // multiple, 1) * multiple
        slots = multiple
        while slots < needed:
            slots *= 2
        slots = min(slots, most)
        if slots >= needed:
            fitting.append(Layout(slots=slots, width=width))
    return min(fitting, key=lambda layout: (layout.rows, layout.slots), default=None)


def worth_stopping_at(layout: Layout, *, multiple: int) -> int:
    """How few live rows end a chunk early: the most that surely fit a layout worth changing to; 0 for
    never."""
    if layout.rows <= SMALLEST * multiple:
        return 0
    fewer = multiple
    while 2 * fewer <= SHRINK * layout.rows:
        fewer *= 2
    return fewer if fewer <= SHRINK * layout.rows else 0


def prompt_columns(length: int, *, multiple: int, known: Collection[int]) -> int:
    """Columns for prompts of up to ``length`` tokens: the next ``multiple`` up to 8 of them, then doubling;
    a number that is already in use is taken again where it wastes at most a quarter."""
    bucket = max(1, -(-length // multiple)) * multiple
    if bucket > 8 * multiple:
        bucket = 8 * multiple
        while bucket < length:
            bucket *= 2
    return min((size for size in known if bucket <= size <= 1.25 * bucket), default=bucket)


def completion_columns(length: int, *, smallest: int, max_tokens: int) -> int:
    """Columns for ``length`` tokens: a doubling of ``smallest``, at most the longest completion."""
    bucket = smallest
    while bucket < length:
        bucket *= 2
    return max(length, min(bucket, -(-max_tokens // smallest) * smallest))


def batches(lengths: Sequence[int], *, columns: int, budget: int, multiple: int) -> list[tuple[range, int]]:
    """Cuts prompts into prefills ``(which, number of padded rows)`` of about ``budget`` tokens each."""
    most = multiple
    while 2 * most * columns <= budget:
        most *= 2
    cuts = []
    for start in range(0, len(lengths), most):
        which = range(start, min(start + most, len(lengths)))
        size = multiple
        while size < len(which):
            size *= 2
        cuts.append((which, size))
    return cuts

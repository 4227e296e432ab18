"""`PackedBatch`: the one form of a training batch, for SFT and RL.

Sequences are laid into rows of a fixed number of tokens; everything is aligned to the targets here and never
shifted again. Attention follows one rule (`model/attention.py`): a position sees its own segment and its
prefix segment, up to itself.

- ``separate``: one sequence in a row.
- ``packed``: several sequences in a row, one segment each.
- ``shared_prefix``: what the prompts of a group have in common is written once, as a prefix segment (the
  trunk); each sequence is a segment that branches off behind the last token it shares, and begins at the
  latest with a copy of its prompt's last token, so that each target has exactly one position. Prompts that
  grow with a dialogue leave the trunk at different places: a branch is written right behind its place, and
  sees no more of the trunk than what stands before it.

Shape letters: B rows, T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

Layout = Literal["shared_prefix", "packed", "separate"]
PAD_SEGMENT = 0
NO_PREFIX = -1


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One completion to train on, with what belongs to it.

    Example: ``TrainSequence(group=3, prompt_ids=(5, 6), completion_ids=(7, 2), token_weight=0.25,
    advantage=-1.0, rollout_logprobs=(-0.1, -0.7))``.
    """

    group: int
    """Sequences of one group have the same prompt, or prompts that begin alike."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    token_weight: float | tuple[float, ...]
    """Weight of its targets in the whole mini-batch (`algo.losses.token_weights`), of each alike or one by
    one."""
    advantage: float = 0.0
    rollout_logprobs: tuple[float, ...] | None = None
    """The sampler's log-probability of each completion token; None where nothing was sampled."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Arrays ``[B, T]``, int32 for the first five and float32 for the rest; ``token_weights`` is 0 where
    there is no target."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    prefix_ids: np.ndarray
    token_weights: np.ndarray
    advantages: np.ndarray
    old_logprobs: np.ndarray
    ref_logprobs: np.ndarray
    rollout_logprobs: np.ndarray
    importance_weights: np.ndarray
    """Sampler-to-trainer correction of each target; 1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sequence's targets lie: columns ``start`` to ``start + length`` of ``row``."""

    row: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A batch and the place of every sequence in it, in the order they were given."""

    batch: PackedBatch
    places: tuple[Place, ...]
    num_tokens: int
    """Positions that hold a token; the rest of ``B * T`` is padding."""

    @property
    def padding_share(self) -> float:
        """Share of positions that hold nothing."""
        return 1.0 - self.num_tokens / self.batch.tokens.size


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Sequences laid side by side in one row: a group, a part of one, or a single sequence."""

    members: tuple[int, ...]
    length: int
    shared: tuple[int, ...] = ()
    """Tokens that each member takes from the trunk, never fewer than the member before it."""


def pack(
    sequences: Sequence[TrainSequence],
    *,
    layout: Layout,
    row_tokens: int,
    micro_rows: int,
    balance: bool = False,
) -> Packed:
    """Lay the sequences into rows of ``row_tokens``; empty rows make their number a multiple of
    ``micro_rows``.

    Units are placed longest first into the first row with room, which is deterministic. ``balance`` then
    spreads them over the same number of rows, empty ones included, so that the positions that see each
    other are as many in each. ValueError names a sequence that does not fit into a row.
    """
    for index, sequence in enumerate(sequences):
        _check(index, sequence, row_tokens)
    units = sorted(_units(sequences, layout, row_tokens), key=lambda unit: (-unit.length, unit.members))
    rows = _first_fit(units, row_tokens, alone=layout == "separate")
    num_rows = max(1, -(-len(rows) // micro_rows)) * micro_rows
    if balance and layout != "separate":
        rows = _balanced(units, rows, row_tokens, num_rows=num_rows, sequences=sequences)
    arrays = _empty(num_rows, row_tokens)
    places: dict[int, Place] = {}
    write = _write_group if layout == "shared_prefix" else _write_plain
    for row, held in enumerate(rows):
        cursor, segment = 0, PAD_SEGMENT + 1
        for unit in held:
            cursor, segment = write(arrays, places, sequences, unit, row, cursor, segment)
    return Packed(
        batch=PackedBatch(**arrays),
        places=tuple(places[index] for index in range(len(sequences))),
        num_tokens=sum(unit.length for unit in units),
    )


def _first_fit(units: Sequence[_Unit], row_tokens: int, *, alone: bool) -> list[list[_Unit]]:
    rows: list[list[_Unit]] = []
    room: list[int] = []
    for unit in units:
        fits = (row for row, left in enumerate(room) if left >= unit.length)
        row = None if alone else next(fits, None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(unit)
        room[row] -= unit.length
    return rows


def _balanced(
    units: Sequence[_Unit],
    first: list[list[_Unit]],
    row_tokens: int,
    *,
    num_rows: int,
    sequences: Sequence[TrainSequence],
) -> list[list[_Unit]]:
    """The units over ``num_rows`` rows, each to the row with the least work that has room, the most work
    first, and rows of like work side by side; the rows of ``first`` where one fits nowhere."""
    work = {unit.members: _seen_pairs(unit, sequences) for unit in units}
    rows: list[list[_Unit]] = [[] for _ in range(num_rows)]
    room, load = [row_tokens] * num_rows, [0] * num_rows
    for unit in sorted(units, key=lambda unit: (-work[unit.members], unit.members)):
        fitting = [row for row in range(num_rows) if room[row] >= unit.length]
        if not fitting:
            rows, load = first, [sum(work[unit.members] for unit in row) for row in first]
            break
        row = min(fitting, key=lambda row: (load[row], row))
        rows[row].append(unit)
        room[row] -= unit.length
        load[row] += work[unit.members]
    order = sorted(range(len(rows)), key=lambda row: (-load[row], row))
    return [rows[row] for row in order]


def _seen_pairs(unit: _Unit, sequences: Sequence[TrainSequence]) -> int:
    """Pairs of a position and one that it sees: attention's work where nothing else is computed."""
    trunk, pairs = max(unit.shared, default=0), 0
    for index, shared in zip(unit.members, unit.shared or [0] * len(unit.members), strict=True):
        own = len(sequences[index].prompt_ids) + len(sequences[index].completion_ids) - 1 - shared
        pairs += own * shared + own * (own + 1) // 2
    return pairs + trunk * (trunk + 1) // 2


def micro_batches(batch: PackedBatch, *, micro_rows: int, at_once: int = 1) -> Iterator[PackedBatch]:
    """Cut a batch into parts of ``micro_rows`` rows, or of ``at_once`` times as many while there are so many
    left: no more than two shapes."""
    num_rows, start = batch.tokens.shape[0], 0
    assert num_rows % micro_rows == 0
    while start < num_rows:
        size = micro_rows * (at_once if num_rows - start >= micro_rows * at_once else 1)
        rows = slice(start, start + size)
        start += size
        yield PackedBatch(**{field.name: getattr(batch, field.name)[rows] for field in fields(batch)})


def target_width(batch: PackedBatch) -> int | None:
    """Positions of a row that the output head must look at: the most targets that any row has, rounded up to
    one of `target_widths`; None where that is the whole row."""
    most = int(is_target(batch.token_weights, batch.targets).sum(axis=1).max(initial=1))
    widths = target_widths(batch.tokens.shape[1])
    return next((width for width in widths if width is not None and most <= width), None)


def target_widths(row_tokens: int) -> tuple[int | None, ...]:
    """An eighth, a quarter, a half, three quarters of a row, and None, all of it: few, since each is compiled
    for itself."""
    parts = (-(-row_tokens * eighths // 8) for eighths in (1, 2, 4, 6))
    return *dict.fromkeys(width for width in parts if width < row_tokens), None


def is_target(token_weights: Any, targets: Any) -> Any:
    """Where there is a target, of arrays of either kind; one of weight 0 and id 0 is none."""
    return (token_weights != 0) | (targets != 0)


def gather(values: np.ndarray, places: Sequence[Place]) -> list[np.ndarray]:
    """The values ``[B, T]`` at each sequence's targets, one array per sequence."""
    return [values[place.row, place.start : place.start + place.length] for place in places]


def scatter(values: Sequence[np.ndarray], packed: Packed, *, fill: float) -> np.ndarray:
    """The inverse of `gather`: float32 ``[B, T]`` with each sequence's values at its targets, else
    ``fill``."""
    out = np.full(packed.batch.tokens.shape, fill, np.float32)
    for value, place in zip(values, packed.places, strict=True):
        out[place.row, place.start : place.start + place.length] = value
    return out


def _check(index: int, sequence: TrainSequence, row_tokens: int) -> None:
    if not sequence.prompt_ids or not sequence.completion_ids:
        raise ValueError(f"sequence {index}: a prompt and a completion of at least one token are needed")
    needed = len(sequence.prompt_ids) + len(sequence.completion_ids) - 1
    if needed > row_tokens:
        raise ValueError(
            f"sequence {index}: a prompt of {len(sequence.prompt_ids)} and a completion of "
            f"{len(sequence.completion_ids)} tokens need {needed} positions, a row has {row_tokens}; "
            "raise batch.row_tokens or lower data.max_prompt or rollout.max_tokens"
        )


def _units(sequences: Sequence[TrainSequence], layout: Layout, row_tokens: int) -> list[_Unit]:
    if layout != "shared_prefix":
        return [
            _Unit(members=(index,), length=len(sequence.prompt_ids) + len(sequence.completion_ids) - 1)
            for index, sequence in enumerate(sequences)
        ]
    groups: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.group, []).append(index)
    return [unit for members in groups.values() for unit in _branches(sequences, members, row_tokens)]


def _branches(sequences: Sequence[TrainSequence], members: Sequence[int], row_tokens: int) -> Iterator[_Unit]:
    """A group as one unit, or, where that is longer than a row, as parts with a copy of the trunk each."""
    longest = max(members, key=lambda index: len(sequences[index].prompt_ids))
    trunk = sequences[longest].prompt_ids
    shared = {index: _num_shared(sequences[index].prompt_ids, trunk) for index in members}
    # The longest prompt is the trunk's source and alone has all of it: it branches where the others have.
    others = [shared[index] for index in members if index != longest]
    shared[longest] = min(shared[longest], max(others, default=shared[longest]))
    part: list[int] = []
    length = 0
    for index in sorted(members, key=lambda index: shared[index]):
        sequence = sequences[index]
        added = len(sequence.prompt_ids) - 1 + len(sequence.completion_ids) - shared[index]
        grown = length + shared[index] - (shared[part[-1]] if part else 0) + added
        if part and grown > row_tokens:
            yield _Unit(members=tuple(part), length=length, shared=tuple(shared[i] for i in part))
            part, grown = [], shared[index] + added
        part.append(index)
        length = grown
    yield _Unit(members=tuple(part), length=length, shared=tuple(shared[i] for i in part))


def _num_shared(prompt: Sequence[int], trunk: Sequence[int]) -> int:
    """Leading tokens that a prompt takes from the trunk: never its last, whose position has a target."""
    most = min(len(prompt) - 1, len(trunk))
    return next((i for i in range(most) if prompt[i] != trunk[i]), most)


def _empty(num_rows: int, row_tokens: int) -> dict[str, np.ndarray]:
    shape = (num_rows, row_tokens)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    arrays["segment_ids"] = np.full(shape, PAD_SEGMENT, np.int32)
    arrays["prefix_ids"] = np.full(shape, NO_PREFIX, np.int32)
    for name in ("token_weights", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        arrays[name] = np.zeros(shape, np.float32)
    arrays["importance_weights"] = np.ones(shape, np.float32)
    return arrays


def _write_targets(arrays, places, sequences, index, row, start):
    sequence = sequences[index]
    length = len(sequence.completion_ids)
    columns = slice(start, start + length)
    arrays["targets"][row, columns] = sequence.completion_ids
    arrays["token_weights"][row, columns] = sequence.token_weight
    arrays["advantages"][row, columns] = sequence.advantage
    if sequence.rollout_logprobs is not None:
        arrays["rollout_logprobs"][row, columns] = sequence.rollout_logprobs
    places[index] = Place(row=row, start=start, length=length)


def _write_plain(arrays, places, sequences, unit, row, cursor, segment):
    (index,) = unit.members
    sequence = sequences[index]
    columns = slice(cursor, cursor + unit.length)
    arrays["tokens"][row, columns] = (*sequence.prompt_ids, *sequence.completion_ids[:-1])
    arrays["positions"][row, columns] = np.arange(unit.length)
    arrays["segment_ids"][row, columns] = segment
    _write_targets(arrays, places, sequences, index, row, cursor + len(sequence.prompt_ids) - 1)
    return cursor + unit.length, segment + 1


def _write_group(arrays, places, sequences, unit, row, cursor, segment):
    trunk, branch = segment, segment + 1
    written = 0
    for index, num_shared in zip(unit.members, unit.shared, strict=True):
        prompt, completion = sequences[index].prompt_ids, sequences[index].completion_ids
        columns = slice(cursor, cursor + num_shared - written)
        arrays["tokens"][row, columns] = prompt[written:num_shared]
        arrays["positions"][row, columns] = np.arange(written, num_shared)
        arrays["segment_ids"][row, columns] = trunk
        cursor, written = columns.stop, num_shared
        tokens = (*prompt[num_shared:], *completion[:-1])
        columns = slice(cursor, cursor + len(tokens))
        arrays["tokens"][row, columns] = tokens
        arrays["positions"][row, columns] = num_shared + np.arange(len(tokens))
        arrays["segment_ids"][row, columns] = branch
        arrays["prefix_ids"][row, columns] = trunk if num_shared else NO_PREFIX
        _write_targets(arrays, places, sequences, index, row, cursor + len(prompt) - num_shared - 1)
        cursor, branch = columns.stop, branch + 1
    return cursor, branch

"""How new prompts are laid out for their prefill: a row each, or, for prompts that grow with a dialogue, rows
that hold once what they have in common (`data.batching`, layout ``shared_prefix``).

Shape letters: B prompts, R rows, T tokens of a row, P prompt columns.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from selfemo_jax.data.batching import Packed, TrainSequence, pack
from selfemo_jax.rollout.slots import batches

Ids = Sequence[int]


def by_dialogue(prompts: Sequence[Ids]) -> list[int]:
    """Order in which prompts with a common beginning stand side by side."""
    return sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))


def prefilled(
    prefill: Callable[..., Any],
    prompts: Sequence[Ids],
    *,
    columns: int,
    budget: int,
    multiple: int,
) -> Iterator[tuple[Sequence[int], Any]]:
    """Prefills of a row for each prompt, without its last token: (which prompts, their caches)."""
    lengths = [len(ids) - 1 for ids in prompts]
    for which, size in batches(lengths, columns=columns, budget=budget, multiple=multiple):
        tokens, used = np.zeros((size, columns), np.int32), np.zeros(size, np.int32)
        for row, index in enumerate(which):
            tokens[row, : lengths[index]] = prompts[index][:-1]
            used[row] = lengths[index]
        yield which, prefill(tokens, used)


def prefilled_together(
    prefill: Callable[..., Any],
    prompts: Sequence[Ids],
    *,
    columns: int,
    budget: int,
    multiple: int,
) -> Iterator[tuple[Sequence[int], Any]]:
    """As `prefilled`, from rows in which the prompts of a dialogue share their trunk."""
    packed = pack(
        [
            TrainSequence(group=group, prompt_ids=tuple(ids), completion_ids=(0,), token_weight=0.0)
            for ids, group in zip(prompts, _groups(prompts), strict=True)
        ],
        layout="shared_prefix",
        row_tokens=2 * columns,
        micro_rows=multiple,
    )
    rows = max(1, budget // (2 * columns * multiple)) * multiple
    rows = min(rows, packed.batch.tokens.shape[0])
    for start in range(0, packed.batch.tokens.shape[0], rows):
        which = [i for i, place in enumerate(packed.places) if start <= place.row < start + rows]
        if which:
            yield which, _prefill_rows(prefill, packed, which, start, rows, columns, multiple)


def _prefill_rows(
    prefill: Callable[..., Any],
    packed: Packed,
    which: Sequence[int],
    start: int,
    rows: int,
    columns: int,
    multiple: int,
) -> Any:
    size = multiple
    while size < len(which):
        size *= 2
    row, picked = np.zeros(size, np.int32), np.zeros((size, columns), np.int32)
    for number, index in enumerate(which):
        place = packed.places[index]
        row[number] = place.row - start
        found = columns_of(packed, index)
        picked[number, : len(found) - 1] = found[:-1]
    part = {
        name: _rows(getattr(packed.batch, name), start, rows)
        for name in ("tokens", "positions", "segment_ids", "prefix_ids")
    }
    return prefill(**part, row=row, columns=picked)


def columns_of(packed: Packed, index: int) -> np.ndarray:
    """Columns of a prompt's tokens in its row, in order, the last token's included."""
    place = packed.places[index]
    segments, prefixes = packed.batch.segment_ids[place.row], packed.batch.prefix_ids[place.row]
    own = (segments == segments[place.start]) | (segments == prefixes[place.start])
    return np.flatnonzero(own[: place.start + 1])


def _rows(values: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Rows from ``start`` on, filled up with rows of zeros: padding that nothing is picked from."""
    part = values[start : start + rows]
    return np.concatenate([part, np.zeros((rows - len(part), values.shape[1]), values.dtype)])


def _groups(prompts: Sequence[Ids]) -> list[int]:
    """A number for each prompt, the same for neighbours of which one half or more is common."""
    numbers: list[int] = []
    for index, ids in enumerate(prompts):
        before = prompts[index - 1] if index else ()
        shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), -1)
        shared = min(len(before), len(ids)) if shared < 0 else shared
        together = index and 2 * shared >= min(len(before), len(ids))
        numbers.append(numbers[-1] if together else len(numbers))
    return numbers

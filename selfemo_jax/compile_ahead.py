"""Programs that later batches will ask for, compiled with the first batch.

A function of the update is compiled for each of the few widths that the output head may have
(`data.batching.target_widths`) and for each number of rows. Which of them a batch needs, its lengths decide:
without this a run compiles whenever it first meets one, which may be hours after it began.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from selfemo_jax.data.batching import target_widths


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What was compiled ahead, of one set of functions; with ``on`` false nothing is."""

    on: bool
    done: set[Any] = field(default_factory=set)

    def __call__(
        self,
        function: jax.stages.Wrapped,
        *args: Any,
        width: int | None,
        num_rows: Sequence[int] = (),
        **static: Any,
    ) -> Any:
        """``function(*args, width=width, **static)``; the last argument is a batch ``[B, T]``. Its first call
        compiles it for all widths of such rows, and for batches of ``num_rows`` rows beside."""
        batch = args[-1]
        shape = jax.tree.leaves(batch)[0].shape
        key = function, shape[1], tuple(static.items())
        if self.on and key not in self.done:
            self.done.add(key)
            for rows in sorted({shape[0], *num_rows}):
                like = batch if rows == shape[0] else jax.tree.map(lambda x, rows=rows: _rows(x, rows), batch)
                for other in target_widths(shape[1]):
                    function.lower(*args[:-1], like, width=other, **static).compile()
        return function(*args, width=width, **static)


def _rows(array: jax.Array, num_rows: int) -> jax.ShapeDtypeStruct:
    """The same array with another number of rows."""
    return jax.ShapeDtypeStruct((num_rows, *array.shape[1:]), array.dtype, sharding=array.sharding)

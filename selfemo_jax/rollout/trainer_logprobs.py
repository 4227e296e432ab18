"""The trainer's log-probs of given sequences, for comparison with what a server says."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from selfemo_jax.model.adapters import is_adapted
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, forward, token_logprobs
from selfemo_jax.model.sharding import batch_sharding

_ROW_MULTIPLE = 64
_BATCH_TOKENS = 8192
_BUDGET_BYTES = 256 * 2**20


class TrainerLogprobs:
    """Scores whole sequences with one forward pass; compiled once per padded length. To be called from one
    thread: programs of one mesh that two threads start can wait for each other."""

    def __init__(self, model: ModelConfig, compute: Compute, mesh: Mesh):
        self._rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._most = model.max_positions
        place = batch_sharding(mesh, ndim=2)
        hidden_sharding = batch_sharding(mesh, ndim=3)

        @functools.partial(jax.jit, static_argnames="temperature")
        def score(params, head, tokens, targets, segment_ids, *, temperature):
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden = forward(
                params,
                model,
                compute,
                tokens=tokens,
                positions=positions,
                segment_ids=segment_ids,
                prefix_ids=jnp.full_like(tokens, -1),
                sharding=hidden_sharding,
            )
            heads = [params] if head is None else [params, {"head": head.T}]
            return [
                token_logprobs(
                    one,
                    model,
                    compute,
                    hidden,
                    targets,
                    temperature=temperature,
                    budget_bytes=_BUDGET_BYTES * self._rows,
                )[0]
                for one in heads
            ]

        self._score, self._place = score, place

    def __call__(
        self,
        params: Params,
        sequences: Sequence[Sequence[int]],
        *,
        starts: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """log p of tokens ``starts[i]``, ... of each sequence (1 by default) given those before it,
        float32."""
        (found,) = self._all(params, None, sequences, starts, temperature)
        return found

    def of_probes(
        self, params: Params, before: Params | None, probes: Sequence[Sequence[int]]
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...] | None]:
        """Of each probe; and where the embedding is also the head and may have changed since ``before``, with
        the head before."""
        if before is None or "head" in params or is_adapted(before):
            return tuple(self(params, probes)), None
        own, old_head = self.with_head(params, before["embed"], probes)
        return tuple(own), tuple(old_head)

    def with_head(
        self, params: Params, head: jax.Array, sequences: Sequence[Sequence[int]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The same, and what an output head ``[V, D]`` from elsewhere would make of the same hidden
        states."""
        own, other = self._all(params, head, sequences, None, 1.0)
        return own, other

    def _all(
        self,
        params: Params,
        head: jax.Array | None,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None,
        temperature: float,
    ) -> list[list[np.ndarray]]:
        starts = [1] * len(sequences) if starts is None else starts
        longest = max((len(ids) for ids in sequences), default=2)
        columns = min(-(-(longest - 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE, max(self._most, longest - 1))
        rows = max(self._rows, _BATCH_TOKENS // columns // self._rows * self._rows)
        rows = min(rows, -(-len(sequences) // self._rows) * self._rows)
        found: list[list[np.ndarray]] = [[]] if head is None else [[], []]
        for begin in range(0, len(sequences), rows):
            part = sequences[begin : begin + rows]
            tokens = np.zeros((rows, columns + 1), np.int32)
            segments = np.ones((rows, columns), np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 0
            arrays = jax.device_put((tokens[:, :-1], tokens[:, 1:], segments), self._place)
            scored = self._score(params, head, *arrays, temperature=temperature)
            for rows_of, scores in zip(found, map(np.asarray, scored), strict=True):
                rows_of += [
                    scores[row, starts[begin + row] - 1 : len(ids) - 1] for row, ids in enumerate(part)
                ]
        return found

"""Entropy of the next-token distribution at each token of given sequences."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, forward, token_logprobs
from selfemo_jax.model.sharding import batch_sharding

ROW_MULTIPLE = 64
BATCH_TOKENS = 8192
BUDGET_BYTES = 256 * 2**20
"""Of float32 logits at once; above it the head runs in chunks."""


class TokenEntropies:
    """One forward pass for each batch of sequences; compiled once per padded length."""

    def __init__(self, model: ModelConfig, compute: Compute, mesh: Mesh):
        self._rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._place = batch_sharding(mesh, ndim=2)
        hidden_sharding = batch_sharding(mesh, ndim=3)

        @functools.partial(jax.jit, static_argnames="temperature")
        def measure(params, tokens, targets, segment_ids, *, temperature):
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
            budget = BUDGET_BYTES * self._rows
            return token_logprobs(
                params, model, compute, hidden, targets, temperature=temperature, budget_bytes=budget
            )[1]

        self._measure = measure

    def __call__(
        self,
        params: Params,
        sequences: Sequence[Sequence[int]],
        *,
        starts: Sequence[int],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """Entropy in nats, under softmax(logits / temperature), of the distributions that tokens
        ``starts[i]``, ... of each sequence were drawn from; float32."""
        longest = max(map(len, sequences), default=2)
        columns = -(-(longest - 1) // ROW_MULTIPLE) * ROW_MULTIPLE
        rows = max(self._rows, BATCH_TOKENS // columns // self._rows * self._rows)
        rows = min(rows, -(-len(sequences) // self._rows) * self._rows)
        found = []
        for begin in range(0, len(sequences), rows):
            part = sequences[begin : begin + rows]
            tokens = np.zeros((rows, columns + 1), np.int32)
            segments = np.ones((rows, columns), np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 0
            arrays = jax.device_put((tokens[:, :-1], tokens[:, 1:], segments), self._place)
            values = np.asarray(self._measure(params, *arrays, temperature=temperature))
            found += [values[row, starts[begin + row] - 1 : len(ids) - 1] for row, ids in enumerate(part)]
        return found

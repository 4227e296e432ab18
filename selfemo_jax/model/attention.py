"""Causal attention over packed rows with shared prefixes.

The rule on every backend: position i sees j iff j <= i and (segment[j] == segment[i] or segment[j] ==
prefix[i]). Padding is a segment of its own, so no row of the score matrix is empty. Shape letters: B rows, T
tokens, N query heads, K key-value heads, H head size.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Backend = Literal["dense", "blocked"]
MIN_BLOCK = 128
MAX_BLOCKS = 16
_NEGATIVE = -1e30


def choose_backend(requested: str, num_tokens: int) -> Backend:
    """The backend for rows of ``num_tokens``; ``auto`` takes ``blocked`` where it skips work, and ``dense``
    below two blocks."""
    if requested == "auto":
        return "blocked" if num_tokens >= 2 * MIN_BLOCK else "dense"
    if requested not in ("dense", "blocked"):
        raise ValueError(f"model.attention: unknown backend {requested!r}; expected auto, dense or blocked")
    return "dense" if requested == "dense" else "blocked"


def visible(
    query_segments: Int[Array, "B Q"],
    query_prefixes: Int[Array, "B Q"],
    key_segments: Int[Array, "B S"],
    *,
    query_offset: int,
) -> Bool[Array, "B Q S"]:
    """The attention rule for queries that start at row index ``query_offset`` against keys that start at
    0."""
    num_queries, num_keys = query_segments.shape[1], key_segments.shape[1]
    causal = jnp.arange(num_keys)[None, :] <= query_offset + jnp.arange(num_queries)[:, None]
    keys = key_segments[:, None, :]
    related = (keys == query_segments[:, :, None]) | (keys == query_prefixes[:, :, None])
    return related & causal[None]


def attend(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B Q S"],
) -> Float[Array, "B Q N H"]:
    """Grouped-query attention of Q queries over S keys; scores and softmax in float32."""
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    repeats = num_heads // num_kv
    # One matrix product per row and key-value head: its `repeats` query heads are stacked along the query
    # axis.
    grouped = q.reshape(num_rows, num_queries, num_kv, repeats, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(num_rows, num_kv, repeats * num_queries, head_dim)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(num_rows, num_kv, repeats, num_queries, -1) * (head_dim**-0.5)
    scores = jnp.where(mask[:, None, None], scores, _NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(num_rows, num_kv, repeats * num_queries, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, values)
    out = out.reshape(num_rows, num_kv, repeats, num_queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(num_rows, num_queries, num_heads, head_dim)


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"],
    *,
    backend: Backend,
) -> Float[Array, "B T N H"]:
    """Attention by the rule above. ``blocked`` cuts the queries into row blocks that never touch the keys
    after them and recomputes each block's scores in the backward pass, so that no ``[T, T]`` array lives
    through it."""
    num_tokens = q.shape[1]
    if backend == "dense":
        return attend(q, k, v, visible(segment_ids, prefix_ids, segment_ids, query_offset=0))

    block = max(MIN_BLOCK, -(-num_tokens // MAX_BLOCKS))

    # The slices are taken inside: what is kept for the backward pass is then the keys and values once, not
    # one growing part of them for each block.
    @functools.partial(jax.checkpoint, static_argnums=(5, 6))
    def one_block(q, k, v, segment_ids, prefix_ids, start, stop):
        rows, seen = slice(start, stop), slice(0, stop)
        mask = visible(segment_ids[:, rows], prefix_ids[:, rows], segment_ids[:, seen], query_offset=start)
        return attend(q[:, rows], k[:, seen], v[:, seen], mask)

    starts = range(0, num_tokens, block)
    outputs = [
        one_block(q, k, v, segment_ids, prefix_ids, start, min(start + block, num_tokens)) for start in starts
    ]
    return jnp.concatenate(outputs, axis=1)

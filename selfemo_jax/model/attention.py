"""Causal attention over packed rows with shared prefixes.

The rule on every backend: position i sees j iff j <= i and (segment[j] == segment[i] or segment[j] ==
prefix[i]). Padding is a segment of its own, so no row of the score matrix is empty. Shape letters: B rows, T
tokens, N query heads, K key-value heads, H head size.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from selfemo_jax.model.linear import ATTENDED, sum_of_products

Backend = Literal["dense", "blocked", "pallas"]
MIN_BLOCK = 128
MAX_BLOCKS = 16
_NEGATIVE = -1e30


def choose_backend(requested: str, num_tokens: int) -> Backend:
    """The backend for rows of ``num_tokens``; ``auto`` takes ``blocked`` where it skips work, and ``dense``
    below two blocks. What is asked for by name is never replaced: ValueError where it cannot run."""
    if requested == "auto":
        return "blocked" if num_tokens >= 2 * MIN_BLOCK else "dense"
    if requested == "pallas" and jax.default_backend() != "gpu":
        raise ValueError(
            "model.attention: pallas is a kernel for NVIDIA GPUs and the devices are "
            f"{jax.default_backend()}; take auto, dense or blocked"
        )
    if requested not in ("dense", "blocked", "pallas"):
        raise ValueError(
            f"model.attention: unknown backend {requested!r}; expected auto, dense, blocked or pallas"
        )
    return "dense" if requested == "dense" else "blocked" if requested == "blocked" else "pallas"


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
    grouped = _grouped(q, k.shape[2])
    scores = _scores(grouped, k.transpose(0, 2, 1, 3), mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _ungrouped(_over_keys(weights, v.transpose(0, 2, 1, 3)))


def layer_plan(segment_ids: Int[Array, "B T"], prefix_ids: Int[Array, "B T"], *, backend: Backend) -> Any:
    """What every layer's `packed_attention` over these rows has in common, to be made once outside the loop
    over layers; None where there is nothing."""
    if backend != "pallas":
        return None
    from selfemo_jax.model.flash import attention_plan

    return attention_plan(segment_ids, prefix_ids)


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"],
    *,
    backend: Backend,
    mesh: Mesh | None = None,
    plan: Any = None,
) -> Float[Array, "B T N H"]:
    """Attention by the rule above. ``blocked`` cuts the queries into row blocks that never touch the keys
    after them and recomputes each block's scores in the backward pass, so that no ``[T, T]`` array lives
    through it. ``pallas`` is the GPU kernel of `model/flash.py`; ``mesh`` is what its rows and heads are
    split over, which XLA does for the others by itself, and
    ``plan`` its `layer_plan`, where one was made."""
    if backend == "dense":
        return attend(q, k, v, visible(segment_ids, prefix_ids, segment_ids, query_offset=0))
    if backend == "pallas":
        # Pallas takes long to import, and a machine without a GPU has no use for it.
        from selfemo_jax.model.flash import sharded_flash_attention

        return sharded_flash_attention(q, k, v, segment_ids, prefix_ids, mesh=mesh, plan=plan)
    return _blocked(q, k, v, segment_ids, prefix_ids)


def _grouped(x: jax.Array, num_kv: int) -> jax.Array:
    """``[B, T, N, H]`` as ``[B, K, R, T, H]``, R query heads to each key-value head."""
    num_rows, num_tokens, num_heads, head_dim = x.shape
    x = x.reshape(num_rows, num_tokens, num_kv, num_heads // num_kv, head_dim)
    return x.transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    num_rows, num_kv, repeats, num_tokens, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(num_rows, num_tokens, num_kv * repeats, head_dim)


def _stacked(x: jax.Array) -> jax.Array:
    # One matrix product per row and key-value head: its R query heads are stacked along the query axis.
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(grouped: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled scores of ``[B, K, R, Q, H]`` against ``[B, K, S, H]``, float32, where hidden a large negative
    number."""
    scores = jnp.einsum("bkqh,bksh->bkqs", _stacked(grouped), keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(*grouped.shape[:-1], -1) * (grouped.shape[-1] ** -0.5)
    return jnp.where(mask[:, None, None], scores, _NEGATIVE)


def _over_keys(weights: jax.Array, values: jax.Array, dtype: Any = None) -> jax.Array:
    """``[B, K, R, Q, S]`` times ``[B, K, S, H]``, summed in ``dtype``."""
    out = jnp.einsum("bkqs,bksh->bkqh", _stacked(weights), values, preferred_element_type=dtype)
    return out.reshape(*weights.shape[:-1], -1)


def _blocks(num_tokens: int) -> list[tuple[slice, slice]]:
    """Queries, and the keys up to them."""
    size = max(MIN_BLOCK, -(-num_tokens // MAX_BLOCKS))
    stops = [min(start + size, num_tokens) for start in range(0, num_tokens, size)]
    return [(slice(start, stop), slice(0, stop)) for start, stop in zip([0, *stops], stops, strict=False)]


def _seen(segment_ids: jax.Array, prefix_ids: jax.Array, rows: slice, *earlier: jax.Array) -> jax.Array:
    own = _after(segment_ids[:, rows], *earlier)
    return visible(own, prefix_ids[:, rows], segment_ids[:, : rows.stop], query_offset=rows.start)


def _after(x: jax.Array, *earlier: jax.Array) -> jax.Array:
    """``x``, but no sooner than the others: XLA:CPU forgets its barriers before it puts operations in order,
    and would hold the scores of all blocks at once. What is added is 0, which XLA cannot know."""
    zeros = [jnp.minimum(jnp.abs(one[(0,) * one.ndim]), 0).astype(x.dtype) for one in earlier]
    return x + sum(zeros) if zeros else x


@jax.custom_vjp
def _blocked(q, k, v, segment_ids, prefix_ids):
    return _blocked_forward(q, k, v, segment_ids, prefix_ids)[0]


def _blocked_forward(q, k, v, segment_ids, prefix_ids):
    grouped, keys, values = _grouped(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outputs, log_totals = [], []
    for rows, seen in _blocks(q.shape[1]):
        mask = _seen(segment_ids, prefix_ids, rows, *outputs[-1:])
        scores = _scores(_after(grouped[:, :, :, rows], *outputs[-1:]), keys[:, :, seen], mask)
        highest = scores.max(axis=-1, keepdims=True)
        exponentials = jnp.exp(scores - highest)
        total = exponentials.sum(axis=-1, keepdims=True)
        summed = _over_keys(exponentials.astype(v.dtype), values[:, :, seen], jnp.float32)
        outputs.append((summed / total).astype(v.dtype))
        log_totals.append((highest + jnp.log(total))[..., 0])
    out = checkpoint_name(_ungrouped(jnp.concatenate(outputs, axis=3)), ATTENDED)
    log_total = checkpoint_name(jnp.concatenate(log_totals, axis=3), ATTENDED)
    return out, (q, k, v, segment_ids, prefix_ids, out, log_total)


def _blocked_backward(residuals, g):
    """As FlashAttention-2 (arXiv:2307.08691): the softmax needs no second look for its largest value and sum,
    and the sum of weight times its gradient is that of output times its own."""
    # What is computed again must not be found equal to the forward pass and kept from there.
    q, k, v, segment_ids, prefix_ids, out, log_total = jax.lax.optimization_barrier(residuals)
    num_kv, scale = k.shape[2], q.shape[-1] ** -0.5
    grouped, keys, values = _grouped(q, num_kv), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    g = jnp.asarray(g, v.dtype)
    grouped_g = _grouped(g, num_kv)
    common = sum_of_products(out.astype(jnp.float32), g.astype(jnp.float32))
    common = _grouped(common[..., None], num_kv)[..., 0]
    dq = []
    # Gradients of keys and values grow as [H, S]: XLA:CPU has its fast product for query-major factors alone.
    dk, dv = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (keys, values))
    over_queries = functools.partial(jnp.einsum, "bkhq,bkqs->bkhs", preferred_element_type=jnp.float32)
    for rows, seen in _blocks(q.shape[1]):
        earlier = (dk, dv, *dq[-1:])
        mask = _seen(segment_ids, prefix_ids, rows, *earlier)
        block_q, block_g = (_after(x[:, :, :, rows], *earlier) for x in (grouped, grouped_g))
        scores = _scores(block_q, keys[:, :, seen], mask)
        weights = jnp.exp(scores - log_total[:, :, :, rows, None])
        dweights = jnp.einsum(
            "bkqh,bksh->bkqs", _stacked(block_g), values[:, :, seen], preferred_element_type=jnp.float32
        ).reshape(weights.shape)
        dscores = (weights * (dweights - common[:, :, :, rows, None]) * scale).astype(q.dtype)
        dq.append(_over_keys(dscores, keys[:, :, seen]))
        columns = slice(0, seen.stop)
        dk = dk.at[..., columns].add(over_queries(_stacked(block_q).swapaxes(2, 3), _stacked(dscores)))
        dv = dv.at[..., columns].add(
            over_queries(_stacked(block_g).swapaxes(2, 3), _stacked(weights.astype(v.dtype)))
        )
    dq = _ungrouped(jnp.concatenate(dq, axis=3))
    dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)

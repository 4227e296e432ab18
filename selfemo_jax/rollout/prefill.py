"""Keys and values of prompts, from rows that hold one prompt each or several that share their beginning.

Shape letters: B prompts, R rows, T tokens of a row, P prompt columns, S slots, W rows of a slot, K key-value
heads, H head size, M layers of a stack.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from selfemo_jax.model.attention import choose_backend, layer_plan, packed_attention
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, embed_tokens, layer_output, layer_qkv
from selfemo_jax.model.rope import rope_tables

Caches = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of each stack: prompts ``[M, S, K, P, H]``, completions ``[M, S, W, K, T, H]``; without M
where the layers are unrolled, since XLA:CPU copies a cache that is sliced after it is written."""


def prefill(
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    config: ModelConfig,
    compute: Compute,
    pin: Callable[[jax.Array], jax.Array],
    mesh: Mesh | None = None,
) -> Caches:
    """Keys and values (`Caches`, B for S) of right-padded prompts; columns from ``lengths`` on mean
    nothing."""
    num_rows, num_columns = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(num_columns)[None, :], (num_rows, num_columns))
    segments = jnp.where(positions < lengths[:, None], 0, 1)
    nothing = jnp.full_like(segments, -1)
    return _through_layers(
        params,
        tokens,
        positions,
        segments,
        nothing,
        lambda keys: keys,
        config=config,
        compute=compute,
        pin=pin,
        mesh=mesh,
    )


def prefill_rows(
    params: Params,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    prefix_ids: Int[Array, "R T"],
    row: Int[Array, " B"],
    columns: Int[Array, "B P"],
    *,
    config: ModelConfig,
    compute: Compute,
    pin: Callable[[jax.Array], jax.Array],
    mesh: Mesh | None = None,
) -> Caches:
    """Keys and values (`Caches`, B for S) of prompts that lie in packed rows: prompt b's are those of
    ``row[b]`` at ``columns[b]``; what its length leaves of the columns means nothing."""

    def pick(keys):
        return keys[row[:, None], columns]

    return _through_layers(
        params,
        tokens,
        positions,
        segment_ids,
        prefix_ids,
        pick,
        config=config,
        compute=compute,
        pin=pin,
        mesh=mesh,
    )


def _through_layers(
    params, tokens, positions, segments, prefixes, pick, *, config, compute, pin, mesh
) -> Caches:
    backend = choose_backend(compute.attention, tokens.shape[1])
    tables = rope_tables(positions, config)
    plan = layer_plan(segments, prefixes, backend=backend)

    def block(x, layer):
        q, k, v = layer_qkv(layer, config, x, tables)
        attended = packed_attention(q, k, v, segments, prefixes, backend=backend, mesh=mesh, plan=plan)
        heads_major = tuple(pick(part).transpose(0, 2, 1, 3) for part in (k, v))
        return pin(layer_output(layer, config, x, attended)), heads_major

    x = pin(embed_tokens(params, compute, tokens))
    caches = []
    for stack in params["stacks"]:
        if stack["attn_norm"].shape[0] == 1:
            x, pair = block(x, {name: weight[0] for name, weight in stack.items()})
        else:
            x, pair = lax.scan(block, x, stack)
        caches.append(pair)
    return tuple(caches)

"""The compiled half of the JAX engine: prefill, and decoding in chunks of tokens.

A prompt is prefilled once, without its last token, and its keys and values are shared by all its rollouts;
the last prompt token is the first input of every row, so that no step differs from the others. A row is one
rollout; slots hold one prompt and `W` rows each. All rows write their completion cache at one common column,
whatever their age: a row that has sampled `count` tokens owns the last `count` columns.

The layers are held in stacks: one stack of all L layers, looped over, or L stacks of one layer, unrolled
(`stack_layers`). Unrolled is faster where small products dominate, and slower to compile.

Shape letters: S slots, W rows of a slot, B prompts of a prefill, P prompt columns, T completion columns, C
tokens of a chunk, U rows with draws, M layers of a stack, V vocabulary, D model, N query heads, K key-value
heads, R = N / K, H head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from selfemo_jax.algo.sampling import sample, sample_penalised
from selfemo_jax.model.adapters import merge
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import (
    Compute,
    Params,
    embed_tokens,
    head_dtype,
    layer_output,
    layer_qkv,
    weight_dtype,
)
from selfemo_jax.model.linear import rms_norm
from selfemo_jax.model.rope import rope_tables
from selfemo_jax.model.sharding import RULES, abstract_params, partition_spec
from selfemo_jax.rollout.cached_attention import two_part_attention
from selfemo_jax.rollout.prefill import Caches, prefill, prefill_rows

_ROWS = ("data", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled functions of one model on one mesh; jax.jit keeps one program per shape in each."""

    take_weights: Callable[[Params], Params]
    """Training weights -> a copy in the decode layout: ``embed``, ``stacks``, ``final_norm``, ``head``."""
    prefill: Callable[..., Caches]
    prefill_rows: Callable[..., Caches]
    admit: Callable[..., Caches]
    take_slots: Callable[..., Caches]
    take_rows: Callable[..., Caches]
    uniforms: Callable[..., jax.Array]
    decode: Callable[..., tuple[Caches, dict[str, jax.Array]]]
    empty: Callable[..., tuple[Caches, Caches]]

    def num_compiled(self) -> int:
        """Programs compiled so far, over all shapes."""
        return sum(function._cache_size() for function in vars(self).values())


@functools.lru_cache(maxsize=8)
def programs(config: ModelConfig, compute: Compute, mesh: Mesh, *, unroll: bool, shard: bool) -> Programs:
    """The functions of the engine; shared by engines of the same model and mesh, so each shape compiles once.

    ``shard`` keeps the weights split over fsdp, as in training; else each data row of the mesh holds them
    whole (up to tp).
    """
    place = functools.partial(NamedSharding, mesh)
    whole = place(PartitionSpec())
    depth = () if unroll else (None,)
    prompt = place(PartitionSpec(*depth, _ROWS, "tp", None, None))
    cache = place(PartitionSpec(*depth, _ROWS, None, "tp", None, None))
    settings = {"config": config, "compute": compute}
    pin = functools.partial(lax.with_sharding_constraint, shardings=place(PartitionSpec(_ROWS)))
    return Programs(
        take_weights=jax.jit(
            functools.partial(stack_layers, unroll=unroll, **settings),
            out_shardings=weight_shardings(config, compute, mesh, unroll=unroll, shard=shard),
        ),
        prefill=jax.jit(functools.partial(prefill, pin=pin, mesh=mesh, **settings), out_shardings=prompt),
        prefill_rows=jax.jit(
            functools.partial(prefill_rows, pin=pin, mesh=mesh, **settings), out_shardings=prompt
        ),
        admit=jax.jit(admit, donate_argnums=0, out_shardings=prompt),
        take_slots=jax.jit(take_slots, static_argnames="length", out_shardings=prompt),
        take_rows=jax.jit(take_rows, static_argnames="length", out_shardings=cache),
        uniforms=jax.jit(uniforms, static_argnames="chunk", out_shardings=whole),
        decode=jax.jit(
            functools.partial(decode, pin=pin, **settings),
            static_argnames=("chunk", "temperature", "top_k", "top_p", "frequency_penalty"),
            donate_argnames="caches",
            out_shardings=(cache, whole),
        ),
        empty=jax.jit(
            functools.partial(empty, unroll=unroll, **settings),
            static_argnames=("slots", "width", "prompt_length", "length"),
            out_shardings=(prompt, cache),
        ),
    )


def stack_layers(params: Params, *, config: ModelConfig, compute: Compute, unroll: bool) -> Params:
    """A copy of the weights in the compute dtype, cut into stacks, never the same buffers as ``params``;
    adapters are merged."""
    params = merge(params, dtype="float32")

    def cast(x):
        return jnp.array(x, dtype=compute.dtype, copy=True)

    layers = {
        name: jnp.array(weight, dtype=weight_dtype(name, compute), copy=True)
        for name, weight in params["layers"].items()
    }
    pieces = [slice(i, i + 1) for i in range(config.num_layers)] if unroll else [slice(None)]
    head = params["head"] if "head" in params else params["embed"].T
    return {
        "embed": cast(params["embed"]),
        "stacks": tuple({name: weight[piece] for name, weight in layers.items()} for piece in pieces),
        "final_norm": cast(params["final_norm"]),
        "head": jnp.array(head, dtype=head_dtype(compute), copy=True),
    }


def weight_shardings(
    config: ModelConfig, compute: Compute, mesh: Mesh, *, unroll: bool, shard: bool
) -> Params:
    """Where `stack_layers` puts each weight."""
    shapes, axes = abstract_params(config)
    sizes = dict(mesh.shape)

    def sharding(names: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if shard:
            return NamedSharding(mesh, partition_spec(leaf.shape, names, sizes))
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    placed = jax.tree.map(sharding, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    if "head" not in placed:
        spec = tuple(placed["embed"].spec) or (None, None)
        placed["head"] = NamedSharding(mesh, PartitionSpec(*spec[::-1]))
    num_stacks = config.num_layers if unroll else 1
    return {
        "embed": placed["embed"],
        "stacks": (placed["layers"],) * num_stacks,
        "final_norm": placed["final_norm"],
        "head": placed["head"],
    }


def empty(
    *,
    config: ModelConfig,
    compute: Compute,
    unroll: bool,
    slots: int,
    width: int,
    prompt_length: int,
    length: int,
) -> tuple[Caches, Caches]:
    """Prompt and completion caches of zeros."""
    c = config
    num_stacks, depth = (c.num_layers, ()) if unroll else (1, (c.num_layers,))

    def zeros(*shape: int) -> Caches:
        # Each an array of its own: the decode step takes their buffers over.
        one = functools.partial(jnp.zeros, (*depth, *shape, c.head_dim), compute.dtype)
        return tuple((one(), one()) for _ in range(num_stacks))

    return zeros(slots, c.num_kv_heads, prompt_length), zeros(slots, width, c.num_kv_heads, length)


def admit(prompts: Caches, new: Caches, slots: Int[Array, " B"]) -> Caches:
    """Write prefilled prompts into their slots; a slot number beyond the last is dropped."""
    length = new[0][0].shape[-2]
    return jax.tree.map(
        lambda old, fresh: old.at[..., slots, :, :length, :].set(fresh, mode="drop"), prompts, new
    )


def take_slots(prompts: Caches, source: Int[Array, " S"], *, length: int) -> Caches:
    """Prompt caches in a new order of slots and with ``length`` columns."""

    def take(x):
        taken = jnp.take(x[..., :length, :], source, axis=-4)
        return jnp.pad(taken, ((0, 0),) * (x.ndim - 2) + ((0, length - taken.shape[-2]), (0, 0)))

    return jax.tree.map(take, prompts)


def take_rows(caches: Caches, source: Int[Array, "S W"], shift: Int[Array, ""], *, length: int) -> Caches:
    """Completion caches of the rows ``source`` (slot * W + row, of the old layout), without their first
    ``shift`` columns, with ``length`` columns."""

    def take(x):
        *depth, slots, width = x.shape[:-3]
        taken = jnp.take(x.reshape(*depth, slots * width, *x.shape[-3:]), source, axis=-4)
        padded = jnp.pad(taken, ((0, 0),) * (x.ndim - 2) + ((0, length), (0, 0)))
        return lax.dynamic_slice_in_dim(padded, shift, length, axis=x.ndim - 2)

    return jax.tree.map(take, caches)


def uniforms(
    seeds: UInt32[Array, "U 2"], rollouts: Int[Array, " U"], counts: Int[Array, " U"], *, chunk: int
) -> Float[Array, "U C 2"]:
    """Two uniforms for each of a row's next ``chunk`` tokens: a function of (seed, rollout, position of the
    token) alone."""

    def one_row(seed, rollout, count):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), rollout)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(count + jnp.arange(chunk))
        return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    return jax.vmap(one_row)(seeds, rollouts, counts)


def decode(
    params: Params,
    prompts: Caches,
    caches: Caches,
    rows: dict[str, jax.Array],
    draws: Float[Array, "U C 2"],
    numbers: dict[str, jax.Array],
    *,
    config: ModelConfig,
    compute: Compute,
    pin: Callable[[jax.Array], jax.Array],
    chunk: int,
    temperature: float,
    top_k: int,
    top_p: float,
    frequency_penalty: float,
) -> tuple[Caches, dict[str, jax.Array]]:
    """Up to ``chunk`` tokens for every live row.

    ``rows``: ``token`` (the next input), ``count`` (tokens sampled so far) and ``live`` ``[S, W]``, and
    ``prompt_length [S]`` (columns of the prompt cache in use); with a ``frequency_penalty`` also ``said
    [S, W, T]``, the tokens sampled so far, filled up with -1. ``draws``: `uniforms` of the S * W rows, and
    of more; greedy sampling ignores them. ``numbers``: the first ``column`` to write, ``limit`` of steps,
    ``stop_at`` (leave when that few rows live), ``max_tokens``, and ``stop_ids`` (padded with -1). Returns
    the caches, ``tokens`` and ``logprobs [S, W, C]``, ``count``, ``live`` and ``steps``; a row's new tokens
    are its first ``count`` minus old ``count``.
    """
    slots, width = rows["token"].shape
    num_columns = caches[0][0].shape[-2]
    prompt_mask = jnp.arange(prompts[0][0].shape[-2])[None, :] < rows["prompt_length"][:, None]
    column_ids = jnp.arange(num_columns)[None, None, :]
    draws = draws[: slots * width]
    own_row = jnp.arange(slots * width)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def going(carry):
        return (carry["step"] < numbers["limit"]) & (carry["live"].sum() > numbers["stop_at"])

    def one_token(carry):
        step, count, live = carry["step"], carry["count"], carry["live"]
        column = numbers["column"] + step
        seen = (column_ids <= column) & (column_ids >= column - count[..., None])
        tables = rope_tables(rows["prompt_length"][:, None] + count, config)
        x = pin(embed_tokens(params, compute, carry["token"]))

        def block(x, layer, prompt, cache, index):
            q, k, v = layer_qkv(layer, config, x, tables)
            cache = jax.tree.map(lambda whole, new: _write(whole, new, column, index), cache, (k, v))
            pick = functools.partial(_one_layer, index=index)
            with jax.named_scope("attention"):
                attended = two_part_attention(
                    q, jax.tree.map(pick, prompt), jax.tree.map(pick, cache), prompt_mask, seen
                )
            with jax.named_scope("output_mlp"):
                return pin(layer_output(layer, config, x, attended)), cache

        new_caches = []
        for stack, prompt, cache in zip(params["stacks"], prompts, carry["caches"], strict=True):
            x, cache = _through_stack(block, x, stack, prompt, cache)
            new_caches.append(cache)
        hidden = rms_norm(x, params["final_norm"], eps=config.norm_eps).astype(params["head"].dtype)
        hidden = hidden.reshape(slots * width, -1)
        with jax.named_scope("lm_head"):
            scores = pin(jnp.matmul(hidden, params["head"], preferred_element_type=jnp.float32))
        with jax.named_scope("sample"):
            if frequency_penalty:
                token, logprob = sample_penalised(
                    scores, draws[:, step], carry["said"], frequency_penalty=frequency_penalty, **how
                )
                said = carry["said"].at[own_row, token].add(1)
            else:
                token, logprob = sample(scores, draws[:, step], **how)
                said = carry["said"]
        token = jnp.where(live, token.reshape(slots, width), carry["token"])
        count = count + live
        stopped = (token[..., None] == numbers["stop_ids"]).any(axis=-1)

        def put(out, value):
            return lax.dynamic_update_slice_in_dim(out, value[..., None], step, axis=2)

        return {
            "step": step + 1,
            "caches": tuple(new_caches),
            "token": token,
            "said": said,
            "count": count,
            "live": live & ~stopped & (count < numbers["max_tokens"]),
            "tokens": put(carry["tokens"], token),
            "logprobs": put(carry["logprobs"], logprob.reshape(slots, width)),
        }

    said = jnp.zeros((slots * width, config.vocab_size if frequency_penalty else 0), jnp.int32)
    if frequency_penalty:
        before = rows["said"].reshape(slots * width, -1)
        # -1 would count for the last token; a number beyond it counts for none.
        before = jnp.where(before < 0, config.vocab_size, before)
        said = said.at[own_row[:, None], before].add(1, mode="drop")
    start = {
        "said": said,
        "step": jnp.zeros((), jnp.int32),
        # By row: the shape in which the attention reads them. Of a cache that it reads in another one XLA
        # keeps a second and copies both at every token.
        "caches": jax.tree.map(lambda x: x.reshape(*x.shape[:-5], -1, *x.shape[-3:]), caches),
        "token": rows["token"],
        "count": rows["count"],
        "live": rows["live"],
        "tokens": jnp.zeros((slots, width, chunk), jnp.int32),
        "logprobs": jnp.zeros((slots, width, chunk), jnp.float32),
    }
    end = lax.while_loop(going, one_token, start)
    result = {name: end[name] for name in ("tokens", "logprobs", "count", "live")}
    caches = jax.tree.map(lambda new, old: new.reshape(old.shape), end["caches"], caches)
    return caches, result | {"steps": end["step"]}


def _write(cache: jax.Array, new: Float[Array, "S W K H"], column: jax.Array, index: jax.Array | None):
    new = new.reshape(-1, new.shape[-2], 1, new.shape[-1])
    if index is None:
        return lax.dynamic_update_slice_in_dim(cache, new, column, axis=2)
    return lax.dynamic_update_slice(cache, new[None], (index, 0, 0, column, 0))


def _one_layer(cache: jax.Array, index: jax.Array | None) -> jax.Array:
    return cache if index is None else lax.dynamic_index_in_dim(cache, index, keepdims=False)


def _through_stack(block, x: jax.Array, stack: Params, prompt: Any, cache: Any) -> tuple[jax.Array, Any]:
    depth = stack["attn_norm"].shape[0]
    if depth == 1:
        return block(x, {name: weight[0] for name, weight in stack.items()}, prompt, cache, None)

    # The cache stays in the carry: as inputs and outputs of a scan it would be copied at every token.
    def one_layer(index, carry):
        x, cache = carry
        layer = {name: lax.dynamic_index_in_dim(w, index, keepdims=False) for name, w in stack.items()}
        return block(x, layer, prompt, cache, index)

    return lax.fori_loop(0, depth, one_layer, (x, cache))

"""Attention over packed rows with shared prefixes as a GPU kernel (Pallas, lowered to Triton).

The rule is that of `model/attention.py`. Blocks of queries meet only those blocks of keys of which they see
something: which these are is worked out from the segments (`block_plan`), so that the prompts of other
groups, later positions and foreign completions cost nothing. The forward pass is that of FlashAttention-2
(arXiv:2307.08691); the backward pass is one kernel over blocks of queries and one over blocks of keys,
without atomic additions, so that equal inputs give equal gradients.

Shape letters: B rows, T tokens, N query heads, K key-value heads, R = N / K, H head size, I blocks of
queries, J blocks of keys.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from selfemo_jax.model.linear import ATTENDED

_NEGATIVE = -1e30
_SMALLEST = 16
"""Triton multiplies matrices of no less than this in each dimension."""
_FILLING = -2
"""Segment of the positions that fill up the last block; no segment or prefix of a row has it."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of the kernels' blocks: powers of two of at least 16."""

    queries: int = 64
    keys: int = 64
    num_warps: int = 4
    num_stages: int = 2


def block_plan(
    segment_ids: Int[Array, "B T"], prefix_ids: Int[Array, "B T"], *, blocks: Blocks
) -> Bool[Array, "B I J"]:
    """Whether a block of queries sees anything of a block of keys; T is a multiple of both sizes."""
    num_rows, num_tokens = segment_ids.shape
    keys = segment_ids.reshape(num_rows, 1, -1, blocks.keys)

    def one_block(index):
        rows = lax.dynamic_slice_in_dim(segment_ids, index * blocks.queries, blocks.queries, axis=1)
        prefixes = lax.dynamic_slice_in_dim(prefix_ids, index * blocks.queries, blocks.queries, axis=1)
        related = (keys == rows[:, :, None, None]) | (keys == prefixes[:, :, None, None])
        at = index * blocks.queries + jnp.arange(blocks.queries)
        causal = jnp.arange(num_tokens).reshape(1, -1, blocks.keys) <= at[:, None, None]
        return (related & causal[None]).any(axis=(1, 3))

    found = lax.map(one_block, jnp.arange(num_tokens // blocks.queries))
    return found.transpose(1, 0, 2)


class Plan(NamedTuple):
    """What all layers of a pass over the same rows have in common: T filled up to whole blocks, and the
    blocks to visit, in order and first, with how many of them there are."""

    segment_ids: Int[Array, "B T"]
    prefix_ids: Int[Array, "B T"]
    keys: Int[Array, "B I J"]
    num_keys: Int[Array, "B I"]
    queries: Int[Array, "B J I"]
    num_queries: Int[Array, "B J"]


def attention_plan(
    segment_ids: Int[Array, "B T"], prefix_ids: Int[Array, "B T"], *, blocks: Blocks | None = None
) -> Plan:
    """The plan of rows of any length."""
    blocks = Blocks() if blocks is None else blocks
    filling = ((0, 0), (0, -segment_ids.shape[1] % max(blocks.queries, blocks.keys)))
    segment_ids = jnp.pad(segment_ids, filling, constant_values=_FILLING)
    prefix_ids = jnp.pad(prefix_ids, filling, constant_values=_FILLING)
    seen = block_plan(segment_ids, prefix_ids, blocks=blocks)
    keys, num_keys = _visits(seen)
    queries, num_queries = _visits(seen.swapaxes(1, 2))
    return Plan(
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        keys=keys,
        num_keys=num_keys,
        queries=queries,
        num_queries=num_queries,
    )


def _visits(seen: Bool[Array, "B I J"]) -> tuple[Int[Array, "B I J"], Int[Array, "B I"]]:
    order = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
    return order, seen.sum(axis=-1).astype(jnp.int32)


def _visible(row_segments, row_prefixes, key_segments, first_row, first_key):
    rows = first_row + jnp.arange(row_segments.shape[0])
    keys = first_key + jnp.arange(key_segments.shape[0])
    same = key_segments[None, :] == row_segments[:, None]
    return (same | (key_segments[None, :] == row_prefixes[:, None])) & (keys[None, :] <= rows[:, None])


def _times_transposed(a, b):
    return plgpu.dot(a, b, trans_b=True)


def _forward_kernel(q_ref, k_ref, v_ref, segments_ref, prefixes_ref, visits_ref, number_ref, o_ref, l_ref, *,
                    blocks: Blocks, scale: float):  # fmt: skip
    first_row = pl.program_id(0) * blocks.queries
    rows = pl.ds(first_row, blocks.queries)
    q, segments, prefixes = q_ref[...], segments_ref[rows], prefixes_ref[rows]

    def visit(turn, carry):
        out, highest, total = carry
        first_key = visits_ref[turn] * blocks.keys
        keys = pl.ds(first_key, blocks.keys)
        scores = _times_transposed(q, k_ref[keys, :]) * scale
        mask = _visible(segments, prefixes, segments_ref[keys], first_row, first_key)
        scores = jnp.where(mask, scores, _NEGATIVE)
        higher = jnp.maximum(highest, scores.max(axis=1))
        # A row that has seen nothing yet has only hidden scores here: they must not count as e^0.
        weights = jnp.where(mask, jnp.exp(scores - higher[:, None]), 0.0)
        shrink = jnp.exp(highest - higher)
        total = total * shrink + weights.sum(axis=1)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return out, higher, total

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(blocks.queries, _NEGATIVE, jnp.float32),
        jnp.zeros(blocks.queries, jnp.float32),
    )
    out, highest, total = lax.fori_loop(0, number_ref[...], visit, start)
    o_ref[...] = (out / total[:, None]).astype(o_ref.dtype)
    l_ref[...] = highest + jnp.log(total)


def _dq_kernel(q_ref, k_ref, v_ref, g_ref, l_ref, c_ref, segments_ref, prefixes_ref, visits_ref, number_ref,
               dq_ref, *, blocks: Blocks, scale: float):  # fmt: skip
    first_row = pl.program_id(0) * blocks.queries
    rows = pl.ds(first_row, blocks.queries)
    q, g, log_total, common = q_ref[...], g_ref[...], l_ref[...], c_ref[...]
    segments, prefixes = segments_ref[rows], prefixes_ref[rows]

    def visit(turn, dq):
        first_key = visits_ref[turn] * blocks.keys
        keys = pl.ds(first_key, blocks.keys)
        k = k_ref[keys, :]
        mask = _visible(segments, prefixes, segments_ref[keys], first_row, first_key)
        weights = jnp.where(mask, jnp.exp(_times_transposed(q, k) * scale - log_total[:, None]), 0.0)
        dweights = _times_transposed(g, v_ref[keys, :])
        dscores = weights * (dweights - common[:, None]) * scale
        return dq + plgpu.dot(dscores.astype(k.dtype), k)

    dq = lax.fori_loop(0, number_ref[...], visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, g_ref, l_ref, c_ref, segments_ref, prefixes_ref, visits_ref, number_ref,
                dk_ref, dv_ref, *, blocks: Blocks, scale: float, repeats: int):  # fmt: skip
    first_key = pl.program_id(0) * blocks.keys
    k, v = k_ref[...], v_ref[...]
    key_segments = segments_ref[pl.ds(first_key, blocks.keys)]

    def visit(turn, carry):
        first_row = visits_ref[turn] * blocks.queries
        rows = pl.ds(first_row, blocks.queries)
        mask = _visible(segments_ref[rows], prefixes_ref[rows], key_segments, first_row, first_key)
        dk, dv = carry
        for head in range(repeats):
            q, g = q_ref[rows, head, :], g_ref[rows, head, :]
            scores = _times_transposed(q, k) * scale
            weights = jnp.where(mask, jnp.exp(scores - l_ref[head, rows][:, None]), 0.0)
            dv += plgpu.dot(weights.astype(g.dtype), g, trans_a=True)
            dscores = weights * (_times_transposed(g, v) - c_ref[head, rows][:, None]) * scale
            dk += plgpu.dot(dscores.astype(q.dtype), q, trans_a=True)
        return dk, dv

    nothing = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, number_ref[...], visit, (nothing, nothing))
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _call(kernel, *, grid, in_specs, out_specs, out_shape, blocks: Blocks, interpret: bool, name: str):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q, k, v, plan: Plan, blocks: Blocks, interpret: bool):
    return _flash_forward(q, k, v, plan, blocks, interpret)[0]


def _flash_forward(q, k, v, plan: Plan, blocks: Blocks, interpret: bool):
    num_rows, num_tokens, num_heads, head_dim = q.shape
    repeats = num_heads // k.shape[2]
    row = pl.BlockSpec((None, num_tokens), lambda i, b, n: (b, 0))
    own = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, b, n: (b, i, n, 0))
    others = pl.BlockSpec((None, num_tokens, None, head_dim), lambda i, b, n: (b, 0, n // repeats, 0))
    out, log_total = _call(
        functools.partial(_forward_kernel, blocks=blocks, scale=head_dim**-0.5),
        grid=(num_tokens // blocks.queries, num_rows, num_heads),
        in_specs=[own, others, others, row, row, *_visit_specs(plan.keys)],
        out_specs=[own, pl.BlockSpec((None, None, blocks.queries), lambda i, b, n: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads, num_tokens), jnp.float32),
        ],
        blocks=blocks,
        interpret=interpret,
        name="packed_attention",
    )(q, k, v, plan.segment_ids, plan.prefix_ids, plan.keys, plan.num_keys)
    out, log_total = checkpoint_name(out, ATTENDED), checkpoint_name(log_total, ATTENDED)
    return out, (q, k, v, plan, out, log_total)


def _visit_specs(visits: jax.Array) -> list[pl.BlockSpec]:
    return [
        pl.BlockSpec((None, None, visits.shape[2]), lambda i, b, n: (b, i, 0)),
        pl.BlockSpec((None, None), lambda i, b, n: (b, i)),
    ]


def _flash_backward(blocks: Blocks, interpret: bool, residuals, g):
    q, k, v, plan, out, log_total = residuals
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    repeats = num_heads // num_kv
    g = g.astype(v.dtype)
    common = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(axis=-1).transpose(0, 2, 1)
    row = pl.BlockSpec((None, num_tokens), lambda i, b, n: (b, 0))
    settings = {"blocks": blocks, "interpret": interpret}

    own = pl.BlockSpec((None, blocks.queries, None, head_dim), lambda i, b, n: (b, i, n, 0))
    own_sums = pl.BlockSpec((None, None, blocks.queries), lambda i, b, n: (b, n, i))
    others = pl.BlockSpec((None, num_tokens, None, head_dim), lambda i, b, n: (b, 0, n // repeats, 0))
    dq = _call(
        functools.partial(_dq_kernel, blocks=blocks, scale=head_dim**-0.5),
        grid=(num_tokens // blocks.queries, num_rows, num_heads),
        in_specs=[own, others, others, own, own_sums, own_sums, row, row, *_visit_specs(plan.keys)],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="packed_attention_dq",
        **settings,
    )(q, k, v, g, log_total, common, plan.segment_ids, plan.prefix_ids, plan.keys, plan.num_keys)

    own = pl.BlockSpec((None, blocks.keys, None, head_dim), lambda j, b, n: (b, j, n, 0))
    # The R query heads that share a key-value head are one block of R heads.
    heads = pl.BlockSpec((None, num_tokens, repeats, head_dim), lambda j, b, n: (b, 0, n, 0))
    sums = pl.BlockSpec((None, repeats, num_tokens), lambda j, b, n: (b, n, 0))
    dk, dv = _call(
        functools.partial(_dkv_kernel, blocks=blocks, scale=head_dim**-0.5, repeats=repeats),
        grid=(num_tokens // blocks.keys, num_rows, num_kv),
        in_specs=[heads, own, own, heads, sums, sums, row, row, *_visit_specs(plan.queries)],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="packed_attention_dkv",
        **settings,
    )(q, k, v, g, log_total, common, plan.segment_ids, plan.prefix_ids, plan.queries, plan.num_queries)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"],
    *,
    plan: Plan | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention on one device, scores and softmax in float32; ``interpret`` runs the kernels step by step on
    a CPU. Rows are filled up to whole blocks and heads to a power of two, and cut again. ``plan`` is that of
    these rows and blocks, made once for many layers; None makes it here."""
    blocks = Blocks() if blocks is None else blocks
    num_tokens, head_dim = q.shape[1], q.shape[-1]
    filling = -num_tokens % max(blocks.queries, blocks.keys)
    wider = max(_SMALLEST, pl.next_power_of_2(head_dim)) - head_dim
    if wider:
        # The kernels scale by the size they see; zeros beside the numbers change no product.
        q = q * jnp.asarray(((head_dim + wider) / head_dim) ** 0.5, q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, wider))) for x in (q, k, v))
    plan = attention_plan(segment_ids, prefix_ids, blocks=blocks) if plan is None else plan
    out = _flash(q, k, v, plan, blocks, interpret)
    return out[:, :num_tokens, :, :head_dim]


def sharded_flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"],
    *,
    mesh: Mesh | None,
    plan: Plan | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`flash_attention` with rows split over data and fsdp and heads over tp: a kernel is a closed box to
    XLA, which would gather everything for it."""

    def run(q, k, v, segment_ids, prefix_ids, plan):
        return flash_attention(
            q, k, v, segment_ids, prefix_ids, plan=plan, blocks=blocks, interpret=interpret
        )

    if mesh is None or mesh.size == 1:
        return run(q, k, v, segment_ids, prefix_ids, plan)
    heads = PartitionSpec(("data", "fsdp"), None, "tp", None)
    rows = PartitionSpec(("data", "fsdp"))
    # Outputs of a kernel carry no account of which axes they vary over.
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(heads, heads, heads, rows, rows, rows), out_specs=heads, check_vma=False
    )
    return split(q, k, v, segment_ids, prefix_ids, plan)

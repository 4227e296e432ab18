"""The decoder: Qwen3 (arXiv:2505.09388) and Llama-family, weights as Flax variables, layers scanned.

Every weight is declared once, in `Decoder` and `Layers`, with its shape and its logical axes;
`model/sharding.py` maps those to mesh axes. The arithmetic is functions over the plain tree of arrays
(`Params`), which the trainer, the decode loop and the converter share. Shape letters: B rows, T tokens, D
model, F MLP, N query heads, K key-value heads, H head size, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from selfemo_jax.model.adapters import block_weights, plus_low_rank
from selfemo_jax.model.attention import choose_backend, layer_plan, packed_attention
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.linear import ATTENDED, PRODUCT, gated, matmul, rms_norm, sum_of_products
from selfemo_jax.model.rope import rope_tables, rotate

Params = dict[str, Any]
"""Nested dict of arrays: ``embed [V, D]``, ``layers`` (each weight with a leading L), ``final_norm [D]``,
``head [D, V]`` if untied."""
_MATRICES = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
KEPT = {"dots": PRODUCT, "attention": ATTENDED}
"""Name of what a kind of `Compute.remat` keeps of a block beside its input."""
LOWER = "lower"
"""Where a tree for `forward` holds its frozen first blocks, stacked like ``layers``, which then holds the
rest (`model/freeze.py`)."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the arithmetic runs; hashable, so that it is part of a compiled function's identity."""

    dtype: str = "float32"
    """Activations and the weights at the moment of use; the stored weights keep their own type."""
    product: str | None = None
    """Type in which the blocks' matrix products take their inputs, summed in float32; None: ``dtype``."""
    remat: str = "none"
    """What the backward pass recomputes: ``none``, ``dots`` (all but the matrix products of weights),
    ``attention`` (all but attention itself), ``full`` (whole layers)."""
    attention: str = "auto"
    """``auto``, ``dense``, ``blocked`` or ``pallas``; see `model/attention.py`."""
    logits_float32: bool = True
    """The output head's product in float32 whatever ``dtype`` is."""


class Layers(nnx.Module):
    """The L blocks, stacked: one array per kind of weight, with the layer as its first dimension."""

    def __init__(self, config: ModelConfig, weight: Callable[..., nnx.Param]):
        c = config
        layers, d, f = c.num_layers, c.embed_dim, c.mlp_dim
        n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
        self.attn_norm = weight((layers, d), ("layers", "embed"), ones=True)
        self.q = weight((layers, d, n, h), ("layers", "embed", "heads", "head_dim"), fan_in=d)
        self.k = weight((layers, d, k, h), ("layers", "embed", "kv_heads", "head_dim"), fan_in=d)
        self.v = weight((layers, d, k, h), ("layers", "embed", "kv_heads", "head_dim"), fan_in=d)
        # The projections back into the residual stream start smaller by the number of additions, as in GPT-2.
        self.o = weight(
            (layers, n, h, d), ("layers", "heads", "head_dim", "embed"), fan_in=n * h * 2 * layers
        )
        if c.attention_bias:
            self.q_bias = weight((layers, n, h), ("layers", "heads", "head_dim"))
            self.k_bias = weight((layers, k, h), ("layers", "kv_heads", "head_dim"))
            self.v_bias = weight((layers, k, h), ("layers", "kv_heads", "head_dim"))
            self.o_bias = weight((layers, d), ("layers", "embed"))
        if c.qk_norm:
            self.q_norm = weight((layers, h), ("layers", "head_dim"), ones=True)
            self.k_norm = weight((layers, h), ("layers", "head_dim"), ones=True)
        self.mlp_norm = weight((layers, d), ("layers", "embed"), ones=True)
        self.gate = weight((layers, d, f), ("layers", "embed", "mlp"), fan_in=d)
        self.up = weight((layers, d, f), ("layers", "embed", "mlp"), fan_in=d)
        self.down = weight((layers, f, d), ("layers", "mlp", "embed"), fan_in=f * 2 * layers)


class Decoder(nnx.Module):
    """A decoder-only transformer with its weights drawn from ``rngs``; call it on a packed batch for
    logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: str = "float32"):
        self.config = config

        def weight(shape, axes, *, fan_in: int | None = None, ones: bool = False) -> nnx.Param:
            if ones:
                value = jnp.ones(shape, dtype)
            elif fan_in is None:
                value = jnp.zeros(shape, dtype)
            else:
                value = (jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype)
            return nnx.Param(value, axes=axes)

        self.embed = weight(
            (config.vocab_size, config.embed_dim), ("vocab", "embed"), fan_in=config.embed_dim
        )
        self.layers = Layers(config, weight)
        self.final_norm = weight((config.embed_dim,), ("embed",), ones=True)
        if not config.tie_embeddings:
            self.head = weight(
                (config.embed_dim, config.vocab_size), ("embed", "vocab"), fan_in=config.embed_dim
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        prefix_ids: Int[Array, "B T"],
        *,
        compute: Compute | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of every position; the trainer uses `forward` and a chunked head instead."""
        compute = Compute() if compute is None else compute
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        hidden = forward(
            params, self.config, compute, tokens=tokens, positions=positions, segment_ids=segment_ids,
            prefix_ids=prefix_ids,
        )  # fmt: skip
        return logits(params, self.config, compute, hidden)


def init_params(config: ModelConfig, key: jax.Array, *, dtype: str = "float32") -> Params:
    """Random weights; under `jax.jit` with ``out_shardings`` they are born on their own devices."""
    module = Decoder(config, rngs=nnx.Rngs(params=key), dtype=dtype)
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def abstract_params(config: ModelConfig, *, dtype: str = "float32") -> tuple[Params, Params]:
    """Shapes (`jax.ShapeDtypeStruct`) and logical axes (tuples of names), in the form of `Params`; no array
    is made."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), dtype=dtype))
    state = nnx.state(module, nnx.Param)
    shapes = nnx.to_pure_dict(state)
    axes = jax.tree.map(
        lambda variable: variable.get_metadata("axes"),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return shapes, _plain_dict(axes)


def _plain_dict(tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tree
    return {name: _plain_dict(child) for name, child in tree.items()}


def layer_qkv(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    tables: tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]],
    *,
    product: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Norm, projections, head norms and rotation of one block; ``layer`` holds that block's slice of each
    weight, heads and their size as two dimensions or as one. ``product`` is that of `linear.matmul`."""
    normed = rms_norm(x, layer["attn_norm"], eps=config.norm_eps)
    projected = []
    for name in ("q", "k", "v"):
        heads = _project(layer, name, normed, product=product).reshape(*x.shape[:-1], -1, config.head_dim)
        if config.attention_bias:
            heads = heads + jnp.broadcast_to(layer[f"{name}_bias"], heads.shape)
        projected.append(heads)
    q, k, v = projected
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], eps=config.norm_eps)
        k = rms_norm(k, layer["k_norm"], eps=config.norm_eps)
    return rotate(q, tables), rotate(k, tables), v


def _project(
    layer: Params, name: str, x: Float[Array, "B T I"], *, product: str | None
) -> Float[Array, "B T O"]:
    """``x`` by one matrix of a block, and by its adapter."""
    weight = layer[name].reshape(x.shape[-1], -1)
    return plus_low_rank(matmul(x, weight, product=product), layer, name, x)


def layer_output(
    layer: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    attended: Float[Array, "B T N H"],
    *,
    product: str | None = None,
) -> Float[Array, "B T D"]:
    """Output projection of the attended heads and the gated MLP, each added to the residual stream."""
    project = functools.partial(_project, layer, product=product)
    mixed = project("o", attended.reshape(*x.shape[:-1], -1))
    if config.attention_bias:
        mixed = mixed + jnp.broadcast_to(layer["o_bias"], mixed.shape)
    x = x + mixed
    normed = rms_norm(x, layer["mlp_norm"], eps=config.norm_eps)
    return x + project("down", gated(project("gate", normed), project("up", normed)))


def embed_tokens(
    params: Params,
    compute: Compute,
    tokens: Int[Array, "B T"],
    *,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Float[Array, "B T D"]:
    """Rows of the embedding table in the compute dtype; ``sharding`` is that of the activations."""
    table = params["embed"].astype(compute.dtype)
    if sharding is not None:
        # The table is gathered over its D before the look-up: rows cannot be moved from D-split to
        # batch-split.
        spec = jax.sharding.PartitionSpec("tp", None)
        table = lax.with_sharding_constraint(table, jax.sharding.NamedSharding(sharding.mesh, spec))
    return jnp.take(table, tokens, axis=0)


def weight_dtype(name: str, compute: Compute) -> str:
    """The type in which a block's weight of that name is used."""
    return compute.product or compute.dtype if name in _MATRICES else compute.dtype


def head_dtype(compute: Compute) -> str:
    """The type in which the output head's product takes its inputs."""
    return "float32" if compute.logits_float32 else compute.product or compute.dtype


def forward(
    params: Params,
    config: ModelConfig,
    compute: Compute,
    *,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"],
    sharding: jax.sharding.NamedSharding | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm. ``sharding`` pins the activations' layout ``[B, T, D]`` between
    blocks, so that the partitioner moves weights to the rows and never rows to the weights."""
    backend = choose_backend(compute.attention, tokens.shape[1])
    pin = (lambda x: x) if sharding is None else (lambda x: lax.with_sharding_constraint(x, sharding))
    mesh = None if sharding is None else sharding.mesh
    tables = rope_tables(positions, config)
    plan = layer_plan(segment_ids, prefix_ids, backend=backend)
    product = weight_dtype("q", compute)

    def block(x, layer):
        # Matrices are cast where they are multiplied, so that the backward pass keeps no copy of them.
        layer = {name: w if name in _MATRICES else w.astype(compute.dtype) for name, w in layer.items()}
        with jax.named_scope("attention"):
            q, k, v = layer_qkv(layer, config, x, tables, product=product)
            attended = packed_attention(
                q, k, v, segment_ids, prefix_ids, backend=backend, mesh=mesh, plan=plan
            )
        with jax.named_scope("output_mlp"):
            return pin(layer_output(layer, config, x, attended, product=product)), None

    if compute.remat == "full":
        block = jax.checkpoint(block)
    elif compute.remat in KEPT:
        kept = jax.checkpoint_policies.save_only_these_names(KEPT[compute.remat])
        block = jax.checkpoint(block, policy=kept)
    with jax.named_scope("embed"):
        x = pin(embed_tokens(params, compute, tokens, sharding=sharding))
    if LOWER in params:
        # No gradient enters from above, so the backward pass ends here and keeps nothing of these blocks.
        x, _ = lax.scan(block, x, _flat(params[LOWER]))
        x = lax.stop_gradient(x)
    x, _ = lax.scan(block, x, _flat(block_weights(params)))
    return rms_norm(x, params["final_norm"].astype(compute.dtype), eps=config.norm_eps)


def _flat(layers: Params) -> Params:
    """Stacked weights with heads and their size as one dimension: a matrix that a block reshapes is another
    array, which its backward pass would keep."""
    heads = {name: layers[name].reshape(*layers[name].shape[:2], -1) for name in ("q", "k", "v")}
    o = layers["o"]
    return layers | heads | {"o": o.reshape(o.shape[0], -1, o.shape[-1])}


def head_weight(params: Params, compute: Compute) -> Float[Array, "D V"]:
    """The output head ``[D, V]``, the transposed embedding where tied, in the type its product runs in."""
    weight = params["head"] if "head" in params else params["embed"].T
    return weight.astype(head_dtype(compute))


def logits(
    params: Params, config: ModelConfig, compute: Compute, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Float32 logits of hidden states."""
    del config
    weight = head_weight(params, compute)
    return matmul(_for_head(hidden, weight, compute), weight).astype(jnp.float32)


def _for_head(hidden: jax.Array, weight: jax.Array, compute: Compute) -> jax.Array:
    return hidden.astype(weight.dtype if compute.product is None else jnp.float32)


def column_logits(
    params: Params, compute: Compute, hidden: Float[Array, "*B D"], columns: Int[Array, " C"]
) -> Float[Array, "*B C"]:
    """Float32 logits of a few tokens alone: those columns of the output head."""
    rows = params["head"][:, columns].T if "head" in params else jnp.take(params["embed"], columns, axis=0)
    rows = rows.astype(head_dtype(compute))
    return matmul(_for_head(hidden, rows, compute), rows.T).astype(jnp.float32)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    compute: Compute,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    temperature: float,
    budget_bytes: int,
    wanted: Bool[Array, "B T"] | None = None,
    width: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy of each position under softmax(logits / temperature),
    float32.

    Where the float32 logits of all positions exceed ``budget_bytes`` the head runs over chunks of T and is
    recomputed in the backward pass, so that no ``[B, T, V]`` array exists; below it one product is faster.
    With a ``width`` the head runs on that many positions of each row only, and leaves 0 at the others: those
    that are ``wanted``, of which no row has more.
    """
    num_rows, num_tokens, _ = hidden.shape
    if width is not None and width < num_tokens:
        assert wanted is not None
        columns = jnp.argsort(~wanted, axis=1, stable=True)[:, :width]
        found = token_logprobs(
            params,
            config,
            compute,
            jnp.take_along_axis(hidden, columns[..., None], axis=1),
            jnp.take_along_axis(targets, columns, axis=1),
            temperature=temperature,
            budget_bytes=budget_bytes,
        )
        rows = jnp.arange(num_rows)[:, None]
        logprobs, entropy = (jnp.zeros(targets.shape).at[rows, columns].set(values) for values in found)
        return logprobs, entropy
    vocab = config.vocab_size

    def scores(hidden, targets):
        with jax.named_scope("lm_head"):
            # Rows and tokens as one dimension: see `sum_of_products`.
            flat = logits(params, config, compute, hidden.reshape(-1, hidden.shape[-1])) / temperature
            chosen = jnp.take_along_axis(flat, targets.reshape(-1, 1), axis=-1)[:, 0]
            highest = lax.stop_gradient(flat.max(axis=-1))
            exponentials = jnp.exp(flat - highest[:, None])
            total = exponentials.sum(axis=-1)
            log_total = highest + jnp.log(total)
            entropy = log_total - sum_of_products(exponentials, flat) / total
            return (chosen - log_total).reshape(targets.shape), entropy.reshape(targets.shape)

    num_chunks = min(num_tokens, -(-num_rows * num_tokens * vocab * 4 // max(budget_bytes, 1)))
    if num_chunks <= 1:
        return scores(hidden, targets)
    # Chunks of one size: the last one is filled up, and what fills it is cut off again.
    chunk = -(-num_tokens // num_chunks)
    num_chunks = -(-num_tokens // chunk)
    filling = num_chunks * chunk - num_tokens
    hidden = jnp.pad(hidden, ((0, 0), (0, filling), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, filling)))
    hidden = hidden.reshape(num_rows, num_chunks, chunk, -1).swapaxes(0, 1)
    targets = targets.reshape(num_rows, num_chunks, chunk).swapaxes(0, 1)
    step = jax.checkpoint(lambda _, chunked: (None, scores(*chunked)))
    _, (logprobs, entropy) = lax.scan(step, None, (hidden, targets))
    logprobs, entropy = (
        chunks.swapaxes(0, 1).reshape(num_rows, -1)[:, :num_tokens] for chunks in (logprobs, entropy)
    )
    return logprobs, entropy

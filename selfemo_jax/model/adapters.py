"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen base and, beside some of its matrices, ``a b``.

A weight W of a block acts as W + alpha / rank * a b. An adapted policy is the base's own tree with two more
entries: ``lora`` (target -> ``a [L, I, R]``, ``b [L, R, O]``; inputs and outputs flattened) is trained,
``lora_scale`` (alpha / rank) is not. `decoder.forward` takes such a tree as it is; `merge` makes a plain one
of it. Shape letters: L layers, I inputs, O outputs, R rank.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.hf_table import param_shapes

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
LORA, SCALE = "lora", "lora_scale"
_A, _B = "_a", "_b"
_INPUT_DIMS = {"o": 2}
"""How many dimensions of a weight are inputs, without the layer; one where nothing is said."""


def target_shapes(config: ModelConfig, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Target -> (inputs, outputs), both flattened."""
    shapes = param_shapes(config)
    found = {}
    for name in targets:
        shape = shapes[f"layers.{name}"][1:]
        cut = _INPUT_DIMS.get(name, 1)
        found[name] = (math.prod(shape[:cut]), math.prod(shape[cut:]))
    return found


def init_adapters(
    config: ModelConfig, key: jax.Array, *, rank: int, targets: Sequence[str], dtype: str = "float32"
) -> dict[str, Any]:
    """Adapters that change nothing yet: ``a`` uniform within 1 / sqrt(inputs), as PEFT draws it, ``b`` 0."""
    adapters = {}
    shapes = target_shapes(config, targets)
    for name, part in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        inputs, outputs = shapes[name]
        bound = inputs**-0.5
        a = jax.random.uniform(part, (config.num_layers, inputs, rank), minval=-bound, maxval=bound)
        adapters[name] = {"a": a.astype(dtype), "b": jnp.zeros((config.num_layers, rank, outputs), dtype)}
    return adapters


def abstract(
    config: ModelConfig, base: Mapping[str, Any], *, rank: int, targets: Sequence[str]
) -> dict[str, Any]:
    """Shapes of an adapted policy; no array is made."""
    make = functools.partial(init_adapters, config, rank=rank, targets=targets)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return adapted(base, jax.eval_shape(make, jax.random.key(0)), scale=scale)


def is_adapted(params: Mapping[str, Any]) -> bool:
    """Whether a policy's tree has adapters."""
    return LORA in params


def adapted(base: Mapping[str, Any], adapters: Mapping[str, Any], *, scale: Any) -> dict[str, Any]:
    """The base with adapters; its arrays are shared, not copied."""
    return {**base, LORA: adapters, SCALE: scale}


def base_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The policy with its adapters off: the same arrays."""
    return {name: leaf for name, leaf in params.items() if name not in (LORA, SCALE)}


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained (the adapters), and what is not."""
    return {LORA: params[LORA]}, {name: leaf for name, leaf in params.items() if name != LORA}


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Both parts as one tree, no gradient into what is frozen."""
    return {**jax.tree.map(lax.stop_gradient, dict(frozen)), **trained}


def block_weights(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The stacked weights of the blocks, each target's factors beside it, the scale inside the second."""
    layers = dict(params["layers"])
    for name, pair in params.get(LORA, {}).items():
        layers[name + _A] = pair["a"]
        layers[name + _B] = pair["b"] * params[SCALE].astype(pair["b"].dtype)
    return layers


def plus_low_rank(product: jax.Array, layer: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """``x W`` of one block with what its adapter adds, if it has one; ``x`` is ``[..., I]``."""
    if name + _A not in layer:
        return product
    return product + x @ layer[name + _A] @ layer[name + _B]


def merge(params: Mapping[str, Any], *, dtype: str | None = None) -> dict[str, Any]:
    """The plain tree of the same policy; one without adapters comes back as it is. Sums are float32, then
    ``dtype`` or the base's own type."""
    if not is_adapted(params):
        return dict(params)
    _, base = split(params)
    scale = base.pop(SCALE)
    layers = dict(base["layers"])
    for name, pair in params[LORA].items():
        weight = layers[name]
        update = scale * jnp.einsum(
            "lir,lro->lio", pair["a"], pair["b"], preferred_element_type=jnp.float32, precision="highest"
        )
        sums = weight.astype(jnp.float32) + update.reshape(weight.shape)
        layers[name] = sums.astype(dtype or weight.dtype)
    return base | {"layers": layers}


def merged(params: Mapping[str, Any]) -> dict[str, Any]:
    """`merge` compiled, each weight laid out over the devices as the base's is; a plain tree passes."""
    if not is_adapted(params):
        return dict(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base_of(params))
    return jax.jit(merge, out_shardings=shardings)(dict(params))

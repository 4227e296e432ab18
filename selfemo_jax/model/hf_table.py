"""The one table between Hugging Face tensor names and our parameter tree, read in both directions.

Each row names a tensor by its Hugging Face name (``*`` is the layer), our path, the dimensions there and the
dimensions here. Dimensions in parentheses are flattened into one. Example: ``(N H) D`` there and ``D N H``
here means split the first dimension into heads, then move the model dimension to the front. Letters: V
vocabulary, D model, F MLP, N query heads, K key-value heads, H head size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from selfemo_jax.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table."""

    hf: str
    path: str
    """Our place in the tree, joined by dots; a rule with a layer stacks them on a leading dimension L."""
    hf_dims: str
    dims: str
    only: str = ""
    """Which models have it: all (empty), or those with ``qk_norm``, ``attention_bias``, ``untied``."""

    @property
    def stacked(self) -> bool:
        """Whether there is one Hugging Face tensor per layer."""
        return "*" in self.hf


_ATTN = "model.layers.*.self_attn."
_MLP = "model.layers.*.mlp."
_TILE = 256
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TABLE: tuple[Rule, ...] = (
    Rule(hf=EMBED, path="embed", hf_dims="V D", dims="V D"),
    Rule(hf="model.layers.*.input_layernorm.weight", path="layers.attn_norm", hf_dims="D", dims="D"),
    Rule(hf=_ATTN + "q_proj.weight", path="layers.q", hf_dims="(N H) D", dims="D N H"),
    Rule(hf=_ATTN + "k_proj.weight", path="layers.k", hf_dims="(K H) D", dims="D K H"),
    Rule(hf=_ATTN + "v_proj.weight", path="layers.v", hf_dims="(K H) D", dims="D K H"),
    Rule(hf=_ATTN + "o_proj.weight", path="layers.o", hf_dims="D (N H)", dims="N H D"),
    Rule(hf=_ATTN + "q_proj.bias", path="layers.q_bias", hf_dims="(N H)", dims="N H", only="attention_bias"),
    Rule(hf=_ATTN + "k_proj.bias", path="layers.k_bias", hf_dims="(K H)", dims="K H", only="attention_bias"),
    Rule(hf=_ATTN + "v_proj.bias", path="layers.v_bias", hf_dims="(K H)", dims="K H", only="attention_bias"),
    Rule(hf=_ATTN + "o_proj.bias", path="layers.o_bias", hf_dims="D", dims="D", only="attention_bias"),
    Rule(hf=_ATTN + "q_norm.weight", path="layers.q_norm", hf_dims="H", dims="H", only="qk_norm"),
    Rule(hf=_ATTN + "k_norm.weight", path="layers.k_norm", hf_dims="H", dims="H", only="qk_norm"),
    Rule(hf="model.layers.*.post_attention_layernorm.weight", path="layers.mlp_norm", hf_dims="D", dims="D"),
    Rule(hf=_MLP + "gate_proj.weight", path="layers.gate", hf_dims="F D", dims="D F"),
    Rule(hf=_MLP + "up_proj.weight", path="layers.up", hf_dims="F D", dims="D F"),
    Rule(hf=_MLP + "down_proj.weight", path="layers.down", hf_dims="D F", dims="F D"),
    Rule(hf="model.norm.weight", path="final_norm", hf_dims="D", dims="D"),
    Rule(hf=HEAD, path="head", hf_dims="V D", dims="D V", only="untied"),
)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one Hugging Face tensor goes: its rule and its layer (None where nothing is stacked)."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]
    """Its shape as Hugging Face has it."""

    @property
    def row_dim(self) -> int:
        """Which of our dimensions holds the rows of an unstacked tensor."""
        return self.rule.dims.split().index(self.rule.hf_dims.split()[0])

    def index(self, rows: slice | None = None) -> tuple[int | slice, ...]:
        """Where the tensor lies in our array: its layer, or these rows (None for all) of an unstacked one."""
        if self.layer is not None:
            return (self.layer,)
        part = slice(0, self.shape[0]) if rows is None else rows
        return tuple(part if dim == self.row_dim else slice(None) for dim in range(len(self.shape)))


def active_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rows of the table that this model has."""
    has = {
        "": True,
        "qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
        "untied": not config.tie_embeddings,
    }
    return tuple(rule for rule in TABLE if has[rule.only])


def hf_slots(config: ModelConfig) -> dict[str, Slot]:
    """Every Hugging Face tensor that a checkpoint of this model must have, layer by layer."""
    sizes = _sizes(config)
    slots: dict[str, Slot] = {}
    rules = active_rules(config)
    for rule in (rule for rule in rules if not rule.stacked):
        slots[rule.hf] = Slot(rule=rule, layer=None, shape=_hf_shape(rule, sizes))
    for layer in range(config.num_layers):
        for rule in (rule for rule in rules if rule.stacked):
            slots[rule.hf.replace("*", str(layer))] = Slot(
                rule=rule, layer=layer, shape=_hf_shape(rule, sizes)
            )
    return slots


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> shape, with the leading L of stacked weights."""
    sizes = _sizes(config)
    lead = {True: (config.num_layers,), False: ()}
    return {r.path: lead[r.stacked] + tuple(sizes[d] for d in r.dims.split()) for r in active_rules(config)}


def from_hf_layout(array: np.ndarray, rule: Rule, config: ModelConfig) -> np.ndarray:
    """One Hugging Face tensor, or rows of an unstacked one, in our dimensions; contiguous."""
    sizes = _sizes(config)
    if array.shape != _hf_shape(rule, sizes):
        (row_name,) = _groups(rule.hf_dims)[0]
        sizes[row_name] = array.shape[0]
    turned = _transposed(array) if _is_turned(rule) else np.ascontiguousarray(array)
    return turned.reshape([sizes[name] for name in rule.dims.split()])


def to_hf_layout(array: np.ndarray, rule: Rule) -> np.ndarray:
    """The inverse of `from_hf_layout`, also for a part of the rows."""
    size = dict(zip(rule.dims.split(), array.shape, strict=True))
    shape = [int(np.prod([size[name] for name in group])) for group in _groups(rule.hf_dims)]
    if not _is_turned(rule):
        return np.ascontiguousarray(array).reshape(shape)
    return _transposed(np.ascontiguousarray(array).reshape(shape[::-1]))


def unflatten(flat: Mapping[str, object]) -> dict:
    """Dotted paths to the nested dict of the parameters."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """The nested dict of the parameters to dotted paths."""
    flat: dict = {}
    for name, child in tree.items():
        flat |= flatten(child, f"{prefix}{name}.") if isinstance(child, Mapping) else {prefix + name: child}
    return flat


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }


def _groups(dims: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", dims)]


def _is_turned(rule: Rule) -> bool:
    """Whether our order is the transpose of theirs; a rule is that or the same order."""
    groups = _groups(rule.hf_dims)
    ours = rule.dims.split()
    if ours == [name for group in groups for name in group]:
        return False
    assert ours == [name for group in reversed(groups) for name in group], rule
    return True


def _hf_shape(rule: Rule, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([sizes[name] for name in group])) for group in _groups(rule.hf_dims))


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose. Tiles that fit the cache are five times faster than numpy's own copy, and plain
    integers than a two-byte type that numpy does not know."""
    plain = matrix.view(f"u{matrix.dtype.itemsize}")
    turned = np.empty(plain.shape[::-1], plain.dtype)
    for row in range(0, plain.shape[0], _TILE):
        for column in range(0, plain.shape[1], _TILE):
            tile = plain[row : row + _TILE, column : column + _TILE]
            turned[column : column + _TILE, row : row + _TILE] = tile.T
    return turned.view(matrix.dtype)

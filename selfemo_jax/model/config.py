"""The shape of a decoder, read from a Hugging Face `config.json` in either spelling.

The Hub writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes `rope_parameters` and
`dtype`. Both are read, a contradiction between them is an error, and the source's own dictionary is kept so
that an export speaks as it did. Anything that would change the arithmetic and is not implemented (mixture of
experts, sliding attention, other rope types, quantised weights) is refused by its key: a model that loads and
answers slightly wrongly is the worst outcome.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = ("bfloat16", "float16", "float32")

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
_REQUIRED_INTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
}


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (linear interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between the two."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    """Context length, in tokens, of the pretraining before the extension."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder's arithmetic depends on; hashable, so it can be a static argument of `jax.jit`.

    Example: Qwen3-0.6B is `ModelConfig(architecture="qwen3", vocab_size=151936, embed_dim=1024, mlp_dim=3072,
    num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, tie_embeddings=True,
    max_positions=40960)`.
    """

    architecture: Literal["qwen3", "llama"]
    vocab_size: int
    """V: rows of the embedding, which may exceed the number of tokens of the tokenizer."""
    embed_dim: int
    """D, the width of the residual stream."""
    mlp_dim: int
    """F, the width inside the gated MLP."""
    num_layers: int
    num_heads: int
    """N query heads."""
    num_kv_heads: int
    """K key-value heads; divides `num_heads`."""
    head_dim: int
    """H, the size of one head; N * H need not be D."""
    rope_theta: float
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool | None = None
    """RMSNorm on each query and key head before the rotation; None is the architecture's own."""
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    tie_embeddings: bool = False
    """The output head is the embedding; there is then no `head` parameter."""
    max_positions: int
    dtype: str | None = None
    """Storage type of the source's weights, one of `DTYPES`; None where the source does not say."""
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The `config.json` this was read from, unchanged; empty for a configuration written by hand."""

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"ModelConfig: architecture {self.architecture!r} is not one of {sorted(ARCHITECTURES)}"
            )
        if self.qk_norm is None:
            object.__setattr__(self, "qk_norm", self.architecture == "qwen3")
        if self.qk_norm != (self.architecture == "qwen3"):
            raise ValueError(
                f"ModelConfig: qk_norm={self.qk_norm} does not go with architecture {self.architecture!r}"
            )
        for name in (*_REQUIRED_INTS.values(), "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, found {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim={self.head_dim} is odd; the rotation works on pairs")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"ModelConfig: dtype {self.dtype!r} is not one of {DTYPES}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed Hugging Face `config.json`; a ValueError names the key that is wrong."""
        architecture = config.get("model_type")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"config.json: model_type {architecture!r} is not supported; expected one of "
                f"{sorted(ARCHITECTURES)} (dense decoders)"
            )
        _refuse_unsupported(config)
        sizes = {ours: _integer(config, theirs) for theirs, ours in _REQUIRED_INTS.items()}
        if config.get("head_dim") is not None:
            head_dim = _integer(config, "head_dim")
        else:
            if architecture != "llama":
                raise ValueError(
                    f"config.json: head_dim is missing; {architecture} does not derive it from hidden_size"
                )
            if sizes["embed_dim"] % sizes["num_heads"]:
                raise ValueError(
                    "config.json: head_dim is missing and num_attention_heads does not divide hidden_size"
                )
            head_dim = sizes["embed_dim"] // sizes["num_heads"]
        num_kv_heads = sizes["num_heads"]
        if config.get("num_key_value_heads") is not None:
            num_kv_heads = _integer(config, "num_key_value_heads")
        theta, scaling = _read_rope(config)
        return cls(
            architecture=architecture,
            **sizes,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_number(config, "rms_norm_eps", "config.json"),
            qk_norm=architecture == "qwen3",
            attention_bias=_boolean(config, "attention_bias"),
            tie_embeddings=_boolean(config, "tie_word_embeddings"),
            dtype=_read_dtype(config),
            source=copy.deepcopy(dict(config)),
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` of this model: the source's own where it holds, else one in the Hub's spelling."""
        if self.source and ModelConfig.from_hf(self.source) == self:
            return copy.deepcopy(dict(self.source))
        written = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_act": "silu",
            **{theirs: getattr(self, ours) for theirs, ours in _REQUIRED_INTS.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(self.rope_scaling),
            "torch_dtype": self.dtype or "float32",
        }
        return written | {key: self.source[key] for key in self.source if key.endswith("_token_id")}

    @property
    def num_params(self) -> int:
        """Number of weights, a tied head counted once."""
        attention = self.embed_dim * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        if self.attention_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.embed_dim
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        tables = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.embed_dim


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key in _EXPERT_KEYS:
        if config.get(key):
            raise ValueError(
                f"config.json: {key}={config[key]!r} asks for a mixture of experts; only dense models work"
            )
    if config.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window=true; sliding attention is not implemented")
    # Qwen3 writes the size of a window it does not use; Llama has no switch, so there a size would mean use.
    if config["model_type"] == "llama" and config.get("sliding_window"):
        raise ValueError(
            f"config.json: sliding_window={config['sliding_window']!r}; sliding attention is not implemented"
        )
    other_layers = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ValueError(f"config.json: layer_types has {other_layers}; only full_attention is implemented")
    if config.get("hidden_act") not in (None, "silu"):
        raise ValueError(
            f"config.json: hidden_act {config['hidden_act']!r} is not implemented; expected 'silu'"
        )
    if config.get("mlp_bias"):
        raise ValueError("config.json: mlp_bias=true is not implemented")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"config.json: partial_rotary_factor={config['partial_rotary_factor']!r} is not implemented"
        )
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config is set; convert the unquantised weights instead")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """(theta, scaling) from whichever spelling is there; both may be there if they say the same."""
    found: list[tuple[str, Any]] = []
    thetas: list[tuple[str, float]] = []
    if config.get("rope_theta") is not None:
        thetas.append(("rope_theta", _number(config, "rope_theta", "config.json")))
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if section is None or section == {}:
            # The Hub's `rope_scaling: null` is the plain rotation; beside rope_parameters it says nothing.
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"config.json: {key} must be an object, found {section!r}")
        if section.get("rope_theta") is not None:
            thetas.append((f"{key}.rope_theta", _number(section, "rope_theta", f"config.json: {key}")))
        found.append((key, _read_rope_section(key, section)))
    if not thetas:
        raise ValueError(
            "config.json: rope_theta is missing (also looked for rope_parameters.rope_theta); it has no safe "
            "default, add the value the model was trained with"
        )
    for name, value in thetas[1:]:
        if value != thetas[0][1]:
            raise ValueError(
                f"config.json: {thetas[0][0]}={thetas[0][1]:g} contradicts {name}={value:g}; remove one"
            )
    for name, value in found[1:]:
        if value != found[0][1]:
            raise ValueError(
                f"config.json: {found[0][0]} says {found[0][1]} but {name} says {value}; remove the wrong one"
            )
    return thetas[0][1], found[0][1] if found else None


def _read_rope_section(where: str, section: Mapping[str, Any]) -> LinearScaling | Llama3Scaling | None:
    kinds = {key: section[key] for key in ("rope_type", "type") if section.get(key) is not None}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"config.json: {where}.rope_type={kinds['rope_type']!r} contradicts its type={kinds['type']!r}"
        )
    kind = next(iter(kinds.values()), "default" if where == "rope_parameters" else None)
    if kind is None:
        raise ValueError(f"config.json: {where}.rope_type is missing; expected one of {sorted(_ROPE_KEYS)}")
    if kind not in _ROPE_KEYS:
        raise ValueError(
            f"config.json: {where}.rope_type {kind!r} is not implemented; expected one of "
            f"{sorted(_ROPE_KEYS)}"
        )
    if section.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"config.json: {where}.partial_rotary_factor={section['partial_rotary_factor']!r} "
            "is not implemented"
        )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    unknown = sorted(key for key in section if key not in known and section[key] is not None)
    if unknown:
        raise ValueError(f"config.json: {where} has keys {unknown} that rope_type {kind!r} does not use")
    values = {key: _number(section, key, f"config.json: {where}") for key in _ROPE_KEYS[kind]}
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=values["factor"])
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(
            f"config.json: {where}.high_freq_factor must exceed low_freq_factor, found {dict(section)}"
        )
    return Llama3Scaling(
        factor=values["factor"],
        low_freq_factor=values["low_freq_factor"],
        high_freq_factor=values["high_freq_factor"],
        original_max_positions=int(values["original_max_position_embeddings"]),
    )


def _rope_scaling_to_hf(scaling: LinearScaling | Llama3Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    values = dataclasses.asdict(scaling)
    return {
        "rope_type": "llama3",
        "original_max_position_embeddings": values.pop("original_max_positions"),
    } | values


def _read_dtype(config: Mapping[str, Any]) -> str | None:
    found = {
        key: str(config[key]).removeprefix("torch.")
        for key in ("torch_dtype", "dtype")
        if config.get(key) is not None
    }
    if len(set(found.values())) > 1:
        raise ValueError(
            f"config.json: torch_dtype={found['torch_dtype']!r} contradicts dtype={found['dtype']!r}"
        )
    for key, value in found.items():
        if value not in DTYPES:
            raise ValueError(f"config.json: {key} {value!r} is not one of {DTYPES}")
        return value
    return None


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value


def _number(section: Mapping[str, Any], key: str, where: str) -> float:
    value = section.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, found {value!r}")
    return value

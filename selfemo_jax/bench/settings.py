"""What a benchmark runs: one flat set of fields, from YAML and flags (PyYAML comes with flax)."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from selfemo_jax.model.config import ModelConfig

PHASES = ("logprobs", "rl_update", "sft_update", "generate", "refresh", "rl_step")
"""generate is three phases measured in one run: prefill, decode, and both together as rollout."""
LAYOUTS = ("separate", "packed", "shared_prefix")
BACKENDS = ("jax", "torch", "both")
LISTS = ("phases", "layouts", "jax_attention", "micro_cuts")
SWEPT = ("groups", "prompt", "completion", "group_size", "devices")


def _qwen3(*sizes: int, tied: bool) -> ModelConfig:
    vocab, embed, mlp, layers, heads, kv_heads, head_dim = sizes
    return ModelConfig(
        architecture="qwen3", vocab_size=vocab, embed_dim=embed, mlp_dim=mlp, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rope_theta=1e6, tie_embeddings=tied,
        max_positions=40_960,
    )  # fmt: skip


MODELS = {
    "tiny": _qwen3(97, 32, 96, 2, 2, 1, 16, tied=True),
    "small": _qwen3(8192, 256, 768, 4, 8, 4, 32, tied=True),
    "qwen3_0.6b": _qwen3(151_936, 1024, 3072, 28, 16, 8, 128, tied=True),
    "qwen3_4b": _qwen3(151_936, 2560, 9728, 36, 32, 8, 128, tied=True),
    "qwen3_8b": _qwen3(151_936, 4096, 12_288, 36, 32, 8, 128, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One benchmark."""

    backend: str = "both"
    """jax, torch or both."""
    torch_python: str | None = None
    """Python of the PyTorch side's environment; null: this one."""
    trl_python: str | None = None
    """Python of an environment with TRL, for the whole step; null: the PyTorch side's."""
    tunix_python: str | None = None
    """Python of an environment with google-tunix, for the whole step; null: tunix does not take part."""
    phases: tuple[str, ...] = PHASES
    """Any of logprobs, rl_update, sft_update, generate, refresh, rl_step."""
    model: str = "small"
    """tiny, small, qwen3_0.6b, qwen3_4b, qwen3_8b: the shape of random weights."""
    dtype: str = "float32"
    """Of activations and products, the output head's too, on both sides; master weights and moments are
    float32. A run in bfloat16 has such a head with `model.logits_float32: false`."""
    remat: str = "none"
    """What the backward pass recomputes: none or full, whole layers, on both sides; dots and attention
    (`model.remat` of a run) in JAX, with none in PyTorch."""
    groups: int = 4
    """Prompts of an update or a rollout."""
    group_size: int = 8
    """G, completions of each."""
    prompt: int = 400
    """Mean prompt length; lengths lie within a tenth of it."""
    completion: int = 60
    """Mean completion length, likewise; rollouts sample exactly so many."""
    layouts: tuple[str, ...] = LAYOUTS
    """Rows of the updates: separate, packed, shared_prefix."""
    row_tokens: int = 2048
    """Length of packed rows."""
    prefix_row_tokens: int = 0
    """Length of shared-prefix rows; 0: the longest group."""
    micro_tokens: int = 0
    """Positions of a micro-batch, on both sides; 0: one group of separate rows, one row else."""
    micro_cuts: tuple[int, ...] = (1,)
    """Parts that a micro-batch of separate rows is cut into, in updates and log-probs; of several the
    fastest of each side is measured."""
    logits_budget_mib: int = 256
    """MiB of float32 logits that a side holds at once."""
    devices: int = 1
    """Devices of each side: fsdp of that size in JAX, FSDP2 in PyTorch."""
    platform: str = "auto"
    """cpu, gpu, or auto: gpu where there is one."""
    torch_compile: str = "best"
    """off, on, or best: both are tried and the faster is measured."""
    jax_attention: tuple[str, ...] = ("auto",)
    """Attention backends of the JAX side (`model.attention` of a run); of several the fastest is measured."""
    jax_flags: str = ""
    """Added to XLA_FLAGS of the JAX side."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of both sides' processes."""
    torch_env: dict[str, str] = field(default_factory=dict)
    """Added to that of the PyTorch side, as an allocator's LD_PRELOAD."""
    cores: str = ""
    """Cores both sides are pinned to, as 0,1; empty: those of this process."""
    warmup: int = 1
    """Runs of each contestant after its first, before any is timed."""
    rounds: int = 5
    """Timed runs of each contestant; all contestants run once in each round."""
    interleave: str = "auto"
    """rounds: both sides stay loaded and take turns; sittings: one side at a time, each twice; auto: rounds
    on a CPU, sittings on a GPU, whose memory two sides would share."""
    tolerance: float = 0.0
    """Largest difference of the sides' losses; 0: 1e-5 in float32, 2e-2 in bfloat16."""
    seed: int = 0
    """Of weights and tokens."""
    sweep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """groups, prompt, completion, group_size, devices: values that take the place of the setting, one
    setting at a time."""
    profile: str = ""
    """Folder for a trace of each contestant, one run after the timed ones; empty: none."""

    def __post_init__(self):
        _one_of("backend", self.backend, BACKENDS)
        _one_of("model", self.model, MODELS)
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "dots", "attention", "full"))
        _one_of("platform", self.platform, ("auto", "cpu", "gpu"))
        _one_of("torch_compile", self.torch_compile, ("off", "on", "best"))
        _one_of("interleave", self.interleave, ("auto", "rounds", "sittings"))
        attentions = ("auto", "dense", "blocked", "pallas")
        for name, known in (
            ("phases", PHASES), ("layouts", LAYOUTS), ("jax_attention", attentions), ("sweep", SWEPT)
        ):  # fmt: skip
            for value in getattr(self, name):
                _one_of(name, value, known)
        for name in ("groups", "group_size", "prompt", "completion", "row_tokens", "devices", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench: {name} is {getattr(self, name)}; expected at least 1")
        if not self.micro_cuts or min(self.micro_cuts) < 1:
            raise ValueError(f"bench: micro_cuts is {list(self.micro_cuts)}; expected numbers of at least 1")
        if self.completion < 2 or self.prompt < 2:
            raise ValueError("bench: prompt and completion need at least 2 tokens each")
        if self.rounds < 2:
            raise ValueError("bench: rounds is 1; a spread needs at least 2")
        for name, values in self.sweep.items():
            for value in values:
                try:
                    dataclasses.replace(self, sweep={}, **{name: value})
                except ValueError as error:
                    raise ValueError(f"bench: sweep of {name} over {value}: {error}") from None

    @property
    def model_config(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def loss_tolerance(self) -> float:
        return self.tolerance or (1e-5 if self.dtype == "float32" else 2e-2)


def _one_of(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"bench: {name} is {value!r}; expected any of {', '.join(known)}")


def read_settings(path: Path | None, overrides: Mapping[str, Any]) -> BenchSettings:
    """Settings of a YAML file with ``overrides`` laid over; ValueError names an unknown key."""
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot read the benchmark's settings: {error}") from None
    found |= overrides
    known = {one.name: one for one in dataclasses.fields(BenchSettings)}
    for name in found:
        if name not in known:
            raise ValueError(f"{path or 'bench'}: unknown key {name}; known: {', '.join(known)}")
    if "micro_cuts" in found:
        found["micro_cuts"] = _numbers("micro_cuts", found["micro_cuts"], example="--micro_cuts 1,2")
    for name in LISTS:
        if name in found:
            found[name] = tuple(found[name])
    found["sweep"] = {
        name: _numbers(f"sweep of {name}", values, example=f"--sweep {name}=2,4 or [2, 4]")
        for name, values in (found.get("sweep") or {}).items()
    }
    for name in ("env", "torch_env"):
        found[name] = {key: str(value) for key, value in (found.get(name) or {}).items()}
    return BenchSettings(**found)


def _numbers(name: str, values: Any, *, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in ([values] if isinstance(values, str) else values))
    except (TypeError, ValueError):
        raise ValueError(f"bench: {name} is {values}; expected whole numbers, as {example}") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field; lists take commas, ``sweep`` takes NAME=1,2,4 and may be repeated."""
    described = _docs()
    for one in dataclasses.fields(BenchSettings):
        text = described.get(one.name, "").replace("%", "%%")
        if one.name in ("env", "torch_env", "sweep"):
            parser.add_argument(f"--{one.name}", action="append", metavar="NAME=VALUE", help=text)
        else:
            whole = isinstance(one.default, int)
            kind = float if isinstance(one.default, float) else int if whole else str
            parser.add_argument(f"--{one.name}", type=kind, metavar=kind.__name__.upper(), help=text)


def flag_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(BenchSettings):
        value = getattr(args, one.name)
        if value is None:
            continue
        if one.name in ("env", "torch_env", "sweep"):
            pairs = dict(text.partition("=")[::2] for text in value)
            if one.name == "sweep":
                pairs = {name: text.split(",") for name, text in pairs.items()}
            found[one.name] = pairs
        else:
            found[one.name] = value.split(",") if one.name in LISTS else value
    return found


def _docs() -> dict[str, str]:
    """The text under each field."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(BenchSettings)).body[0].body  # pyrefly: ignore[missing-attribute]
    found = {}
    for node, text in zip(body, body[1:], strict=False):
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if is_field and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[node.target.id] = " ".join(str(text.value.value).split())
    return found

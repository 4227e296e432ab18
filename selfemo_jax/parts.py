"""What a command works with: devices, tokenizer, model shape, weights, engine, assembled from the
settings."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jax.sharding import Mesh

from selfemo_jax.accelerators import visible_gpus
from selfemo_jax.config import Config, Optim, parse_mesh
from selfemo_jax.data.codec import TextCodec, load_codec
from selfemo_jax.data.label_rows import LabelTable
from selfemo_jax.devices import prepare
from selfemo_jax.model.attention import choose_backend
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params
from selfemo_jax.model.sharding import check_tp, param_shardings
from selfemo_jax.model.weights import load_params, open_model
from selfemo_jax.rollout.engine import Engine
from selfemo_jax.rollout.jax_engine import JaxEngine
from selfemo_jax.rollout.records import ReplayEngine
from selfemo_jax.train_step import Steps, born_sharded, make_steps

VOCAB_MULTIPLE = 128
"""A random model's embedding is padded to this, so that any usual mesh divides it."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything but data and logs; the engine is made last and closed by whoever made the parts."""

    config: Config
    mesh: Mesh
    codec: TextCodec
    tokenizer_folder: Path
    model: ModelConfig
    compute: Compute
    note: str
    """Words that every score made with these weights carries; empty when there are none."""
    notices: tuple[str, ...]
    """Lines for the person who started the command."""


def bundled_tokenizer() -> Path:
    """Folder of the tokenizer that comes with the package."""
    return Path(str(resources.files("selfemo_jax") / "sample" / "tokenizer"))


def build_parts(config: Config) -> Parts:
    """Devices, tokenizer and model shape; ValueError where the model and the mesh or the tokenizer do not
    fit."""
    taken = taken_by_servers(config, visible_gpus())
    mesh, devices = prepare(parse_mesh(config.mesh), platform=config.platform, taken=taken)
    section = config.model
    notes = [config.note] if config.note else []
    if section.path is not None:
        model, checkpoint = open_model(section.path)
        tokenizer = Path(section.tokenizer or section.path)
        notes += [checkpoint.note] if checkpoint.note else []
        codec = load_codec(tokenizer)
        if codec.vocab_size > model.vocab_size:
            raise ValueError(
                f"model.tokenizer {tokenizer}: {codec.vocab_size} tokens, the model's embedding has only "
                f"{model.vocab_size} rows; name the tokenizer that the model was trained with"
            )
    else:
        tokenizer = Path(section.tokenizer) if section.tokenizer else bundled_tokenizer()
        codec = load_codec(tokenizer)
        model = _random_model(config, codec)
    check_tp(model, dict(mesh.shape))
    compute = Compute(
        dtype=section.compute_dtype,
        product=section.product_dtype,
        remat=section.remat,
        attention=section.attention,
        logits_float32=section.logits_float32,
    )
    backend = choose_backend(section.attention, config.batch.row_tokens)
    kind = "random weights" if section.path is None else f"weights of {section.path}"
    described = (
        f"{model.architecture} {model.num_params / 1e6:.2f} M parameters, {kind}; attention {backend} "
        f"over rows of {config.batch.row_tokens} tokens"
    )
    return Parts(
        config=config,
        mesh=mesh,
        codec=codec,
        tokenizer_folder=tokenizer,
        model=model,
        compute=compute,
        note="; ".join(dict.fromkeys(notes)),
        notices=(devices, described),
    )


def taken_by_servers(config: Config, gpus: Collection[str]) -> float:
    """What servers that this run starts take of the memory of the ``gpus`` that it computes on, as a share of
    each."""
    sidecar = config.rollout.sidecar
    if config.rollout.engine != "vllm" or sidecar.attach:
        return 0.0
    # Servers that name none are given the first of those that the trainer sees.
    apart = sidecar.devices and set(map(str, sidecar.devices)).isdisjoint(gpus)
    return 0.0 if apart else sidecar.memory_share


def base_weights(parts: Parts) -> Params:
    """The policy before any training, each device holding its own part: loaded, or drawn from the seed."""
    config = parts.config
    if config.model.path is None:
        return born_sharded(parts.model, parts.mesh, seed=config.seed, dtype=weights_dtype(config))
    return weights_of(parts, Path(config.model.path))


def weights_of(parts: Parts, folder: Path) -> Params:
    """The weights of a folder in the run's type and layout."""
    shardings = param_shardings(parts.model, parts.mesh)
    return load_params(folder, dtype=weights_dtype(parts.config), shardings=shardings)


def weights_dtype(config: Config) -> str:
    """The type of whole weights: with adapters that of their base, which no update changes."""
    kept = config.lora.base_dtype if config.lora.rank else None
    return kept or config.model.param_dtype


def compile_steps(parts: Parts, optim: Optim, *, labels: LabelTable | None = None) -> Steps:
    """The jitted training functions of an optimizer's settings under the run's loss, type and mesh."""
    config = parts.config
    return make_steps(
        parts.model,
        parts.compute,
        parts.mesh,
        optim=optim,
        loss=config.loss,
        temperature=config.rollout.temperature,
        logits_budget_mib=config.model.logits_budget_mib,
        freeze=config.model.freeze,
        lora=config.lora,
        labels=labels,
        compile_ahead=config.batch.compile_ahead,
    )


def make_engine(parts: Parts) -> Engine:
    """The engine in this process, whatever `rollout.engine` says of training (`serving.run_engine`); with
    `rollout.replay` the recorded rollouts answer in its place."""
    config = parts.config
    engine = JaxEngine(
        parts.model,
        parts.compute,
        parts.mesh,
        max_rows=max(config.rollout.max_rows, config.eval.batch_rows),
        share_prompts=config.output.prompt_style == "dialogue",
    )
    return ReplayEngine(engine, Path(config.rollout.replay)) if config.rollout.replay else engine


def _random_model(config: Config, codec: TextCodec) -> ModelConfig:
    shape = config.model.shape
    return ModelConfig(
        architecture="qwen3",
        vocab_size=-(-codec.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        embed_dim=shape.embed_dim,
        mlp_dim=shape.mlp_dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_theta=shape.rope_theta,
        tie_embeddings=shape.tie_embeddings,
        max_positions=config.batch.row_tokens,
    )

"""Which model a plan is for: a Hugging Face `config.json`, or a published shape by its name."""

import difflib
import json
from pathlib import Path

from selfemo_jax.config import Config
from selfemo_jax.model.config import ModelConfig

_QWEN3 = {
    # name: (D, F, L, N, K, tied), from the config.json of each model on the Hub
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False),
}


def published_shape(name: str) -> ModelConfig:
    """A Qwen3 by its name, such as qwen3-4b."""
    embed, mlp, layers, heads, kv_heads, tied = _QWEN3[name]
    return ModelConfig(
        architecture="qwen3", vocab_size=151936, embed_dim=embed, mlp_dim=mlp, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=128, rope_theta=1e6, tie_embeddings=tied,
        max_positions=40960,
    )  # fmt: skip


def planned_model(config: Config, named: str | None, *, vocab_size: int = 0) -> tuple[ModelConfig, str]:
    """The shape to plan for and where it is from: ``named`` (a file, a folder or a published name), else the
    checkpoint of the settings, else their random shape with ``vocab_size``.

    No weights are opened, so the checkpoint need not be on this machine where its folder has a published
    name. ValueError where nothing says what the shape is.
    """
    wanted = named or config.model.path
    if wanted is None:
        shape = config.model.shape
        model = ModelConfig(
            architecture="qwen3", vocab_size=vocab_size, embed_dim=shape.embed_dim, mlp_dim=shape.mlp_dim,
            num_layers=shape.num_layers, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, rope_theta=shape.rope_theta, tie_embeddings=shape.tie_embeddings,
            max_positions=config.batch.row_tokens,
        )  # fmt: skip
        return model, "model.shape"
    path = Path(wanted)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return ModelConfig.from_hf(json.loads(file.read_text())), str(file)
    name = path.name.lower()
    if name in _QWEN3:
        return published_shape(name), f"published shape {name}"
    near = difflib.get_close_matches(name, _QWEN3, n=1)
    hint = f"did you mean {near[0]}?" if near else f"published shapes: {', '.join(_QWEN3)}"
    raise ValueError(f"--model {wanted}: no config.json there, and not a published shape; {hint}")

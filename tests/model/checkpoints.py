"""Small random Hugging Face checkpoints, made by PyTorch and the safetensors library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def hf_config(kind: str, **changes):
    """A tiny configuration: qwen3 with a head size that is not hidden / heads, or llama."""
    if kind == "qwen3":
        options = {"head_dim": 16, "rope_theta": 1e4, "tie_word_embeddings": False, **SIZES, **changes}
        return Qwen3Config(**options)
    return LlamaConfig(**{"rope_theta": 1e4, "tie_word_embeddings": False, **SIZES, **changes})


def random_model(config, *, seed: int = 0):
    """A model with every weight drawn, norms and biases too, so that none of them can be lost unseen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            weight.copy_(centre + 0.2 * torch.randn_like(weight))
    return model


def save_checkpoint(folder: Path, config, *, dtype: torch.dtype, max_shard_size: str = "5GB") -> Path:
    """A checkpoint as transformers writes it, with the other files that people keep beside it."""
    random_model(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        (folder / name).write_text(json.dumps({"made for": name}))
    return folder


def read_bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Name -> type, shape and bytes of each tensor, read by the safetensors library."""
    bits = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in bits, name
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            bits[name] = (tensor.dtype, tuple(tensor.shape), raw)
    return bits


def edit_tensors(folder: Path, change) -> None:
    """Rewrite the single file of a checkpoint after ``change(tensors)``."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

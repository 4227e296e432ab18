"""Adapters on disk, in the format of Hugging Face's PEFT: a folder for `peft.PeftModel.from_pretrained`.

``adapter_config.json`` names rank, alpha and modules; ``adapter_model.safetensors`` holds two float32 tensors
for each module of each layer. A phase of a run reads its adapters back from it, bit for bit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfemo_jax.model.adapters import target_shapes
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.orbax_io import read_json
from selfemo_jax.model.safetensors_io import StoredTensor, TensorInfo, read_header, read_rows, write_header
from selfemo_jax.settings.model import Lora

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_PREFIX = "base_model.model.model.layers"


def write_adapters(folder: Path, adapters: Mapping[str, Any], lora: Lora, *, base: str | None) -> None:
    """Write the adapters of a policy; ``base`` is the name or folder of its base, if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(_MODULES[name].rpartition(".")[2] for name in adapters),
    }
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapters.items():
        a, b = (np.asarray(jax.device_get(pair[part]), np.float32) for part in ("a", "b"))
        for layer in range(len(a)):
            # PyTorch's linear layers hold outputs x inputs.
            tensors[_tensor_name(layer, name, "A")] = np.ascontiguousarray(a[layer].T)
            tensors[_tensor_name(layer, name, "B")] = np.ascontiguousarray(b[layer].T)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        write_header(file, {n: TensorInfo(dtype="F32", shape=t.shape) for n, t in tensors.items()})
        for values in tensors.values():
            file.write(values.tobytes())
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=1) + "\n")


def read_adapters(folder: Path, model: ModelConfig, lora: Lora) -> dict[str, Any]:
    """What `write_adapters` left, as numpy arrays; ValueError where it is not of this model and these
    settings."""
    settings = read_json(folder / CONFIG_NAME)
    modules = sorted(_MODULES[name].rpartition(".")[2] for name in lora.targets)
    found = (settings.get("r"), settings.get("lora_alpha"), sorted(settings.get("target_modules") or ()))
    if found != (lora.rank, lora.alpha, modules):
        raise ValueError(
            f"{folder}: adapters of rank {found[0]}, alpha {found[1]} for {', '.join(found[2])}; the "
            f"settings say lora.rank {lora.rank}, lora.alpha {lora.alpha}, {', '.join(modules)}"
        )
    stored, problems = read_header(folder / WEIGHTS_NAME)
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    adapters = {}
    for name, (inputs, outputs) in target_shapes(model, lora.targets).items():
        a = [
            _read(stored, folder, layer, name, "A", (lora.rank, inputs)) for layer in range(model.num_layers)
        ]
        b = [
            _read(stored, folder, layer, name, "B", (outputs, lora.rank)) for layer in range(model.num_layers)
        ]
        adapters[name] = {"a": np.stack(a), "b": np.stack(b)}
    return adapters


def _tensor_name(layer: int, target: str, part: str) -> str:
    return f"{_PREFIX}.{layer}.{_MODULES[target]}.lora_{part}.weight"


def _read(
    stored: Mapping[str, StoredTensor],
    folder: Path,
    layer: int,
    target: str,
    part: str,
    shape: tuple[int, int],
) -> np.ndarray:
    name = _tensor_name(layer, target, part)
    info = stored[name].info if name in stored else None
    if info is None or info.shape != shape or info.dtype != "F32":
        has = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
        raise ValueError(f"{folder}: {name}: found {has}, expected F32 {list(shape)}")
    return np.ascontiguousarray(read_rows(stored[name]).T)

"""A tiny Qwen3 as a Hugging Face folder, and versions of its weights as the trainer publishes them.

Written here from the format alone, with numpy, tensorstore and safetensors: both sides are held to it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from safetensors.numpy import save_file

import selfemo_jax

TOKENIZER = Path(selfemo_jax.__file__).parent / "sample" / "tokenizer"
SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 128, "vocab": 2000}

Arrays = dict[str, np.ndarray]


def hf_config(*, tied: bool = True, shape: Mapping[str, int] = SHAPE, **changes: Any) -> dict[str, Any]:
    """A Qwen3 configuration as Hugging Face writes it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 2,
    } | changes


def random_weights(seed: int, *, tied: bool = True, shape: Mapping[str, int] = SHAPE) -> Arrays:
    """Our parameters, layers stacked. A large embedding keeps the next token far from uniform: weights near
    their usual initial scale give nearly the same tokens whatever the seed, and hide a stale layer."""
    rng = np.random.default_rng(seed)
    num, dim, mlp, size = shape["layers"], shape["hidden"], shape["mlp"], shape["head_dim"]
    heads, kv = shape["heads"], shape["kv_heads"]

    def normal(*dims: int, std: float) -> np.ndarray:
        return (rng.standard_normal(dims, dtype=np.float32) * std).astype(np.float32)

    def norm(*dims: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(dims)).astype(np.float32)

    std = dim**-0.5
    arrays = {
        "embed": normal(shape["vocab"], dim, std=0.5),
        "layers.attn_norm": norm(num, dim),
        "layers.q": normal(num, dim, heads, size, std=std),
        "layers.k": normal(num, dim, kv, size, std=std),
        "layers.v": normal(num, dim, kv, size, std=2 * std),
        "layers.o": normal(num, heads, size, dim, std=2 * std),
        "layers.q_norm": norm(num, size),
        "layers.k_norm": norm(num, size),
        "layers.mlp_norm": norm(num, dim),
        "layers.gate": normal(num, dim, mlp, std=std),
        "layers.up": normal(num, dim, mlp, std=2 * std),
        "layers.down": normal(num, mlp, dim, std=2 * std),
        "final_norm": norm(dim),
    }
    return arrays if tied else arrays | {"head": normal(dim, shape["vocab"], std=0.5)}


_LAYER = {
    "input_layernorm.weight": ("layers.attn_norm", None),
    "self_attn.q_proj.weight": ("layers.q", [1, 2, 0]),
    "self_attn.k_proj.weight": ("layers.k", [1, 2, 0]),
    "self_attn.v_proj.weight": ("layers.v", [1, 2, 0]),
    "self_attn.o_proj.weight": ("layers.o", [2, 0, 1]),
    "self_attn.q_norm.weight": ("layers.q_norm", None),
    "self_attn.k_norm.weight": ("layers.k_norm", None),
    "post_attention_layernorm.weight": ("layers.mlp_norm", None),
    "mlp.gate_proj.weight": ("layers.gate", [1, 0]),
    "mlp.up_proj.weight": ("layers.up", [1, 0]),
    "mlp.down_proj.weight": ("layers.down", [1, 0]),
}


def table(arrays: Arrays) -> dict[str, tuple[str, int | None, list[int] | None]]:
    """Hugging Face name -> (array, layer, transpose)."""
    rows: dict[str, tuple[str, int | None, list[int] | None]] = {
        "model.embed_tokens.weight": ("embed", None, None)
    }
    for layer in range(arrays["layers.q"].shape[0]):
        for name, (array, transpose) in _LAYER.items():
            rows[f"model.layers.{layer}.{name}"] = (array, layer, transpose)
    rows["model.norm.weight"] = ("final_norm", None, None)
    if "head" in arrays:
        rows["lm_head.weight"] = ("head", None, [1, 0])
    return rows


def hf_tensors(arrays: Arrays) -> dict[str, np.ndarray]:
    """The tensors as Hugging Face has them."""
    tensors = {}
    for name, (array, layer, transpose) in table(arrays).items():
        values = arrays[array] if layer is None else arrays[array][layer]
        values = values if transpose is None else values.transpose(transpose)
        if values.ndim == 3:
            values = values.reshape((-1, values.shape[2]) if name.endswith(_OUT) else (values.shape[0], -1))
        tensors[name] = np.ascontiguousarray(values)
    return tensors


_OUT = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def write_model_folder(folder: Path, config: Mapping[str, Any], arrays: Arrays | None) -> Path:
    """What a server starts on; without arrays there are no weights in it."""
    folder.mkdir(parents=True)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    if arrays is not None:
        save_file(hf_tensors(arrays), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(
    root: Path,
    version: int,
    arrays: Arrays,
    config: Mapping[str, Any],
    *,
    driver: str = "zarr3",
    ocdbt: bool = True,
    safetensors: bool = False,
) -> Path:
    """A committed version; `safetensors` writes those too."""
    folder = root / str(version)
    params = folder / "params"
    params.mkdir(parents=True)
    for path, values in arrays.items():
        stacked = path.startswith("layers.")
        write_array(params, path, values, stacked=stacked, driver=driver, ocdbt=ocdbt)
    tensors = hf_tensors(arrays)
    if safetensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = table(arrays)
    manifest = {
        "format": "selfemo_jax.weights/1",
        "version": version,
        "source_step": version,
        "dtype": "float32",
        "zarr_driver": driver,
        "architecture": config["architectures"][0],
        "config_digest": hashlib.sha256(
            json.dumps(dict(config), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest(),
        "digest": "sha256",
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "digest": digest(path.read_bytes())}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "tensors": {
            name: {
                "array": rows[name][0],
                "index": rows[name][1],
                "transpose": rows[name][2],
                "shape": list(values.shape),
                "dtype": "float32",
                "digest": digest(values),
            }
            for name, values in tensors.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_array(
    params: Path, path: str, values: np.ndarray, *, stacked: bool, driver: str, ocdbt: bool
) -> None:
    """One array in chunks of one layer."""
    kvstore = (
        {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{path}/"}
        if ocdbt
        else {"driver": "file", "path": f"{params / path}/"}
    )
    chunk = [1, *values.shape[1:]] if stacked else list(values.shape)
    metadata = (
        {
            "shape": values.shape,
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        }
        if driver == "zarr3"
        else {"shape": values.shape, "dtype": "<f4", "chunks": chunk, "compressor": None}
    )
    spec = {"driver": driver, "kvstore": kvstore, "metadata": metadata, "create": True}
    ts.open(spec).result().write(values).result()


def change_manifest(folder: Path, change: Any) -> None:
    """Rewrite the manifest by `change`, a function of the parsed one."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def largest_file(folder: Path) -> Path:
    """The data file with most of the bytes."""
    return max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

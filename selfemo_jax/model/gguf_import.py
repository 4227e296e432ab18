"""Read a GGUF file (the format of llama.cpp) into a converted folder: weights, configuration and tokenizer.

Weights are dequantised to float32 exactly as the file says; they stay a quantised copy of the model, and the
certificate says so, so that every score made from them can. Needs the `gguf` library and, for the tokenizer,
`tokenizers`; both are imported only here.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.hf_convert import TensorSource, write_converted
from selfemo_jax.model.safetensors_io import TensorInfo

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "blk.*.attn_q.weight": "model.layers.*.self_attn.q_proj.weight",
    "blk.*.attn_k.weight": "model.layers.*.self_attn.k_proj.weight",
    "blk.*.attn_v.weight": "model.layers.*.self_attn.v_proj.weight",
    "blk.*.attn_output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blk.*.attn_q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "blk.*.attn_k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "blk.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blk.*.ffn_gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blk.*.ffn_up.weight": "model.layers.*.mlp.up_proj.weight",
    "blk.*.ffn_down.weight": "model.layers.*.mlp.down_proj.weight",
}
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def from_gguf(file: str | os.PathLike, dst: str | os.PathLike) -> dict[str, Any]:
    """Convert a GGUF file (or the one that an installed package of that name holds); the certificate."""
    path = find_gguf(file)
    reader = _reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = ModelConfig.from_hf(hf_config(fields, tied="output.weight" not in tensors))
    note = quantisation_note(sorted({tensor.tensor_type.name for tensor in reader.tensors}), path.name)
    about: dict[str, Any] = {"source": {"kind": "gguf", "name": path.name}}
    if note:
        about["note"] = note
    return write_converted(
        _source(tensors, config),
        config,
        dst,
        carry=lambda part: _write_texts(fields, config, part),
        about=about,
    )


def find_gguf(file: str | os.PathLike) -> Path:
    """The file itself, or the single ``*.gguf`` inside the installed package of that name."""
    path = Path(file)
    if path.is_file():
        return path
    spec = importlib.util.find_spec(str(file)) if str(file).isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(f for place in places for f in Path(place).glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"{file}: no such file, and no installed package of that name with one *.gguf in it")
    return found[0]


def quantisation_note(types: list[str], name: str) -> str | None:
    """What scores made from these weights must say; None for a file of whole numbers of 16 or 32 bits."""
    bits = [int(re.search(r"\d+", kind)[0]) for kind in types]
    if min(bits, default=32) >= 16:
        return None
    return f"{min(bits)}-bit quantised copy ({', '.join(types)} in {name}); not the published weights"


def hf_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The Hub's `config.json` for a file's metadata; ValueError names the key that is not supported."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"general.architecture {kind!r} is not supported; expected 'llama' or 'qwen3'")

    def need(key: str) -> Any:
        if f"{kind}.{key}" not in fields:
            raise ValueError(f"{kind}.{key} is missing from the file's metadata")
        return fields[f"{kind}.{key}"]

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = fields.get(f"{kind}.attention.key_length", width // heads)
    if fields.get(f"{kind}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{kind}.rope.dimension_count differs from the head size {head_dim}; not supported")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{kind}.rope.scaling.type {scaling!r} is not supported; expected none or linear")
    config = {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen3ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(need("rope.freq_base")),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _decimal(need("rope.scaling.factor"))}
    return config | _token_ids(fields)


def build_tokenizer(fields: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(`tokenizers.Tokenizer`, contents of `tokenizer_config.json`) from metadata; byte-level BPE only."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model {model!r} is not supported; expected 'gpt2' (byte-level BPE)")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    regexes = {"qwen2": _QWEN2_SPLIT, "llama-bpe": _LLAMA3_SPLIT}
    if cut in ("gpt-2", "default"):
        splitter = byte_level
    elif cut == "smollm":
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif cut in regexes:
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(regexes[cut]), "isolated"), plain_bytes]
        )
    else:
        raise ValueError(
            f"tokenizer.ggml.pre {cut!r} is not supported; expected smollm, gpt-2, qwen2, llama-bpe"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    # llama3 looks a piece up whole before it merges; the others only merge.
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=cut == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = fields["tokenizer.ggml.token_type"]
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
    }
    for name, key in _SPECIAL.items():
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            about[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in fields:
        about["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, about


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("reading GGUF needs the gguf library: pip install gguf") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a GGUF file, or cut short: {error}") from error


def _source(tensors: Mapping[str, Any], config: ModelConfig) -> TensorSource:
    from gguf import dequantize

    infos, places, problems = {}, {}, []
    for name, tensor in tensors.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        pattern = name.replace(layer[0], "blk.*.") if layer else name
        if pattern not in _TENSORS:
            problems.append(f"{name}: unknown tensor of type {tensor.tensor_type.name}")
            continue
        hf_name = _TENSORS[pattern].replace("*", layer[1] if layer else "*")
        # GGUF lists dimensions from the fastest; numpy and Hugging Face from the slowest.
        infos[hf_name] = TensorInfo(dtype="F32", shape=tuple(int(n) for n in reversed(tensor.shape)))
        places[hf_name] = tensor

    def read(name: str, rows: slice | None) -> np.ndarray:
        tensor = places[name]
        data = tensor.data if rows is None else tensor.data[rows]
        values = np.asarray(dequantize(data, tensor.tensor_type), np.float32)
        if config.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            assert rows is None, "heads are turned whole"
            values = undo_rotation_order(values, head_dim=config.head_dim)
        return values

    return TensorSource(infos=infos, read=read, problems=problems)


def undo_rotation_order(weight: np.ndarray, *, head_dim: int) -> np.ndarray:
    """Rows of q or k ``[N H, D]`` from llama.cpp's order (pairs side by side) to Hugging Face's (halves)."""
    paired = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


def _write_texts(fields: Mapping[str, Any], config: ModelConfig, part: Path) -> None:
    tokenizer, about = build_tokenizer(fields)
    tokenizer.save(str(part / "tokenizer.json"))
    texts = {
        "config.json": config.to_hf(),
        "generation_config.json": _token_ids(fields),
        "tokenizer_config.json": about,
    }
    for name, value in texts.items():
        (part / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _token_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    found = {name: fields.get(f"tokenizer.ggml.{_SPECIAL[name]}_token_id") for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": value for name, value in found.items() if value is not None}


def _decimal(value: float) -> float:
    """The short decimal that the file's float32 stands for: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))

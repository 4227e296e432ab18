"""Which piece of each tensor a tensor-parallel worker holds, as vLLM cuts Qwen3 and Llama models."""

from collections.abc import Mapping
from typing import Any

from .arrays import Part

_VOCAB_PADDING = 64
_ROWS = ("q_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")


def worker_parts(
    shapes: Mapping[str, tuple[int, ...]], config: Any, *, rank: int, num_ranks: int
) -> dict[str, Part]:
    """Tensor name -> the piece of worker `rank`; tensors that every worker holds whole are left out.

    `config` is the Hugging Face config. Key-value heads are repeated where there are fewer than workers.
    """
    if num_ranks == 1:
        return {}
    parts = {}
    for name, shape in shapes.items():
        module = name.split(".")[-2]
        bias = name.endswith(".bias")
        if module in _ROWS:
            parts[name] = _even(0, shape[0], rank, num_ranks)
        elif module in ("k_proj", "v_proj"):
            parts[name] = _key_value(shape[0], config.num_key_value_heads, rank, num_ranks)
        elif module in _COLUMNS and not bias:
            parts[name] = _even(1, shape[1], rank, num_ranks)
        elif module in ("embed_tokens", "lm_head"):
            padded = -(-shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING
            piece = _even(0, padded, rank, num_ranks)
            parts[name] = Part(dim=0, start=min(piece.start, shape[0]), stop=min(piece.stop, shape[0]))
    return parts


def _even(dim: int, length: int, rank: int, num_ranks: int) -> Part:
    step = length // num_ranks
    return Part(dim=dim, start=rank * step, stop=(rank + 1) * step)


def _key_value(length: int, num_heads: int, rank: int, num_ranks: int) -> Part:
    if num_heads >= num_ranks:
        return _even(0, length, rank, num_ranks)
    return _even(0, length, rank // (num_ranks // num_heads), num_heads)

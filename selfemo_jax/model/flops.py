"""What a phase has to compute and read, from shapes alone; MFU; and the counts of others beside ours.

The count (docs/flops.md): matrix products only, 2 per multiply and add; attention over the pairs that the
rule lets through (causal, inside a segment and its prefix, with the model's own head size); the output head
where logits are asked for; no embedding look-up, norms, softmax or optimizer. A backward pass is twice the
forward pass; what an implementation computes again, or computes on padding, is its own affair and not
counted. Shape letters: B rows, T tokens, V vocabulary, D model, F MLP, N query heads, K key-value heads, H
head size, L layers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfemo_jax.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What goes through the model; works of segments, rows and micro-batches add up."""

    num_tokens: int = 0
    """Positions that pass the blocks, padding left out."""
    num_pairs: int = 0
    """(query, key) pairs that attention lets through, of one head of one layer."""
    num_head: int = 0
    """Positions whose logits are needed."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            num_tokens=self.num_tokens + other.num_tokens,
            num_pairs=self.num_pairs + other.num_pairs,
            num_head=self.num_head + other.num_head,
        )


def sequence_work(length: int, *, num_head: int | None = None) -> Work:
    """A causal sequence of ``length`` tokens, logits at the last ``num_head`` of them (None: all)."""
    num_pairs = length * (length + 1) // 2
    return Work(num_tokens=length, num_pairs=num_pairs, num_head=length if num_head is None else num_head)


def separate_work(prompt: int, completions: Sequence[int]) -> Work:
    """A prompt with each of its completions as a sequence of its own, logits of the completions alone.

    The last token of a completion is predicted and never read, so a sequence has prompt + completion - 1
    positions. The same holds for sampling the completions without sharing the prompt.
    """
    return sum((sequence_work(prompt + length - 1, num_head=length) for length in completions), Work())


def group_work(prompt: int, completions: Sequence[int]) -> Work:
    """The same with the prompt computed once: its last token is repeated at the head of each completion."""
    trunk = prompt - 1
    work = sequence_work(trunk, num_head=0)
    for length in completions:
        num_pairs = length * trunk + length * (length + 1) // 2
        work += Work(num_tokens=length, num_pairs=num_pairs, num_head=length)
    return work


def rows_work(
    segment_ids: np.ndarray, prefix_ids: np.ndarray, *, num_head: int, pad_segment: int = 0
) -> Work:
    """Packed rows ``[B, T]``, counted by the attention rule itself: i sees j iff j <= i and segment[j] is
    the segment or the prefix of i. Positions of ``pad_segment`` are padding."""
    num_tokens = num_pairs = 0
    for segments, prefixes in zip(segment_ids, prefix_ids, strict=True):
        seen: dict[int, int] = {}
        for segment, prefix in zip(segments.tolist(), prefixes.tolist(), strict=True):
            if segment == pad_segment:
                continue
            seen[segment] = seen.get(segment, 0) + 1
            num_tokens += 1
            num_pairs += seen[segment] + (seen.get(prefix, 0) if prefix != segment else 0)
    return Work(num_tokens=num_tokens, num_pairs=num_pairs, num_head=num_head)


def block_weights(config: ModelConfig) -> int:
    """Weights of all blocks that stand in matrix products."""
    attention = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.embed_dim * config.mlp_dim)


def matmul_weights(config: ModelConfig) -> int:
    """Weights of the blocks and of the output head: Nm, what a token is multiplied with."""
    return block_weights(config) + config.vocab_size * config.embed_dim


def forward_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of a forward pass."""
    blocks = 2.0 * block_weights(config) * work.num_tokens
    # Scores and the weighted sum of values: 2 H each for every pair of every head.
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * work.num_pairs
    return blocks + attention + 2.0 * config.vocab_size * config.embed_dim * work.num_head


def train_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of a forward and a backward pass over all weights."""
    return 3.0 * forward_flops(config, work)


def mfu(flops: float, seconds: float, *, peak: float, num_devices: int = 1) -> float:
    """Share of the devices' peak FLOP/s that was needed for ``flops`` in ``seconds``."""
    return flops / (seconds * peak * num_devices)


def decode_bytes(
    config: ModelConfig, *, prompts: Sequence[int], group_size: int, sampled: float, itemsize: int
) -> float:
    """Bytes that one decode step must read when rows have ``sampled`` tokens behind them on average: every
    weight once, each prompt's keys and values once for its whole group, and those of each row's own
    completion."""
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    positions = sum(prompts) + len(prompts) * group_size * sampled
    return itemsize * (matmul_weights(config) + cached * positions)


@dataclass(frozen=True, kw_only=True)
class Device:
    """The published peak of one accelerator, dense bfloat16."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""


DEVICES = {
    "H200 NVL": Device(flops=835e12, bandwidth=4.8e12),
    "H200": Device(flops=989e12, bandwidth=4.8e12),
    "H100 PCIe": Device(flops=756e12, bandwidth=2.0e12),
    "H100 NVL": Device(flops=835e12, bandwidth=3.9e12),
    "H100": Device(flops=989e12, bandwidth=3.35e12),
    "A100": Device(flops=312e12, bandwidth=2.0e12),
    "L40S": Device(flops=362e12, bandwidth=0.864e12),
    "L4": Device(flops=121e12, bandwidth=0.3e12),
}
"""By whole words of the name that a driver gives, the first that fits; the vendor's data sheets, without
sparsity."""


def known_device(kind: str) -> Device | None:
    """The peak of a device by its driver's name (``NVIDIA H200``); None where it is not in the table."""
    found = (device for name, device in DEVICES.items() if re.search(rf"\b{name}\b", kind))
    return next(found, None)


def _exact(config: ModelConfig, tokens: int) -> float:
    return train_flops(config, sequence_work(tokens)) / tokens


def _wide_attention(config: ModelConfig, tokens: int) -> float:
    """Every query sees every key: twice the causal count."""
    return 12.0 * config.num_layers * config.num_heads * config.head_dim * tokens


def _megatron(config: ModelConfig, tokens: int, *, passes: int) -> float:
    # One pass over a block of the paper is 24 D^2 + 4 D T: multi-head attention, an MLP of 4 D.
    width = config.embed_dim
    blocks = passes * config.num_layers * (24.0 * width**2 + 4.0 * width * tokens)
    return blocks + 6.0 * width * config.vocab_size


CONVENTIONS: dict[str, Callable[[ModelConfig, int], float]] = {
    "exact": _exact,
    "6ND": lambda c, t: 6.0 * c.num_params,
    "6ND, no embeddings": lambda c, t: 6.0 * block_weights(c),
    "PaLM": lambda c, t: 6.0 * c.num_params + _wide_attention(c, t),
    "Megatron": lambda c, t: _megatron(c, t, passes=3),
    "Megatron, recomputing": lambda c, t: _megatron(c, t, passes=4),
    "verl": lambda c, t: 6.0 * (matmul_weights(c) + c.vocab_size * c.embed_dim) + _wide_attention(c, t) / 2,
    "MaxText": lambda c, t: 6.0 * matmul_weights(c) + _wide_attention(c, t) / 2,
    "prime-rl": lambda c, t: 6.0 * matmul_weights(c) + 12.0 * c.num_layers * c.embed_dim * t,
    "tunix": lambda c, t: 6.0 * c.num_params / t,
}
"""Name -> training FLOPs per token of a sequence of T tokens, as each source counts them; docs/flops.md
names the sources and what each leaves out."""


def convert_mfu(
    value: float, config: ModelConfig, *, tokens: int, source: str, target: str = "exact"
) -> float:
    """An MFU (or FLOP/s) reported by one convention for sequences of ``tokens``, in another's."""
    for name in (source, target):
        if name not in CONVENTIONS:
            raise ValueError(f"convert_mfu: unknown convention {name!r}; expected one of {list(CONVENTIONS)}")
    return value * CONVENTIONS[target](config, tokens) / CONVENTIONS[source](config, tokens)

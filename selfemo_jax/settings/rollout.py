"""Settings of sampling."""

from dataclasses import dataclass
from typing import Literal

from selfemo_jax.settings.numbers import Count, Natural, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling of completions for training."""

    engine: Literal["jax", "vllm"] = "jax"
    """The sampler in this process, or a vLLM sidecar."""
    temperature: Positive = 1.0
    """Of the softmax, for sampling and for the trainer's log-probs alike."""
    max_tokens: Count = 256
    """Longest completion."""
    top_k: Natural = 0
    """Must stay 0 (off): truncated sampling breaks the recorded log-probs."""
    top_p: float = 1.0
    """Must stay 1 (off), for the same reason."""
    max_rows: Count = 128
    """Completions decoded at once."""
    overlap: Natural = 0
    """Steps the sampler may run ahead of the trainer."""
    replay: str | None = None
    """Run folder whose recorded rollouts are used instead of sampling."""
    keep: str = "all"
    """Rollout files kept: all, last N or every N."""
    max_lost: Share = 0.05
    """Share of a step's groups that may be lost before the run stops."""

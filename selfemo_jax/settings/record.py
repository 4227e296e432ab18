"""Settings of scoring, checkpoints and logs."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.numbers import Count, Natural, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Greedy scoring during and after training."""

    every: Natural = 10
    """Steps between dev scores; 0: only at the end of a phase."""
    max_items: Count = 500
    """Dev inputs per score during training, fixed by the seed."""
    selfemo: bool = False
    """Score the held-out synthetic inputs (`flywheel.heldout`) too, as many at most, in the phases after a
    harvest: `dev/selfemo/...`. Their gold was declared by the policy; no checkpoint is chosen by them."""
    persona: Literal["none", "given"] = "none"
    """Leave persona and theme out at evaluation, or give them where the data has them or experts made them of
    each history; the theme of a whole dialogue, which tells what is said later, is never given."""
    batch_rows: Count = 128
    """Prompts decoded at once."""
    final_splits: list[Literal["dev", "test"]] = field(default_factory=lambda: ["dev", "test"])
    """Splits scored whole when training ends."""
    temperature: Positive = 1.0
    """Of the answers that `evaluate --samples` draws."""
    top_p: Share = 1.0
    """Their nucleus; 1: all tokens."""
    top_k: Natural = 0
    """Their likeliest tokens; 0: all. An endpoint is asked for them by the field `top_k`, which vLLM takes
    and OpenAI does not."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the answer holds it already, in greedy and drawn answers,
    as OpenAI and vLLM do: against a small model's loops. 0: off."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """States written for resuming."""

    every: Count = 50
    """Steps between states."""
    keep: Count = 2
    """Newest states kept; the best by dev score is kept apart."""
    weights_every: Natural = 0
    """Steps of a phase between policies that stay in its folder (``steps/STEP``) beside the one that it
    leaves, to be evaluated or for ``study entropy``; 0: none. Each takes the space of the weights."""
    asynchronous: bool = True
    """Write while training goes on."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go beside metrics.jsonl."""

    sinks: list[str] = field(default_factory=list)
    """Any of tensorboard, wandb, mlflow."""
    profile_steps: str | None = None
    """Global steps recorded by the JAX profiler into the run's folder profile, as FIRST or FIRST:LAST (also
    --profile_steps)."""

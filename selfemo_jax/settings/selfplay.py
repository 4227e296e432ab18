"""Settings of the cold start and of self-play."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.model import Optim
from selfemo_jax.settings.numbers import Count, Natural, Positive, Share


def _sft_optim() -> Optim:
    return Optim(lr=1e-5, b2=0.95, schedule="cosine", warmup=0.1)


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """Supervised steps that teach the answer format before any reward; its optim serves every SFT phase."""

    source: Literal["human", "none"] = "human"
    """human: targets made from gold labels and the real next turn; none: no cold start."""
    num: Count | None = None
    """Inputs used; null: all that can be made."""
    epochs: Positive = 2.0
    """Passes over those inputs."""
    batch_size: Count = 64
    """Examples per optimizer step."""
    optim: Optim = field(default_factory=_sft_optim)
    """Learning rate and schedule of SFT."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """How the harvest is used in the next iteration."""

    method: Literal["grpo", "sft", "sft_then_grpo"] = "grpo"
    """The next RL phase alone, SFT on the best rollouts, or SFT and then RL."""
    init: Literal["base", "cold", "current"] = "base"
    """Weights it starts from: the base model's, the cold start's, or the last phase's."""


@dataclass(frozen=True, kw_only=True)
class Flywheel:
    """Self-play: accepted best rollouts become new labelled inputs."""

    iterations: Natural = 1
    """Rounds of RL, play and harvest before the final RL phase; 0: no self-play."""
    max_inputs: Count | None = None
    """Inputs that self-play answers per iteration, chosen by the seed; null: all."""
    n_syn: Count = 8000
    """Synthetic inputs kept per iteration at most."""
    tau: Share = 0.5
    """Least r1 of an accepted rollout."""
    max_depth: Count = 3
    """Generated turns a dialogue may carry."""
    max_share: Share = 0.5
    """Share of synthetic inputs in the RL buffer at most."""
    heldout: Share = 0.05
    """Share of synthetic inputs, by root dialogue, kept out of training for evaluation."""
    retrain: Retrain = field(default_factory=Retrain)
    """What the next iteration starts from."""

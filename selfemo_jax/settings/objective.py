"""Settings of the objective: reward, advantages, loss, sizes of a step."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from selfemo_jax.settings.numbers import Bounds, Count, Finite, NotNegative, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Reward:
    """r1 against the gold label, r2 against the group's core emotions, and how they add up."""

    preset: Literal["paper", "robust", "convex"] = "paper"
    """paper: r1 + (t/T) r2, any listed weight counts as present; robust: lambda_max 0.5, presence 0.05;
    convex: (1 - lambda) r1 + lambda r2."""
    lambda_max: NotNegative | None = None
    """Weight of r2 at the phase's last step; null: the preset's."""
    presence: Share | None = None
    """Share of an answer's weight a label needs to count as named; null: the preset's."""
    combine: Literal["additive", "convex"] | None = None
    """r1 + lambda r2, or their weighted mean; null: the preset's."""
    lambda_schedule: Literal["linear", "constant"] = "linear"
    """lambda_max t/T, or lambda_max from the first step."""
    top_k: Count = 3
    """Size of the core emotion set."""
    consensus: Literal["count", "mass", "off"] = "count"
    """r2 counts the core labels an answer names, adds their weights, or is not used."""
    core: Literal["mean", "raw_mean", "count"] = "mean"
    """How a group's core is found: by mean normalised weight, mean weight as written, or how many name it."""
    divide: Literal["core", "top_k"] = "core"
    """Consensus count divides by the labels that the core has, or always by top_k."""
    fail_value: Finite = 0.0
    """Reward of an answer outside the grammar."""
    function: str | None = None
    """A reward of your own in place of r1, as package.module:function."""
    primary: Literal["wiou", "accuracy", "similarity"] = "wiou"
    """r1: weighted intersection over union; 1 for the right top label; similarity of the weights under
    `similarity`. Scores always report the first."""
    smoothing: NotNegative = 0.0
    """Weight spread over the labels of the list on both sides before wiou; 0: none."""
    similarity: dict[str, float] = field(default_factory=dict)
    """Label pair as one/other -> how alike they are, 0 to 1; what is not named is 0. For primary
    similarity."""


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How rewards become advantages inside a group."""

    kind: Literal["std", "mean", "leave_one_out"] = "std"
    """GRPO (mean removed, over the standard deviation), Dr. GRPO (mean removed), RLOO."""
    scale: Literal["reward", "r1", "parts"] = "reward"
    """Whose deviation normalises: the total's, r1's alone, or each part by its own."""
    eps: Positive = 1e-6
    """Added to the deviation."""
    class_power: Share = 0.0
    """A prompt counts as the frequency of its gold label in the training inputs to the power of minus this,
    1 in the mean: 0, the paper's, all prompts alike; 1 all labels of a set alike."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The clipped policy objective with a KL term to the phase's frozen reference."""

    clip_low: Annotated[float, Bounds("above 0 and at most 1", low=0, high=1, open_low=True)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_dual: Annotated[float, Bounds("above 1, or null", low=1, open_low=True)] | None = 3.0
    """For negative advantages the loss is at most this times -advantage; null: no bound."""
    aggregation: Literal[
        "token-mean",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "micro-token-mean",
    ] = "token-mean"
    """How token losses of a mini-batch become one number; micro-token-mean averages the means of
    micro-batches, as verl's older worker does, and so depends on batch.micro_rows."""
    norm_constant: Positive | None = None
    """Divisor of seq-mean-token-sum-norm; null: rollout.max_tokens."""
    kl_coef: NotNegative = 1e-3
    """Weight of the KL term; 0 keeps no reference policy."""
    kl_kind: Literal["k1", "k2", "k3", "k1+", "k2+", "k3+"] = "k3"
    """KL estimator (k3 is verl's low_var_kl); + takes the gradient of k2 with the value of the named one."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    importance: Literal["off", "token", "sequence"] = "off"
    """Truncated importance weights of trainer over sampler log-probs."""
    importance_cap: Positive = 2.0
    """Where those weights are truncated."""
    importance_band: Positive | None = None
    """Sequences whose geometric mean of trainer over sampler probabilities is outside 1 / (1 + band) to
    1 + band are left out of the surrogate, as 0.01 for 1 %; null: none are."""


@dataclass(frozen=True, kw_only=True)
class RL:
    """Sizes of a GRPO phase; prompts, not sequences, are counted."""

    prompts_per_step: Count = 64
    """P, prompts sampled per step."""
    mini_prompts: Count = 32
    """Prompts per optimizer update; divides prompts_per_step."""
    group_size: Count = 8
    """G, rollouts per prompt."""
    epochs: Positive = 3.0
    """Passes over the phase's buffer."""
    steps: Count | None = None
    """Steps of each RL phase in place of epochs; null: from epochs."""
    updates_per_batch: Count = 1
    """Passes over one step's rollouts (PPO epochs)."""
    layout: Literal["shared_prefix", "packed", "separate"] = "shared_prefix"
    """A row holds a prompt once with its completions, or several whole sequences, or one."""

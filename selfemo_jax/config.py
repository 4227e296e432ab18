"""The settings of a run: one tree of frozen dataclasses.

`config_io.load_config` fills it from YAML and the command line; `config_check.validate` looks at what the
fields say together. Nothing here touches a file or a device.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal


@dataclass(frozen=True)
class Bounds:
    """The values a number may take; part of its annotation."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the value is finite and inside; NaN never is."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __repr__(self) -> str:
        return self.words


Count = Annotated[int, Bounds("1 or more", low=1)]
Natural = Annotated[int, Bounds("0 or more", low=0)]
Finite = Annotated[float, Bounds("a finite number")]
NotNegative = Annotated[float, Bounds("0 or more", low=0)]
Positive = Annotated[float, Bounds("above 0", low=0, open_low=True)]
Share = Annotated[float, Bounds("from 0 to 1", low=0, high=1)]
Decay = Annotated[float, Bounds("from 0 to below 1", low=0, high=1, open_high=True)]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The decoder that is made when no checkpoint is named; the vocabulary comes from the tokenizer."""

    num_layers: Count = 4
    """Decoder blocks."""
    embed_dim: Count = 128
    """D, width of the residual stream."""
    mlp_dim: Count = 384
    """F, width inside the gated MLP."""
    num_heads: Count = 4
    """N, query heads; a multiple of num_kv_heads."""
    num_kv_heads: Count = 2
    """K, key-value heads."""
    head_dim: Count = 32
    """H, size of a head; even."""
    rope_theta: Positive = 1e4
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which policy, and in which numbers it computes."""

    path: str | None = None
    """Hugging Face folder or converted folder; null: random weights of `shape`."""
    tokenizer: str | None = None
    """Tokenizer folder; null: the model folder's own, else the bundled one."""
    shape: Shape = field(default_factory=Shape)
    """Sizes of a random policy; unused when `path` is set."""
    thinking: bool = False
    """Let the policy reason before its answer, as Qwen3 does by default."""
    param_dtype: DType = "float32"
    """Type of the master weights and moments."""
    compute_dtype: DType = "float32"
    """Type of activations and matrix products; softmax and log-probs are float32 whatever this says."""
    logits_float32: bool = True
    """Accumulate the output head's product in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    attention: Literal["auto", "dense", "blocked"] = "auto"
    """Attention backend; auto takes blocked for long rows."""
    logits_budget_mib: Count = 256
    """MiB of logits one device may hold at once; above it the head runs in chunks that are recomputed."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How often each data set is drawn."""

    kind: Literal["proportional", "temperature", "weights"] = "proportional"
    """By size, by size**(1/temperature), or by `weights`."""
    temperature: Positive = 1.0
    """1 is proportional; larger is flatter. Only for kind temperature."""
    weights: dict[str, float] = field(default_factory=dict)
    """Data set name -> relative weight. Only for kind weights."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which dialogues become training inputs."""

    root: str | None = None
    """Folder that holds the data sets' folders; null: the environment's SELFEMO_DATA."""
    sets: list[str] = field(default_factory=lambda: ["sample"])
    """sample (all three bundled sets), meld, emorynlp, iemocap, or the path of a folder of your own."""
    rule: Literal["context_and_responder", "any_responder", "all"] = "context_and_responder"
    """Which utterances are training inputs: with a context and a real next speaker, any speaker, all."""
    decontaminate: bool = False
    """Drop training dialogues that share scenes with any evaluation split."""
    speaker_style: Literal["name", "index"] = "name"
    """Write speakers by name or as Speaker 1, Speaker 2."""
    mixture: Mixture = field(default_factory=Mixture)
    """How often each data set is drawn."""
    max_prompt: Count = 512
    """Tokens; the oldest turns of a longer prompt are dropped."""
    max_items: Count | None = None
    """Training inputs used, chosen by the seed; null: all."""
    persona: bool = True
    """Tell the responder's persona where one is known."""
    shuffle_gold: bool = False
    """Control arm: permute the gold labels among the training inputs."""
    num_workers: Natural = 0
    """Reader processes; 0 reads in the training process."""
    dev_split: str = "dev"
    """Split that selects checkpoints."""


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """What the policy is asked to write."""

    max_labels: Count = 3
    """Emotions an answer may list."""
    prompt_style: Literal["full", "brief"] = "full"
    """Complete rules with an example, for pretrained models, or a short form for small ones."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (arXiv:1711.05101)."""

    lr: NotNegative = 1e-6
    """Peak learning rate."""
    b1: Decay = 0.9
    """Decay of the first moment."""
    b2: Decay = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, of every parameter."""
    clip_norm: Positive = 1.0
    """Global norm at which gradients are clipped."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: hold, or decay to zero at the phase's end."""
    warmup: Share = 0.0
    """Share of the phase's steps that rises linearly from zero."""


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
    fail_value: Finite = 0.0
    """Reward of an answer outside the grammar."""
    function: str | None = None
    """A reward of your own in place of r1, as package.module:function."""
    primary: Literal["wiou", "accuracy"] = "wiou"
    """r1: weighted intersection over union, or 1 for the right top label."""


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How rewards become advantages inside a group."""

    kind: Literal["std", "mean", "leave_one_out"] = "std"
    """GRPO (mean removed, over the standard deviation), Dr. GRPO (mean removed), RLOO."""
    scale: Literal["reward", "r1", "parts"] = "reward"
    """Whose deviation normalises: the total's, r1's alone, or each part by its own."""
    eps: Positive = 1e-6
    """Added to the deviation."""


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
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How token losses of a mini-batch become one number."""
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of a training micro-batch."""

    row_tokens: Count = 1024
    """T, length of a row."""
    micro_rows: Count = 8
    """B, rows of a micro-batch over the whole mesh; a multiple of the data axes."""


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


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Greedy scoring during and after training."""

    every: Natural = 10
    """Steps between dev scores; 0: only at the end of a phase."""
    max_items: Count = 500
    """Dev inputs per score during training, fixed by the seed."""
    persona: Literal["none", "given"] = "none"
    """Leave the persona out at evaluation, or give it where the data has one."""
    batch_rows: Count = 128
    """Prompts decoded at once."""
    final_splits: list[str] = field(default_factory=lambda: ["dev", "test"])
    """Splits scored whole when training ends."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """States written for resuming."""

    every: Count = 50
    """Steps between states."""
    keep: Count = 2
    """Newest states kept; the best by dev score is kept apart."""
    asynchronous: bool = True
    """Write while training goes on."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go beside metrics.jsonl."""

    sinks: list[str] = field(default_factory=list)
    """Any of tensorboard, wandb, mlflow."""
    profile_steps: str | None = None
    """Global steps recorded by the JAX profiler, as FIRST or FIRST-LAST."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    run_dir: str | None = None
    """Folder of everything the run writes; null: runs/<name of the config file>."""
    seed: Natural = 0
    """Every random draw comes from it."""
    mesh: str = "1"
    """Devices: 8 means fsdp=8; or name the axes, as fsdp=4,tp=2."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to run; auto takes what JAX finds first."""
    time_limit: Positive | None = None
    """Minutes after which training stops cleanly and is scored; null: none."""
    note: str = ""
    """Words stamped on every score."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    output: OutputSection = field(default_factory=OutputSection)
    cold_start: ColdStart = field(default_factory=ColdStart)
    reward: Reward = field(default_factory=Reward)
    advantages: Advantages = field(default_factory=Advantages)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    rl: RL = field(default_factory=RL)
    batch: Batch = field(default_factory=Batch)
    rollout: Rollout = field(default_factory=Rollout)
    flywheel: Flywheel = field(default_factory=Flywheel)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)


MESH_AXES = ("data", "fsdp", "tp")


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes of a mesh in the order (data, fsdp, tp): `"8"` is fsdp 8; `"fsdp=4,tp=2"` names its axes.

    ValueError for another axis, an axis named twice or a size that is not a positive whole number.
    """
    hint = "write a number of devices (8) or axes (fsdp=4,tp=2)"
    text = text.strip()
    if re.fullmatch(r"[1-9][0-9]*", text):
        text = f"fsdp={text}"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*=\s*([1-9][0-9]*)\s*", part)
        if match is None:
            raise ValueError(f"mesh {text!r}: cannot read {part!r}; {hint}")
        axis, size = match.groups()
        if axis not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; the axes are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh {text!r}: axis {axis} is given twice; {hint}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def num_devices(mesh: str) -> int:
    """Devices a mesh text asks for."""
    return math.prod(parse_mesh(mesh).values())

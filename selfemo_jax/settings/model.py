"""Settings of the policy, its optimizer and its rows."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.numbers import Count, Decay, DType, Natural, NotNegative, Positive, Share


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
class Freeze:
    """Weights that training leaves as they are: no gradient, no optimizer state."""

    embeddings: bool = False
    """The embedding table, and with it the output head where the two are tied."""
    layers: Natural = 0
    """The first blocks, this many."""


Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv:2106.09685): the base stays frozen, without gradients or moments."""

    rank: Natural = 0
    """Inner size of the adapters; 0: none, every weight is trained."""
    alpha: Positive = 32.0
    """Adapters act times alpha / rank."""
    targets: list[Target] = field(default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"])
    """Which matrices of each block have one."""
    base_dtype: DType | None = None
    """Type in which the frozen base is kept; null: model.param_dtype. bfloat16 halves the largest part."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which policy, and in which numbers it computes."""

    path: str | None = None
    """Hugging Face folder or converted folder; null: random weights of `shape`."""
    tokenizer: str | None = None
    """Tokenizer folder; null: the model folder's own, else the bundled one."""
    shape: Shape = field(default_factory=Shape)
    """Sizes of a random policy; unused when `path` is set."""
    freeze: Freeze = field(default_factory=Freeze)
    """What every phase of training leaves as it is."""
    thinking: bool = False
    """Let the policy reason before its answer, as Qwen3 does by default."""
    param_dtype: DType = "float32"
    """Type of the master weights and moments."""
    compute_dtype: DType = "float32"
    """Type of activations and matrix products; softmax and log-probs are float32 whatever this says."""
    product_dtype: DType | None = None
    """Type in which the blocks' matrix products take their inputs, summed in float32; null: compute_dtype.
    bfloat16 beside a float32 compute_dtype is several times faster on a CPU with AMX."""
    logits_float32: bool = True
    """Take the output head's product of float32 inputs (TF32 on a GPU); false: of the type of the blocks'."""
    remat: Literal["none", "dots", "attention", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, all but attention, or whole
    blocks."""
    attention: Literal["auto", "dense", "blocked", "pallas"] = "auto"
    """Attention backend; auto takes blocked for long rows. pallas is a kernel for NVIDIA GPUs that skips
    what no position sees; it is an error elsewhere."""
    logits_budget_mib: Count = 256
    """MiB of logits one device may hold at once; above it the head runs in chunks that are recomputed."""


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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of a training micro-batch."""

    row_tokens: Count = 1024
    """T, length of a row."""
    micro_rows: Count = 8
    """B, rows of a micro-batch over the whole mesh; a multiple of the data axes."""
    logprobs_at_once: Count = 1
    """Micro-batches that a pass for reference or old log-probs takes at once, which keeps nothing for a
    backward pass."""
    compile_ahead: bool = False
    """Compile the update for all widths of the output head with a phase's first batch, in place of each when
    a batch first needs it: up to five times the time of compiling, and then no step that waits for it."""
    balance: bool = False
    """Give all rows, and so all devices, alike numbers of positions that see each other. It pays where
    `model.attention` is pallas, which alone skips the others."""

"""What the formulas of the planner are given and what they give: bytes of one device, seconds of one step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step is expected to hold; lengths are assumptions until a run has shown them."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while the update runs."""

    parameters: float
    optimizer: float
    gradients: float
    """The accumulator, and the gradient of one micro-batch beside it."""
    reference: float
    batch: float
    activations: float
    """What the forward pass keeps of all blocks for the backward pass."""
    block: float
    """One block at work in the backward pass, its attention scores included."""
    logits: float
    """The output head at work; over before the backward pass reaches the blocks."""
    gathered: float
    """Weights of one block, and of the tables, whole and in the compute type; all blocks where some of them
    are frozen, as the update then has them cut in two."""
    logprobs: float
    """A pass for reference or old log-probs, its batch included: forward alone, `batch.logprobs_at_once`
    micro-batches, and no accumulator beside it."""
    engine: float
    """The sampler's copy of the weights on the same device; its cache is freed before the update."""

    @property
    def resident(self) -> float:
        """What lives through the whole step."""
        return self.parameters + self.optimizer + self.reference + self.engine + self.accumulator

    @property
    def accumulator(self) -> float:
        """The sum of the micro-batches' gradients."""
        return self.gradients / 2

    @property
    def temporaries(self) -> float:
        """What only the update of a micro-batch needs."""
        return self.accumulator + self.activations + max(self.block, self.logits) + self.gathered

    @property
    def total(self) -> float:
        """The peak."""
        update = self.accumulator + self.batch + self.temporaries
        return self.resident - self.accumulator + max(update, self.logprobs)


@dataclass(frozen=True, kw_only=True)
class SidecarCache:
    """What a vLLM server has for keys and values on one of its devices."""

    weights: float
    cache: float
    tokens: int
    """That fit into the cache of one server."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step of SELF-GRPO by part."""

    rollout_prefill: float
    rollout_decode: float
    refresh: float
    old_logprobs: float
    reference: float
    update: float
    collectives: float
    """Of the update, what its arithmetic does not hide."""
    optimizer: float

    @property
    def total(self) -> float:
        """The parts one after another."""
        return sum(vars(self).values())

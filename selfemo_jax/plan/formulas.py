"""Every formula of the planner: memory, collectives and time of a step on devices that need not be here.

All sizes are bytes on one device, all times seconds of one step. FLOPs come from `model/flops.py`. What a
compiler does beside the arithmetic (copies, fusion, scheduling) is not in them: the plan prints how far they
are from the compiled step where there is one. Shape letters: B rows, T tokens, V vocabulary, D model, F MLP,
N query heads, K key-value heads, H head size, L layers; n tokens on one device, c bytes of the compute type.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from selfemo_jax.config import Config
from selfemo_jax.model.attention import MAX_BLOCKS, MIN_BLOCK, choose_backend
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import abstract_params
from selfemo_jax.model.flops import Work, block_weights, decode_bytes, forward_flops, group_work
from selfemo_jax.model.sharding import partition_spec
from selfemo_jax.plan.devices import Efficiency, PlanDevice

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCH_BYTES = 44
"""Of a position of a `PackedBatch`: eleven arrays of four bytes."""


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
    """Weights of one block, and of the tables, whole and in the compute type."""
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
        return self.resident + self.batch + self.temporaries


def param_bytes(model: ModelConfig, axes: Mapping[str, int], *, itemsize: int) -> float:
    """Bytes of the weights that one device holds, leaf by leaf as the sharding table places them."""
    shapes, names = abstract_params(model)
    flat = _flat(shapes), _flat(names)
    total = 0.0
    for path, leaf in flat[0].items():
        spec = partition_spec(leaf.shape, flat[1][path], axes)
        ways = 1
        for entry in spec:
            for axis in (entry,) if isinstance(entry, str) else (entry or ()):
                ways *= axes[axis]
        total += int(np.prod(leaf.shape)) * itemsize / ways
    return total


def memory(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> Memory:
    """The update of one micro-batch under the settings."""
    section, batch = config.model, config.batch
    stored, c = ITEMSIZE[section.param_dtype], ITEMSIZE[section.compute_dtype]
    parameters = param_bytes(model, axes, itemsize=stored)
    trained = parameters / stored
    if config.lora.rank:
        trained = adapter_weights(model, config)
        parameters = param_bytes(
            model, axes, itemsize=ITEMSIZE[config.lora.base_dtype or section.param_dtype]
        )
        parameters += 4 * trained
    rows = batch.micro_rows / (axes["data"] * axes["fsdp"])
    # With adapters the frozen base is its own reference.
    kept = bool(config.loss.kl_coef) and not config.lora.rank
    return Memory(
        parameters=parameters,
        optimizer=8 * trained,
        gradients=2 * 4 * trained,
        reference=parameters if kept else 0.0,
        batch=BATCH_BYTES * rows * batch.row_tokens,
        activations=activation_bytes(model, config, axes, rows=rows),
        block=block_bytes(model, config, axes, rows=rows),
        logits=logits_bytes(model, config, axes, rows=rows),
        gathered=gathered_bytes(model, config, axes, c=c),
        engine=engine_weights(model, config, axes) if config.rollout.engine == "jax" else 0.0,
    )


def adapter_weights(model: ModelConfig, config: Config) -> int:
    """Weights of the low-rank adapters, whole on every device."""
    d, f, h = model.embed_dim, model.mlp_dim, model.head_dim
    sides = {
        "q": d + model.num_heads * h, "k": d + model.num_kv_heads * h, "v": d + model.num_kv_heads * h,
        "o": d + model.num_heads * h, "gate": d + f, "up": d + f, "down": d + f,
    }  # fmt: skip
    return model.num_layers * config.lora.rank * sum(sides[name] for name in config.lora.targets)


def block_width(model: ModelConfig, tp: int) -> float:
    """Values that one position of one block leaves for the backward pass when nothing is recomputed: the
    residual stream and its norms twice, heads before and after norm and rotation, the attended heads, and
    four of the MLP's width."""
    heads = 3 * model.num_heads + 5 * model.num_kv_heads
    return 4 * model.embed_dim + (heads * model.head_dim + 4 * model.mlp_dim) / tp


def activation_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """What `model.remat` lets the forward pass keep of all blocks."""
    c, tp = ITEMSIZE[config.model.compute_dtype], axes["tp"]
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    kept = {
        "none": block_width(model, tp),
        # The result of every product: q, k, v, o, gate, up, down; and the block's input.
        "dots": 3 * model.embed_dim + (heads + 2 * model.mlp_dim) / tp,
        # The attended heads, a float32 sum for each, and the block's input.
        "attention": model.embed_dim + model.num_heads * (model.head_dim + 4 / c) / tp,
        "full": float(model.embed_dim),
    }[config.model.remat]
    return model.num_layers * rows * config.batch.row_tokens * kept * c


def block_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """One block in the backward pass: what was computed again, its gradients, and the scores of one block of
    queries."""
    c, tp, tokens = ITEMSIZE[config.model.compute_dtype], axes["tp"], config.batch.row_tokens
    n = rows * tokens
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    again = 0.0 if config.model.remat == "none" else n * block_width(model, tp) * c
    gradients = n * (2 * model.embed_dim + (heads + 2 * model.mlp_dim) / tp) * c
    queries = tokens
    # The kernel keeps its scores on the chip; no GPU is needed here to plan for it.
    if config.model.attention == "pallas":
        queries = 0
    elif choose_backend(config.model.attention, tokens) == "blocked":
        queries = max(MIN_BLOCK, -(-tokens // MAX_BLOCKS))
    # Scores, weights and the gradient of one of them, float32.
    scores = 3 * 4 * rows * (model.num_heads / tp) * queries * tokens
    return again + gradients + scores


def logits_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """Logits, probabilities and gradient of one chunk of the output head, and the hidden states' gradient."""
    n = rows * config.batch.row_tokens
    whole = 4 * n * model.vocab_size
    # A chunk has the same number of columns in every row, so it can end a little below the budget.
    chunk = min(whole, config.model.logits_budget_mib * 2**20)
    return 3 * chunk / axes["tp"] + 3 * 4 * n * model.embed_dim


def gathered_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, c: int) -> float:
    """One block's weights (the next one's too, while this one computes) and both tables, with the tables'
    gradient before it is added up over the devices."""
    split = axes["fsdp"] > 1
    block = block_weights(model) / model.num_layers / axes["tp"]
    table = model.vocab_size * model.embed_dim / axes["tp"]
    head = 4 if config.model.logits_float32 else c
    stored = ITEMSIZE[config.model.param_dtype]
    copies = 0.0 if not split and c == stored else block * c * (2 if split else 1)
    tables = table * (c + head) if split or c != stored else 0.0
    gradient = 0.0 if config.lora.rank or config.model.freeze.embeddings else 4.0 * table
    return copies + tables + gradient


def engine_weights(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> float:
    """The JAX engine's copy: whole up to tp on every device, with a head of its own."""
    c = ITEMSIZE[config.model.compute_dtype]
    head = 4 if config.model.logits_float32 else c
    table = model.vocab_size * model.embed_dim
    return (c * (block_weights(model) + table) + head * table) / axes["tp"]


def cache_per_token(model: ModelConfig, *, itemsize: int) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize


def engine_cache(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> float:
    """The JAX engine's caches at their largest: prompts once a group, completions once a row."""
    rows = max(config.rollout.max_rows, config.eval.batch_rows) / (axes["data"] * axes["fsdp"])
    groups = rows / config.rl.group_size
    tokens = groups * config.data.max_prompt + rows * config.rollout.max_tokens
    return tokens * cache_per_token(model, itemsize=ITEMSIZE[config.model.compute_dtype]) / axes["tp"]


@dataclass(frozen=True, kw_only=True)
class SidecarCache:
    """What a vLLM server has for keys and values on one of its devices."""

    weights: float
    cache: float
    tokens: int
    """That fit into the cache of one server."""


def sidecar_cache(model: ModelConfig, config: Config, device: PlanDevice) -> SidecarCache:
    """A server's share of its device, less its bfloat16 weights."""
    sidecar = config.rollout.sidecar
    ways = sidecar.tensor_parallel
    weights = 2.0 * model.num_params / ways
    cache = max(0.0, device.memory * sidecar.memory_share - weights)
    tokens = int(cache * ways / cache_per_token(model, itemsize=2))
    return SidecarCache(weights=weights, cache=cache, tokens=tokens)


def collective_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device receives in the update of one micro-batch: weights gathered over fsdp for each
    pass, gradients scattered back, and activations added up over tp."""
    fsdp, tp = axes["fsdp"], axes["tp"]
    c = ITEMSIZE[config.model.compute_dtype]
    rows = config.batch.micro_rows / (axes["data"] * fsdp)
    blocks, table = block_weights(model) / tp, model.vocab_size * model.embed_dim / tp
    passes = 2 if config.model.remat == "none" else 3
    head = 4 if config.model.logits_float32 else c
    found = {"all-gather": (fsdp - 1) / fsdp * (passes * blocks * c + table * (c + 2 * head))}
    trained = 0.0 if config.lora.rank else 4.0 * (blocks + table)
    found["reduce-scatter"] = (fsdp - 1) / fsdp * trained
    if axes["data"] > 1:
        found["all-reduce over data"] = 2 * (axes["data"] - 1) / axes["data"] * trained / fsdp
    if tp > 1:
        # Two sums a block forward and two backward, once more where the block is computed again.
        sums = 2 * (passes) * model.num_layers + 2
        size = rows * config.batch.row_tokens * model.embed_dim * c
        found["all-reduce over tp"] = 2 * (tp - 1) / tp * sums * size
    return {name: value for name, value in found.items() if value}


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


def step_time(
    model: ModelConfig,
    config: Config,
    axes: Mapping[str, int],
    device: PlanDevice,
    work: Workload,
    efficiency: Efficiency,
) -> StepTime:
    """One step: P groups of G rollouts sampled, scored and learned from."""
    devices = axes["data"] * axes["fsdp"] * axes["tp"]
    groups, size = config.rl.prompts_per_step, config.rl.group_size
    lengths = [work.completion_tokens] * size
    one = group_work(work.prompt_tokens, lengths)
    forward = groups * forward_flops(model, one) / devices
    # Flops of the update: forward, twice that backward, and again what was not kept.
    repeated = {"full": one, "attention": replace(one, num_pairs=0)}.get(config.model.remat, Work())
    again = groups * forward_flops(model, repeated) / devices
    update = (3 * forward + again) * config.rl.updates_per_batch / (device.flops * efficiency.train)
    scored = forward / (device.flops * efficiency.forward)
    updates = groups // config.rl.mini_prompts * config.rl.updates_per_batch
    on_policy = updates == 1 and config.loss.importance == "off" and config.loss.importance_band is None
    positions = groups * (work.prompt_tokens - 1 + size * work.completion_tokens)
    micro = max(1.0, positions / (config.batch.micro_rows * config.batch.row_tokens))
    moved = sum(collective_bytes(model, config, axes).values()) * micro * config.rl.updates_per_batch
    on_wire = moved / (device.link * efficiency.link)
    weights = param_bytes(model, axes, itemsize=4)
    prefill = groups * forward_flops(model, group_work(work.prompt_tokens, [1])) / devices
    return StepTime(
        rollout_prefill=prefill / (device.flops * efficiency.forward),
        rollout_decode=_decode_time(model, config, axes, device, work, efficiency),
        refresh=refresh_time(model, config),
        old_logprobs=0.0 if on_policy else scored,
        reference=scored if config.loss.kl_coef else 0.0,
        update=update,
        collectives=max(0.0, on_wire - update),
        # Weights, both moments and the gradient read, the first three written.
        optimizer=updates * 7 * weights / (device.bandwidth * efficiency.decode),
    )


def _decode_time(model, config, axes, device, work, efficiency) -> float:
    tp = axes["tp"] if config.rollout.engine == "jax" else config.rollout.sidecar.tensor_parallel
    engines = (
        axes["data"] * axes["fsdp"] if config.rollout.engine == "jax" else config.rollout.sidecar.replicas
    )
    size = config.rl.group_size
    rows = config.rl.prompts_per_step * size / engines
    at_once = min(rows, config.rollout.max_rows / (engines if config.rollout.engine == "jax" else 1))
    rounds = max(1.0, rows / max(at_once, 1.0))
    prompts = [work.prompt_tokens] * max(1, round(at_once / size))
    read = decode_bytes(
        model, prompts=prompts, group_size=size, sampled=work.completion_tokens / 2, itemsize=2
    )
    memory_bound = read / tp / (device.bandwidth * efficiency.decode)
    one = forward_flops(model, group_work(2, [1]))
    compute_bound = at_once * one / tp / (device.flops * efficiency.forward)
    return rounds * work.completion_tokens * max(memory_bound, compute_bound)


def refresh_time(model: ModelConfig, config: Config) -> float:
    """Seconds to hand new weights to the sampler: through a disk (3 GB/s written, 6 GB/s read, guesses),
    through memory (10 GB/s each way) below /dev/shm, or a copy on the device."""
    size = 2.0 * model.num_params
    if config.rollout.engine == "jax":
        return 0.0
    if (config.rollout.sidecar.weights_root or "").startswith("/dev/shm"):
        return size / 10e9 * 2
    return size / 3e9 + size / 6e9


def largest(fits, *, low: int, high: int, multiple: int) -> int:
    """The largest multiple in ``low`` to ``high`` that fits, 0 where not even ``low`` does; ``fits`` must
    not hold again once it failed."""
    first, last = -(-low // multiple), high // multiple
    if not fits(first * multiple):
        return 0
    while first < last:
        middle = (first + last + 1) // 2
        if fits(middle * multiple):
            first = middle
        else:
            last = middle - 1
    return first * multiple


def _flat(tree, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = value
    return found

"""Every formula of the planner: memory, collectives and time of a step on devices that need not be here.

All sizes are bytes on one device, all times seconds of one step. FLOPs come from `model/flops.py`. What a
compiler does beside the arithmetic (copies, fusion, scheduling) is not in them: the plan prints how far they
are from the compiled step where there is one. Shape letters: B rows, T tokens, V vocabulary, D model, F MLP,
N query heads, K key-value heads, H head size, L layers; n tokens on one device, c bytes of the compute type.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import jax

from selfemo_jax.config import Config
from selfemo_jax.model.attention import MAX_BLOCKS, MIN_BLOCK, choose_backend
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import abstract_params
from selfemo_jax.model.flops import (
    Work,
    block_weights,
    decode_bytes,
    forward_flops,
    group_work,
    separate_work,
    sequence_work,
)
from selfemo_jax.model.freeze import split, split_spec
from selfemo_jax.model.sharding import partition_spec
from selfemo_jax.plan.devices import Efficiency, PlanDevice
from selfemo_jax.plan.figures import Memory, SidecarCache, StepTime, Workload
from selfemo_jax.settings.model import Freeze

NOTHING = Freeze()
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCH_BYTES = 44
"""Of a position of a `PackedBatch`: eleven arrays of four bytes."""


def param_bytes(
    model: ModelConfig, axes: Mapping[str, int], *, itemsize: int, freeze: Freeze = NOTHING
) -> float:
    """Bytes of the weights that one device holds, leaf by leaf as the sharding table places them; with
    ``freeze`` of those that are trained."""
    shapes, names = abstract_params(model)
    specs = jax.tree.map(lambda leaf, name: partition_spec(leaf.shape, name, axes), shapes, names)
    cut = functools.partial(split, embeddings=freeze.embeddings, layers=freeze.layers)
    trained, _ = jax.eval_shape(cut, shapes)

    def held(leaf: jax.ShapeDtypeStruct, spec: jax.sharding.PartitionSpec) -> float:
        entries = ((entry,) if isinstance(entry, str) else (entry or ()) for entry in spec)
        return leaf.size * itemsize / math.prod(axes[axis] for entry in entries for axis in entry)

    return sum(jax.tree.leaves(jax.tree.map(held, trained, split_spec(specs, embeddings=freeze.embeddings))))


def memory(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> Memory:
    """The update of one micro-batch under the settings, and the passes for log-probs before it."""
    section, batch = config.model, config.batch
    c = ITEMSIZE[section.compute_dtype]
    parameters = param_bytes(model, axes, itemsize=ITEMSIZE[section.param_dtype])
    trained = trained_weights(model, config, axes)
    if config.lora.rank:
        base = ITEMSIZE[config.lora.base_dtype or section.param_dtype]
        parameters = param_bytes(model, axes, itemsize=base) + 4 * trained
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
        logprobs=logprobs_bytes(model, config, axes, rows=rows * batch.logprobs_at_once),
        engine=engine_weights(model, config, axes) if config.rollout.engine == "jax" else 0.0,
    )


def trained_weights(model: ModelConfig, config: Config, axes: Mapping[str, int]) -> float:
    """Weights with a gradient and moments, of those that one device holds."""
    if config.lora.rank:
        return adapter_weights(model, config)
    return param_bytes(model, axes, itemsize=1, freeze=config.model.freeze)


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
    """What `model.remat` lets the forward pass keep of all blocks; nothing goes back through frozen ones."""
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
    num_layers = model.num_layers - config.model.freeze.layers
    return num_layers * rows * config.batch.row_tokens * kept * c


def block_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """One block in the backward pass: what was computed again, its gradients, and the scores of one block of
    queries."""
    c, tp, tokens = ITEMSIZE[config.model.compute_dtype], axes["tp"], config.batch.row_tokens
    n = rows * tokens
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    again = 0.0 if config.model.remat == "none" else n * block_width(model, tp) * c
    gradients = n * (2 * model.embed_dim + (heads + 2 * model.mlp_dim) / tp) * c
    # Scores, weights and the gradient of one of them, float32.
    return again + gradients + 3 * scores_bytes(model, config, axes, rows=rows)


def scores_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """Float32 scores of one block of queries."""
    tokens = queries = config.batch.row_tokens
    # The kernel keeps its scores on the chip; no GPU is needed here to plan for it.
    if config.model.attention == "pallas":
        queries = 0
    elif choose_backend(config.model.attention, tokens) == "blocked":
        queries = max(MIN_BLOCK, -(-tokens // MAX_BLOCKS))
    return 4 * rows * (model.num_heads / axes["tp"]) * queries * tokens


def logits_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """Logits, probabilities and gradient of the output head, or of a chunk, which computes them again, two of
    the three; and the hidden states' gradient."""
    n = rows * config.batch.row_tokens
    whole = 4 * n * model.vocab_size
    # A chunk has the same number of columns in every row, so it can end a little below the budget.
    budget = config.model.logits_budget_mib * 2**20
    held = 3 * whole if whole <= budget else 2 * budget
    return held / axes["tp"] + 3 * 4 * n * model.embed_dim


def logprobs_bytes(model: ModelConfig, config: Config, axes: Mapping[str, int], *, rows: float) -> float:
    """A forward pass that keeps nothing: its batch, the residual stream, one block at work, then the head."""
    c, tp = ITEMSIZE[config.model.compute_dtype], axes["tp"]
    n = rows * config.batch.row_tokens
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    stream = n * model.embed_dim * c
    attended = n * 2 * heads / tp * c + 2 * scores_bytes(model, config, axes, rows=rows)
    block = max(attended, n * 2 * model.mlp_dim / tp * c)
    chunk = min(4 * n * model.vocab_size, config.model.logits_budget_mib * 2**20)
    gathered = gathered_bytes(model, config, axes, c=c, backward=False)
    return BATCH_BYTES * n + stream + max(block, chunk / tp) + gathered


def gathered_bytes(
    model: ModelConfig, config: Config, axes: Mapping[str, int], *, c: int, backward: bool = True
) -> float:
    """One block's weights (the next one's too, while this one computes) and both tables, with the tables'
    gradient before it is added up over the devices; forward alone one table at a time. With frozen blocks
    the update's copy of all blocks, cut in two."""
    is_split = axes["fsdp"] > 1
    block = block_weights(model) / model.num_layers / axes["tp"]
    table = model.vocab_size * model.embed_dim / axes["tp"]
    head = 4 if config.model.logits_float32 else c
    stored = ITEMSIZE[config.model.param_dtype]
    copies = 0.0 if not is_split and c == stored else block * c * (2 if is_split else 1)
    tables = table * (c + head if backward else max(c, head)) if is_split or c != stored else 0.0
    back = backward and not config.lora.rank and not config.model.freeze.embeddings
    cut = stored * block_weights(model) / (axes["tp"] * axes["fsdp"]) if config.model.freeze.layers else 0.0
    return copies + tables + (4.0 * table if back else 0.0) + (cut if backward else 0.0)


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
    again = 1 if config.model.remat == "none" else 2
    head = 4 if config.model.logits_float32 else c
    share, freeze = _trained_share(model, config), config.model.freeze
    passes = 1 + share * again
    found = {"all-gather": (fsdp - 1) / fsdp * (passes * blocks * c + table * (c + 2 * head))}
    learning = share * blocks + (0.0 if freeze.embeddings else table)
    trained = 0.0 if config.lora.rank else 4.0 * learning
    found["reduce-scatter"] = (fsdp - 1) / fsdp * trained
    if axes["data"] > 1:
        found["all-reduce over data"] = 2 * (axes["data"] - 1) / axes["data"] * trained / fsdp
    if tp > 1:
        # Two sums a block forward and two backward, once more where the block is computed again.
        sums = 2 * passes * model.num_layers + 2
        size = rows * config.batch.row_tokens * model.embed_dim * c
        found["all-reduce over tp"] = 2 * (tp - 1) / tp * sums * size
    return {name: value for name, value in found.items() if value}


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
    groups = config.rl.prompts_per_step
    one = learned_work(config, work)
    seconds = functools.partial(_forward_seconds, model, config, device)
    # Forward, twice that backward, and again what was not kept; nothing goes back through frozen blocks.
    repeated = {"full": one, "attention": replace(one, num_pairs=0)}.get(config.model.remat, Work())
    share = _trained_share(model, config)
    passes = seconds(one) + 2 * seconds(one, share=share) + seconds(repeated, share=share)
    update = groups * passes * config.rl.updates_per_batch / (devices * efficiency.train)
    scored = groups * seconds(one) / (devices * efficiency.forward)
    updates = groups // config.rl.mini_prompts * config.rl.updates_per_batch
    on_policy = updates == 1 and config.loss.importance == "off" and config.loss.importance_band is None
    micro = max(1.0, groups * one.num_tokens / (config.batch.micro_rows * config.batch.row_tokens))
    moved = sum(collective_bytes(model, config, axes).values()) * micro * config.rl.updates_per_batch
    on_wire = moved / (device.link * efficiency.link)
    prefill = forward_flops(model, group_work(work.prompt_tokens, [1]))
    return StepTime(
        rollout_prefill=groups
        * prefill
        / (devices * device.flops_of(_sampled_in(config)) * efficiency.forward),
        rollout_decode=_decode_time(model, config, axes, device, work, efficiency),
        refresh=refresh_time(model, config),
        old_logprobs=0.0 if on_policy else scored,
        reference=scored if config.loss.kl_coef else 0.0,
        update=update,
        collectives=max(0.0, on_wire - update),
        # Weights, both moments and the gradient read, the first three written, float32.
        optimizer=updates
        * 28
        * trained_weights(model, config, axes)
        / (device.bandwidth * efficiency.decode),
    )


def learned_work(config: Config, work: Workload) -> Work:
    """What the update of one group computes in its layout; separate rows are as long as all rows are."""
    lengths = [work.completion_tokens] * config.rl.group_size
    if config.rl.layout == "shared_prefix":
        return group_work(work.prompt_tokens, lengths)
    if config.rl.layout == "packed":
        return separate_work(work.prompt_tokens, lengths)
    row = sequence_work(config.batch.row_tokens, num_head=work.completion_tokens)
    return sum([row] * config.rl.group_size, Work())


def _forward_seconds(
    model: ModelConfig, config: Config, device: PlanDevice, work: Work, *, share: float = 1.0
) -> float:
    """Of one device at its peak, with ``share`` of the blocks: theirs and the head's products may be of
    different types."""
    inside = config.model.product_dtype or config.model.compute_dtype
    at_head = "float32" if config.model.logits_float32 else inside
    blocks = share * forward_flops(model, replace(work, num_head=0)) / device.flops_of(inside)
    return blocks + forward_flops(model, Work(num_head=work.num_head)) / device.flops_of(at_head)


def _trained_share(model: ModelConfig, config: Config) -> float:
    """Of the blocks, those with a backward pass."""
    return 1.0 - config.model.freeze.layers / model.num_layers


def _sampled_in(config: Config) -> str:
    """The type of the sampler's weights and cache."""
    return config.model.compute_dtype if config.rollout.engine == "jax" else "bfloat16"


def _decode_time(model, config, axes, device, work, efficiency) -> float:
    tp = axes["tp"] if config.rollout.engine == "jax" else config.rollout.sidecar.tensor_parallel
    engines = (
        axes["data"] * axes["fsdp"] if config.rollout.engine == "jax" else config.rollout.sidecar.replicas
    )
    size, dtype = config.rl.group_size, _sampled_in(config)
    rows = config.rl.prompts_per_step * size / engines
    at_once = min(rows, config.rollout.max_rows / (engines if config.rollout.engine == "jax" else 1))
    rounds = max(1.0, rows / max(at_once, 1.0))
    prompts = [work.prompt_tokens] * max(1, round(at_once / size))
    read = decode_bytes(
        model, prompts=prompts, group_size=size, sampled=work.completion_tokens / 2, itemsize=ITEMSIZE[dtype]
    )
    memory_bound = read / tp / (device.bandwidth * efficiency.decode)
    one = forward_flops(model, group_work(2, [1]))
    compute_bound = at_once * one / tp / (device.flops_of(dtype) * efficiency.forward)
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

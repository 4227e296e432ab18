"""The sharded update: state, gradients of one micro-batch, optimizer step, log-probs.

A step is a sum: `Steps.rl_gradients` and `Steps.sft_gradients` add one micro-batch's gradient and metric sums
to what came before, and `Steps.apply` takes the optimizer step once. Every weight of a token was decided on
the host for the whole mini-batch (`algo.losses.token_weights`), so micro-batches, rows and devices only add.
Micro-batches have one shape: a function compiles once, or once for each width of the output head that its
rows ask for. Shape letters: B rows, T tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfemo_jax.algo.losses import largest_gap, policy_loss, rollout_gap, sft_loss
from selfemo_jax.compile_ahead import Ahead
from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import PackedBatch, is_target, micro_batches, target_width
from selfemo_jax.data.label_table import LabelTable
from selfemo_jax.model import adapters
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import (
    Compute,
    Params,
    abstract_params,
    column_logits,
    forward,
    init_params,
    token_logprobs,
)
from selfemo_jax.model.freeze import check_frozen, join, put_back, split, split_spec
from selfemo_jax.model.sharding import batch_sharding, param_shardings
from selfemo_jax.optimizer import make_optimizer
from selfemo_jax.settings.model import Freeze, Lora

Sums = dict[str, jax.Array]
"""Metric name -> ``[2]``: a sum and what it is divided by in the end, float32; by nothing where that is 0.
Where the name ends in ``_max`` it is the largest value so far in place of a sum."""


@struct.dataclass
class TrainState:
    """Everything the optimizer changes; the update donates it. Trees of its form also hold shapes or
    shardings, so the fields are not typed as arrays."""

    params: Any
    opt_state: Any
    step: Any
    """Optimizer updates taken, int32 scalar."""


@struct.dataclass
class Accumulator:
    """Gradient (`Params`) and metric sums (`Sums`) of the micro-batches so far, or what describes them."""

    gradients: Any
    sums: Any


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The compiled functions of one model on one mesh; see `make_steps`."""

    mesh: Mesh
    model: ModelConfig
    param_shardings: Params
    init_state: Callable[[Params], TrainState]
    parts: Callable[[Params], tuple[Params, Params]]
    """(trained, frozen), as the gradient functions take them: a copy of the blocks where some are frozen."""
    zeros: dict[str, Callable[[], Accumulator]]
    sft_gradients: Callable[..., Accumulator]
    rl_gradients: Callable[..., Accumulator]
    label_gradients: Callable[..., Accumulator]
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    logprobs: Callable[..., jax.Array]
    label_choices: Callable[[Params, dict[str, jax.Array]], jax.Array]
    """Index of the best label of the target's set at each position, int32 ``[B, T]``."""
    at_width: Ahead
    """Calls a function with a width, and compiles it for the others where that was asked for."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient of an update was not finite; ``state`` is that from before the update, since
    the caller's own was donated."""

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


def born_sharded(model: ModelConfig, mesh: Mesh, *, seed: int, dtype: str) -> Params:
    """Random weights, each device making only its own part. The draw does not depend on the mesh."""
    shardings = param_shardings(model, mesh)
    init = jax.jit(functools.partial(init_params, model, dtype=dtype), out_shardings=shardings)
    return init(jax.random.key(seed))


def device_batch(batch: PackedBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the mesh, rows split over the data axes; of several processes each holds the whole batch
    and gives its own devices their rows."""
    arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
    sharding = batch_sharding(mesh, ndim=2)
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    return {
        name: jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        for name, values in arrays.items()
    }


def make_steps(
    model: ModelConfig,
    compute: Compute,
    mesh: Mesh,
    *,
    optim: Optim,
    loss: Loss,
    temperature: float,
    logits_budget_mib: int,
    freeze: Freeze | None = None,
    lora: Lora | None = None,
    labels: LabelTable | None = None,
    compile_ahead: bool = False,
) -> Steps:
    """Compile-once functions of a phase. ``temperature`` is the sampler's; SFT uses 1.

    The logits budget is that of one device: its rows' float32 logits above it are computed in chunks.
    ``freeze`` names what has no gradient and no moments; ``lora`` with a rank takes policies with adapters
    (`model/adapters.py`) and trains those alone; ``labels`` are what rows of labels choose among;
    ``compile_ahead`` compiles for all widths of the output head with the first batch.
    """
    freeze = Freeze() if freeze is None else freeze
    labels = LabelTable(names=(), token_ids=(), sets=()) if labels is None else labels
    check_frozen(model, layers=freeze.layers)
    with_adapters = lora is not None and lora.rank > 0
    parted = functools.partial(split, embeddings=freeze.embeddings, layers=freeze.layers)
    joined = join
    weights = param_shardings(model, mesh)
    trained_weights = split_spec(weights, embeddings=freeze.embeddings)
    whole = NamedSharding(mesh, PartitionSpec())
    abstract_weights, _ = abstract_params(model, dtype="float32")
    if with_adapters:
        parted, joined = adapters.split, adapters.join
        abstract_weights = adapters.abstract(model, abstract_weights, rank=lora.rank, targets=lora.targets)
        trained_weights = jax.tree.map(lambda _: whole, parted(abstract_weights)[0])
    hidden_sharding = batch_sharding(mesh, ndim=3)
    num_row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    budget = logits_budget_mib * 2**20 * num_row_shards
    optimizer = make_optimizer(optim)

    def batch_hidden(params: Params, batch: dict[str, jax.Array]):
        return forward(
            params,
            model,
            compute,
            tokens=batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            prefix_ids=batch["prefix_ids"],
            sharding=hidden_sharding,
        )

    def batch_logprobs(params: Params, batch: dict[str, jax.Array], temperature: float, width: int | None):
        hidden, targets = batch_hidden(params, batch), batch["targets"]
        settings = {"temperature": temperature, "budget_bytes": budget}
        wanted = is_target(batch["token_weights"], targets)
        return token_logprobs(params, model, compute, hidden, targets, wanted=wanted, width=width, **settings)

    def sft_objective(params, batch, *, width=None):
        logprobs, entropy = batch_logprobs(params, batch, 1.0, width)
        total, sums = sft_loss(logprobs, batch["token_weights"])
        mask = batch["token_weights"] != 0
        entropy = jnp.sum(jax.lax.stop_gradient(entropy), where=mask)
        return total, _pairs({"loss": (total, jnp.zeros(()))} | sums | {"entropy": (entropy, mask.sum())})

    def label_scores(params, batch):
        """Logits of all labels, those of other sets than the target's out of reach: ``[B, T, C]``."""
        columns = jnp.array(labels.token_ids, jnp.int32)
        sets = jnp.array(labels.sets, jnp.int32)
        scores = column_logits(params, compute, batch_hidden(params, batch), columns)
        return jnp.where(sets[batch["targets"]][..., None] == sets, scores, -1e30)

    def label_objective(params, batch):
        """Rows of labels: ``targets`` are positions in the table, 0 where there is none."""
        logprobs = jax.nn.log_softmax(label_scores(params, batch), axis=-1)
        chosen = jnp.take_along_axis(logprobs, batch["targets"][..., None], axis=-1)[..., 0]
        total, sums = sft_loss(chosen, batch["token_weights"])
        mask = batch["token_weights"] != 0
        right = jnp.sum(jnp.argmax(logprobs, axis=-1) == batch["targets"], where=mask)
        return total, _pairs({"loss": (total, jnp.zeros(()))} | sums | {"accuracy": (right, mask.sum())})

    def rl_objective(params, batch, *, on_policy: bool, width=None):
        logprobs, entropy = batch_logprobs(params, batch, temperature, width)
        if loss.entropy_coef == 0:
            # The metric needs no gradient, and a product with 0 would still compute one over the vocabulary.
            entropy = jax.lax.stop_gradient(entropy)
        # With one update per batch the policy that sampled is the policy that is updated: the ratio is 1.
        old_logprobs = jax.lax.stop_gradient(logprobs) if on_policy else batch["old_logprobs"]
        total, sums = policy_loss(
            logprobs,
            old_logprobs,
            batch["ref_logprobs"],
            batch["advantages"],
            batch["token_weights"],
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            clip_dual=loss.clip_dual,
            kl_coef=loss.kl_coef,
            kl_kind=loss.kl_kind,
            entropy=entropy,
            entropy_coef=loss.entropy_coef,
            importance_weights=batch["importance_weights"],
        )
        mask = batch["token_weights"] != 0
        gaps = rollout_gap(jax.lax.stop_gradient(old_logprobs), batch["rollout_logprobs"], mask)
        largest = largest_gap(jax.lax.stop_gradient(old_logprobs), batch["rollout_logprobs"], mask)
        gaps |= {"rollout_gap/dlogp_max": (largest, jnp.zeros(()))}
        return total, _pairs({"loss": (total, jnp.zeros(()))} | sums | gaps)

    def add(objective, parts, accumulator, batch):
        trained, frozen = parts

        def whole(trained, batch):
            return objective(joined(trained, frozen), batch)

        (_, sums), gradients = jax.value_and_grad(whole, has_aux=True)(trained, batch)
        together = Accumulator(gradients=gradients, sums=sums)
        added = jax.tree.map(lambda total, more: total + more.astype(total.dtype), accumulator, together)
        largest = {
            name: jnp.maximum(accumulator.sums[name], sums[name]) for name in sums if name.endswith("_max")
        }
        return added.replace(sums=added.sums | largest)

    out = Accumulator(gradients=trained_weights, sums=whole)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out, static_argnames="width")
    def sft_gradients(parts, accumulator, batch, *, width=None):
        return add(functools.partial(sft_objective, width=width), parts, accumulator, batch)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out, static_argnames=("on_policy", "width"))
    def rl_gradients(parts, accumulator, batch, *, on_policy: bool, width=None):
        objective = functools.partial(rl_objective, on_policy=on_policy, width=width)
        return add(objective, parts, accumulator, batch)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out)
    def label_gradients(parts, accumulator, batch):
        return add(label_objective, parts, accumulator, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, accumulator: Accumulator, rate):
        norm = optax.tree.norm(accumulator.gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(accumulator.sums["loss"][0])
        trained = state.params if with_adapters else parted(state.params)[0]
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(accumulator.gradients, state.opt_state, trained)
            trained = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), trained, updates)
        params = trained if with_adapters else put_back(state.params, trained, layers=freeze.layers)
        stepped = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        return kept, {"grad_norm": norm, "finite": finite}

    def apply_to_adapters(state: TrainState, accumulator: Accumulator, rate):
        """The base is neither given away nor copied: it is also the reference policy."""
        trained, base = parted(state.params)
        stepped, checks = apply(replace(state, params=trained), accumulator, rate)
        return replace(stepped, params={**base, **stepped.params}), checks

    @functools.partial(jax.jit, out_shardings=whole, static_argnames="width")  # Every process reads all rows.
    def logprobs(params, batch, *, width=None):
        return batch_logprobs(params, batch, temperature, width)[0]

    @functools.partial(jax.jit, out_shardings=whole)  # Every process reads all rows.
    def label_choices(params, batch):
        return jnp.argmax(label_scores(params, batch), axis=-1).astype(jnp.int32)

    def init_moments(params: Params):
        return optimizer.init(parted(params)[0])

    def init_state(params: Params) -> TrainState:
        """Moments of 0 for what is trained, laid out as the weights they belong to."""
        abstract = jax.eval_shape(init_moments, params)
        shardings = _like_params(abstract, trained_weights, whole)
        opt_state = jax.jit(init_moments, out_shardings=shardings)(params)
        return TrainState(
            params=params, opt_state=opt_state, step=jax.device_put(jnp.zeros((), jnp.int32), whole)
        )

    abstract_batch = {
        field.name: jax.ShapeDtypeStruct((num_row_shards, 16), jnp.int32 if i < 5 else jnp.float32)
        for i, field in enumerate(fields(PackedBatch))
    }
    abstract_gradients, _ = jax.eval_shape(parted, abstract_weights)

    def empty(objective) -> Callable[[], Accumulator]:
        _, sums = jax.eval_shape(objective, abstract_weights, abstract_batch)
        shapes = Accumulator(gradients=abstract_gradients, sums=sums)
        return jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=out
        )

    zeros = {
        "sft": empty(sft_objective),
        "rl": empty(functools.partial(rl_objective, on_policy=True)),
    }
    if labels.names:
        zeros["labels"] = empty(label_objective)

    return Steps(
        mesh=mesh,
        model=model,
        param_shardings=weights,
        init_state=init_state,
        parts=parted,
        zeros=zeros,
        sft_gradients=sft_gradients,
        rl_gradients=rl_gradients,
        label_gradients=label_gradients,
        apply=apply_to_adapters if with_adapters else apply,
        logprobs=logprobs,
        label_choices=label_choices,
        at_width=Ahead(on=compile_ahead),
    )


def update(
    steps: Steps,
    state: TrainState,
    batch: PackedBatch,
    *,
    kind: str,
    micro_rows: int,
    rate: float,
    where: str,
    on_policy: bool = True,
) -> tuple[TrainState, dict[str, float]]:
    """One optimizer update from the micro-batches of ``batch``; ``kind`` is ``sft``, ``labels`` or ``rl``.

    Returns the new state (the old one is donated) and the metrics as weighted means. NonFiniteError names
    ``where`` (the step) and holds the state, its weights and moments untouched.
    """
    accumulator = _gradient(steps, state.params, batch, kind=kind, micro_rows=micro_rows, on_policy=on_policy)
    means = jax.tree.map(lambda pair: pair[0] / jnp.where(pair[1] > 0, pair[1], 1.0), accumulator.sums)
    state, checks = steps.apply(state, accumulator, rate)
    metrics = {name: float(value) for name, value in jax.device_get(means | checks).items()}
    if not metrics.pop("finite"):
        raise NonFiniteError(
            f"{where}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the update was not "
            "taken. Lower the learning rate, or look at the step's rollouts",
            state,
        )
    return state, metrics


def _gradient(
    steps: Steps, params: Params, batch: PackedBatch, *, kind: str, micro_rows: int, on_policy: bool
) -> Accumulator:
    accumulator, width, parts = steps.zeros[kind](), target_width(batch), steps.parts(params)
    for rows in micro_batches(batch, micro_rows=micro_rows):
        given = parts, accumulator, device_batch(rows, steps.mesh)
        if kind == "sft":
            accumulator = steps.at_width(steps.sft_gradients, *given, width=width)
        elif kind == "labels":
            accumulator = steps.label_gradients(*given)
        else:
            accumulator = steps.at_width(steps.rl_gradients, *given, width=width, on_policy=on_policy)
    return accumulator


def sequence_logprobs(
    steps: Steps, params: Params, batch: PackedBatch, *, micro_rows: int, at_once: int = 1
) -> np.ndarray:
    """Log-probability of every target under ``params``, float32 ``[B, T]`` on the host, ``at_once``
    micro-batches in a pass: nothing is kept for a backward pass here."""
    score = functools.partial(steps.at_width, steps.logprobs, params)
    settings: Any = {"width": target_width(batch), "num_rows": (micro_rows, micro_rows * at_once)}
    parts = micro_batches(batch, micro_rows=micro_rows, at_once=at_once)
    pending = [score(device_batch(part, steps.mesh), **settings) for part in parts]
    return np.concatenate(jax.device_get(pending), axis=0)


def _pairs(sums: dict[str, tuple[jax.Array, jax.Array]]) -> Sums:
    return {name: jnp.stack([jnp.float32(total), jnp.float32(num)]) for name, (total, num) in sums.items()}


def _like_params(abstract: Any, shardings: Params, whole: NamedSharding) -> Any:
    """Shardings for an optimizer state: a subtree shaped like the trained weights lies as they do, the rest
    is whole."""
    structure = jax.tree.structure(shardings)

    def is_params(node):
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda node: shardings if is_params(node) else whole, abstract, is_leaf=is_params)

"""The real step, lowered and compiled on shapes alone: what it needs by the compiler's own account.

No weights are made. On this machine's accelerators the account is that of the run itself; on simulated CPU
devices the partitioning is real and the buffers are those of the CPU backend, which keeps float32 copies of
bfloat16 products and has no reduce-scatter.
"""

import time
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfemo_jax.config import Config
from selfemo_jax.data.batching import PackedBatch
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, abstract_params
from selfemo_jax.model.sharding import batch_sharding
from selfemo_jax.plan.hlo import Collectives, collectives
from selfemo_jax.train_step import Steps, make_steps

_INTEGER_FIELDS = 5


@dataclass(frozen=True, kw_only=True)
class Program:
    """Bytes on one device of one compiled function."""

    name: str
    arguments: float
    outputs: float
    """Less what takes the place of a donated argument."""
    temporaries: float
    seconds: float
    """It took to compile."""
    flops: float
    """As XLA counts them, 0 where it does not; loops' bodies count once."""
    collectives: Collectives

    @property
    def total(self) -> float:
        """All of it at once."""
        return self.arguments + self.outputs + self.temporaries


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """The functions of an update of SELF-GRPO, and what they share."""

    backend: str
    device_kind: str
    parameters: float
    optimizer: float
    accumulator: float
    batch: float
    cut: float
    """Weights that lie whole beside the update's arguments, which has them in two parts."""
    programs: tuple[Program, ...]

    def program(self, name: str) -> Program:
        """One of them."""
        return next(program for program in self.programs if program.name == name)

    def peaks(self, *, reference: float = 0.0) -> dict[str, float]:
        """Bytes while each function runs, with what lies beside its arguments."""
        beside = {
            # The gradient function is given the weights and the accumulator, not the moments.
            "update": self.cut + self.optimizer + reference,
            "optimizer": reference,
            "logprobs": self.optimizer + reference,
        }
        return {program.name: program.total + beside[program.name] for program in self.programs}

    def peak(self, *, reference: float = 0.0, engine: float = 0.0) -> float:
        """Bytes at the worst moment."""
        return max(self.peaks(reference=reference).values()) + engine


def compile_step(model: ModelConfig, config: Config, mesh: Mesh) -> CompiledStep:
    """Compile the update, the optimizer and the log-probs under the settings for ``mesh``.

    The output head is at every position, as in the run's widest batches (`data.batching.target_width`); where
    no row has so many targets a run compiles smaller programs.
    """
    steps = planned_steps(model, config, mesh)
    params, state = abstract_state(steps, model, config)
    sizes = config.batch
    batch = abstract_batch(mesh, rows=sizes.micro_rows, tokens=sizes.row_tokens)
    wide = abstract_batch(mesh, rows=sizes.micro_rows * sizes.logprobs_at_once, tokens=sizes.row_tokens)
    empty: Any = steps.zeros["rl"]
    accumulator = _with_shardings(jax.eval_shape(empty), empty.lower().compile().output_shardings)
    cut = jax.jit(steps.parts).lower(params).compile()
    parts = _with_shardings(jax.eval_shape(steps.parts, params), cut.output_shardings)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    programs = [
        _compiled("update", steps.rl_gradients, parts, accumulator, batch, on_policy=_on_policy(config)),
        _compiled("optimizer", steps.apply, state, accumulator, rate),
    ]
    if config.loss.kl_coef or not _on_policy(config):
        programs.append(_compiled("logprobs", steps.logprobs, params, wide))
    device = mesh.devices.flat[0]
    return CompiledStep(
        backend=device.platform,
        device_kind=device.device_kind,
        parameters=local_bytes(params),
        optimizer=local_bytes(state.opt_state),
        accumulator=local_bytes(accumulator),
        batch=local_bytes(batch),
        cut=local_bytes(params["layers"]) if config.model.freeze.layers else 0.0,
        programs=tuple(programs),
    )


def planned_steps(model: ModelConfig, config: Config, mesh: Mesh) -> Steps:
    """The functions that the run would compile."""
    section = config.model
    compute = Compute(
        dtype=section.compute_dtype, product=section.product_dtype, remat=section.remat,
        attention=section.attention, logits_float32=section.logits_float32,
    )  # fmt: skip
    return make_steps(
        model, compute, mesh, optim=config.optim, loss=config.loss, temperature=config.rollout.temperature,
        logits_budget_mib=section.logits_budget_mib, freeze=section.freeze,
    )  # fmt: skip


def abstract_state(steps: Steps, model: ModelConfig, config: Config) -> tuple[Any, Any]:
    """Shapes with their shardings: of the weights, and of the whole training state."""
    shapes, _ = abstract_params(model, dtype=config.model.param_dtype)
    params = _with_shardings(shapes, steps.param_shardings)
    state = jax.eval_shape(steps.init_state, params)
    whole = NamedSharding(steps.mesh, PartitionSpec())
    places = {_path(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    def placed(path, leaf):
        # A moment lies where its weight does: its path ends in the weight's; frozen blocks have none.
        name = _path(path)
        own = next((at for at in places if name.endswith("/" + at) and places[at].ndim == leaf.ndim), None)
        return _struct(leaf, places[own].sharding if own else whole)

    return params, jax.tree.map_with_path(placed, state)


def abstract_batch(mesh: Mesh, *, rows: int, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A micro-batch's shapes on the mesh."""
    sharding = batch_sharding(mesh, ndim=2)
    types = [jnp.int32 if i < _INTEGER_FIELDS else jnp.float32 for i in range(len(fields(PackedBatch)))]
    return {
        field.name: jax.ShapeDtypeStruct((rows, tokens), dtype, sharding=sharding)
        for field, dtype in zip(fields(PackedBatch), types, strict=True)
    }


def local_bytes(tree: Any) -> float:
    """Bytes that one device holds of arrays or of shapes with shardings."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _compiled(name: str, function: Any, *args: Any, **static: Any) -> Program:
    began = time.perf_counter()
    compiled = function.lower(*args, **static).compile()
    seconds = time.perf_counter() - began
    account = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Program(
        name=name,
        arguments=account.argument_size_in_bytes,
        outputs=max(0, account.output_size_in_bytes - account.alias_size_in_bytes),
        temporaries=account.temp_size_in_bytes,
        seconds=seconds,
        flops=float(cost.get("flops", 0.0)),
        collectives=collectives(compiled.as_text()),
    )


def _on_policy(config: Config) -> bool:
    single = config.rl.prompts_per_step == config.rl.mini_prompts and config.rl.updates_per_batch == 1
    return single and config.loss.importance == "off" and config.loss.importance_band is None


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(_struct, shapes, shardings)


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

"""A plan: what the formulas say of a device, what the compiler says where it was asked, and advice."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfemo_jax.config import Config, parse_mesh
from selfemo_jax.model.attention import MIN_BLOCK
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.sharding import check_tp
from selfemo_jax.plan import formulas
from selfemo_jax.plan.compiled import CompiledStep
from selfemo_jax.plan.devices import Efficiency, PlanDevice
from selfemo_jax.plan.figures import Memory, SidecarCache, StepTime, Workload

_MOST_TOKENS = 2**20
_MOST_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest micro-batch that fits, each size searched with the other as it is set; 0: none fits."""

    row_tokens: int
    micro_rows: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is printed."""

    model: ModelConfig
    shape_from: str
    axes: Mapping[str, int]
    device: PlanDevice
    workload: Workload
    efficiency: Efficiency
    memory: Memory
    cache: float
    """Of the JAX engine while it samples, bytes; the update's temporaries are free then."""
    sidecar: SidecarCache | None
    moved: Mapping[str, float]
    time: StepTime
    budget: Budget
    compiled: CompiledStep | None
    advice: tuple[str, ...]

    @property
    def compiled_peak(self) -> float | None:
        """Bytes at the worst moment of the compiled step."""
        if self.compiled is None:
            return None
        return self.compiled.peak(reference=self.memory.reference, engine=self.memory.engine)

    @property
    def formula_error(self) -> float | None:
        """How far the formulas are from the compiled step: 0.1 is 10 % too much."""
        peak = self.compiled_peak
        return None if peak is None else self.memory.total / peak - 1

    @property
    def fits(self) -> bool:
        """By the formulas."""
        return max(self.memory.total, self.sampling) <= self.device.usable

    @property
    def sampling(self) -> float:
        """Bytes while the JAX engine samples: its weights and cache beside the state of training."""
        found = self.memory
        return found.parameters + found.optimizer + found.reference + found.engine + self.cache

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        found = asdict(replace(self, compiled=None, model=self.model))
        found["model"] = {k: v for k, v in asdict(self.model).items() if k != "source"}
        found["memory"] |= {"total": self.memory.total, "sampling": self.sampling}
        found["time"] |= {"total": self.time.total}
        found["fits"], found["formula_error"] = self.fits, self.formula_error
        found["compiled"] = None if self.compiled is None else asdict(self.compiled)
        if found["compiled"]:
            found["compiled"]["peak"] = self.compiled_peak
        return found


def make_plan(
    model: ModelConfig,
    config: Config,
    device: PlanDevice,
    *,
    shape_from: str = "",
    workload: Workload | None = None,
    efficiency: Efficiency | None = None,
    compiled: CompiledStep | None = None,
) -> Plan:
    """Figures and advice for the settings on ``device``. ``compiled`` is the step as some backend here
    compiled it. ValueError where the mesh does not divide the model."""
    axes = parse_mesh(config.mesh)
    check_tp(model, axes)
    efficiency = efficiency or Efficiency()
    if workload is None:
        workload = Workload(
            prompt_tokens=max(2, config.data.max_prompt // 2),
            completion_tokens=max(1, config.rollout.max_tokens // 2),
        )
    jax_engine = config.rollout.engine == "jax"
    plan = Plan(
        model=model,
        shape_from=shape_from,
        axes=axes,
        device=device,
        workload=workload,
        efficiency=efficiency,
        memory=formulas.memory(model, config, axes),
        cache=formulas.engine_cache(model, config, axes) if jax_engine else 0.0,
        sidecar=None if jax_engine else formulas.sidecar_cache(model, config, device),
        moved=formulas.collective_bytes(model, config, axes),
        time=formulas.step_time(model, config, axes, device, workload, efficiency),
        budget=token_budget(model, config, axes, device),
        compiled=compiled,
        advice=(),
    )
    return replace(plan, advice=tuple(advice(plan, config)))


def token_budget(model: ModelConfig, config: Config, axes: Mapping[str, int], device: PlanDevice) -> Budget:
    """By bisection over the formulas, down to one attention block and one row a device."""

    def fits(change: Callable[[int], dict[str, int]]) -> Callable[[int], bool]:
        def holds(number: int) -> bool:
            batch = replace(config.batch, **change(number))
            return formulas.memory(model, replace(config, batch=batch), axes).total <= device.usable

        return holds

    ways = axes["data"] * axes["fsdp"]
    return Budget(
        row_tokens=largest(
            fits(lambda n: {"row_tokens": n}), low=MIN_BLOCK, high=_MOST_TOKENS, multiple=MIN_BLOCK
        ),
        micro_rows=largest(
            fits(lambda n: {"micro_rows": n}), low=ways, high=max(_MOST_ROWS, ways), multiple=ways
        ),
    )


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


def advice(plan: Plan, config: Config) -> list[str]:
    """What to change, in the order in which it matters; the settings are named."""
    words: list[str] = []
    memory, time, budget = plan.memory, plan.time, plan.budget
    if not plan.fits:
        words += _too_large(plan, config)
    elif budget.micro_rows >= 2 * config.batch.micro_rows:
        words.append(
            f"there is room: batch.micro_rows may go up to {budget.micro_rows} (or batch.row_tokens to "
            f"{budget.row_tokens}); larger micro-batches gather the weights less often"
        )
    if plan.fits and config.model.remat == "full":
        lighter = replace(config, model=replace(config.model, remat="dots"))
        if formulas.memory(plan.model, lighter, plan.axes).total <= plan.device.usable:
            words.append("model.remat dots fits too and saves most of the second forward pass")
    if config.model.compute_dtype == "float32" and plan.device.name != "CPU":
        words.append("model.compute_dtype bfloat16: float32 products do not reach the peak of this device")
    if time.collectives > 0.1 * time.total:
        words.append(
            f"the link is the limit of the update ({time.collectives:.1f} s beyond its arithmetic): larger "
            "micro-batches, or data parallel groups of fewer devices (data=..,fsdp=..)"
        )
    if plan.axes["tp"] > 1 and memory.total < plan.device.usable / 2:
        words.append("tp moves activations in every block; the same devices as fsdp move less")
    rollout = time.rollout_decode + time.rollout_prefill
    if rollout > 0.5 * time.total:
        words.append(
            f"sampling is {rollout / time.total:.0%} of a step: more rows at once (rollout.max_rows), more "
            "servers (rollout.sidecar.replicas), or rollout.overlap 1"
        )
    if time.refresh > 0.08 * time.total:
        words.append(
            f"the refresh takes {time.refresh:.1f} s a step: rollout.sidecar.weights_root below /dev/shm"
        )
    if plan.sidecar and plan.sidecar.tokens < _sidecar_tokens(plan, config):
        words.append(
            f"a server's cache holds {plan.sidecar.tokens:,} tokens, its share of a step is about "
            f"{_sidecar_tokens(plan, config):,}: it will decode in several rounds"
        )
    return words or ["nothing to change"]


def _sidecar_tokens(plan: Plan, config: Config) -> int:
    rows = config.rl.prompts_per_step * config.rl.group_size / config.rollout.sidecar.replicas
    each = plan.workload.completion_tokens + plan.workload.prompt_tokens / config.rl.group_size
    return int(rows * each)


def _too_large(plan: Plan, config: Config) -> list[str]:
    short = max(plan.memory.total, plan.sampling) - plan.device.usable
    words = [f"it does not fit: {short / 2**30:.1f} GiB too much on each device"]
    if plan.budget.row_tokens or plan.budget.micro_rows:
        found = [
            f"{name} {number}"
            for name, number in (
                ("batch.row_tokens", plan.budget.row_tokens),
                ("batch.micro_rows", plan.budget.micro_rows),
            )
            if number
        ]
        words.append(f"what fits at most: {' or '.join(found)}")
    trials: list[tuple[str, Config]] = [
        ("model.remat full", replace(config, model=replace(config.model, remat="full"))),
        (
            "model.compute_dtype bfloat16",
            replace(config, model=replace(config.model, compute_dtype="bfloat16")),
        ),
        ("loss.kl_coef 0 (no reference policy)", replace(config, loss=replace(config.loss, kl_coef=0.0))),
        (
            "rollout.engine vllm on devices of its own",
            replace(config, rollout=replace(config.rollout, engine="vllm")),
        ),
        (
            "lora.rank 16, lora.base_dtype bfloat16",
            replace(config, lora=replace(config.lora, rank=16, base_dtype="bfloat16")),
        ),
    ]  # fmt: skip
    for name, changed in trials:
        total = formulas.memory(plan.model, changed, plan.axes).total
        saved = plan.memory.total - total
        if saved > 0.02 * plan.memory.total:
            enough = " and it fits" if total <= plan.device.usable else ""
            words.append(f"{name} saves {saved / 2**30:.1f} GiB{enough}")
    split = {name: plan.axes[name] for name in ("data", "fsdp", "tp")}
    while split["fsdp"] < 512:
        split["fsdp"] *= 2
        rows = max(config.batch.micro_rows, split["fsdp"] * split["data"])
        changed = replace(config, batch=replace(config.batch, micro_rows=rows))
        if formulas.memory(plan.model, changed, split).total <= plan.device.usable:
            words.append(f"fsdp={split['fsdp']} devices of this kind hold it (batch.micro_rows {rows})")
            break
    return words

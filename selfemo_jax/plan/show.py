"""A plan for the terminal: figures by formula and by the compiler side by side, each named for what it is."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from selfemo_jax.accelerators import MEMORY_VARIABLES
from selfemo_jax.plan.compiled import CompiledStep
from selfemo_jax.plan.planning import Plan


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    model, device = plan.model, plan.device
    mesh = " ".join(f"{name}={size}" for name, size in plan.axes.items() if size > 1) or "one device"
    console.print(
        f"{model.architecture}, {model.num_params / 1e6:,.1f} M parameters ({plan.shape_from}); mesh {mesh} "
        f"of {device.name}, {device.memory / 2**30:.0f} GiB each ({device.source})",
        markup=False,
    )
    work, share = plan.workload, plan.efficiency
    console.print(
        f"assumed: prompts of {work.prompt_tokens} and completions of {work.completion_tokens} tokens; "
        f"shares of the peak: update {share.train:.0%}, forward {share.forward:.0%}, decode bandwidth "
        f"{share.decode:.0%}, link {share.link:.0%} (guesses until measured)",
        markup=False,
    )
    console.print("\nmemory of one device, MiB", markup=False)
    console.print(_memory_table(plan))
    for line in _memory_words(plan):
        console.print(line, markup=False)
    console.print("\ncollectives of one micro-batch, MiB that each device receives", markup=False)
    console.print(_moved_table(plan))
    console.print(f"\npredicted seconds of one step on {device.name}, by formula", markup=False)
    console.print(_time_table(plan))
    budget = plan.budget
    console.print(
        "largest micro-batch by formula: "
        f"batch.row_tokens {budget.row_tokens or 'none'} with batch.micro_rows as set, or batch.micro_rows "
        f"{budget.micro_rows or 'none'} with batch.row_tokens as set",
        markup=False,
    )
    for line in plan.advice:
        console.print(f"advice: {line}", markup=False)


def _memory_table(plan: Plan) -> Table:
    memory, step = plan.memory, plan.compiled
    compiled = f"compiled for {step.backend} ({step.device_kind})" if step else "compiled"
    table = Table()
    for column in ("", f"formula for {plan.device.name}", compiled):
        table.add_column(column, justify="left" if not column else "right")
    update = step.program("update") if step else None
    lines = [
        ("parameters", memory.parameters, step and step.parameters),
        ("optimizer (both moments)", memory.optimizer, step and step.optimizer),
        ("gradients, summed", memory.accumulator, step and step.accumulator),
        ("reference policy", memory.reference, None),
        ("batch", memory.batch, step and step.batch),
        ("temporaries of the update", memory.temporaries, update and update.temporaries + update.outputs),
        ("  gradient of a micro-batch", memory.accumulator, None),
        ("  activations kept", memory.activations, None),
        ("  one block at work, or", memory.block, None),
        ("  the output head at work", memory.logits, None),
        ("  gathered weights", memory.gathered, None),
        ("sampler's weights", memory.engine, None),
        ("temporaries of log-probs, and batch", memory.logprobs, _logprobs(step)),
        ("peak of an update", memory.total, plan.compiled_peak),
    ]
    if plan.cache:
        lines.append(("while sampling, with the cache", plan.sampling, None))
        lines.append(("  the cache", plan.cache, None))
    for name, formula, found in lines:
        table.add_row(name, f"{formula / 2**20:,.1f}", "" if found is None else f"{found / 2**20:,.1f}")
    return table


def _logprobs(step: CompiledStep | None) -> float | None:
    """Less the weights, which are there anyway."""
    found = [one for one in step.programs if one.name == "logprobs"] if step else []
    return found[0].total - step.parameters if step and found else None


def _memory_words(plan: Plan) -> Iterator[str]:
    verdict, device = "fits" if plan.fits else "DOES NOT FIT", plan.device
    words = f"{verdict} into {device.usable / 2**20:,.0f} MiB usable, by formula: {device.share:.0%} of all"
    if device.name != "CPU":
        words += f", what servers on the same GPU leave, unless {MEMORY_VARIABLES[0]} says how much"
    yield words
    if plan.formula_error is not None:
        yield f"the formulas are {plan.formula_error:+.1%} off the compiled step"
    if plan.sidecar:
        yield (
            f"a server of the sidecar: {plan.sidecar.weights / 2**30:.1f} GiB of weights and "
            f"{plan.sidecar.cache / 2**30:.1f} GiB of cache a device, {plan.sidecar.tokens:,} tokens in all"
        )


def _moved_table(plan: Plan) -> Table:
    table = Table()
    for column in ("", "calls", "devices", "MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, size in plan.moved.items():
        table.add_row(f"formula: {name}", "", "", f"{size / 2**20:,.2f}")
    for program in plan.compiled.programs if plan.compiled else ():
        for one in program.collectives.found:
            words = f"compiled, {program.name}: {one.kind}"
            table.add_row(words, str(one.count), str(one.group), f"{one.received / 2**20:,.2f}")
    if not table.row_count:
        table.add_row("none: one device", "", "", "")
    return table


def _time_table(plan: Plan) -> Table:
    table = Table()
    for column in ("", "s", "share"):
        table.add_column(column, justify="left" if not column else "right")
    total = plan.time.total
    for name, seconds in vars(plan.time).items():
        if seconds:
            table.add_row(name.replace("_", " "), f"{seconds:.3g}", f"{seconds / total:.0%}")
    table.add_row("total", f"{total:.3g}", "")
    return table


def compile_words(step: CompiledStep) -> str:
    """Where the seconds of compiling went."""
    parts = ", ".join(f"{program.name} {program.seconds:.1f} s" for program in step.programs)
    return f"compiled for {step.backend}: {parts}"

"""What a run would do, without doing it: phases, sizes, where each weight lies, what will be on disk."""

import math
from collections.abc import Mapping, Sized

from rich.console import Console
from rich.table import Table

from selfemo_jax import phases as plans
from selfemo_jax.config import Config
from selfemo_jax.config_check import parse_keep
from selfemo_jax.label_phase import training_dialogues
from selfemo_jax.model.sharding import placements
from selfemo_jax.parts import Parts, build_parts
from selfemo_jax.run_checks import check_run
from selfemo_jax.run_data import RunData, doubts, load_data
from selfemo_jax.run_inputs import cold_inputs, example_dialogues, phase_examples

BYTES_PER_TOKEN = 14
"""Of a recorded rollout: ids and log-probs compressed, and its text; measured on the bundled data."""


def describe(config: Config) -> None:
    """Print the plan of a run; ValueError as the run itself would raise it."""
    console = Console(highlight=False, width=140)
    parts = build_parts(config)
    data = load_data(config)
    check_run(config, parts, data)
    for notice in (*parts.notices, *doubts(data, config)):
        console.print(notice, markup=False)
    num_inputs = sum(map(len, data.train.values()))
    sizes = ", ".join(f"{name} {len(samples)}" for name, samples in data.train.items())
    console.print(f"training inputs: {num_inputs} ({sizes})", markup=False)
    rl = config.rl
    console.print(
        f"a step of SELF-GRPO: {rl.prompts_per_step} prompts x {rl.group_size} rollouts, "
        f"{rl.prompts_per_step // rl.mini_prompts * rl.updates_per_batch} optimizer updates",
        markup=False,
    )
    console.print(_phase_table(config, parts, data, num_inputs))
    table = Table(title="weights", title_justify="left")
    for column in ("weight", "shape", "split over", "KiB a device"):
        table.add_column(column, justify="right" if column.startswith("KiB") else "left")
    for line in placements(parts.model, parts.mesh, dtype=config.model.param_dtype):
        split = ", ".join(str(axis) for axis in line.spec) if any(line.spec) else "whole on each device"
        table.add_row(line.path, str(line.shape), split, f"{line.bytes_per_device / 1024:.1f}")
    console.print(table)


def _cold_items(phase: plans.Phase, config: Config, parts: Parts, data: RunData) -> Mapping[str, Sized]:
    """What the cold start's batches count, by source: examples or dialogues. What an expert will write is not
    known before: at most an answer for each input."""
    if config.cold_start.lines == "all":
        return training_dialogues(data, config)
    if config.cold_start.source in ("expert", "mixed"):
        return cold_inputs(config, data)
    found = phase_examples(phase, data, (), parts.codec, config)
    return example_dialogues(found) if config.cold_start.rows == "dialogues" else found


def _phase_table(config: Config, parts: Parts, data: RunData, num_inputs: int) -> Table:
    table = Table(title="phases", title_justify="left")
    for column in ("phase", "kind", "starts from", "inputs", "steps", "rollouts on disk, MiB at most"):
        table.add_column(column)
    kind, number = parse_keep(config.rollout.keep)
    for phase in plans.plan(config):
        disk, prompts = "-", config.rl.prompts_per_step
        if phase.kind == "sft" and phase.buffer == (plans.ORIGINAL,):
            num = sum(map(len, _cold_items(phase, config, parts, data).values()))
            steps = math.ceil(config.cold_start.epochs * num / config.cold_start.batch_size)
        elif phase.kind == "labels":
            labels = config.cold_start.labels
            num = sum(map(len, training_dialogues(data, config).values()))
            steps = math.ceil(labels.epochs * num / labels.batch_size)
        elif phase.kind == "sft":
            steps = None
        elif phase.kind == "rl":
            steps = phase.steps or max(1, int(config.rl.epochs * num_inputs / config.rl.prompts_per_step))
        else:
            # At most: where every reply is accepted, each dialogue is asked once a turn.
            num = min(config.flywheel.max_inputs or num_inputs, num_inputs)
            prompts = min(num, config.flywheel.dialogues_per_step)
            steps = math.ceil(num / config.flywheel.dialogues_per_step) * config.flywheel.max_depth
        if phase.kind not in ("sft", "labels") and steps is not None:
            kept = {"all": steps, "last": min(steps, number), "every": math.ceil(steps / number)}[kind]
            rollouts = kept * prompts * config.rl.group_size
            disk = f"{rollouts * config.rollout.max_tokens * BYTES_PER_TOKEN / 2**20:.1f}"
        # What a harvest will hold is not known before: phases after it say what the originals alone give.
        words = (
            f"{steps}" if plans.ORIGINAL in phase.buffer and len(phase.buffer) == 1 else f"{steps} or more"
        )
        fixed = phase.kind == "rl" and config.rl.steps is not None
        shown = "?" if steps is None else str(steps) if fixed else words
        table.add_row(phase.name, phase.kind, phase.init, " + ".join(phase.buffer), shown, disk)
    return table

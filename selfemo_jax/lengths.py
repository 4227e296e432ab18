"""How long prompts and completions are beside the budgets they must fit: a table, a JSON file and a picture.

Made once a phase, after its first step: a budget that is far too large or cuts answers off shows before hours
are spent.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.label_rows import Answered, Question
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.distributed import is_first
from selfemo_jax.phases import Phase
from selfemo_jax.rollout.stream import Rollouts
from selfemo_jax.runlog import RunLog

MAX_BINS = 20
_BLOCKS = " ▁▂▃▄▅▆▇█"


def step_lengths(item: object, config: Config) -> dict[str, Any] | None:
    """Lengths in tokens of a step's prompts, completions and what lies in a row together.

    ``item`` is what a phase's loop gets: a batch of (prompt ids, completion ids), of dialogues with their
    answers or of dialogues with their questions, or rollouts. None for anything else, and where every group
    was lost. Each quantity has ``lengths``, ``budget`` and the setting that ``limit``s it; ``sequence`` is a
    prompt with one completion, ``group`` a prompt with all of its completions, ``question`` a prompt with the
    opening of its answer, behind which one label is all there is.
    """
    cut = dropped = None
    if isinstance(item, Rollouts):
        kept = [(p, g) for p, g in zip(item.prompts, item.groups, strict=True) if g.completions]
        prompts = [len(prompt.token_ids) for prompt, _ in kept]
        completions = [[len(c.token_ids) for c in group.completions] for _, group in kept]
        reasons = [c.finish_reason for _, group in kept for c in group.completions]
        cut = sum(reason == "length" for reason in reasons)
        dropped = sum(prompt.num_dropped_turns > 0 for prompt, _ in kept)
    elif isinstance(item, Batch) and (asked := _questions(item.items)):
        return _quantities({"question": (asked, "batch.row_tokens", config.batch.row_tokens)}, config)
    elif isinstance(item, Batch):
        pairs = _examples(item.items)
        prompts = [len(prompt) for prompt, _ in pairs]
        completions = [[len(completion)] for _, completion in pairs]
    else:
        return None
    if not prompts:
        return None
    sequences = [p + n - 1 for p, row in zip(prompts, completions, strict=True) for n in row]
    quantities = {
        "prompt": (prompts, "data.max_prompt", config.data.max_prompt),
        "completion": (
            [n for row in completions for n in row],
            "rollout.max_tokens",
            config.rollout.max_tokens,
        ),
        "sequence": (sequences, "batch.row_tokens", config.batch.row_tokens),
    }
    if isinstance(item, Rollouts) and config.rl.layout == "shared_prefix":
        groups = [p + sum(row) - 1 for p, row in zip(prompts, completions, strict=True)]
        quantities["group"] = (groups, "batch.row_tokens", config.batch.row_tokens)
    return _quantities(quantities, config) | {"completions_cut": cut, "prompts_with_dropped_turns": dropped}


def _quantities(found: Mapping[str, tuple[list[int], str, int]], config: Config) -> dict[str, Any]:
    """``found``: quantity -> lengths, the setting that limits them, its value."""
    return {
        "quantities": {
            name: {"limit": limit, "budget": budget, "lengths": lengths}
            for name, (lengths, limit, budget) in found.items()
        },
        "micro_batch_tokens": config.batch.micro_rows * config.batch.row_tokens,
        "completions_cut": None,
        "prompts_with_dropped_turns": None,
    }


def histogram(lengths: Sequence[int], *, max_bins: int = MAX_BINS) -> dict[str, list[int]]:
    """``counts[i]`` lengths in ``edges[i] <= length < edges[i + 1]``; bins are equally wide, of whole
    tokens."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // max_bins)
    number = -(-(high - low + 1) // width)
    edges = [low + i * width for i in range(number + 1)]
    counts = np.bincount((np.asarray(lengths) - low) // width, minlength=number)
    return {"edges": edges, "counts": counts.tolist()}


def summarise(lengths: Sequence[int]) -> dict[str, Any]:
    """Number, extremes, mean, median, 95 % quantile and histogram of some lengths in tokens."""
    values = np.asarray(lengths)
    return {
        "num": len(values),
        "min": int(values.min()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": int(values.max()),
        **histogram(lengths),
    }


def report(name: str, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``lengths/<phase>.json`` holds: every quantity's budget, setting and `summarise`."""
    quantities = {
        key: {"limit": value["limit"], "budget": value["budget"], **summarise(value["lengths"])}
        for key, value in found["quantities"].items()
    }
    rest = {key: value for key, value in found.items() if key != "quantities"}
    return {"phase": name, "step": step, "quantities": quantities, **rest}


def table(content: Mapping[str, Any]) -> Table:
    """The report for the terminal, at most 80 columns wide."""
    words = [f"{content['phase']}, step {content['step']}: lengths in tokens"]
    if content["completions_cut"]:
        words.append(f"{content['completions_cut']} completions cut off")
    if content["prompts_with_dropped_turns"]:
        words.append(f"{content['prompts_with_dropped_turns']} prompts without their oldest turns")
    shown = Table(title="; ".join(words), title_justify="left", title_style="")
    for column in ("", "n", "min", "median", "95 %", "max", "budget"):
        shown.add_column(column, justify="left" if column == "" else "right")
    shown.add_column("min to max", no_wrap=True)
    for key, value in content["quantities"].items():
        numbers = (value["num"], value["min"], round(value["median"]), round(value["p95"]), value["max"])
        shown.add_row(key, *map(str, numbers), str(value["budget"]), _bars(value["counts"]))
    return shown


def picture(content: Mapping[str, Any]) -> bytes:
    """The report as a PNG: one histogram a quantity, with its budget where it is near."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = content["quantities"]
    figure = Figure(figsize=(7, 1.6 * len(quantities)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, value) in zip(
        np.atleast_1d(figure.subplots(len(quantities))), quantities.items(), strict=True
    ):
        edges = np.asarray(value["edges"])
        axes.bar(edges[:-1], value["counts"], width=np.diff(edges), align="edge", edgecolor="white")
        if value["budget"] <= 1.5 * value["max"]:
            axes.axvline(value["budget"], color="tab:red", linewidth=1)
        axes.set_ylabel(key)
        axes.set_title(f"{value['limit']} {value['budget']}", fontsize="small", loc="right")
    figure.suptitle(f"{content['phase']}, step {content['step']}: lengths in tokens", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def report_lengths(item: tuple[int, object], phase: Phase, config: Config, log: RunLog) -> None:
    """Show the lengths of a step, ``(number, batch or rollouts)``, and keep them under ``lengths/`` in the
    run's folder."""
    found = step_lengths(item[1], config)
    if found is not None and is_first():
        content = report(phase.name, item[0], found)
        log.show(table(content))
        save(log.run_dir / "lengths", phase.folder, content)


def save(folder: Path, stem: str, content: Mapping[str, Any]) -> None:
    """Write ``<stem>.json`` and ``<stem>.png``; a resumed phase keeps those of its first step."""
    if not (folder / f"{stem}.json").exists():
        atomic_write(folder / f"{stem}.png", picture(content))
        atomic_write(folder / f"{stem}.json", json.dumps(content, indent=1) + "\n")


def _examples(items: Sequence[Any]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Prompt and completion ids of supervised items, dialogue after dialogue; none of other items."""
    if all(_is_pair(item) for item in items):
        return list(items)
    answers = [answer for item in items if isinstance(item, list) for answer in item]
    return [(one.prompt_ids, one.completion_ids) for one in answers if isinstance(one, Answered)]


def _questions(items: Sequence[Any]) -> list[int]:
    """Tokens of every question, dialogue after dialogue; none of other items."""
    asked = [one for item in items if isinstance(item, tuple) for one in item]
    return [len(one.prompt_ids) for one in asked if isinstance(one, Question)]


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, tuple) for part in item)


def _bars(counts: Sequence[int]) -> str:
    top = max(counts)
    return "".join(_BLOCKS[-(-8 * count // top)] for count in counts)

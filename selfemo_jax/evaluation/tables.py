"""Tables of an evaluation for the terminal; numbers in percent unless a column says otherwise."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from selfemo_jax.evaluation.published import SETS, TABLE, rows_for
from selfemo_jax.run_data import RunData

MEAN = "mean of 3"


def print_all(split: str, result: Mapping[str, Any], data: RunData) -> None:
    """Every table that the results of a split have something for."""
    note, scored = result["note"], result["sets"]
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if scored:
        console.print(_scores(split, scored, data, note))
        console.print(_calibration(split, result))
    if result.get("samples"):
        console.print(_samples(result["samples"], data, note))
    if result.get("yardsticks") or (split == "test" and rows_for(list(data.label_sets))):
        console.print(_beside(split, result, data))


def percent(value: float | None) -> str:
    """`0.5` -> `50.00`; `-` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _titled(words: str, note: str) -> str:
    return f"{words}: {note}" if note else words


def _scores(split: str, scored: Mapping[str, Any], data: RunData, note: str) -> Table:
    table = _table(
        _titled(f"{split} split", note),
        "set",
        (
            *("n", "acc", "w-F1", "macro-F1", "invalid", "r1", "lenient w-F1", "InstructERC w-F1", "labels"),
            *("majority acc", "majority w-F1"),
        ),
    )
    for name, result, num_labels in _rows(scored, data):
        values = [result[key] for key in ("accuracy", "weighted_f1", "macro_f1", "invalid_rate", "r1")]
        table.add_row(
            name,
            str(result["num"]),
            *map(percent, values),
            *(percent(result[reading]["weighted_f1"]) for reading in ("lenient", "instructerc")),
            f"{result['num_labels_predicted']}/{num_labels}",
            *(percent(result["majority"][key]) for key in ("accuracy", "weighted_f1")),
        )
    return table


def _calibration(split: str, result: Mapping[str, Any]) -> Table:
    speed = result["speed"]
    words = f"weights as probabilities ({split}, valid answers); {speed_words(speed)}"
    table = _table(
        _titled(words, result["note"]), "set",
        ("share", "confidence", "acc", "ECE", "Brier (0 to 2)", "Brier of label shares", "mean tokens"),
    )  # fmt: skip
    for name, scores in result["sets"].items():
        stated = scores["calibration"]
        briers = ("-" if stated[key] is None else f"{stated[key]:.3f}" for key in ("brier", "brier_prior"))
        table.add_row(
            name, *(percent(stated[key]) for key in ("share", "confidence", "accuracy", "ece")), *briers,
            f"{scores['mean_tokens']:.1f}",
        )  # fmt: skip
    return table


def speed_words(speed: Mapping[str, Any]) -> str:
    """Throughput and times in words. Seconds since a batch was handed over grow with the batch, and are not
    called the latency of an answer."""
    rate, unasked = speed["inputs_per_s"], speed["unasked"]
    words = "nothing asked now" if rate is None else f"{rate:.2f} inputs/s"
    if rate is not None and unasked:
        words += f" ({unasked} more were not asked now)"
    words += f", {speed['completion_tokens']:,} tokens"
    if latency := speed.get("latency"):
        name = {"batch": "time in batch", "request": "latency"}[latency["of"]]
        words += f", {name} p50 {latency['p50']:.2f} s, p95 {latency['p95']:.2f} s (n={latency['n']})"
    return words


def _samples(samples: Mapping[str, Any], data: RunData, note: str) -> Table:
    table = _table(
        _titled("sampled answers", note), "set",
        (
            *("n", "mean acc", "sd", "mean w-F1", "sd"),
            *("maj acc", "maj w-F1", "any right", "invalid", "ECE of votes"),
        ),
    )  # fmt: skip
    for name, scores, _ in _rows(samples, data):
        table.add_row(
            name, str(scores["n"]),
            *(percent(scores[part][key]) for key in ("accuracy", "weighted_f1") for part in ("mean", "sd")),
            *(percent(scores["maj"][key]) for key in ("accuracy", "weighted_f1")),
            percent(scores["any"]), percent(scores["mean"]["invalid_rate"]), percent(scores["votes"]["ece"]),
        )  # fmt: skip
    return table


def _beside(split: str, result: Mapping[str, Any], data: RunData) -> Table:
    """Ours and the yardsticks, whole and by part, and the published rows: acc and w-F1 of each set, and their
    means over the three sets of the paper."""
    names = list(data.label_sets)
    published = rows_for(names) if split == "test" else ()
    table = _table(
        _titled("side by side", result["note"]), "system",
        [f"{name} {score}" for name in (*names, *([MEAN] if published else [])) for score in ("acc", "w-F1")],
    )  # fmt: skip
    systems = {"this policy": result["sets"]} if result["sets"] else {}
    yardsticks = result.get("yardsticks") or {}
    for label in dict.fromkeys(label for of_set in yardsticks.values() for label in of_set):
        systems[label] = {name: found[label] for name, found in yardsticks.items() if label in found}
    for label, scored in systems.items():
        lines = list(_beside_lines(label, scored, names, with_mean=bool(published)))
        for place, line in enumerate(lines, start=1):
            table.add_row(*line, end_section=place == len(lines))
    if published:
        width = 2 * len(names) + 2
        table.add_row(f"{TABLE}:", *[""] * width)
    for row in published:
        values = [v for n in names for v in (row.of(n) if n in SETS else (None, None))]
        shown = ("-" if v is None else f"{v:.2f}" for v in (*values, *row.average))
        table.add_row(f"{row.group}: {row.name}", *shown)
    return table


def _beside_lines(
    label: str, scored: Mapping[str, Any], names: Sequence[str], *, with_mean: bool
) -> Iterator[list[str]]:
    """A system's cells over whole sets, then those of its parts; the mean is of all three sets or none."""

    def cells(found: Mapping[str, Any]) -> list[str]:
        keys = ("accuracy", "weighted_f1")
        values = [found.get(name, {}).get(key) for name in names for key in keys]
        if with_mean:
            whole = [found[name] for name in SETS if name in found]
            values += [sum(s[key] for s in whole) / 3 if len(whole) == 3 else None for key in keys]
        return [percent(value) for value in values]

    yield [label, *cells(scored)]
    told = {name: scores["parts"] for name, scores in scored.items() if len(scores.get("parts") or {}) > 1}
    for part in dict.fromkeys(part for parts in told.values() for part in parts):
        yield [f"  {part}", *cells({name: parts[part] for name, parts in told.items() if part in parts})]


def _rows(scored: Mapping[str, Any], data: RunData) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """Name, scores and number of labels of each set, and below it of its parts where there are two."""
    for name, result in scored.items():
        num_labels = len(data.label_sets[name].labels)
        yield name, result, num_labels
        if len(result["parts"]) > 1:
            for part, of_part in result["parts"].items():
                yield f"  {part}", of_part, num_labels

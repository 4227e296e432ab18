"""Scores of a policy: a split -> greedy answers -> predictions.jsonl -> scores.

    python -m selfemo_jax.evaluate --checkpoint DIR [--data.root DIR] [--split test] [--out DIR]

The checkpoint is a run's folder (its best policy by dev score), a converted (Orbax) folder or a Hugging Face
folder. Every labelled utterance of the split counts once; an answer outside the grammar is wrong. Beside each
score stand the invalid rate and the score of always answering with the most frequent training label.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfemo_jax.appendlog import AppendLog, atomic_write
from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config import Config
from selfemo_jax.config_io import Flag, load_config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.parts import build_parts, make_engine, weights_of
from selfemo_jax.rollout.engine import Engine
from selfemo_jax.run_data import RunData, load_data
from selfemo_jax.scores import greedy_answers, score

FLAGS = {
    "checkpoint": Flag(help="run, converted or Hugging Face folder", required=True),
    "split": Flag(help="dev or test", default="test"),
    "out": Flag(
        help="folder for predictions and scores; default: eval/ in the run, or beside the checkpoint"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Score one split; returns the exit status."""
    try:
        config, command = load_config(
            sys.argv[1:] if argv is None else argv,
            prog="selfemo_jax.evaluate",
            flags=FLAGS,
            base=lambda command: find_checkpoint(command.extra["checkpoint"]).config_file,
        )
        checkpoint = find_checkpoint(command.extra["checkpoint"])
        config = checkpoint.settings(config)
        parts = build_parts(config)
        data = load_data(config)
        engine = make_engine(parts)
        engine.update_policy(weights_of(parts, checkpoint.weights), version=0)
        folder = Path(command.extra["out"] or checkpoint.out)
        evaluate_splits(
            engine, parts.codec, config, data,
            splits=[command.extra["split"]], note=parts.note, folder=folder, say=print,
        )  # fmt: skip
        engine.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate_splits(
    engine: Engine,
    codec: TextCodec,
    config: Config,
    data: RunData,
    *,
    splits: Sequence[str],
    note: str,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Score splits with the engine's policy; writes ``<split>_predictions.jsonl`` and ``<split>.json`` for
    each."""
    results = {}
    for split in splits:
        samples = data.split(split)
        path = folder / f"{split}_predictions.jsonl"
        part = path.with_suffix(".partial")
        part.unlink(missing_ok=True)
        predictions, started = [], time.perf_counter()
        with AppendLog(part) as log:
            for prediction in greedy_answers(engine, samples, codec, config):
                log.append(prediction.to_json())
                predictions.append(prediction)
                if len(predictions) % 500 == 0:
                    rate = len(predictions) / (time.perf_counter() - started)
                    left = (len(samples) - len(predictions)) / rate
                    say(f"{split}: {len(predictions)}/{len(samples)}, {rate:.1f} inputs/s, eta {left:.0f} s")
        part.replace(path)
        seconds = time.perf_counter() - started
        scored = score(predictions, data.label_sets, data.majority, data.parts)
        results[split] = {"seconds": seconds, "note": note, "sets": scored}
        atomic_write(folder / f"{split}.json", json.dumps(results[split], indent=1) + "\n")
        print_scores(split, scored, data, note)
    return results


def print_scores(split: str, scored: Mapping[str, Any], data: RunData, note: str) -> None:
    """The table of a split; numbers in percent."""
    table = Table(title=f"{split} split{f': {note}' if note else ''}", title_justify="left")
    for column in ("set", "n", "acc", "w-F1", "macro-F1", "invalid", "r1", "lenient w-F1", "labels"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for column in ("majority acc", "majority w-F1"):
        table.add_column(column, justify="right")
    for name, result, num_labels in _rows(scored, data):
        percent = [result[key] for key in ("accuracy", "weighted_f1", "macro_f1", "invalid_rate", "r1")]
        baseline = result["majority"]
        table.add_row(
            name,
            str(result["num"]),
            *(f"{100 * value:.2f}" for value in percent),
            f"{100 * result['lenient']['weighted_f1']:.2f}",
            f"{result['num_labels_predicted']}/{num_labels}",
            f"{100 * baseline['accuracy']:.2f}",
            f"{100 * baseline['weighted_f1']:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _rows(scored: Mapping[str, Any], data: RunData) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """Name, scores and number of labels of each set, and below it of its parts where there are two."""
    for name, result in scored.items():
        num_labels = len(data.label_sets[name].labels)
        yield name, result, num_labels
        if len(result["parts"]) > 1:
            for part, of_part in result["parts"].items():
                yield f"  {part}", of_part, num_labels


if __name__ == "__main__":
    sys.exit(main())

"""Scores of a policy: a split -> greedy answers -> predictions.jsonl -> scores.

    python -m selfemo_jax.evaluate --checkpoint DIR [--data.root DIR] [--split test] [--out DIR]
                                   [--samples N] [--yardsticks]
    python -m selfemo_jax.evaluate --endpoint URL --model NAME [--key_env VARIABLE] ...

The checkpoint is a run's folder (its best policy by dev score), a converted (Orbax) folder or a Hugging Face
folder; or an OpenAI-compatible server answers. Every labelled utterance of the split counts once; an answer
outside the grammar is wrong. Beside each score stand the invalid rate, lenient readings, and the score of
always answering with the most frequent training label; beside the sets of the paper its Table 1.
"""

import selfemo_jax.keep_memory  # noqa: F401, I001 - before NumPy starts threads

import hashlib
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.appendlog import AppendLog, atomic_write
from selfemo_jax.checkpoint import Found, find_checkpoint
from selfemo_jax.config import Config
from selfemo_jax.config_io import Command, Flag, config_folder, load_config, read_config
from selfemo_jax.evaluation.answers import Answers, policy_answers
from selfemo_jax.evaluation.endpoint import EndpointAnswers, folder_name
from selfemo_jax.evaluation.rewards import single_reward, write_groups
from selfemo_jax.evaluation.samples import score_samples
from selfemo_jax.evaluation.tables import print_all
from selfemo_jax.evaluation.yardsticks import yardsticks
from selfemo_jax.parts import build_parts, make_engine, weights_of
from selfemo_jax.run_biographies import with_biographies
from selfemo_jax.run_data import RunData, load_data, part_doubts
from selfemo_jax.run_personas import with_personas
from selfemo_jax.scores import Prediction, score
from selfemo_jax.study.same_settings import FREE, differences

FLAGS = {
    "checkpoint": Flag(help="run, converted or Hugging Face folder"),
    "endpoint": Flag(help="base URL of an OpenAI-compatible server, in place of a checkpoint"),
    "model": Flag(help="the model's name at the endpoint"),
    "key_env": Flag(help="environment variable that holds the endpoint's key; default: no key is sent"),
    "split": Flag(help="dev or test", default="test"),
    "samples": Flag(help="answers drawn for each input beside the greedy one", type=int, default=0),
    "yardsticks": Flag(
        help="score majority, random and a linear model too; alone: nothing else", switch=True
    ),
    "out": Flag(
        help="folder for predictions and scores; default: eval/ in the run (of a finished one scored with "
        "other settings a folder in it), beside the checkpoint, or of an endpoint runs/endpoints/MODEL_at_URL"
    ),
}

_say = functools.partial(print, flush=True)
NOTHING = "utterance in that split, so there is nothing to score"


def main(argv: Sequence[str] | None = None) -> int:
    """Score one split; returns the exit status."""
    try:
        config, command = load_config(
            sys.argv[1:] if argv is None else argv, prog="selfemo_jax.evaluate", flags=FLAGS, base=_config_of
        )
        flags = command.extra
        with _opened(config, command) as (answers, config, folder, note):
            data = with_biographies(config, load_data(config))
            if not data.split(flags["split"]):
                raise ValueError(f"--split {flags['split']}: no labelled {NOTHING}")
            for line in part_doubts(data):
                _say(f"data: {line}")
            if config.eval.persona == "given":
                data = with_personas(config, data, split=flags["split"])
            evaluate_splits(
                answers, data, splits=[flags["split"]], note=note, folder=folder, say=_say,
                num_samples=flags["samples"], with_yardsticks=flags["yardsticks"], seed=config.seed,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate_splits(
    answers: Answers | None,
    data: RunData,
    *,
    splits: Sequence[str],
    note: str,
    folder: Path,
    say: Callable[[str], None],
    num_samples: int = 0,
    with_yardsticks: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Score splits; writes ``<split>_predictions.jsonl`` and ``<split>.json`` for each, without ``answers``
    of the yardsticks alone."""
    results = {}
    measured = yardsticks(data, splits, seed=seed) if with_yardsticks else {}
    for split in splits:
        samples, found = data.split(split), {"seconds": 0.0, "note": note, "sets": {}}
        found["parts_from"] = list(data.parts_from)
        if not samples:
            say(f"{split}: no labelled {NOTHING}")
        if answers is not None:
            started = time.perf_counter()
            predictions = _written(answers.greedy(samples), folder / f"{split}_predictions.jsonl", data.parts)
            found["persona"] = answers.config.eval.persona
            found["frequency_penalty"] = answers.config.eval.frequency_penalty
            found["seconds"] = time.perf_counter() - started
            found["sets"] = score(predictions, data.label_sets, data.majority, data.parts)
            found["speed"] = _speed(predictions, found["seconds"], timed=answers.timed)
            drawn = folder / f"{split}_samples.jsonl"
            # Those of an earlier evaluation are not of these scores.
            drawn.unlink(missing_ok=True)
            if num_samples:
                groups = list(answers.sampled(samples, num_samples))
                found["samples"] = score_samples(groups, data.label_sets, data.parts)
                found["reward"] = write_groups(drawn, groups, answers.config, data.parts)
        if split in measured:
            found["yardsticks"] = measured[split]
        results[split] = found
        name = split if answers is not None else f"{split}_yardsticks"
        atomic_write(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
        print_all(split, found, data)
    return results


def _written(
    predictions: Iterable[Prediction],
    path: Path,
    parts: Mapping[str, str],
) -> list[Prediction]:
    """The predictions once all of them are in the file, which has its name only then."""
    part = path.with_suffix(".partial")
    part.unlink(missing_ok=True)
    done: list[Prediction] = []
    with AppendLog(part) as log:
        for prediction in predictions:
            line = prediction.to_json(parts.get(prediction.sample.root_id, ""))
            log.append(line | {"r1": single_reward(prediction)})
            done.append(prediction)
    part.replace(path)
    return done


def _speed(predictions: Sequence[Prediction], seconds: float, *, timed: str) -> dict[str, Any]:
    """Tokens of all answers; of those that were made now their rate and the quantiles of their seconds."""
    waited = np.array([p.seconds for p in predictions if p.seconds is not None])
    latency = None
    if len(waited):
        p50, p95 = np.quantile(waited, (0.5, 0.95))
        latency = {"p50": float(p50), "p95": float(p95), "n": len(waited), "of": timed}
    return {
        "inputs_per_s": len(waited) / seconds if len(waited) else None,
        "unasked": len(predictions) - len(waited),
        "prompt_tokens": sum(p.num_prompt_tokens for p in predictions),
        "completion_tokens": sum(p.num_tokens for p in predictions),
        "latency": latency,
    }


def _config_of(command: Command) -> Path:
    """The settings of the run that the checkpoint lies in, else those of ``configs/evaluate.yaml``."""
    checkpoint = command.extra["checkpoint"]
    return find_checkpoint(checkpoint).config_file if checkpoint else config_folder() / "evaluate.yaml"


def scores_folder(checkpoint: Found, config: Config) -> Path:
    """Where scores under these settings go unless told otherwise.

    The final scores of a finished run stay: what other settings than its own give goes to a folder beside
    them that is named for what differs.
    """
    if not (checkpoint.out / "final.json").exists():
        return checkpoint.out
    own = read_config(checkpoint.config_file)
    changed = {key: now for key, (_, now) in differences(own, config).items() if key not in FREE}
    if not changed:
        return checkpoint.out
    words = ",".join(f"{key}={value}" for key, value in sorted(changed.items()))
    name = re.sub(r"[^\w.=,+-]+", "-", words)[:80]
    digest = "" if name == words else f"-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    return checkpoint.out / f"{name}{digest}"


@contextmanager
def _opened(config: Config, command: Command):
    """Who answers (None: only yardsticks), its settings, where the scores go, and the words they carry."""
    flags = command.extra
    if bool(flags["checkpoint"]) + bool(flags["endpoint"]) > 1 or bool(flags["endpoint"]) != bool(
        flags["model"]
    ):
        raise ValueError("command line: name --checkpoint DIR, or --endpoint URL and --model NAME")
    if flags["endpoint"]:
        url, model = flags["endpoint"], flags["model"]
        folder = Path(flags["out"] or Path("runs") / "endpoints" / folder_name(model, url))
        with EndpointAnswers(
            config, folder, url=url, model=model, key_env=flags["key_env"], say=_say
        ) as endpoint:
            yield endpoint.answers(), config, folder, f"{model} at {url}"
    elif flags["checkpoint"]:
        checkpoint = find_checkpoint(flags["checkpoint"])
        out = Path(flags["out"] or scores_folder(checkpoint, config))
        if not flags["out"] and out != checkpoint.out:
            print(f"other settings than the run's own: its scores stay, these go to {out}")
        config = checkpoint.settings(config)
        parts = build_parts(config)
        engine = make_engine(parts)
        try:
            engine.update_policy(weights_of(parts, checkpoint.weights), version=0)
            yield policy_answers(engine, parts.codec, config, say=_say), config, out, parts.note
        finally:
            engine.close()
    elif flags["yardsticks"]:
        yield None, config, Path(flags["out"] or Path("runs") / "yardsticks"), config.note
    else:
        raise ValueError(
            "command line: --checkpoint DIR, or --endpoint URL and --model NAME, or --yardsticks is needed"
        )


if __name__ == "__main__":
    sys.exit(main())

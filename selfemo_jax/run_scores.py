"""Scores of a run: its policy on the dev subset while it trains, and on whole splits at the end."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.inputs import Sample
from selfemo_jax.distributed import is_first
from selfemo_jax.evaluate import evaluate_splits
from selfemo_jax.evaluation.answers import policy_answers
from selfemo_jax.evaluation.rewards import single_reward
from selfemo_jax.parts import Parts
from selfemo_jax.phases import SELFEMO, Phase, phase_dir
from selfemo_jax.report import report_at_end
from selfemo_jax.reporting.flows import DEV_ANSWERS
from selfemo_jax.rollout.engine import Engine
from selfemo_jax.run_data import RunData, fixed_subset
from selfemo_jax.run_inputs import heldout_inputs
from selfemo_jax.scores import Prediction, gold_label, greedy_answers, mean_wf1, score


def final_file(run_dir: Path) -> Path:
    """The file whose presence says that a run is scored."""
    return run_dir / "eval" / "final.json"


def dev_subset(data: RunData, config: Config) -> tuple[Sample, ...]:
    """The labelled dev inputs that are scored during training, fixed by the seed."""
    dev = data.split(config.data.dev_split)
    return fixed_subset(dev, config.eval.max_items, seed=config.seed, purpose="dev")


def dev_metrics(
    engine: Engine,
    dev: Sequence[Sample],
    parts: Parts,
    data: RunData,
    phase: Phase,
    *,
    records: Callable[[], Iterable[Mapping[str, Any]]],
) -> dict[str, float]:
    """``dev/...`` metrics of the engine's policy: ``dev/wf1`` is the mean over data sets. With `eval.selfemo`
    ``dev/selfemo/...`` of the inputs held out of the phase's harvests, which are part of no mean; ``records``
    reads them. The labels answered on dev stay in the phase's folder, the last ones as the phase ends."""
    predictions = list(greedy_answers(engine, dev, parts.codec, parts.config))
    if is_first():
        assert parts.config.run_dir is not None, "load_config fills run_dir"
        kept = ("id", "dataset", "gold", "prediction")
        lines = ({name: line[name] for name in kept} for line in (one.to_json() for one in predictions))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(phase_dir(Path(parts.config.run_dir), phase) / DEV_ANSWERS, text)
    results = score(predictions, data.label_sets, data.majority)
    metrics = {"dev/wf1": mean_wf1(results)}
    for name, result in results.items():
        metrics[f"dev/{name}/wf1"] = result["weighted_f1"]
        metrics[f"dev/{name}/accuracy"] = result["accuracy"]
        metrics[f"dev/{name}/macro_f1"] = result["macro_f1"]
        metrics[f"dev/{name}/r1"] = result["r1"]
        metrics[f"dev/{name}/invalid"] = result["invalid_rate"]
    if held := heldout_inputs(phase, records, parts.config):
        found = list(greedy_answers(engine, held, parts.codec, parts.config))
        metrics |= {f"dev/{SELFEMO}/{name}": value for name, value in _selfemo(found).items()}
    return metrics


def _selfemo(found: Sequence[Prediction]) -> dict[str, float]:
    """Scores over the inputs of all data sets together: each is right or wrong by its own label list."""
    return {
        "accuracy": float(np.mean([one.label == gold_label(one.sample) for one in found])),
        "r1": float(np.mean([single_reward(one) for one in found])),
        "invalid": float(np.mean([one.label is None for one in found])),
        "num": float(len(found)),
    }


def score_whole_splits(
    engine: Engine,
    parts: Parts,
    data: RunData,
    *,
    run_dir: Path,
    notice: str,
    summary: Mapping[str, Any],
    say: Callable[[str], None],
    check_stop: Callable[[], None],
) -> None:
    """Score the engine's policy on `eval.final_splits` and print the tables; ``check_stop`` is called after
    each answer, and raises where the run has to end.

    ``final.json`` (``summary``, the note and the scores) is written only without a ``notice``, which says why
    these scores are not the run's last. The run's report is written anew.
    """
    config = parts.config
    answers = policy_answers(engine, parts.codec, config, say=say, between=check_stop)
    if not is_first():
        # The engine needs every process; what comes out is written and printed by the first one.
        with tempfile.TemporaryDirectory() as aside, contextlib.redirect_stdout(io.StringIO()):
            evaluate_splits(
                answers, data, splits=config.eval.final_splits, note="",
                folder=Path(aside), say=say,
            )  # fmt: skip
        return
    note = "; ".join(words for words in (parts.note, notice) if words)
    results = evaluate_splits(
        answers, data, splits=config.eval.final_splits, note=note,
        folder=run_dir / "eval", say=say, with_yardsticks=True, seed=config.seed,
    )  # fmt: skip
    if not notice:
        content = {**summary, "note": note, "splits": results}
        atomic_write(final_file(run_dir), json.dumps(content, indent=1) + "\n")
    report_at_end(run_dir, say)

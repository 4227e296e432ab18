"""Greedy answers to labelled inputs, and what they are worth (method 4.3, 6.1).

Every labelled input counts once; an answer outside the grammar, or whose heaviest label is not in the list,
is wrong and stays in every denominator. Scores of a data set are over its own labels.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from selfemo_jax.algo import metrics
from selfemo_jax.algo.rewards import weighted_iou
from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.dialogues import LabelSet
from selfemo_jax.data.grammar import Answer, predicted_label
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_arrays import answers_to_arrays, gold_to_array
from selfemo_jax.data.lenient import lenient_label, parse_lenient
from selfemo_jax.data.prompts import Prompt, build_prompt
from selfemo_jax.evaluation.calibration import calibration, normalised, places
from selfemo_jax.rollout.engine import Completion, Engine, Request, Sampling
from selfemo_jax.scoring import parse_completion


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The policy's greedy answer to one input."""

    sample: Sample
    text: str
    answer: Answer
    label: str | None
    """Heaviest label; None where the answer is invalid."""
    lenient: str | None
    """What a forgiving reading of the emotion field gives."""
    num_prompt_tokens: int
    num_tokens: int
    seconds: float | None = None
    """From handing its batch over, or from sending its request, until the answer was there; None where
    nothing was asked for it now."""

    def to_json(self, part: str = "") -> dict[str, Any]:
        """One line of ``predictions.jsonl``; ``part`` of its set, where that is told in parts."""
        return {
            "id": self.sample.id,
            "dataset": self.sample.dataset,
            **({"part": part} if part else {}),
            "responder": self.sample.responder,
            "gold": gold_label(self.sample),
            "prediction": self.label,
            "lenient": self.lenient,
            "codes": list(self.answer.codes),
            "emotion": dict(self.answer.emotion),
            "self_emotion": dict(self.answer.self_emotion),
            "response": self.answer.response,
            "text": self.text,
            "num_tokens": self.num_tokens,
        }


def gold_label(sample: Sample) -> str:
    """The heaviest gold label, the first of equals."""
    return max(sample.gold, key=lambda label: sample.gold[label])


def greedy_answers(
    engine: Engine,
    samples: Sequence[Sample],
    codec: TextCodec,
    config: Config,
    *,
    between: Callable[[], None] = lambda: None,
) -> Iterable[Prediction]:
    """Greedy answers in the order of the samples, produced as they are finished, part by part; ``between``
    is called after each, and may raise to end it."""
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens, temperature=0.0, stop_ids=codec.stop_ids,
        frequency_penalty=config.eval.frequency_penalty,
    )  # fmt: skip
    for (prediction,) in answers(engine, samples, codec, config, sampling=sampling, between=between):
        yield prediction


def answers(
    engine: Engine,
    samples: Sequence[Sample],
    codec: TextCodec,
    config: Config,
    *,
    sampling: Sampling,
    num: int = 1,
    seeds: Sequence[int] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterable[tuple[Prediction, ...]]:
    """``num`` answers to each sample, in the order of the samples, part by part; ``seeds`` one a sample."""
    part = max(1, 4 * config.eval.batch_rows // num)
    for start in range(0, len(samples), part):
        chosen = samples[start : start + part]
        prompts = [
            encode_prompt(sample, codec, config, persona=config.eval.persona == "given") for sample in chosen
        ]
        requests = [
            Request(
                id=str(index), token_ids=prompt.token_ids, num=num, seed=seeds[start + index] if seeds else 0
            )
            for index, prompt in enumerate(prompts)
        ]
        groups, started, seconds = {}, time.perf_counter(), {}
        for group in engine.generate(requests, sampling):
            groups[int(group.request_id)] = group
            seconds[int(group.request_id)] = time.perf_counter() - started
            between()
        for index, (sample, prompt) in enumerate(zip(chosen, prompts, strict=True)):
            group = groups[index]
            if group.error is not None:
                raise RuntimeError(f"evaluation: the engine lost {sample.id}: {group.error}")
            yield tuple(
                _read(completion, sample, prompt, codec, config, seconds[index])
                for completion in group.completions
            )


def _read(
    completion: Completion, sample: Sample, prompt: Prompt, codec: TextCodec, config: Config, seconds: float
) -> Prediction:
    text, answer = parse_completion(
        completion,
        sample,
        prompt,
        codec,
        max_labels=config.output.max_labels,
        thinking=config.model.thinking,
    )
    finished = completion.finish_reason == "stop"
    return prediction_of(
        sample, text, answer, config, finished=finished, think_open=prompt.think_open,
        num_prompt_tokens=len(prompt.token_ids), num_tokens=len(completion.token_ids), seconds=seconds,
    )  # fmt: skip


def prediction_of(
    sample: Sample,
    text: str,
    answer: Answer,
    config: Config,
    *,
    finished: bool,
    think_open: bool = False,
    num_prompt_tokens: int,
    num_tokens: int,
    seconds: float | None,
) -> Prediction:
    """An answer with what strict and lenient reading make of it."""
    lenient = parse_lenient(
        text,
        dataset=sample.dataset,
        inventory=sample.inventory,
        max_labels=config.output.max_labels,
        finished=finished,
        think_open_in_prompt=think_open,
    )
    return Prediction(
        sample=sample,
        text=text,
        answer=answer,
        label=predicted_label(answer),
        lenient=lenient_label(lenient, sample.inventory),
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        seconds=seconds,
    )


def encode_prompt(sample: Sample, codec: TextCodec, config: Config, *, persona: bool) -> Prompt:
    """The prompt of an input under the run's settings."""
    return build_prompt(
        sample,
        codec,
        max_labels=config.output.max_labels,
        max_tokens=config.data.max_prompt,
        thinking=config.model.thinking,
        style=config.output.prompt_style,
        persona=persona,
        descriptions=config.output.descriptions,
    )


def score(
    predictions: Sequence[Prediction],
    label_sets: Mapping[str, LabelSet],
    majority: Mapping[str, str],
    parts: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of each data set. ``majority`` is its most frequent training label, the baseline beside every
    score.

    ``parts`` (root dialogue -> name) adds under ``parts`` the same scores of each part of a set, less the
    confusion. Two systems are compared on the same part, never part with part.
    """
    results = {}
    for dataset in sorted({prediction.sample.dataset for prediction in predictions}):
        chosen = [prediction for prediction in predictions if prediction.sample.dataset == dataset]
        results[dataset] = _score_set(chosen, label_sets[dataset], majority[dataset])
        if parts is not None:
            groups: dict[str, list[Prediction]] = {}
            for prediction in chosen:
                groups.setdefault(parts[prediction.sample.root_id], []).append(prediction)
            results[dataset]["parts"] = {
                name: _without_confusion(_score_set(group, label_sets[dataset], majority[dataset]))
                for name, group in sorted(groups.items(), reverse=True)
            }
    return results


def mean_wf1(results: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean over data sets of strict weighted F1: what selects a checkpoint; 0 where nothing was scored."""
    values = [result["weighted_f1"] for result in results.values() if result["num"]]
    return float(np.mean(values)) if values else 0.0


def label_scores(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> dict[str, Any]:
    """Scores of one label for each input over the labels of the set; None, or a label outside, is invalid."""
    order = {label: index for index, label in enumerate(labels)}
    invalid = len(order)
    wanted = np.array([order[label] for label in gold], np.int32)
    found = np.array([order.get(label, invalid) if label else invalid for label in predicted], np.int32)
    counts = metrics.confusion(wanted, found, num_classes=len(order))
    f1, support = np.asarray(metrics.class_f1(counts)), np.asarray(metrics.support(counts))
    return {
        "accuracy": float(metrics.accuracy(counts)),
        "weighted_f1": float(metrics.weighted_f1(counts)),
        "macro_f1": float(metrics.macro_f1(counts)),
        "invalid_rate": float(np.mean(found == invalid)) if len(found) else 0.0,
        "per_class": {
            label: {"f1": float(f1[i]), "support": int(support[i])} for i, label in enumerate(labels)
        },
        "confusion": np.asarray(counts).tolist(),
    }


def _score_set(predictions: Sequence[Prediction], labels: LabelSet, majority: str) -> dict[str, Any]:
    gold = [gold_label(p.sample) for p in predictions]

    def some(predicted: Sequence[str | None], *names: str) -> dict[str, Any]:
        scores = label_scores(gold, predicted, labels.labels)
        return {name: scores[name] for name in ("accuracy", "weighted_f1", "macro_f1", *names)}

    strict = label_scores(gold, [p.label for p in predictions], labels.labels)
    inventories = [p.sample.inventory for p in predictions]
    num_classes = len(labels.labels) + 1
    pred, valid = answers_to_arrays([[p.answer] for p in predictions], inventories, num_classes=num_classes)
    gold_weights = gold_to_array([p.sample.gold for p in predictions], inventories, num_classes=num_classes)
    r1 = np.asarray(weighted_iou(jnp.asarray(pred), jnp.asarray(gold_weights), jnp.asarray(valid)))
    return strict | {
        "num": len(predictions),
        "r1": float(r1.mean()),
        "num_labels_predicted": len({p.label for p in predictions if p.label}),
        "lenient": some([p.lenient for p in predictions], "invalid_rate"),
        "instructerc": some([_instructerc(p) for p in predictions]),
        "majority": some([majority] * len(predictions)) | {"label": majority},
        "calibration": calibration(
            normalised(
                [dict(p.answer.emotion) if p.answer.valid else {} for p in predictions], labels.labels
            ),
            places(gold, labels.labels),
            places([p.label for p in predictions], labels.labels),
            np.array([p.answer.valid for p in predictions]),
        ),
        "mean_tokens": float(np.mean([p.num_tokens for p in predictions])),
        "codes": _code_rates(predictions),
    }


def _without_confusion(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "confusion"}


def _instructerc(prediction: Prediction) -> str | None:
    """The label by the scoring of InstructERC, in which nothing is invalid."""
    sample = prediction.sample
    pairs = parse_lenient(
        prediction.text, dataset=sample.dataset, inventory=sample.inventory, scoring="instructerc"
    )
    return lenient_label(pairs, sample.inventory)


def _code_rates(predictions: Sequence[Prediction]) -> dict[str, float]:
    codes = sorted({code for p in predictions for code in p.answer.codes})
    return {code: float(np.mean([code in p.answer.codes for p in predictions])) for code in codes}

"""The phase on labels alone: which dialogues it reads, how they become rows, and what it scores on dev."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from selfemo_jax.algo import metrics
from selfemo_jax.config import Config
from selfemo_jax.data.batching import gather, micro_batches, pack
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.dialogues import LabelSet
from selfemo_jax.data.inputs import Sample, build_inputs, shuffle_gold
from selfemo_jax.data.label_rows import (
    LabelTable,
    Question,
    class_weights,
    dialogues_of,
    label_sequences,
    label_table,
    questions,
)
from selfemo_jax.model.decoder import Params
from selfemo_jax.run_data import RunData, fixed_subset
from selfemo_jax.scores import encode_prompt
from selfemo_jax.train_step import Steps, device_batch

Dialogues = Mapping[str, tuple[tuple[Sample, ...], ...]]
"""Data set -> dialogues -> samples of their labelled lines."""


def table_of(data: RunData, codec: TextCodec, config: Config) -> LabelTable | None:
    """The table of the run's label sets; None where no phase uses it, as not every tokenizer can tell every
    label apart by one token."""
    if config.cold_start.rows != "dialogues" and not config.cold_start.labels.epochs:
        return None
    inventories = {name: labels.labels for name, labels in data.label_sets.items()}
    return label_table(inventories, codec, thinking=config.model.thinking)


def training_dialogues(data: RunData, config: Config) -> Dialogues:
    """Every labelled line of the training dialogues, whatever `data.rule` says; with `data.max_items`, of the
    dialogues that those inputs come from."""
    used = {sample.root_id for sample in data.all_train()}
    limited = config.data.max_items is not None
    chosen = [d for root, d in sorted(data.dialogues.items()) if root in used or not limited]
    found = {}
    for name, labels in sorted(data.label_sets.items()):
        roots = [dialogue for dialogue in chosen if dialogue.dataset == name]
        samples = build_inputs(roots, labels, rule="all")
        samples = data.biographies.told(samples) if data.biographies else samples
        found[name] = dialogues_of(
            shuffle_gold(samples, config.seed) if config.data.shuffle_gold else samples
        )
    return found


def question_encoder(
    dialogues: Dialogues, table: LabelTable, codec: TextCodec, config: Config
) -> Callable[[Sequence[Sample]], tuple[Question, ...]]:
    """Dialogue -> its questions, weighted by how frequent each label is in ``dialogues``."""
    samples = [sample for group in dialogues.values() for dialogue in group for sample in dialogue]
    weights = class_weights(samples, power=config.cold_start.class_power)
    encode = functools.partial(encode_prompt, codec=codec, config=config, persona=config.data.persona)
    return functools.partial(questions, table=table, encode=encode, weights=weights)


def label_metrics(
    steps: Steps,
    params: Params,
    dev: Sequence[Sample],
    table: LabelTable,
    label_sets: Mapping[str, LabelSet],
    codec: TextCodec,
    config: Config,
) -> dict[str, float]:
    """``dev/SET/label_wf1`` and ``label_accuracy`` of the best label at every question, nothing being
    written."""
    chosen = fixed_subset(
        dialogues_of(dev), config.cold_start.labels.dev_dialogues, seed=config.seed, purpose="dev labels"
    )
    encode = functools.partial(
        encode_prompt, codec=codec, config=config, persona=config.eval.persona == "given"
    )
    asked = [question for dialogue in chosen for question in questions(dialogue, table, encode, {})]
    gold = np.array([question.label for question in asked])
    best = np.array(best_labels(steps, params, asked, config))
    results: dict[str, Any] = {}
    for name, labels in sorted(label_sets.items()):
        own = np.array([question.dataset == name for question in asked])
        if not own.any():
            continue
        first = table.index(name, labels.labels[0])
        counts = metrics.confusion(
            (gold[own] - first).astype(np.int32),
            (best[own] - first).astype(np.int32),
            num_classes=len(labels.labels),
        )
        results[f"dev/{name}/label_wf1"] = float(metrics.weighted_f1(counts))
        results[f"dev/{name}/label_accuracy"] = float(metrics.accuracy(counts))
    values = [value for name, value in results.items() if name.endswith("label_wf1")]
    return results | {"dev/label_wf1": float(np.mean(values)) if values else math.nan}


def best_labels(steps: Steps, params: Params, asked: Sequence[Question], config: Config) -> list[int]:
    """Table position of the best label of each question's set."""
    packed = pack(
        label_sequences(asked), layout="shared_prefix", row_tokens=config.batch.row_tokens,
        micro_rows=config.batch.micro_rows,
    )  # fmt: skip
    parts = micro_batches(packed.batch, micro_rows=config.batch.micro_rows)
    pending = [steps.label_choices(params, device_batch(part, steps.mesh)) for part in parts]
    chosen = np.concatenate(jax.device_get(pending), axis=0)
    return [int(values[0]) for values in gather(chosen, packed.places)]

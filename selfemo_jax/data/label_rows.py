"""Rows of labels: one row a dialogue, one question after each labelled line.

A question is the prompt of that line and the beginning of an answer, up to where the labels of its set part
ways; its one target is the first token that tells them apart. In the prompt style "dialogue" the questions
of a dialogue branch off one trunk (`data.batching`, layout ``shared_prefix``), so that all labels of a
dialogue come from one forward pass, and each is learned in the place where an answer writes it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from selfemo_jax.data.batching import PackedBatch, TrainSequence
from selfemo_jax.data.dialogues import heaviest_label
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_table import LabelTable
from selfemo_jax.data.prompts import Prompt, TextCodec, completion_ids


@dataclass(frozen=True, kw_only=True)
class Question:
    """One labelled line as it is trained on."""

    dataset: str
    prompt_ids: tuple[int, ...]
    """The prompt and the opening of the answer."""
    label: int
    """Position of the gold label in the table."""
    window: tuple[str, int]
    """The dialogue and the line its history begins at; questions with the same window share a trunk."""
    weight: float = 1.0
    """Its weight against other questions."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A full answer as it is trained on beside the others of its dialogue."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    window: tuple[str, int]
    """As in `Question`."""
    label_at: int | None
    """Where the token that tells the label apart stands in the completion; None where it opens otherwise."""
    weight: float = 1.0
    """Weight of that token against the same of other answers."""


def label_table(inventories: Mapping[str, Sequence[str]], codec: TextCodec, *, thinking: bool) -> LabelTable:
    """The table of the data sets' labels under a tokenizer.

    ValueError where two labels of a set begin alike and part from a third before they part from each other.
    """
    names, token_ids, sets, openings = [], [], [], []
    for number, (dataset, labels) in enumerate(sorted(inventories.items())):
        answers = [
            completion_ids({label: 1.0}, {label: 1.0}, "x", codec, think="" if thinking else None)
            for label in labels
        ]
        shared = next(i for i, ids in enumerate(zip(*answers, strict=False)) if len(set(ids)) > 1)
        tokens = [answer[shared] for answer in answers]
        alike = [label for label, token in zip(labels, tokens, strict=True) if tokens.count(token) > 1]
        if alike:
            raise ValueError(
                f"cold_start: with this tokenizer the labels {', '.join(alike)} of {dataset} begin "
                "with the same token, which the loss cannot tell apart; use another tokenizer, or set "
                "cold_start.rows to examples and cold_start.labels.epochs to 0"
            )
        names += [(dataset, label) for label in labels]
        token_ids += tokens
        sets += [number] * len(tokens)
        openings.append((dataset, tuple(answers[0][:shared])))
    return LabelTable(
        names=tuple(names), token_ids=tuple(token_ids), sets=tuple(sets), openings=tuple(openings)
    )


def dialogues_of(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], ...]:
    """The samples of each dialogue, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.root_id, []).append(sample)
    return tuple(map(tuple, groups.values()))


def class_weights(samples: Sequence[Sample], *, power: float) -> dict[tuple[str, str], float]:
    """Weight of each (data set, label): its frequency to the power of -``power``, scaled so that the mean
    over the samples of a set is 1."""
    counts = Counter((sample.dataset, heaviest_label(sample.gold)) for sample in samples)
    raw = {key: count**-power for key, count in counts.items()}
    weights = {}
    for dataset in {dataset for dataset, _ in counts}:
        own = [key for key in counts if key[0] == dataset]
        mean = sum(counts[key] * raw[key] for key in own) / sum(counts[key] for key in own)
        weights |= {key: raw[key] / mean for key in own}
    return weights


def questions(
    dialogue: Sequence[Sample],
    table: LabelTable,
    encode: Callable[[Sample], Prompt],
    weights: Mapping[tuple[str, str], float],
) -> tuple[Question, ...]:
    """The questions of one dialogue's labelled lines; ``encode`` makes their prompts."""
    found = []
    for sample in dialogue:
        prompt, label = encode(sample), heaviest_label(sample.gold)
        found.append(
            Question(
                dataset=sample.dataset,
                prompt_ids=(*prompt.token_ids, *table.opening(sample.dataset)),
                label=table.index(sample.dataset, label),
                window=(sample.root_id, prompt.num_dropped_turns),
                weight=weights.get((sample.dataset, label), 1.0),
            )
        )
    return tuple(found)


def label_sequences(asked: Sequence[Question]) -> list[TrainSequence]:
    """The questions as sequences of one target, their weights summing to 1."""
    total = sum(question.weight for question in asked)
    windows: dict[tuple[str, int], int] = {}
    return [
        TrainSequence(
            group=windows.setdefault(question.window, len(windows)),
            prompt_ids=question.prompt_ids,
            completion_ids=(question.label,),
            token_weight=question.weight / total,
        )
        for question in asked
    ]


def answer_sequences(answered: Sequence[Answered], *, label_weight: float) -> list[TrainSequence]:
    """Full answers as sequences; the weights of all their tokens sum to 1, that of the label counting
    ``label_weight`` times its own."""
    rows = []
    for answer in answered:
        weights = np.ones(len(answer.completion_ids))
        if answer.label_at is not None:
            weights[answer.label_at] = label_weight * answer.weight
        rows.append(weights)
    total = float(sum(weights.sum() for weights in rows))
    windows: dict[tuple[str, int], int] = {}
    return [
        TrainSequence(
            group=windows.setdefault(answer.window, len(windows)),
            prompt_ids=answer.prompt_ids,
            completion_ids=answer.completion_ids,
            token_weight=tuple((weights / total).tolist()),
        )
        for answer, weights in zip(answered, rows, strict=True)
    ]


def without_tokens(batch: PackedBatch, *, share: float, blank: int, seed: tuple[int, ...]) -> PackedBatch:
    """The batch with a share of the trunks' tokens blanked, drawn from the seed; questions stay whole."""
    drawn = np.random.default_rng(seed).random(batch.tokens.shape) < share
    return replace(batch, tokens=np.where(drawn & (batch.prefix_ids < 0), blank, batch.tokens))

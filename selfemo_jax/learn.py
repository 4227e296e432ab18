"""From scored groups, or supervised examples, to optimizer updates: weights of tokens, packing, log-probs,
update."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from selfemo_jax.algo.losses import importance_weights, token_weights
from selfemo_jax.config import Config
from selfemo_jax.data.batching import Layout, Packed, TrainSequence, gather, pack, scatter
from selfemo_jax.data.label_rows import (
    Answered,
    Question,
    answer_sequences,
    label_sequences,
    without_tokens,
)
from selfemo_jax.model.decoder import Params
from selfemo_jax.rollout.gap import batch_ratio, join_gaps, sequence_gap
from selfemo_jax.scoring import Scored
from selfemo_jax.train_step import Steps, TrainState, sequence_logprobs, update


class Timer(Protocol):
    """Times a named part of a step."""

    def __call__(self, name: str) -> AbstractContextManager: ...


def sft_update(
    steps: Steps,
    state: TrainState,
    examples: Sequence[Any],
    config: Config,
    *,
    rate: float,
    where: str,
    timer: Timer,
) -> tuple[TrainState, dict[str, float]]:
    """One supervised update on (prompt ids, completion ids) pairs, or with `cold_start.rows: dialogues` on
    lists of `Answered`; the loss is on completion tokens, in pairs each alike."""
    if config.cold_start.rows == "dialogues":
        sequences, layout = _answers_of_dialogues(examples, config)
    else:
        sequences, layout = _answers(examples), "packed"
    packed = _pack(sequences, layout, config)
    with timer("update"):
        state, metrics = update(
            steps, state, packed.batch, kind="sft", micro_rows=config.batch.micro_rows, rate=rate, where=where
        )
    return state, metrics | _sizes([packed])


def _answers(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TrainSequence]:
    weights = token_weights(np.array([len(completion) for _, completion in examples]), "token-mean")
    return [
        TrainSequence(
            group=index,
            prompt_ids=tuple(prompt),
            completion_ids=tuple(completion),
            token_weight=float(weights[index]),
        )
        for index, (prompt, completion) in enumerate(examples)
    ]


def _answers_of_dialogues(
    dialogues: Sequence[Sequence[Answered]], config: Config
) -> tuple[list[TrainSequence], Layout]:
    answered = [answer for dialogue in dialogues for answer in dialogue]
    return answer_sequences(answered, label_weight=config.cold_start.label_weight), "shared_prefix"


def label_update(
    steps: Steps,
    state: TrainState,
    dialogues: Sequence[Sequence[Question]],
    config: Config,
    *,
    step: int,
    rate: float,
    where: str,
    timer: Timer,
) -> tuple[TrainState, dict[str, float]]:
    """One update on the labels of some dialogues, a question each; ``step`` seeds the dropped tokens."""
    asked = [question for dialogue in dialogues for question in dialogue]
    packed = _pack(label_sequences(asked), "shared_prefix", config)
    batch, share = packed.batch, config.cold_start.labels.token_dropout
    if share:
        batch = without_tokens(batch, share=share, blank=0, seed=(config.seed, step))
    with timer("update"):
        state, metrics = update(
            steps, state, batch, kind="labels", micro_rows=config.batch.micro_rows, rate=rate, where=where
        )
    return state, metrics | _sizes([packed])


def rl_update(
    steps: Steps,
    state: TrainState,
    reference: Params | None,
    scored: Scored,
    config: Config,
    *,
    rate: float,
    where: str,
    timer: Timer,
) -> tuple[TrainState, dict[str, float]]:
    """The updates of one step (equation 14): per mini-batch of prompts, `rl.updates_per_batch` times over
    them all.

    Old and reference log-probs are computed before the first update. With a single update, and no correction
    of the sampler, the old log-probs are those of the update itself and are not computed twice.
    """
    micro_rows = config.batch.micro_rows
    packs = [_pack(s, config.rl.layout, config) for s in _mini_batches(scored, config) if s]
    if config.loss.aggregation == "micro-token-mean":
        packs = [_weighed_by_micro_batch(packed, micro_rows) for packed in packs]
    num_updates = len(packs) * config.rl.updates_per_batch
    on_policy = num_updates == 1 and not _corrects(config)
    gaps: list[dict[str, float]] = []
    prepared = []
    for packed in packs:
        batch = packed.batch
        if reference is not None:
            with timer("reference"):
                ref_logprobs = sequence_logprobs(
                    steps, reference, batch, micro_rows=micro_rows, at_once=config.batch.logprobs_at_once
                )
            batch = replace(batch, ref_logprobs=ref_logprobs)
        if not on_policy:
            with timer("old_logprobs"):
                old_logprobs = sequence_logprobs(
                    steps, state.params, batch, micro_rows=micro_rows, at_once=config.batch.logprobs_at_once
                )
            weights, gap = _importance(old_logprobs, packed, config)
            gaps.append(gap)
            batch = replace(batch, old_logprobs=old_logprobs, importance_weights=weights)
        prepared.append(batch)
    collected: list[dict[str, float]] = []
    for _ in range(config.rl.updates_per_batch):
        for batch in prepared:
            with timer("update"):
                state, metrics = update(
                    steps,
                    state,
                    batch,
                    kind="rl",
                    micro_rows=micro_rows,
                    rate=rate,
                    where=where,
                    on_policy=on_policy,
                )
            collected.append(metrics)
    means = {name: float(_over(name)([m[name] for m in collected])) for name in next(iter(collected), ())}
    means |= batch_ratio(means) | join_gaps(gaps)
    if reference is None:
        # Nothing was measured: the batch then holds zeros for the reference's log-probs.
        means.pop("kl", None)
    return state, means | _sizes(packs) | {"update/count": float(len(collected))}


def _mini_batches(scored: Scored, config: Config) -> list[list[TrainSequence]]:
    """The present rollouts, cut by prompts; each token's weight is decided over its whole mini-batch."""
    size = config.rl.mini_prompts
    batches = []
    for start in range(0, len(scored.samples), size):
        prompts = range(start, min(start + size, len(scored.samples)))
        members = [(p, g) for p in prompts for g in range(len(scored.completions[p]))]
        lengths = np.array([len(scored.completions[p][g].token_ids) for p, g in members], np.int64)
        norm = config.loss.norm_constant or float(config.rollout.max_tokens)
        # Micro-batches are known once the rows are: their weights are decided there.
        mode = "token-mean" if config.loss.aggregation == "micro-token-mean" else config.loss.aggregation
        weights = token_weights(lengths, mode, norm_constant=norm)
        batches.append(
            [
                TrainSequence(
                    group=p,
                    prompt_ids=scored.prompts[p].token_ids,
                    completion_ids=scored.completions[p][g].token_ids,
                    token_weight=float(weight),
                    advantage=float(scored.advantages[p, g]),
                    rollout_logprobs=scored.completions[p][g].logprobs,
                )
                for (p, g), weight in zip(members, weights, strict=True)
            ]
        )
    return batches


def _over(name: str):
    """How a metric of several updates becomes one."""
    return np.max if name.endswith("_max") else np.mean


def _corrects(config: Config) -> bool:
    """Whether the loss weighs tokens by how far the sampler was from the trainer."""
    return config.loss.importance != "off" or config.loss.importance_band is not None


def _weighed_by_micro_batch(packed: Packed, micro_rows: int) -> Packed:
    lengths = np.array([place.length for place in packed.places])
    micro_batches = np.array([place.row // micro_rows for place in packed.places])
    weights = token_weights(lengths, "micro-token-mean", micro_batches=micro_batches)
    values = [np.full(length, weight) for length, weight in zip(lengths, weights, strict=True)]
    batch = replace(packed.batch, token_weights=scatter(values, packed, fill=0.0))
    return replace(packed, batch=batch)


def _importance(
    old_logprobs: np.ndarray, packed: Packed, config: Config
) -> tuple[np.ndarray, dict[str, float]]:
    """Sampler-to-trainer weights ``[B, T]`` and what whole sequences tell of the gap: a sequence's weight
    needs it whole, so it is taken out of the rows."""
    old = gather(old_logprobs, packed.places)
    rollout = gather(packed.batch.rollout_logprobs, packed.places)
    gaps = sequence_gap(old, rollout)
    if not _corrects(config):
        return packed.batch.importance_weights, gaps
    shape = (len(old), config.rollout.max_tokens)
    padded = np.zeros((3, *shape), np.float32)
    for index, (current, sampled) in enumerate(zip(old, rollout, strict=True)):
        padded[0, index, : len(current)] = current
        padded[1, index, : len(current)] = sampled
        padded[2, index, : len(current)] = 1.0
    weights = importance_weights(
        jnp.asarray(padded[0]),
        jnp.asarray(padded[1]),
        jnp.asarray(padded[2] > 0),
        kind=config.loss.importance,
        cap=config.loss.importance_cap,
        band=config.loss.importance_band,
    )
    rows = np.asarray(weights)
    cut = [rows[i, : len(values)] for i, values in enumerate(old)]
    if cut:
        gaps["rollout_gap/masked"] = float(np.mean([row.max(initial=0.0) == 0.0 for row in cut]))
    return scatter(cut, packed, fill=1.0), gaps


def _pack(sequences: Sequence[TrainSequence], layout: Layout, config: Config) -> Packed:
    return pack(
        sequences,
        layout=layout,
        row_tokens=config.batch.row_tokens,
        micro_rows=config.batch.micro_rows,
        balance=config.batch.balance,
    )


def _sizes(packs: Sequence[Packed]) -> dict[str, float]:
    positions = sum(packed.batch.tokens.size for packed in packs)
    tokens = sum(packed.num_tokens for packed in packs)
    return {
        "batch/tokens": float(tokens),
        "batch/positions": float(positions),
        "batch/padding_share": 1.0 - tokens / max(1, positions),
    }

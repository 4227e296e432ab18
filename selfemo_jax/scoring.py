"""From rollout groups to rewards and advantages: decode, parse, and one compiled call over all groups of a
step.

Shape letters: P prompts, G rollouts of a prompt, C classes (label slots, the last for unknown labels).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from selfemo_jax.algo.advantages import scaled_advantages, share_flat, share_r2_only
from selfemo_jax.algo.consensus import (
    collapse_entropy,
    consensus_reward,
    core_distribution,
    core_excludes_gold,
    core_set,
    reward_correlation,
)
from selfemo_jax.algo.rewards import (
    argmax_accuracy,
    combine,
    load_reward,
    reward_preset,
    reward_weight,
    similarity_reward,
    weighted_iou,
)
from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.dialogues import heaviest_label
from selfemo_jax.data.diversity import distinct, self_bleu
from selfemo_jax.data.grammar import Answer, parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_arrays import answers_to_arrays, class_mask, gold_to_array, similarity_array
from selfemo_jax.data.label_rows import class_weights
from selfemo_jax.data.prompts import Prompt
from selfemo_jax.rollout.engine import Completion, Group

_collapse_entropy = jax.jit(collapse_entropy)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How a run scores the groups of a step."""

    kernels: Callable[..., dict[str, jax.Array]]
    """Reward, consensus and advantages as one compiled function of ``(pred [P, G, C], gold [P, C],
    valid [P, G], present [P, G], class_mask [P, C], step, total_steps, similarity [P, C, C] or None,
    prompt_weights [P] or None)``."""
    label_weights: Mapping[tuple[str, str], float]
    """What a prompt's advantages count, by (data set, gold label); empty where all count alike."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rollouts of a step with everything computed from them; arrays ``[P, G]`` on the host."""

    samples: tuple[Sample, ...]
    prompts: tuple[Prompt, ...]
    completions: tuple[tuple[Completion, ...], ...]
    """Empty for a lost group."""
    texts: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[Answer, ...], ...]
    present: np.ndarray
    """False for the places of lost groups, which take part in nothing."""
    valid: np.ndarray
    r1: np.ndarray
    r2: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    metrics: dict[str, float]


def make_scorer(config: Config, training: Sequence[Sample] = ()) -> Scorer:
    """The scorer of this run; `advantages.class_power` counts the labels of its ``training`` inputs."""
    power = config.advantages.class_power
    label_weights = class_weights(training, power=power) if power else {}
    settings, preset = config.reward, reward_preset(config.reward.preset)
    preset = dataclasses.replace(preset, form=settings.combine or preset.form)
    presence = preset.presence if settings.presence is None else settings.presence
    lambda_max = preset.lambda_max if settings.lambda_max is None else settings.lambda_max
    custom = load_reward(settings.function) if settings.function else None

    @jax.jit
    def score(pred, gold, valid, present, mask, step, total_steps, similarity, prompt_weights=None):
        if custom is not None:
            r1 = custom(pred, gold, valid, mask)
        elif settings.primary == "accuracy":
            r1 = argmax_accuracy(pred, gold, valid)
        elif settings.primary == "similarity":
            r1 = similarity_reward(pred, gold, valid, similarity)
        else:
            r1 = weighted_iou(pred, gold, valid, smoothing=settings.smoothing, class_mask=mask)
        r1 = jnp.where(valid, r1, settings.fail_value)
        if settings.consensus == "off":
            r2, rewards, weight = jnp.zeros_like(r1), r1, jnp.float32(0.0)
        else:
            r2 = consensus_reward(
                pred,
                valid,
                mask,
                top_k=settings.top_k,
                presence=presence,
                kind=settings.consensus,
                core=settings.core,
                divide=settings.divide,
            )
            schedule = settings.lambda_schedule
            weight = reward_weight(step, total_steps, lambda_max=lambda_max, schedule=schedule)
            rewards = combine(
                r1,
                r2,
                step=step,
                total_steps=total_steps,
                preset=preset,
                lambda_max=lambda_max,
                schedule=schedule,
            )
        advantages = scaled_advantages(
            r1,
            r2,
            rewards,
            weight,
            present,
            scale=config.advantages.scale,
            kind=config.advantages.kind,
            eps=config.advantages.eps,
        )
        if prompt_weights is not None:
            advantages = advantages * prompt_weights[:, None]
        distribution = core_distribution(pred, valid, mask, core=settings.core, presence=presence)
        core = core_set(distribution, top_k=settings.top_k)
        only, only_share = share_r2_only(r1, r2, advantages, present)
        return {
            "r1": r1,
            "r2": r2,
            "rewards": rewards,
            "advantages": advantages,
            "distribution": distribution,
            "named_gold": argmax_accuracy(pred, gold, valid),
            "reward/lambda": weight,
            "reward/r1_r2_correlation": reward_correlation(r1, r2, present),
            "group/zero_variance": share_flat(rewards, present),
            "group/share_r2_only": only,
            "group/share_r2_only_of_advantage": only_share,
            "group/core_excludes_gold": core_excludes_gold(core, gold).sum()
            / jnp.maximum(present.any(axis=1).sum(), 1),
        }

    return Scorer(kernels=score, label_weights=label_weights)


def parse_completion(
    completion: Completion,
    sample: Sample,
    prompt: Prompt,
    codec: TextCodec,
    *,
    max_labels: int,
    thinking: bool,
) -> tuple[str, Answer]:
    """Text and strict reading of a completion; the end-of-turn token is not part of the text."""
    finished = completion.finish_reason == "stop"
    ids = completion.token_ids[:-1] if finished else completion.token_ids
    text = codec.decode(list(ids))
    answer = parse(
        text,
        inventory=sample.inventory,
        max_labels=max_labels,
        thinking=thinking,
        think_open_in_prompt=prompt.think_open,
        finished=finished,
    )
    return text, answer


def score_groups(
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    groups: Sequence[Group],
    codec: TextCodec,
    scorer: Scorer,
    config: Config,
    *,
    num_classes: int,
    step: int,
    total_steps: int,
) -> Scored:
    """Parse and score the groups of a step (``groups[p]`` belongs to ``samples[p]``); ``step`` counts from 1.

    Lost groups keep their place, so that shapes stay fixed, and are absent from every mean and advantage.
    """
    group_size = config.rl.group_size
    read = functools.partial(
        parse_completion, codec=codec, max_labels=config.output.max_labels, thinking=config.model.thinking
    )
    texts, answers = [], []
    for sample, prompt, group in zip(samples, prompts, groups, strict=True):
        pairs = [read(completion, sample, prompt) for completion in group.completions]
        texts.append(tuple(text for text, _ in pairs))
        answers.append(tuple(answer for _, answer in pairs))
    present = np.array([[group.error is None] * group_size for group in groups])
    inventories = [sample.inventory for sample in samples]
    blank = parse("", inventory=(), max_labels=1)
    full = [row if row else (blank,) * group_size for row in answers]
    pred, valid = answers_to_arrays(full, inventories, num_classes=num_classes)
    gold = gold_to_array([sample.gold for sample in samples], inventories, num_classes=num_classes)
    mask = class_mask(inventories, num_classes=num_classes)
    similarity = None
    if config.reward.primary == "similarity":
        similarity = similarity_array(config.reward.similarity, inventories, num_classes=num_classes)
    times = (np.float32(step), np.float32(total_steps))
    weights = _prompt_weights(samples, scorer.label_weights)
    computed = jax.device_get(scorer.kernels(pred, gold, valid, present, mask, *times, similarity, weights))
    distribution, named_gold = computed.pop("distribution"), computed.pop("named_gold")
    arrays = {name: computed.pop(name) for name in ("r1", "r2", "rewards", "advantages")}
    metrics = {name: float(value) for name, value in computed.items()}
    metrics |= _summary(arrays, present, valid, answers, groups)
    metrics |= _collapse(samples, distribution) | _variety(answers)
    if (wrong := valid & present & (named_gold == 0)).any():
        metrics["reward/r2_of_wrong"] = float(arrays["r2"][wrong].mean())
    return Scored(
        samples=tuple(samples),
        prompts=tuple(prompts),
        completions=tuple(group.completions for group in groups),
        texts=tuple(texts),
        answers=tuple(answers),
        present=present,
        valid=valid,
        metrics=metrics | _by_origin(samples, arrays["r1"], present),
        **arrays,
    )


def _prompt_weights(
    samples: Sequence[Sample], label_weights: Mapping[tuple[str, str], float]
) -> np.ndarray | None:
    if not label_weights:
        return None
    found = [label_weights.get((sample.dataset, heaviest_label(sample.gold)), 1.0) for sample in samples]
    return np.array(found, np.float32)


def _summary(arrays, present, valid, answers, groups) -> dict[str, float]:
    num = max(1, int(present.sum()))
    metrics = {
        "reward/r1": float(arrays["r1"][present].sum() / num),
        "reward/r2": float(arrays["r2"][present].sum() / num),
        "reward/total": float(arrays["rewards"][present].sum() / num),
        "reward/total_std": float(arrays["rewards"][present].std()) if present.any() else 0.0,
        "parse/valid": float(valid.sum() / num),
        "group/lost": float(sum(group.error is not None for group in groups)),
    }
    codes = Counter(code for row in answers for answer in row for code in answer.codes)
    metrics |= {f"parse/{code}": count / num for code, count in sorted(codes.items())}
    listed = [len(answer.emotion) for row in answers for answer in row if answer.valid]
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    stopped = [c.finish_reason == "stop" for group in groups for c in group.completions]
    return metrics | {
        "answer/num_labels": float(np.mean(listed)) if listed else 0.0,
        "completion/tokens_mean": float(np.mean(lengths)) if lengths else 0.0,
        "completion/tokens_max": float(max(lengths, default=0)),
        "completion/stopped": float(np.mean(stopped)) if stopped else 0.0,
    }


def _collapse(samples: Sequence[Sample], distribution: np.ndarray) -> dict[str, float]:
    """By data set the entropy in nats of what the groups of a step agree on ``[P, C]``; it falls to 0 where
    all of them come to say one label. Sets without a valid answer are left out."""
    metrics: dict[str, float] = {}
    agreed = distribution.sum(axis=1) > 0
    for name in sorted({sample.dataset for sample in samples}):
        rows = agreed & np.array([sample.dataset == name for sample in samples])
        if rows.any():
            # Rows of zeros do not count, and a fixed shape is compiled once.
            entropy = _collapse_entropy(np.where(rows[:, None], distribution, 0.0))
            metrics[f"group/collapse_entropy/{name}"] = float(entropy)
    return metrics


def _variety(answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """How varied the replies of the valid answers are: different word n-grams over all, and self-BLEU among
    all replies of the step and among those of one group; what is not defined is left out."""
    said = [(p, one.response) for p, row in enumerate(answers) for one in row if one.valid]
    if not said:
        return {}
    groups, replies = zip(*said, strict=True)
    found = {f"reply/distinct_{n}": distinct(replies, n) for n in (1, 2)}
    for name, of in (("self_bleu", None), ("self_bleu_in_group", groups)):
        alike = self_bleu(replies, of)
        if not np.isnan(alike).all():
            found[f"reply/{name}"] = float(np.nanmean(alike))
    return found


def _by_origin(samples: Sequence[Sample], r1: np.ndarray, present: np.ndarray) -> dict[str, float]:
    """r1 by data set, by origin and by the number of generated turns (``depth_1`` on), and how many prompts
    of each a step held: gold of a synthetic input was declared by the policy itself, so its reward is never
    mixed unseen with that of human labels."""
    rows_of: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        depth = [f"depth_{sample.depth}"] if sample.depth else []
        for name in (sample.dataset, sample.origin, *depth):
            rows_of.setdefault(name, []).append(row)
    metrics: dict[str, float] = {}
    for name, rows in sorted(rows_of.items()):
        metrics[f"data/{name}"] = float(len(rows))
        if present[rows].any():
            metrics[f"reward/r1/{name}"] = float(r1[rows][present[rows]].mean())
    return metrics

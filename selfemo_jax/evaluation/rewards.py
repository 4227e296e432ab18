"""What the answers of an evaluation would have earned in training.

A single answer has r1 alone, its weighted IoU with the gold labels. Several answers to one input are a group,
and a group has the whole reward: r1, the consensus r2 and R, by the kernels and settings of training. The two
are told apart wherever they are shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfemo_jax.algo.rewards import reward_preset, weighted_iou
from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.data.label_arrays import answers_to_arrays, class_mask, gold_to_array, similarity_array
from selfemo_jax.scores import Prediction
from selfemo_jax.scoring import make_scorer

SINGLE = "r1 of single answers"

_iou = jax.jit(weighted_iou)


@dataclass(frozen=True, kw_only=True)
class GroupRewards:
    """Rewards of groups of answers; arrays [P, G], P inputs and G answers to each."""

    r1: np.ndarray
    """Weighted IoU, whatever `reward.primary` says."""
    r2: np.ndarray
    rewards: np.ndarray
    """R, with lambda as at the last step of a training."""


def single_reward(prediction: Prediction) -> float:
    """r1 of one answer; 0 outside the grammar."""
    inventories = [prediction.sample.inventory]
    num_classes = len(inventories[0]) + 1
    pred, valid = answers_to_arrays([[prediction.answer]], inventories, num_classes=num_classes)
    gold = gold_to_array([prediction.sample.gold], inventories, num_classes=num_classes)
    return float(_iou(pred, gold, valid)[0, 0])


def group_rewards(groups: Sequence[Sequence[Prediction]], config: Config) -> GroupRewards:
    """Rewards of as many answers to each input, under the settings of ``config.reward``."""
    inventories = [group[0].sample.inventory for group in groups]
    num_classes = max(map(len, inventories)) + 1
    pred, valid = answers_to_arrays(
        [[one.answer for one in group] for group in groups], inventories, num_classes=num_classes
    )
    gold = gold_to_array([group[0].sample.gold for group in groups], inventories, num_classes=num_classes)
    mask = class_mask(inventories, num_classes=num_classes)
    similarity = None
    if config.reward.primary == "similarity":
        similarity = similarity_array(config.reward.similarity, inventories, num_classes=num_classes)
    last = np.float32(1)
    found = make_scorer(config).kernels(pred, gold, valid, np.ones_like(valid), mask, last, last, similarity)
    return GroupRewards(
        r1=np.asarray(_iou(pred, gold, valid)),
        r2=np.asarray(found["r2"]),
        rewards=np.asarray(found["rewards"]),
    )


def write_groups(
    path: Path, groups: Sequence[Sequence[Prediction]], config: Config, parts: Mapping[str, str]
) -> dict[str, Any]:
    """One line for every sampled answer, with r1 and in groups of two or more r2 and R; returns what was
    averaged, in words, and the means by data set. ``parts`` names the part of a root dialogue."""
    num = len(groups[0])
    found = group_rewards(groups, config)
    # One answer agrees with itself: its consensus says nothing.
    named = {"r1": found.r1} | ({"r2": found.r2, "R": found.rewards} if num > 1 else {})
    lines, members = [], {}
    for p, group in enumerate(groups):
        sample = group[0].sample
        members.setdefault(sample.dataset, []).append(p)
        for g, prediction in enumerate(group):
            line = prediction.to_json(parts.get(sample.root_id, "")) | {"idx": g}
            line |= {name: float(values[p, g]) for name, values in named.items()}
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(path, "".join(lines))
    return {
        "is": group_words(config, num) if num > 1 else SINGLE,
        "means": {
            dataset: {name: float(values[rows].mean()) for name, values in named.items()}
            for dataset, rows in sorted(members.items())
        },
    }


def group_words(config: Config, num: int, *, weight: str | None = None) -> str:
    """What R of groups of ``num`` answers is under these settings; ``weight`` says which lambda, the last by
    default."""
    reward, preset = config.reward, reward_preset(config.reward.preset)
    own = (
        "r1" if reward.primary == "wiou" and not reward.function else f"({reward.function or reward.primary})"
    )
    if reward.consensus == "off":
        return f"R = {own} of each of {num} answers, no consensus"
    top = preset.lambda_max if reward.lambda_max is None else reward.lambda_max
    presence = preset.presence if reward.presence is None else reward.presence
    weight = weight or f"{top:g}"
    convex = (reward.combine or preset.form) == "convex"
    form = f"(1 - {weight}) {own} + {weight} r2" if convex else f"{own} + {weight} r2"
    return (
        f"R = {form} over groups of {num}, consensus {reward.consensus}, top {reward.top_k}, presence "
        f"{presence:g}"
    )

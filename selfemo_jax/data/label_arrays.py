"""Answers, gold labels and inventories as the dense arrays that the reward kernels take.

P prompts, G rollouts per prompt, C classes: the labels of the prompt's inventory in its order, unused slots
of a shorter inventory, and in the last slot the weight of all labels outside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from selfemo_jax.data.grammar import Answer


def answers_to_arrays(
    answers: Sequence[Sequence[Answer]], inventories: Sequence[Sequence[str]], *, num_classes: int
) -> tuple[Float[np.ndarray, "P G C"], Bool[np.ndarray, "P G"]]:
    """Raw weights by label slot and which answers are valid.

    Slot c is the c-th label of that prompt's inventory; the last slot holds the weight of all labels
    outside it. Invalid answers, and the places of missing ones in a shorter group, are zeros and False.
    """
    num_rollouts = max((len(group) for group in answers), default=0)
    weights = np.zeros((len(answers), num_rollouts, num_classes), np.float32)
    valid = np.zeros((len(answers), num_rollouts), bool)
    for p, (group, inventory) in enumerate(zip(answers, inventories, strict=True)):
        slots = _slots(tuple(inventory), num_classes)
        for g, answer in enumerate(group):
            if answer.valid:
                valid[p, g] = True
                for label, weight in answer.emotion:
                    weights[p, g, slots.get(label, num_classes - 1)] += weight
    return weights, valid


def gold_to_array(
    golds: Sequence[Mapping[str, float]], inventories: Sequence[Sequence[str]], *, num_classes: int
) -> Float[np.ndarray, "P C"]:
    """Raw gold weights by label slot; ValueError for a gold label outside its inventory."""
    array = np.zeros((len(golds), num_classes), np.float32)
    for p, (gold, inventory) in enumerate(zip(golds, inventories, strict=True)):
        slots = _slots(tuple(inventory), num_classes)
        for label, weight in gold.items():
            if label.lower() not in slots:
                raise ValueError(f"gold {p}: label {label!r} is not in the inventory {', '.join(inventory)}")
            array[p, slots[label.lower()]] += weight
    return array


def class_mask(inventories: Sequence[Sequence[str]], *, num_classes: int) -> Bool[np.ndarray, "P C"]:
    """True at the slots of each inventory; the last slot (unknown labels) is False."""
    mask = np.zeros((len(inventories), num_classes), bool)
    for p, inventory in enumerate(inventories):
        mask[p, : len(_slots(tuple(inventory), num_classes))] = True
    return mask


def similarity_array(
    pairs: Mapping[str, float], inventories: Sequence[Sequence[str]], *, num_classes: int
) -> Float[np.ndarray, "P C C"]:
    """Similarity of every two label slots: 1 of a label with itself, ``pairs["one/other"]`` both ways, or 0.

    Labels are lower case. A pair of which an inventory lacks a label says nothing there. The slot of unknown
    labels is like none.
    """
    array = np.zeros((len(inventories), num_classes, num_classes), np.float32)
    for p, inventory in enumerate(inventories):
        slots = _slots(tuple(inventory), num_classes)
        array[p, : len(slots), : len(slots)] = np.eye(len(slots))
        for pair, value in pairs.items():
            one, _, other = pair.partition("/")
            if one in slots and other in slots:
                array[p, slots[one], slots[other]] = array[p, slots[other], slots[one]] = value
    return array


@lru_cache(maxsize=256)
def _slots(inventory: tuple[str, ...], num_classes: int) -> Mapping[str, int]:
    if len(inventory) >= num_classes:
        raise ValueError(
            f"{len(inventory)} labels ({', '.join(inventory)}) do not fit {num_classes} classes, "
            "the last of which is for unknown labels; raise num_classes"
        )
    slots = {label.lower(): slot for slot, label in enumerate(inventory)}
    if len(slots) < len(inventory):
        raise ValueError(f"the inventory names a label twice: {', '.join(inventory)}")
    return slots

"""Between the dicts of the oracle and the arrays of the kernels, and random groups for property tests."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

INVENTORY = ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"]
NUM_CLASSES = 8


def rows(weights, inventory=INVENTORY, num_classes=NUM_CLASSES) -> np.ndarray:
    row = np.zeros(num_classes, np.float32)
    for label, weight in (weights or {}).items():
        row[inventory.index(label) if label in inventory else num_classes - 1] += weight
    return row


def pred_arrays(groups, inventory=INVENTORY, num_classes=NUM_CLASSES):
    pred = np.stack([[rows(rollout, inventory, num_classes) for rollout in group] for group in groups])
    valid = np.array([[rollout is not None for rollout in group] for group in groups])
    return jnp.asarray(pred), jnp.asarray(valid)


def gold_array(golds, inventory=INVENTORY, num_classes=NUM_CLASSES):
    return jnp.asarray(np.stack([rows(gold, inventory, num_classes) for gold in golds]))


def mask_array(num_prompts, inventory=INVENTORY, num_classes=NUM_CLASSES):
    row = np.arange(num_classes) < len(inventory)
    return jnp.asarray(np.broadcast_to(row, (num_prompts, num_classes)))


# Weights as the grammar allows them (two decimals), with at most one unknown label.
WEIGHT = st.integers(1, 100).map(lambda hundredths: hundredths / 100)
GOLD = st.dictionaries(st.sampled_from(INVENTORY), WEIGHT, min_size=1, max_size=3)
ROLLOUT = st.none() | st.dictionaries(st.sampled_from([*INVENTORY, "bored"]), WEIGHT, min_size=1, max_size=3)
GROUP = st.lists(ROLLOUT, min_size=4, max_size=4)

GOLDEN_GOLD = {"joy": 1.0}
GOLDEN_GROUP = [{"joy": 1.0}, {"joy": 0.7, "surprise": 0.3}, {"surprise": 0.6, "neutral": 0.4}, None]

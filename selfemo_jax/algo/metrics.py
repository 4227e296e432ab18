"""Scores of predicted emotion labels, equal to scikit-learn's with labels = the emotion list.

Shape legend: N scored utterances, C emotion classes of one list. A prediction outside 0..C-1 (use -1) is
invalid: it is wrong, and counts for no class. A gold label outside 0..C-1 is unlabelled and not scored.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def confusion(
    gold: Int[Array | np.ndarray, " N"], pred: Int[Array | np.ndarray, " N"], *, num_classes: int
) -> Int[Array, "C C+1"]:
    """Counts of [gold, predicted]; the last column holds invalid predictions."""
    gold, pred = jnp.asarray(gold), jnp.asarray(pred)
    scored = (gold >= 0) & (gold < num_classes)
    column = jnp.where((pred >= 0) & (pred < num_classes), pred, num_classes)
    counts = jnp.zeros((num_classes, num_classes + 1), jnp.int32)
    return counts.at[jnp.where(scored, gold, 0), column].add(scored.astype(jnp.int32))


def accuracy(counts: Int[Array, "C C+1"]) -> Float[Array, ""]:
    """Share of right predictions among all scored utterances; 0 without any."""
    return jnp.trace(counts) / jnp.maximum(counts.sum(), 1)


def support(counts: Int[Array, "C C+1"]) -> Int[Array, " C"]:
    """Number of gold utterances of each class."""
    return counts.sum(axis=1)


def class_f1(counts: Int[Array, "C C+1"]) -> Float[Array, " C"]:
    """F1 of each class, 2 hits / (gold + predicted); 0 for a class that is neither gold nor predicted."""
    hits = jnp.diagonal(counts)
    total = support(counts) + counts[:, :-1].sum(axis=0)
    return 2.0 * hits / jnp.maximum(total, 1)


def weighted_f1(counts: Int[Array, "C C+1"]) -> Float[Array, ""]:
    """Mean F1 weighted by support, the usual score of emotion recognition; 0 without utterances."""
    return (class_f1(counts) * support(counts)).sum() / jnp.maximum(counts.sum(), 1)


def macro_f1(counts: Int[Array, "C C+1"]) -> Float[Array, ""]:
    """Plain mean of the F1 of all classes of the list, those without gold utterances too."""
    return class_f1(counts).mean()

"""How far stated weights can be believed: calibration error and Brier score of an answer's normalised
weights.

An answer's weights need not add up to 1; divided by their sum they are its distribution over the labels,
the part on labels outside the list lost. An invalid answer states nothing and is left out; its share stands
beside.

Shape letters: N answers, C labels of the set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

NUM_BINS = 15
"""Bins of equal width, as in arXiv:1706.04599."""

Probabilities = Float[np.ndarray, "N C"]


def places(predicted: Sequence[str | None], labels: Sequence[str]) -> Int[np.ndarray, " N"]:
    """The place of each label in the list; -1 for None and for what is not in it."""
    order = {label: place for place, label in enumerate(labels)}
    return np.array([order.get(label, -1) if label else -1 for label in predicted], int)


def normalised(answers: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Probabilities:
    """Label -> weight of each answer as rows that sum to 1, or to less where a label is outside the list; an
    empty answer is a row of zeros."""
    order = {label: place for place, label in enumerate(labels)}
    rows = np.zeros((len(answers), len(labels)))
    for row, answer in zip(rows, answers, strict=True):
        total = sum(answer.values())
        for label, weight in answer.items():
            if label in order:
                row[order[label]] += weight / total
    return rows


def calibration_error(confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"]) -> float:
    """Expected calibration error: mean over bins of |share right - mean confidence|, weighted by their
    size."""
    return sum(b["num"] * abs(b["accuracy"] - b["confidence"]) for b in bins(confidence, right)) / max(
        1, len(confidence)
    )


def bins(confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"]) -> list[dict[str, float]]:
    """The bins ((k-1)/15, k/15] that hold answers: number, mean confidence and share right of each."""
    place = np.clip(np.ceil(np.asarray(confidence) * NUM_BINS - 1e-9).astype(int) - 1, 0, NUM_BINS - 1)
    found = []
    for k in range(NUM_BINS):
        inside = place == k
        if inside.any():
            found.append(
                {
                    "low": k / NUM_BINS,
                    "num": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    return found


def brier(probabilities: Probabilities, gold: Int[np.ndarray, " N"]) -> float:
    """Mean squared distance to the gold label over all labels, from 0 to 2 (Brier 1950)."""
    wanted = np.eye(probabilities.shape[1])[gold]
    return float(((probabilities - wanted) ** 2).sum(axis=1).mean())


def calibration(
    probabilities: Probabilities,
    gold: Int[np.ndarray, " N"],
    predicted: Int[np.ndarray, " N"],
    valid: Bool[np.ndarray, " N"],
) -> dict[str, Any]:
    """Calibration of the valid answers: `ece`, `brier`, mean `confidence`, `accuracy`, `bins`; `share` of
    answers that this is about, and `brier_prior`, the Brier score of always stating the gold labels' own
    frequencies.

    ``predicted`` are the labels that the strict scores take (-1: none of the list): of equal weights an
    answer has named one first, which the weights do not tell. The numbers are None without a valid answer.
    """
    kept, wanted = probabilities[valid], np.asarray(gold)[valid]
    if not len(kept):
        return (
            {"share": 0.0}
            | dict.fromkeys(("ece", "brier", "brier_prior", "confidence", "accuracy"))
            | {"bins": []}
        )
    confidence = kept.max(axis=1)
    right = np.asarray(predicted)[valid] == wanted
    prior = np.bincount(wanted, minlength=kept.shape[1]) / len(wanted)
    return {
        "share": float(np.mean(valid)),
        "ece": float(calibration_error(confidence, right)),
        "brier": brier(kept, wanted),
        "brier_prior": brier(np.tile(prior, (len(wanted), 1)), wanted),
        "confidence": float(confidence.mean()),
        "accuracy": float(right.mean()),
        "bins": bins(confidence, right),
    }

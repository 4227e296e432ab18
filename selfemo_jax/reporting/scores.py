"""Scores of a run with their intervals, confusions, and paired comparisons of runs on the same inputs.

A prediction outside the labels (invalid, or unknown) is wrong and stays in every denominator, as in the
scores of the run itself. Intervals and tests resample dialogues, not utterances: utterances of a dialogue
are not independent. With fewer than `MIN_DIALOGUES` dialogues there is no interval and no p of the bootstrap.

Shape letters: D dialogues, C classes, S bootstrap samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfemo_jax.reporting.reading import Notices, number

NUM_SAMPLES = 2000
MIN_DIALOGUES = 10
"""Dialogues that a bootstrap over them needs at least. Resampling few of them understates their spread: of
simulated 95 % intervals (12 turns a dialogue, half of them right, ease of a dialogue uniform) 90 % hold the
truth with 10 dialogues, 86 % with 5, 78 % with 3 and 60 % with 2; with one, every draw is the same."""

Prediction = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Confusions ``[D, C, C + 1]`` of each dialogue: rows gold, columns predicted, the last one for what is
    no label of the set."""

    dialogues: tuple[str, ...]
    confusion: np.ndarray


def count(predictions: Sequence[Prediction], labels: Sequence[str]) -> Counts:
    """Confusions by dialogue; a dialogue is an input's id without its turn."""
    order = {label: place for place, label in enumerate(labels)}
    dialogues = {name: place for place, name in enumerate(sorted({dialogue_of(p) for p in predictions}))}
    confusion = np.zeros((len(dialogues), len(labels), len(labels) + 1))
    for p in predictions:
        predicted = order.get(p.get("prediction") or "", len(labels))
        confusion[dialogues[dialogue_of(p)], order[p["gold"]], predicted] += 1
    return Counts(dialogues=tuple(dialogues), confusion=confusion)


def dialogue_of(prediction: Prediction) -> str:
    """`meld/test/12/3` -> `meld/test/12`."""
    return str(prediction["id"]).rsplit("/", 1)[0]


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of right answers; ``[..., C, C + 1]`` -> ``[...]``."""
    right = np.trace(confusion[..., :-1], axis1=-2, axis2=-1)
    return right / np.maximum(confusion.sum((-2, -1)), 1)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of each class, weighted by its gold count; ``[..., C, C + 1]`` -> ``[...]``."""
    right = np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1)
    support, named = confusion.sum(-1), confusion[..., :-1].sum(-2)
    f1 = np.divide(2 * right, support + named, out=np.zeros_like(right), where=support + named > 0)
    return (f1 * support).sum(-1) / np.maximum(support.sum(-1), 1)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Plain mean of the F1 of all classes; ``[..., C, C + 1]`` -> ``[...]``. A class that is neither gold nor
    predicted counts as 0, as in the scores of a run."""
    right = np.diagonal(confusion[..., :-1], axis1=-2, axis2=-1)
    total = confusion.sum(-1) + confusion[..., :-1].sum(-2)
    return np.divide(2 * right, total, out=np.zeros_like(right, float), where=total > 0).mean(-1)


def resampled(confusions: Sequence[np.ndarray], *, seed: int = 0, num: int = NUM_SAMPLES) -> list[np.ndarray]:
    """Confusions ``[S, C, C + 1]`` of ``num`` draws of dialogues with replacement, the same draws for each
    of the given ones ``[D, C, C + 1]``."""
    size = len(confusions[0])
    weights = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=num)
    return [np.tensordot(weights.astype(float), confusion, axes=1) for confusion in confusions]


def interval(values: np.ndarray) -> list[float | None]:
    """The middle 95 % of bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return [number(low), number(high)]


def score_rows(
    splits: Mapping[str, Any], predictions: Mapping[str, Sequence[Prediction]], notices: Notices
) -> list[dict[str, Any]]:
    """One row for each split and data set of the stored scores, with intervals where predictions are at
    hand."""
    rows = []
    for split, result in splits.items():
        drawn = result.get("samples") or {}
        for name, part, scores in _sets_and_parts(result.get("sets") or {}):
            labels = list(scores.get("per_class") or {})
            row = {
                "split": split,
                "set": name,
                "part": part,
                "num": scores.get("num"),
                "majority": {key: number(value) for key, value in (scores.get("majority") or {}).items()}
                | {"label": (scores.get("majority") or {}).get("label", "")},
                "labels": labels,
                "confusion": scores.get("confusion") or [],
                "f1": [number(scores["per_class"][label].get("f1")) for label in labels],
                "num_labels_predicted": scores.get("num_labels_predicted"),
                "yardsticks": _yardsticks((result.get("yardsticks") or {}).get(name) or {}, part),
                "readings": {
                    reading: number((scores.get(reading) or {}).get("weighted_f1"))
                    for reading in ("lenient", "instructerc")
                },
                "calibration": {
                    key: number((scores.get("calibration") or {}).get(key))
                    for key in ("share", "confidence", "accuracy", "ece", "brier", "brier_prior")
                },
                "samples": _samples(drawn.get(name), part),
                "intervals": {},
            }
            for key in ("accuracy", "weighted_f1", "macro_f1", "invalid_rate", "r1", "mean_tokens"):
                row[key] = number(scores.get(key))
            chosen = of_part(predictions.get(split, ()), name, part)
            if chosen and len(chosen) == row["num"] and all(p["gold"] in labels for p in chosen):
                confusion = count(chosen, labels).confusion
                if row["accuracy"] is None or abs(accuracy(confusion.sum(0)) - row["accuracy"]) > 1e-3:
                    where = f"{name}, {part}" if part else name
                    notices.append(f"{split}: the predictions on {where} are not those of its scores")
                elif len(confusion) >= MIN_DIALOGUES:
                    (draws,) = resampled([confusion])
                    row["intervals"] = {
                        "accuracy": interval(accuracy(draws)),
                        "weighted_f1": interval(weighted_f1(draws)),
                    }
            rows.append(row)
    return rows


def of_part(predictions: Sequence[Prediction], dataset: str, part: str) -> list[Prediction]:
    """Those of a set, or of a part of it; none where the lines do not tell parts."""
    return [p for p in predictions if p.get("dataset") == dataset and (not part or p.get("part") == part)]


def _yardsticks(found: Mapping[str, Any], part: str) -> dict[str, list[float | None]]:
    """Yardstick -> weighted F1 and accuracy on the set, or on a part of it."""
    scored = {name: (one.get("parts") or {}).get(part) if part else one for name, one in found.items()}
    return {
        name: [number(one.get(key)) for key in ("weighted_f1", "accuracy")]
        for name, one in scored.items()
        if one
    }


def _samples(found: Any, part: str) -> dict[str, Any] | None:
    """Means, spreads and votes over sampled answers to the set, or to a part of it, rounded; None where they
    are not whole."""
    if part and isinstance(found, Mapping):
        found = (found.get("parts") or {}).get(part)
    if not isinstance(found, Mapping) or not {"n", "mean", "sd", "maj", "any", "votes"} <= found.keys():
        return None
    nested = {
        name: {key: number(found[name].get(key)) for key in ("weighted_f1", "accuracy", "ece")}
        for name in ("mean", "sd", "maj", "votes")
    }
    return {"n": found["n"], "any": number(found["any"]), **nested}


def _sets_and_parts(sets: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name of the set, of its part (empty for the whole) and scores; parts only where there are two."""
    for name, scores in sets.items():
        yield name, "", scores
        parts = scores.get("parts") or {}
        if len(parts) > 1:
            for part, of_part in parts.items():
                yield name, str(part), of_part


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction], labels: Sequence[str]
) -> dict[str, Any] | None:
    """The second policy against the first on the inputs that both answered; None without common inputs.

    Weighted F1 by a paired bootstrap over dialogues, with fewer than `MIN_DIALOGUES` neither interval nor p;
    accuracy by McNemar's exact test.
    """
    before = {p["id"]: p for p in first if p.get("gold") in labels}
    after = {p["id"]: p for p in second if p.get("gold") in labels}
    common = [name for name in before if name in after and before[name]["gold"] == after[name]["gold"]]
    if not common:
        return None
    counts = [count([side[name] for name in common], labels).confusion for side in (before, after)]
    bounds = p_bootstrap = None
    if len(counts[0]) >= MIN_DIALOGUES:
        draws = resampled(counts)
        differences = weighted_f1(draws[1]) - weighted_f1(draws[0])
        least = min((differences <= 0).sum(), (differences >= 0).sum())
        bounds = interval(differences)
        p_bootstrap = number(min(1.0, 2 * (least + 1) / (len(differences) + 1)), 5)
    right = [np.array([side[name].get("prediction") == side[name]["gold"] for name in common])
             for side in (before, after)]  # fmt: skip
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    wf1 = [float(weighted_f1(counts[side].sum(0))) for side in (0, 1)]
    return {
        "num": len(common),
        "dialogues": len(counts[0]),
        "weighted_f1": [number(value) for value in wf1],
        "difference": number(wf1[1] - wf1[0]),
        "interval": bounds,
        "p_bootstrap": p_bootstrap,
        "won": won,
        "lost": lost,
        "p_mcnemar": number(mcnemar_p(won, lost), 5),
    }


def mcnemar_p(one: int, other: int) -> float:
    """Two-sided exact McNemar test: p of such a split of ``one + other`` fair coins, 1 without any."""
    # A second of import that a report without comparisons does without.
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: p-values that keep the error of the whole family. The family are the tests
    that have a p; None stays None."""
    adjusted: list[float | None] = [None] * len(p_values)
    known, largest = sorted((p, place) for place, p in enumerate(p_values) if p is not None), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted

"""Several sampled answers to each input: the mean over samples, the vote (maj@n), and how far votes can be
believed."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfemo_jax.data.dialogues import LabelSet
from selfemo_jax.evaluation.calibration import calibration, normalised, places
from selfemo_jax.scores import Prediction, gold_label, label_scores

SCORES = ("accuracy", "weighted_f1", "macro_f1", "invalid_rate")


def vote(labels: Sequence[str | None]) -> str | None:
    """The label named most often, of equals the one named first; None where no answer is valid."""
    named = Counter(label for label in labels if label is not None)
    return max(named, key=lambda label: named[label]) if named else None


def score_samples(
    groups: Sequence[Sequence[Prediction]],
    label_sets: Mapping[str, LabelSet],
    parts: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of each data set over ``n`` sampled answers to each input.

    ``mean`` and ``sd`` (n - 1 below; None for n = 1) are over the n scores, sample by sample; ``maj`` are
    those of the vote; ``any`` is the share of inputs that any sample has right; ``votes`` is the calibration
    of the shares of the votes. ``parts`` (root dialogue -> name) adds under ``parts`` the same of each part
    of a set.
    """
    results: dict[str, dict[str, Any]] = {}
    for dataset in sorted({group[0].sample.dataset for group in groups}):
        chosen = [group for group in groups if group[0].sample.dataset == dataset]
        labels = label_sets[dataset].labels
        results[dataset] = _score_set(chosen, labels)
        if parts is not None:
            by_part: dict[str, list[Sequence[Prediction]]] = {}
            for group in chosen:
                by_part.setdefault(parts[group[0].sample.root_id], []).append(group)
            results[dataset]["parts"] = {
                name: _score_set(some, labels) for name, some in sorted(by_part.items(), reverse=True)
            }
    return results


def _score_set(chosen: Sequence[Sequence[Prediction]], labels: Sequence[str]) -> dict[str, Any]:
    gold = [gold_label(group[0].sample) for group in chosen]
    number = len(chosen[0])
    single = [label_scores(gold, [group[i].label for group in chosen], labels) for i in range(number)]
    winners = [vote([p.label for p in group]) for group in chosen]
    voted = label_scores(gold, winners, labels)
    shares = [Counter(p.label for p in group if p.label is not None) for group in chosen]
    return {
        "n": number,
        "num": len(chosen),
        "mean": {name: float(np.mean([s[name] for s in single])) for name in SCORES},
        "sd": {name: _spread([s[name] for s in single]) for name in SCORES},
        "maj": {name: voted[name] for name in SCORES},
        "any": float(
            np.mean([any(p.label == g for p in group) for g, group in zip(gold, chosen, strict=True)])
        ),
        "votes": calibration(
            normalised(shares, labels),
            places(gold, labels),
            places(winners, labels),
            np.array([bool(s) for s in shares]),
        ),
    }


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None

"""Watch on what self-play makes: label histograms, their divergence from the human labels, and the counts
of a harvest.

The gold of a synthetic input is declared by the policy that learns from it. Nothing outside pulls a drift of
those labels back, so it is measured after each harvest, and can stop a run.
"""

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

from selfemo_jax.config import Config
from selfemo_jax.data.dialogues import heaviest_label
from selfemo_jax.data.diversity import distinct
from selfemo_jax.data.inputs import Sample
from selfemo_jax.selfplay.selection import Selection, Shares, label_shares

Record = Mapping[str, Any]


class DriftError(ValueError):
    """The labels of a harvest are too far from the human ones to train on."""


def divergence(found: Mapping[str, float], human: Mapping[str, float]) -> float:
    """Jensen-Shannon divergence of two label distributions in bits: 0 for equal ones, 1 for disjoint ones.

    Both are normalised; a label that one lacks has no weight there. 0 where one of them is empty.
    """
    labels = sorted({*found, *human})
    p = np.array([found.get(label, 0.0) for label in labels])
    q = np.array([human.get(label, 0.0) for label in labels])
    if not p.sum() or not q.sum():
        return 0.0
    return float(np.nan_to_num(jensenshannon(p, q, base=2))) ** 2


def mean_divergence(samples: Sequence[Sample], human: Shares) -> float:
    """Divergence of gold labels from the human ones: mean over data sets, weighted by their samples."""
    sizes = Counter(sample.dataset for sample in samples)
    shares = label_shares(samples)
    values = [divergence(shares[name], human.get(name, {})) * size for name, size in sizes.items()]
    return sum(values) / len(samples) if samples else 0.0


def harvest_report(
    records: Sequence[Record],
    selection: Selection,
    human: Shares,
    originals: Sequence[Sample],
    config: Config,
) -> dict[str, Any]:
    """What a harvest proposed, accepted and rejected, and the labels and replies that it leaves.

    ``records`` are the harvest's lines of the store, ``originals`` the human inputs; as many of their real
    next turns as there are replies are what the replies are compared with.
    """
    reasons = Counter(record["reason"] for record in records)
    training = selection.training
    replies = [sample.history[-1][1] for sample in training]
    references = [sample.reference.text for sample in originals if sample.reference is not None]
    return {
        "proposed": len(records),
        "accepted": reasons["accepted"],
        "rejected": {name: count for name, count in reasons.most_common() if name != "accepted"},
        "by_depth": _by_depth(records),
        "training": len(training),
        "heldout": len(selection.heldout),
        "left_out": {name: len(samples) for name, samples in selection.left_out.items()},
        "labels": {
            "human": {name: dict(shares) for name, shares in human.items()},
            "recognised": _histogram(records, "emotion", accepted=False),
            "declared": _histogram(records, "declared", accepted=False),
            "accepted": _histogram(records, "declared", accepted=True),
            "training": label_shares(training),
        },
        "divergence": {
            "accepted": _mean_over(_histogram(records, "declared", accepted=True), human, records),
            "training": mean_divergence(training, human),
        },
        "largest_label_ratio": largest_ratio(label_shares(training), human),
        "replies": reply_statistics(replies),
        "human_replies": reply_statistics(
            random.Random(config.seed).sample(references, min(len(replies), len(references)))
        ),
    }


def check_drift(report: Mapping[str, Any], config: Config) -> str:
    """An alarm in words, or nothing; `DriftError` where the run must not train on the harvest.

    What was accepted counts as well as what is left to train on: the bound on labels hides a collapse, as it
    leaves a handful of inputs in fair shares.
    """
    drift = config.flywheel.drift
    measured = [name for name in ("accepted", "training") if report[name] >= drift.least]
    value = max((report["divergence"][name] for name in measured), default=0.0)
    if not measured or value < drift.alarm:
        return ""
    words = " and ".join(
        f"{found:.3f} bits for the {number} synthetic inputs {what}"
        for what, number, found in (
            ("accepted", report["accepted"], report["divergence"]["accepted"]),
            ("to train on", report["training"], report["divergence"]["training"]),
        )
    )
    words = f"the labels are far from the human ones: {words}"
    if drift.stop is not None and value >= drift.stop:
        raise DriftError(
            f"{words}, and flywheel.drift.stop is {drift.stop}: the policy's declared emotions have drifted; "
            "look at harvest.json of the phase, change flywheel.max_label_ratio, flywheel.verifier or the "
            "rewards in a new run, or raise flywheel.drift.stop and go on with --resume"
        )
    return f"alarm: {words} (flywheel.drift.alarm {drift.alarm})"


def reply_statistics(replies: Sequence[str]) -> dict[str, float]:
    """Number, median words, distinct-1 and distinct-2 (different n-grams over all)."""
    lengths = [len(reply.split()) for reply in replies]
    return {
        "num": len(replies),
        "median_words": float(statistics.median(lengths)) if lengths else 0.0,
        "distinct_1": distinct(replies, 1),
        "distinct_2": distinct(replies, 2),
    }


def largest_ratio(found: Shares, human: Shares) -> float | None:
    """The largest share of a label as a multiple of its human share; None with a label that no human gave."""
    pairs = [
        (share, human.get(dataset, {}).get(label, 0.0))
        for dataset, shares in found.items()
        for label, share in shares.items()
    ]
    if any(not expected for _, expected in pairs):
        return None
    return max((share / expected for share, expected in pairs), default=0.0)


def _histogram(records: Sequence[Record], field: str, *, accepted: bool) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter] = {}
    for record in records:
        if record[field] and (record["accepted"] or not accepted):
            counts.setdefault(record["dataset"], Counter())[heaviest_label(record[field])] += 1
    return {
        dataset: {label: count / found.total() for label, count in sorted(found.items())}
        for dataset, found in sorted(counts.items())
    }


def _mean_over(shares: Shares, human: Shares, records: Sequence[Record]) -> float:
    sizes = Counter(record["dataset"] for record in records if record["accepted"])
    values = [divergence(shares[name], human.get(name, {})) * size for name, size in sizes.items()]
    return sum(values) / sizes.total() if sizes else 0.0


def _by_depth(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    proposed = Counter(record["depth"] for record in records)
    accepted = Counter(record["depth"] for record in records if record["accepted"])
    return {
        str(depth): {"proposed": count, "accepted": accepted[depth]}
        for depth, count in sorted(proposed.items())
    }

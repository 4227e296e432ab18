"""Which accepted inputs train: held-out roots, the balance of labels and data sets, the cap."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from selfemo_jax.data.dialogues import heaviest_label
from selfemo_jax.data.inputs import Sample

Shares = Mapping[str, Mapping[str, float]]
"""Data set -> label -> share of its human-labelled inputs whose heaviest label it is."""
SMALL = 50
"""Inputs of a data set below which a label's bound is rounded up: rounded down it might leave none."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What becomes of the accepted inputs of a harvest; every one of them is in one place."""

    training: tuple[Sample, ...]
    heldout: tuple[Sample, ...]
    """The SELF-EMO test part."""
    left_out: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    """``label_share`` or ``cap`` -> the inputs that the balance or the cap left out."""


def choose(
    children: Sequence[Sample],
    *,
    n_syn: int,
    heldout: float,
    seed: int,
    human: Shares | None = None,
    max_label_ratio: float | None = None,
) -> Selection:
    """The synthetic training inputs and the held-out SELF-EMO test part of a harvest.

    Whole root dialogues are held out, by a hash of their id, so that a root never lies on both sides. Of the
    rest a data set keeps as many as its labels allow: with ``human`` shares no label gets more than
    ``max_label_ratio`` times its own. At most ``n_syn`` are kept in all, taken from the data sets in turn,
    each in a seeded order.
    """
    held = tuple(child for child in children if _is_heldout(child.root_id, heldout, seed))
    pools: dict[str, list[Sample]] = {}
    for child in children:
        if not _is_heldout(child.root_id, heldout, seed):
            pools.setdefault(child.dataset, []).append(child)
    bounds: dict[str, Mapping[str, float] | None] = {}
    for dataset in sorted(pools):
        random.Random(f"{seed}/{dataset}").shuffle(pools[dataset])
        shares = human.get(dataset) if human is not None and max_label_ratio is not None else None
        bounds[dataset] = shares and {label: max_label_ratio * share for label, share in shares.items()}
    room = {dataset: _most(pools[dataset], bounds[dataset], len(pools[dataset])) for dataset in pools}
    quotas = _in_turn(room, n_syn)
    picked = {}
    left_out: dict[str, list[Sample]] = {}
    for dataset in sorted(pools):
        # Of nothing no label may have a share: it is the cap that leaves nothing, not the labels.
        capped = room[dataset] and not quotas[dataset]
        bound = None if capped else bounds[dataset]
        number = _most(pools[dataset], bound, quotas[dataset])
        picked[dataset], over, rest = _take(pools[dataset], bound, number)
        left_out.setdefault("label_share", []).extend(over)
        left_out.setdefault("cap", []).extend(rest)
    return Selection(
        training=_interleaved(picked),
        heldout=held,
        left_out={reason: tuple(samples) for reason, samples in left_out.items() if samples},
    )


def label_shares(samples: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """The share of each heaviest gold label in each data set."""
    counts: dict[str, Counter] = {}
    for sample in samples:
        counts.setdefault(sample.dataset, Counter())[heaviest_label(sample.gold)] += 1
    return {
        dataset: {label: count / found.total() for label, count in sorted(found.items())}
        for dataset, found in sorted(counts.items())
    }


def _most(pool: Sequence[Sample], bounds: Mapping[str, float] | None, limit: int) -> int:
    """The largest number up to ``limit`` that can be taken with every label inside its bound."""
    if bounds is None:
        return min(limit, len(pool))
    counts = Counter(heaviest_label(sample.gold) for sample in pool)
    for number in range(min(limit, len(pool)), 0, -1):
        if sum(min(count, _bound(bounds, label, number)) for label, count in counts.items()) >= number:
            return number
    return 0


def _bound(bounds: Mapping[str, float], label: str, number: int) -> int:
    allowed = bounds.get(label, 0.0) * number
    return math.ceil(allowed) if number < SMALL else math.floor(allowed)


def _in_turn(room: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many each data set gives when they are asked in turn for one, ``limit`` in all."""
    quotas = dict.fromkeys(sorted(room), 0)
    while limit and any(quotas[dataset] < room[dataset] for dataset in quotas):
        for dataset in quotas:
            if limit and quotas[dataset] < room[dataset]:
                quotas[dataset] += 1
                limit -= 1
    return quotas


def _take(
    pool: Sequence[Sample], bounds: Mapping[str, float] | None, number: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """``number`` inputs from the end of the pool, those above a label's bound, and those beyond the cap."""
    taken, over, rest = [], [], []
    counts: Counter = Counter()
    for sample in reversed(pool):
        label = heaviest_label(sample.gold)
        if bounds is not None and counts[label] >= _bound(bounds, label, number):
            over.append(sample)
        elif len(taken) == number:
            rest.append(sample)
        else:
            counts[label] += 1
            taken.append(sample)
    return taken, over, rest


def _interleaved(picked: Mapping[str, Sequence[Sample]]) -> tuple[Sample, ...]:
    length = max((len(samples) for samples in picked.values()), default=0)
    return tuple(
        picked[dataset][place]
        for place in range(length)
        for dataset in sorted(picked)
        if place < len(picked[dataset])
    )


def _is_heldout(root_id: str, share: float, seed: int) -> bool:
    return random.Random(f"heldout/{seed}/{root_id}").random() < share

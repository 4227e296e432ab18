"""The stream of training inputs: a Grain pipeline that is deterministic, resumable and sharded by host.

Each source (a data set, or its synthetic inputs) is shuffled anew in every pass and never ends; the mixture
takes from them in fixed proportions, so that a batch holds what the weights say to within one item per
source. The iterator's whole state is the index of the next batch.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from selfemo_jax.data.curriculum import NUM_STAGES
from selfemo_jax.data.inputs import Sample

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Items of one step, and the iterator's state after them (what a checkpoint of that step records)."""

    items: tuple[Any, ...]
    state: Mapping[str, Any]
    datasets: tuple[str, ...] = ()
    """Data set of every input behind the items."""

    def counts(self) -> dict[str, float]:
        """``data/SET``: inputs of each data set, as a metric of the step."""
        found = Counter(self.datasets)
        return {f"data/{name}": float(found[name]) for name in sorted(found)}


def mixture_weights(
    sizes: Mapping[str, int], *, kind: str, temperature: float, weights: Mapping[str, float]
) -> dict[str, float]:
    """Share of each source, summing to 1: by size, by size^(1/temperature), or as named.

    ValueError where ``weights`` names a source that is not there, leaves one out, or is not positive.
    """
    if kind == "weights":
        if set(weights) != set(sizes):
            raise ValueError(
                f"data.mixture.weights names {sorted(weights)}, the run has {sorted(sizes)}; name each once"
            )
        raw = {name: float(weights[name]) for name in sizes}
        if min(raw.values()) <= 0:
            raise ValueError(f"data.mixture.weights: expected numbers above 0, found {dict(weights)}")
    else:
        exponent = 1.0 / temperature if kind == "temperature" else 1.0
        raw = {name: size**exponent for name, size in sizes.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def with_floor(weights: Mapping[str, float], *, floor: Mapping[str, float]) -> dict[str, float]:
    """Weights with a least share for some sources, the others scaled down to make room; still summing to
    1."""
    raised = {name: max(weights[name], floor[name]) for name in floor if name in weights}
    rest = {name: value for name, value in weights.items() if name not in raised}
    room = 1.0 - sum(raised.values())
    if rest and room <= 0:
        raise ValueError(f"sources {sorted(raised)} ask for {sum(raised.values()):.2f} of a batch, at most 1")
    total = sum(rest.values())
    return {name: raised.get(name, value * room / total if total else 0.0) for name, value in weights.items()}


def input_stream(
    sources: Mapping[str, Sequence[Sample]],
    weights: Mapping[str, float],
    encode: Callable[[Sample], Item],
    *,
    batch_size: int,
    seed: int,
    state: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    difficulty: Callable[[Any], float] | None = None,
) -> Iterator[Batch]:
    """Endless batches of ``encode(sample)``. ``state`` continues after the batch that carried it. ``shard``
    is (this host, number of hosts): each host reads every n-th item of the same stream. ``difficulty`` of an
    item makes each pass over a source a curriculum: its easiest part first, in random order inside each of
    `curriculum.NUM_STAGES` parts; None is one part."""
    import grain

    names = sorted(name for name in sources if sources[name] and weights[name] > 0)
    if not names:
        raise ValueError(
            "no training inputs: every source is empty; check data.sets, data.rule and data.root"
        )
    parts = []
    for position, name in enumerate(names):
        stages = [
            grain.MapDataset.source(stage).seed(seed + position).shuffle()
            for stage in _stages(sources[name], difficulty)
        ]
        parts.append((grain.MapDataset.concatenate(stages) if len(stages) > 1 else stages[0]).repeat())
    mixed = grain.MapDataset.mix(parts, [weights[name] for name in names]) if len(parts) > 1 else parts[0]
    named = mixed[shard[0] :: shard[1]].map(lambda item: (encode(item), tuple(datasets_of(item))))
    dataset = named.batch(batch_size, batch_fn=tuple).to_iter_dataset()
    if num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            # Grain's readers look at absl's flags, which only programs made with absl.app have parsed.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_no_accelerator)
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(dict(state))
    while True:
        items, sets = zip(*next(iterator), strict=True)
        yield Batch(items=items, state=iterator.get_state(), datasets=tuple(itertools.chain(*sets)))


def datasets_of(item: Any) -> Iterable[str]:
    """Data set of each input in an item of training: a sample, an example, or the tuple of those of a
    dialogue."""
    if isinstance(item, Sample):
        return [item.dataset]
    return [name for part in item for name in datasets_of(part)] if isinstance(item, tuple) else []


def _stages(items: Sequence[Any], difficulty: Callable[[Any], float] | None) -> list[Sequence[Any]]:
    """Parts of the items in the order of a pass; equal ones keep their order."""
    if difficulty is None:
        return [items]
    ranked = sorted(items, key=difficulty)
    cuts = [round(len(ranked) * stage / NUM_STAGES) for stage in range(NUM_STAGES + 1)]
    return [ranked[low:high] for low, high in itertools.pairwise(cuts) if high > low]


def _no_accelerator(worker: int, num_workers: int) -> None:
    """A reader process must never hold a GPU, whatever a library that it imports does."""
    del worker, num_workers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"

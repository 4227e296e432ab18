"""A rollout engine that only the first of several processes has: it samples, the others are told.

Every process calls the engine alike (`rollout/engine.py`). New weights are gathered from all devices and laid
over those of process 0 alone, whose engine goes on as in a run of one process; what it samples reaches the
others as the recorded form of `rollout/records.py`, so that all see the same groups to the last bit.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfemo_jax.distributed import bytes_from_first, is_first
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Params
from selfemo_jax.model.sharding import make_mesh, param_shardings
from selfemo_jax.rollout.engine import Engine, Group, Request, Sampling
from selfemo_jax.rollout.records import groups_from_bytes, groups_to_bytes


def local_mesh() -> Mesh:
    """The devices of this process alone, as fsdp."""
    devices = jax.local_devices()
    return make_mesh({"fsdp": len(devices)}, devices)


class FirstProcessEngine:
    """``make`` is called on process 0 alone and gives its engine, which lives on ``local_mesh()``. Close
    it."""

    def __init__(self, make: Callable[[], Engine], model: ModelConfig, mesh: Mesh, *, dtype: str):
        """``dtype`` is what the weights are gathered in: that of the engine."""
        self._engine = make() if is_first() else None
        self._model, self._mesh, self._dtype = model, mesh, dtype
        whole = NamedSharding(mesh, PartitionSpec())
        # One block of a stacked weight at a time: a whole one need not fit on a device beside the training.
        self._block = jax.jit(
            lambda leaf, index: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False).astype(dtype),
            out_shardings=whole,
        )
        self._all = jax.jit(lambda leaf: leaf.astype(dtype), out_shardings=whole)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """The groups of process 0, on every process. What its engine raises is raised there."""
        asked = hashlib.blake2b(repr([(r.id, r.seed, r.num) for r in requests]).encode(), digest_size=12)
        content = bytes_from_first(
            # By what is asked, since another thread may sample ahead.
            functools.partial(self._sample, requests, sampling),
            channel=f"groups/{asked.hexdigest()}",
        )
        return iter(groups_from_bytes(content, where="the rollouts of process 0")[1])

    def update_policy(self, params: Params, *, version: int) -> None:
        """Gather the weights and give them to the engine of process 0."""
        gathered = {name: self._gathered(name, leaf) for name, leaf in params.items()}
        if self._engine is not None:
            placed = jax.device_put(gathered, param_shardings(self._model, local_mesh()))
            self._engine.update_policy(placed, version=version)

    def close(self) -> None:
        """Close the engine of process 0."""
        if self._engine is not None:
            self._engine.close()

    def take_metrics(self) -> dict[str, float]:
        """Those of the engine of process 0, which writes them down; none elsewhere."""
        return getattr(self._engine, "take_metrics", dict)()

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> bytes:
        assert self._engine is not None
        found = {group.request_id: group for group in self._engine.generate(requests, sampling)}
        # A group that never came is missing on every process.
        answered = [request for request in requests if request.id in found]
        return groups_to_bytes(answered, [found[request.id] for request in answered])

    def _gathered(self, name: str, leaf: Any) -> Any:
        """On the host of process 0; elsewhere nothing is kept."""
        if name != "layers":
            value = self._all(leaf)
            return np.asarray(value) if is_first() else None
        return {inner: self._stacked(value) for inner, value in leaf.items()}

    def _stacked(self, leaf: jax.Array) -> np.ndarray | None:
        kept = np.empty(leaf.shape, jnp.dtype(self._dtype)) if is_first() else None
        for index in range(leaf.shape[0]):
            block = self._block(leaf, np.int32(index))
            if kept is not None:
                kept[index] = np.asarray(block)
        return kept

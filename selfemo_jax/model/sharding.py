"""From logical axes to mesh axes: one table, one rule for the rest.

The mesh has the axes ``data``, ``fsdp`` and ``tp``. Rows of a batch are split over data and fsdp. A weight's
``tp`` dimension comes from the table; fsdp then takes the largest dimension that it divides (a weight without
a tp dimension is split over fsdp and tp together). Replication over data is what makes that axis data
parallelism.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import abstract_params

RULES: Mapping[str, str | None] = {
    "vocab": "tp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "embed": None,
    "head_dim": None,
    "layers": None,
}
MESH_AXES = ("data", "fsdp", "tp")
SMALL_BYTES = 64 * 1024
"""Leaves up to this size (in float32) stay whole: gathering a norm costs more than keeping it."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One line of the dry run: where a weight lies."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int


def make_mesh(axes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes' sizes over the first devices; ValueError when there are too few of them."""
    sizes = [axes.get(name, 1) for name in MESH_AXES]
    num_devices = int(np.prod(sizes))
    devices = jax.devices() if devices is None else devices
    if num_devices > len(devices):
        raise ValueError(
            f"--mesh asks for {num_devices} devices, found {len(devices)} ({devices[0].device_kind}); "
            f"ask for --mesh {len(devices)} or fewer"
        )
    return Mesh(np.array(devices[:num_devices]).reshape(sizes), MESH_AXES)


def partition_spec(
    shape: tuple[int, ...], axes: tuple[str, ...], mesh_sizes: Mapping[str, int]
) -> PartitionSpec:
    """The mesh axes of each dimension of one weight; assumes that `check_tp` has passed."""
    tp, fsdp = mesh_sizes.get("tp", 1), mesh_sizes.get("fsdp", 1)
    if 4 * int(np.prod(shape)) <= SMALL_BYTES:
        return PartitionSpec()
    placed: list[Any] = [RULES[axis] if tp > 1 else None for axis in axes]
    free = [dim for dim, axis in enumerate(axes) if placed[dim] is None and axis != "layers"]
    wanted = ("fsdp",) if "tp" in placed else ("fsdp", "tp")
    ways = fsdp if "tp" in placed else fsdp * tp
    by_size = sorted(free, key=lambda dim: -shape[dim])
    for names, number in ((wanted, ways), (("fsdp",), fsdp)):
        fits = [dim for dim in by_size if number > 1 and shape[dim] % number == 0]
        if fits:
            placed[fits[0]] = names if len(names) > 1 else names[0]
            break
    return PartitionSpec(*placed)


def check_tp(config: ModelConfig, mesh_sizes: Mapping[str, int]) -> None:
    """ValueError where tp does not divide a dimension that the table gives it, naming the nearest mesh that
    fits."""
    tp = mesh_sizes.get("tp", 1)
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "mlp_dim": config.mlp_dim,
        "vocab_size": config.vocab_size,
    }
    wrong = {name: size for name, size in sizes.items() if size % tp}
    if not wrong:
        return
    fitting = [n for n in range(1, max(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())]
    nearest = min(fitting, key=lambda n: (abs(n - tp), n))
    total = tp * mesh_sizes.get("fsdp", 1)
    rest = total // nearest if total % nearest == 0 else mesh_sizes.get("fsdp", 1)
    found = ", ".join(f"{name}={size}" for name, size in wrong.items())
    raise ValueError(
        f"--mesh: tp={tp} does not divide {found}; the nearest valid mesh is fsdp={rest},tp={nearest}"
    )


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """`NamedSharding` of every weight, in the form of the parameters."""
    sizes = dict(mesh.shape)
    check_tp(config, sizes)
    shapes, axes = abstract_params(config)
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, partition_spec(leaf.shape, names, sizes)),
        axes,
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def batch_sharding(mesh: Mesh, *, ndim: int) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *([None] * (ndim - 1))))


def placements(config: ModelConfig, mesh: Mesh, *, dtype: str) -> list[Placement]:
    """Where each weight lies, for the dry run."""
    shapes, _ = abstract_params(config, dtype=dtype)
    shardings = param_shardings(config, mesh)
    lines = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        local = sharding.shard_shape(leaf.shape)
        name = "/".join(str(key.key) for key in path)
        size = int(np.prod(local)) * leaf.dtype.itemsize
        lines.append(Placement(path=name, shape=leaf.shape, spec=sharding.spec, bytes_per_device=size))
    return lines

"""Checksums of arrays wherever they lie: one wrong bit is found."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)
"""Factors of an element's places, one a dimension."""
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def array_checksums(tree: Any) -> dict[str, int]:
    """Path of each array -> the sum of its bit patterns, each times an odd number of its place, modulo 2^32:
    the same on any mesh, and another one after any single change."""
    leaves = jax.tree.leaves_with_path(tree)
    sums = jax.device_get(_sums(tuple(leaf for _, leaf in leaves)))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@jax.jit
def _sums(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_sum(leaf) for leaf in leaves)


def _sum(values: Any) -> Any:
    bits = jax.lax.bitcast_convert_type(values, _UNSIGNED[values.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        factor = jnp.uint32(_ODD[dim % len(_ODD)])
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * factor
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def check_arrays(tree: Any, expected: Mapping[str, int], *, where: str) -> None:
    """ValueError naming the arrays that are not those whose checksums were ``expected``."""
    found = array_checksums(tree)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} of {len(found)} arrays are not as they were saved, first {wrong[0]}; "
            "the files are damaged: copy them, or remove the folder to go on from an older one"
        )

"""Hugging Face tensors out of the published arrays: read, turned, hashed. numpy and tensorstore only."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .manifest import Manifest, TensorEntry

PARAMS = "params"
_TILE = 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """The piece of a tensor that a worker needs: `start` to `stop` of dimension `dim` (0 rows, 1 columns)."""

    dim: int
    start: int
    stop: int


def open_arrays(manifest: Manifest) -> dict[str, Any]:
    """Path -> open `tensorstore.TensorStore` of every array that a tensor names; ValueError if damaged."""
    import tensorstore as ts

    folder = manifest.folder / PARAMS
    # No cache: every byte is used once. Threads come from our own pool.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}})
    names = sorted({entry.array for entry in manifest.tensors.values()})
    ocdbt = any(name.endswith("manifest.ocdbt") for name in manifest.files)
    pending = {}
    for name in names:
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{folder / name}/"}
        spec = {"driver": manifest.zarr_driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        pending[name] = ts.open(spec, open=True, read=True, context=context)
    stores = {}
    for name, future in pending.items():
        try:
            stores[name] = future.result()
        # tensorstore answers a damaged or missing array with whatever its status maps to.
        except Exception as error:
            raise ValueError(f"array {name} cannot be opened: {error}") from error
    return stores


def read_tensor(
    name: str, entry: TensorEntry, stores: Mapping[str, Any], part: Part | None = None
) -> np.ndarray:
    """The tensor as Hugging Face has it, contiguous; with `part` only that piece of it, where it can be cut.

    A piece that is not whole rows or columns of the stored array is cut after reading. bfloat16 comes as the
    numpy type of that name. ValueError where the stored shape does not fit or the data are damaged.
    """
    store = stores[entry.array]
    stored = tuple(store.shape)[0 if entry.index is None else 1 :]
    order = entry.transpose or tuple(range(len(stored)))
    if sorted(order) != list(range(len(stored))) or math.prod(stored) != math.prod(entry.shape):
        raise ValueError(
            f"{name}: array {entry.array} of shape {tuple(store.shape)} at index {entry.index} does not give "
            f"{entry.shape} by transpose {entry.transpose}"
        )
    cut = None if part is None else stored_slice(stored, order, entry.shape, part)
    index = (() if entry.index is None else (entry.index,)) + (
        tuple(slice(None) for _ in stored) if cut is None else cut
    )
    try:
        values = store[index].read().result()
    except (ValueError, OSError, LookupError, RuntimeError) as error:
        raise ValueError(f"{name}: array {entry.array} cannot be read: {error}") from error
    if values.dtype.name != entry.dtype:
        raise ValueError(
            f"{name}: array {entry.array} is {values.dtype.name}; the manifest says {entry.dtype}"
        )
    shape = list(entry.shape)
    if part is not None and cut is not None:
        shape[part.dim] = part.stop - part.start
    tensor = turned(values, order).reshape(shape)
    if part is not None and cut is None:
        keep = (slice(None),) * part.dim + (slice(part.start, part.stop),)
        tensor = np.ascontiguousarray(tensor[keep])
    return tensor


def stored_slice(
    stored: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...], part: Part
) -> tuple[slice, ...] | None:
    """The slice of the stored array that holds `part` of the Hugging Face tensor; None where none does."""
    groups, dims, size = [], [], 1
    for dim in order:
        dims.append(dim)
        size *= stored[dim]
        if len(groups) < len(shape) and size == shape[len(groups)]:
            groups.append(dims)
            dims, size = [], 1
    if dims or len(groups) != len(shape):
        return None
    first, *rest = groups[part.dim]
    unit = math.prod(stored[dim] for dim in rest)
    if part.start % unit or part.stop % unit:
        return None
    cut = slice(part.start // unit, part.stop // unit)
    return tuple(cut if dim == first else slice(None) for dim in range(len(stored)))


def turned(values: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """`values.transpose(order)`, contiguous. A rotation of the dimensions is one transposed matrix, copied in
    tiles that fit the cache, which is several times faster than numpy's own copy."""
    ndim = len(order)
    if order == tuple(range(ndim)):
        return np.ascontiguousarray(values)
    first = order[0]
    if order != tuple(range(first, ndim)) + tuple(range(first)):
        return np.ascontiguousarray(values.transpose(order))
    shape = [values.shape[dim] for dim in order]
    rows = math.prod(values.shape[:first])
    plain = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(rows, -1)
    result = np.empty(plain.shape[::-1], plain.dtype)
    for row in range(0, plain.shape[0], _TILE):
        for column in range(0, plain.shape[1], _TILE):
            result[column : column + _TILE, row : row + _TILE] = plain[
                row : row + _TILE, column : column + _TILE
            ].T
    return result.view(values.dtype).reshape(shape)


def digest(tensor: np.ndarray) -> str:
    """SHA-256 of the tensor's bytes in C order."""
    contiguous = np.ascontiguousarray(tensor)
    plain = contiguous.reshape(-1).view(np.uint8)
    return hashlib.sha256(plain).hexdigest()

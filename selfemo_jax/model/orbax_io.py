"""Arrays on disk in Orbax's layout, written and read a piece at a time with tensorstore alone.

Orbax's own save takes a tree of whole arrays, which would hold the model in memory at once. Its layout
without OCDBT is plain: one zarr3 array per leaf in a folder named by the dotted path, and a `_METADATA` file
that gives the tree. What is written here, Orbax restores (a test holds that); what Orbax writes, with OCDBT
or without, is read here.

One layer is one file (a zarr shard), cut inside into up to eight chunks along its largest dimension with a
checksum each, so that a device which holds an eighth of a weight reads an eighth of the bytes, and a damaged
file is found.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

METADATA_NAME = "_METADATA"
_CHECKPOINT_METADATA_NAME = "_CHECKPOINT_METADATA"
_MIN_CHUNK_BYTES = 2**20
_ROWS_BYTES = 64 * 2**20
# What tensorstore raises for files that are missing, cut or overwritten.
_DAMAGE = (ValueError, OSError, LookupError, RuntimeError)


def shard_shape(shape: tuple[int, ...], *, stacked: bool, itemsize: int) -> tuple[int, ...]:
    """What lies in one file: a layer of a stacked weight, or a block of the longer dimension of a table."""
    if stacked:
        return (1, *shape[1:])
    size = int(np.prod(shape)) * itemsize
    dim = int(np.argmax(shape))
    pieces = min(shape[dim], -(-size // _ROWS_BYTES))
    if pieces > 1:
        # A number of files that divides the table wastes nothing and lines up with the devices.
        pieces = next((n for n in range(pieces, 4 * pieces) if shape[dim] % n == 0), pieces)
    return tuple(-(-length // pieces) if d == dim else length for d, length in enumerate(shape))


def _chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    size = int(np.prod(shard)) * itemsize
    for pieces in (8, 4, 2):
        dims = [dim for dim, length in enumerate(shard) if length % pieces == 0]
        if dims and size // pieces >= _MIN_CHUNK_BYTES:
            widest = max(dims, key=lambda dim: shard[dim])
            return tuple(n // pieces if dim == widest else n for dim, n in enumerate(shard))
    return shard


def create_array(folder: Path, path: str, *, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> Any:
    """An empty zarr3 array (a `tensorstore.TensorStore`) for the parameter with this dotted path."""
    import tensorstore as ts

    dtype = np.dtype(dtype)
    shard = shard_shape(shape, stacked=stacked, itemsize=dtype.itemsize)
    inner = {
        "chunk_shape": _chunk_shape(shard, dtype.itemsize),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.absolute() / path}/"},
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        },
        # A shard of zeros is a file too: a missing file then always means damage.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, open=False, context=_context()).result()


def write_metadata(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The files that make ``folder`` a finished Orbax checkpoint of the nested dict with these paths."""
    tree = {}
    for path, shape in shapes.items():
        keys = path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / METADATA_NAME).write_text(json.dumps(metadata))
    now = time.time_ns()
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    about = {
        "item_handlers": handler,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (folder / _CHECKPOINT_METADATA_NAME).write_text(json.dumps(about))


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError naming the file where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not JSON: {error}; the file is damaged, copy or convert it anew"
        ) from error


def open_arrays(folder: Path) -> dict[str, Any]:
    """Dotted path -> open `tensorstore.TensorStore` of each leaf; ValueError where this is no checkpoint."""
    import tensorstore as ts

    path = folder / METADATA_NAME
    if not path.exists():
        raise ValueError(f"{folder}: no {METADATA_NAME}; expected an Orbax checkpoint of parameters")
    metadata = read_json(path)
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    context = _context()
    pending = {}
    for entry in metadata["tree_metadata"].values():
        name = ".".join(str(key["key"]) for key in entry["key_metadata"])
        if metadata.get("use_ocdbt"):
            kvstore = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{folder.absolute() / name}/"}
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        pending[name] = ts.open(spec, open=True, read=True, context=context)
    arrays = {}
    for name, future in pending.items():
        try:
            arrays[name] = future.result()
        except _DAMAGE as error:
            raise ValueError(f"{folder}: cannot open parameter {name}: {error}") from error
    return arrays


def read_array(store: Any, index: tuple[slice | int, ...] = ()) -> np.ndarray:
    """The values at ``index``; ValueError where a file is missing or damaged."""
    try:
        return store[index].read().result() if index else store.read().result()
    except _DAMAGE as error:
        raise ValueError(f"{store.kvstore.path}: cannot be read, the file is damaged: {error}") from error


def _context() -> Any:
    import tensorstore as ts

    # No cache: every piece is used once, and memory stays at one piece.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}})

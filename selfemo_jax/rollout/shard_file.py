"""A zarr3 array in one file, written from memory as it lies there.

The file is one shard: the chunks one after another, then where each begins and how long it is. tensorstore
and Orbax read it as any other array, one chunk at a time. Writing it ourselves costs one pass over the bytes,
and their digest is taken on the way, in place of reading the file again.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from selfemo_jax.model.weights import as_bytes

ALGORITHM = "sha256"


def write_sharded(folder: Path, values: np.ndarray, *, chunk: tuple[int, ...]) -> dict[Path, tuple[int, str]]:
    """Write ``values`` into the new ``folder``; path -> (bytes, digest) of each file. Nothing is fsynced."""
    grid = tuple(-(-length // step) for length, step in zip(values.shape, chunk, strict=True))
    path = folder.joinpath("c", *("0" for _ in grid))
    path.parent.mkdir(parents=True)
    index = np.zeros((*grid, 2), "<u8")
    digest, offset = hashlib.new(ALGORITHM), 0
    with path.open("wb", buffering=0) as file:
        for place in np.ndindex(*grid):
            data = as_bytes(_chunk(values, place, chunk))
            index[place] = offset, len(data)
            offset += _write(file, data, digest)
        offset += _write(file, memoryview(index.tobytes()), digest)
    about = folder / "zarr.json"
    text = json.dumps(_metadata(values, grid, chunk), indent=1).encode()
    about.write_bytes(text)
    return {path: (offset, digest.hexdigest()), about: (len(text), hashlib.new(ALGORITHM, text).hexdigest())}


def _chunk(values: np.ndarray, place: tuple[int, ...], chunk: tuple[int, ...]) -> np.ndarray:
    part = values[tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True))]
    if part.shape != chunk:
        # Chunks have one size: what is beyond the array is filled up.
        filling = [(0, whole - here) for whole, here in zip(chunk, part.shape, strict=True)]
        part = np.pad(part, filling)
    return part


def _write(file, data: memoryview, digest) -> int:
    written = 0
    while written < len(data):
        # The system takes at most 2 GiB at once.
        written += file.write(data[written : written + 2**30])
    digest.update(data)
    return written


def _metadata(values: np.ndarray, grid: tuple[int, ...], chunk: tuple[int, ...]) -> dict[str, object]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = [number * step for number, step in zip(grid, chunk, strict=True)]
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": [little],
        "index_codecs": [little],
        "index_location": "end",
    }
    assert math.prod(shard) >= values.size
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
    }

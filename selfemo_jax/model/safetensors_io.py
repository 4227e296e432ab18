"""Safetensors files read and written tensor by tensor, a block of rows at a time.

The library's own reader maps whole files into memory and its writer wants every tensor at once; a checkpoint
larger than memory can afford neither. A file is eight bytes (a little-endian length), a JSON header, the
tensors' bytes. bfloat16 is read as `ml_dtypes.bfloat16`. A sharded checkpoint is several files and an index.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from selfemo_jax.model import orbax_io

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 64 * 2**20
"""Rows are read and written in blocks of about this size."""
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Type and shape of one tensor. Example: ``TensorInfo(dtype="BF16", shape=(2048, 1024))``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies on disk."""

    info: TensorInfo
    path: Path
    offset: int
    """First byte of the values in the file."""


def read_folder(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors of a Hugging Face folder, single file or sharded, and what is wrong with them (empty when
    nothing).

    Problems are returned and not raised, so that the caller reports them together with its own.
    """
    index_path = folder / INDEX_NAME
    paths = sorted(folder.glob("*.safetensors"))
    problems: list[str] = []
    weight_map: Mapping[str, str] | None = None
    if index_path.exists():
        index: Mapping[str, str] = orbax_io.read_json(index_path)["weight_map"]
        weight_map = index
        named = sorted({folder / name for name in index.values()})
        problems += [
            f"{path.name}: named in {INDEX_NAME} but not there" for path in named if not path.exists()
        ]
        paths = [path for path in named if path.exists()]
    elif (folder / SINGLE_NAME).exists():
        paths = [folder / SINGLE_NAME]
    if not paths:
        raise ValueError(f"{folder}: no *.safetensors file; expected a Hugging Face checkpoint")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        stored, found = read_header(path)
        problems += found
        for name, tensor in stored.items():
            if name in tensors:
                problems.append(f"{name}: duplicate, in {tensors[name].path.name} and in {path.name}")
                continue
            if weight_map is not None and weight_map.get(name) != path.name:
                problems.append(
                    f"{name}: in {path.name}, but {INDEX_NAME} says {weight_map.get(name, 'nothing')}"
                )
            tensors[name] = tensor
    if weight_map is not None:
        problems += [f"{n}: in {INDEX_NAME} but in no file" for n in sorted(set(weight_map) - set(tensors))]
    return tensors, problems


def read_header(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors that one file declares, and its problems; ValueError where it is no safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: not a safetensors file, or cut short (its header says {length} bytes)")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        except _DuplicateKey as error:
            raise ValueError(f"{path}: duplicate tensor {error} in the header") from error
    start, tensors, problems = 8 + length, {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            problems.append(f"{name}: type {entry['dtype']} in {path.name}; expected one of {sorted(DTYPES)}")
            continue
        info = TensorInfo(dtype=entry["dtype"], shape=tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != info.nbytes or start + end > size:
            problems.append(
                f"{name}: bytes {begin} to {end} of {path.name} ({size - start} bytes of values) do not hold "
                f"{info.dtype} {list(info.shape)}; the file is damaged or cut short"
            )
        tensors[name] = StoredTensor(info=info, path=path, offset=start + begin)
    return tensors, problems


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def row_blocks(info: TensorInfo, *, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices of the first dimension of about ``block_bytes`` each, in order."""
    num_rows = info.shape[0]
    step = max(1, min(num_rows, block_bytes * num_rows // max(1, info.nbytes)))
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def read_rows(tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
    """The tensor, or some of its rows, as a fresh array; ValueError where the file ends too early."""
    shape = tensor.info.shape
    begin, end = (0, shape[0]) if rows is None else (rows.start, rows.stop)
    array = np.empty((end - begin, *shape[1:]), DTYPES[tensor.info.dtype])
    row_bytes = tensor.info.nbytes // max(1, shape[0])
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + begin * row_bytes)
        view, done = memoryview(array.view(np.uint8).reshape(-1)), 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise ValueError(f"{tensor.path}: ends before the values of a tensor; the file is cut short")
            done += got
    return array


def write_header(file: BinaryIO, tensors: Mapping[str, TensorInfo]) -> None:
    """Write the header for tensors whose bytes the caller then writes in the same order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def plan_shards(tensors: Mapping[str, TensorInfo], *, max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> its tensors, in order, no file above ``max_bytes`` unless a single tensor is."""
    groups: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in tensors.items():
        if groups[-1] and used + info.nbytes > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = info
        used += info.nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    total = len(groups)
    return {f"model-{i + 1:05d}-of-{total:05d}.safetensors": group for i, group in enumerate(groups)}


def write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """The index of a sharded checkpoint; nothing for a single file."""
    if set(shards) == {SINGLE_NAME}:
        return
    total = sum(info.nbytes for group in shards.values() for info in group.values())
    weight_map = {name: file for file, group in shards.items() for name in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + os.linesep)

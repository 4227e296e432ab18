"""Weights on disk or in memory as one thing: named tensors, declared at once and read a piece at a time.

`open_model` says what a folder is, `load_params` brings it into JAX, and the sources below are what
`model/hf_convert.py` copies between. JAX is imported by `load_params` alone.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfemo_jax.model import orbax_io
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.digests import check_files
from selfemo_jax.model.hf_table import (
    EMBED,
    HEAD,
    Slot,
    flatten,
    from_hf_layout,
    hf_slots,
    param_shapes,
    to_hf_layout,
    unflatten,
)
from selfemo_jax.model.safetensors_io import (
    DTYPE_NAMES,
    DTYPES,
    TensorInfo,
    read_folder,
    read_rows,
    row_blocks,
)

CERTIFICATE_NAME = "certificate.json"
PARAMS_NAME = "params"
_Reader = Callable[[str, tuple[slice, ...]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder of weights that this project can read."""

    folder: Path
    kind: Literal["hf", "flax"]
    certificate: Mapping[str, Any] | None = None

    @property
    def note(self) -> str | None:
        """What every score made from these weights must say, such as that they are a quantised copy."""
        return (self.certificate or {}).get("note")


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Hugging Face tensors from anywhere: declared at once, read a piece at a time."""

    infos: Mapping[str, TensorInfo]
    read: Callable[[str, slice | None], np.ndarray]
    """(name, rows or None for all) -> values in Hugging Face's layout."""
    problems: Sequence[str] = ()


def open_model(folder: str | os.PathLike) -> tuple[ModelConfig, Checkpoint]:
    """Configuration and kind of a Hugging Face folder or a converted one; ValueError where it is neither."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a Hugging Face or a converted checkpoint")
    config_path = folder / "config.json"
    if not config_path.exists():
        raise ValueError(f"{folder}: no config.json; expected a Hugging Face or a converted checkpoint")
    settings = orbax_io.read_json(config_path)
    try:
        config = ModelConfig.from_hf(settings)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    certificate_path = folder / CERTIFICATE_NAME
    certificate = orbax_io.read_json(certificate_path) if certificate_path.exists() else None
    if (folder / PARAMS_NAME / orbax_io.METADATA_NAME).exists():
        return config, Checkpoint(folder=folder, kind="flax", certificate=certificate)
    if any(folder.glob("*.safetensors")):
        return config, Checkpoint(folder=folder, kind="hf", certificate=certificate)
    raise ValueError(f"{folder}: neither *.safetensors nor {PARAMS_NAME}/{orbax_io.METADATA_NAME} is there")


def load_params(
    folder: str | os.PathLike, *, dtype: str, shardings: Mapping[str, Any] | Any = None
) -> dict[str, Any]:
    """The parameters as JAX arrays of ``dtype``, from a Hugging Face or a converted folder.

    With ``shardings`` (a tree like the parameters', or one for all) each device is given its own slice only,
    and from a converted folder only that slice is read. ValueError for weights that do not fit `config.json`.
    """
    import jax

    config, checkpoint = open_model(folder)
    shapes = param_shapes(config)
    target = np.dtype(jax.numpy.dtype(dtype))
    tree = isinstance(shardings, Mapping)
    by_path = flatten(shardings) if tree else dict.fromkeys(shapes, shardings)
    read = _flax_reader(checkpoint, config) if checkpoint.kind == "flax" else _hf_reader(checkpoint, config)
    loaded = {}
    for path, shape in shapes.items():
        pieces: dict[tuple, np.ndarray] = {}

        def piece(index: tuple[slice, ...], path=path, shape=shape, pieces=pieces) -> np.ndarray:
            key = tuple(part.indices(length) for part, length in zip(index, shape, strict=True))
            if key not in pieces:
                pieces[key] = read(path, index).astype(target, copy=False)
            return pieces[key]

        if by_path[path] is None:
            loaded[path] = jax.device_put(piece(tuple(slice(None) for _ in shape)))
        else:
            loaded[path] = jax.make_array_from_callback(shape, by_path[path], piece)
    return unflatten(loaded)


def _flax_reader(checkpoint: Checkpoint, config: ModelConfig) -> _Reader:
    stores = _open_stores(checkpoint, config)
    return lambda path, index: orbax_io.read_array(stores[path], index)


def _hf_reader(checkpoint: Checkpoint, config: ModelConfig) -> _Reader:
    source = hf_source(checkpoint)
    slots, shapes = hf_slots(config), param_shapes(config)
    raise_together([*source.problems, *mismatches(source.infos, slots, config)])
    names: dict[str, list[str]] = {}
    for name, slot in slots.items():
        names.setdefault(slot.rule.path, []).append(name)
    last: dict[str, np.ndarray] = {}

    def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
        # One stacked weight is held at a time: its layers are spread over the file, its devices ask in turn.
        if path not in last:
            last.clear()
            whole = np.empty(shapes[path], DTYPES[source.infos[names[path][0]].dtype])
            for name in names[path]:
                slot = slots[name]
                target = whole if slot.layer is None else whole[slot.layer]
                target[...] = from_hf_layout(source.read(name, None), slot.rule, config)
            last[path] = whole
        return last[path][index]

    return read


def as_bytes(values: np.ndarray) -> memoryview:
    """The values' bytes, little-endian as in the file."""
    return memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1))


def entry(info: TensorInfo, digest: str) -> dict[str, Any]:
    """A tensor's line in the certificate."""
    return {"dtype": info.dtype, "shape": list(info.shape), "sha256": digest}


def blocks(source: TensorSource, name: str) -> Iterator[np.ndarray]:
    """The tensor's values in order: the two large tables by rows, everything else at once.

    A layer is one piece on disk on our side, and would be read again for every block of it.
    """
    if name not in (EMBED, HEAD):
        yield source.read(name, None)
        return
    for rows in row_blocks(source.infos[name]):
        yield source.read(name, rows)


def tensor_digest(source: TensorSource, name: str) -> str:
    """SHA-256 of the little-endian bytes of the values, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks(source, name):
        digest.update(as_bytes(block))
    return digest.hexdigest()


def tensor_source(checkpoint: Checkpoint, config: ModelConfig) -> TensorSource:
    """The tensors of a folder of either kind, in Hugging Face's names and layout."""
    return hf_source(checkpoint) if checkpoint.kind == "hf" else flax_source(checkpoint, config)


def hf_source(checkpoint: Checkpoint) -> TensorSource:
    """The tensors of a Hugging Face folder; its problems are listed, not raised."""
    tensors, problems = read_folder(checkpoint.folder)
    infos = {name: tensor.info for name, tensor in tensors.items()}
    return TensorSource(
        infos=infos, read=lambda name, rows: read_rows(tensors[name], rows), problems=problems
    )


def _open_stores(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    # A run writes through Orbax, which keeps no checksums, and notes the digests of its files.
    check_files(checkpoint.folder / PARAMS_NAME, (checkpoint.certificate or {}).get("files", {}))
    stores = orbax_io.open_arrays(checkpoint.folder / PARAMS_NAME)
    _check_shapes(stores, config, where=f"{checkpoint.folder}: the parameters do not fit config.json")
    return stores


def _check_shapes(leaves: Mapping[str, Any], config: ModelConfig, *, where: str) -> None:
    expected = param_shapes(config)
    problems = [f"{path}: missing" for path in expected if path not in leaves]
    problems += [f"{path}: unknown" for path in leaves if path not in expected]
    problems += [
        f"{path}: shape {list(leaves[path].shape)}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in leaves and tuple(leaves[path].shape) != shape
    ]
    raise_together(problems, where=where)


def flax_source(checkpoint: Checkpoint, config: ModelConfig) -> TensorSource:
    """The Hugging Face tensors that a converted folder stands for, in the order of its certificate."""
    stores = _open_stores(checkpoint, config)
    slots = hf_slots(config)
    dtypes = {path: DTYPE_NAMES[store.dtype.numpy_dtype] for path, store in stores.items()}
    infos = {n: TensorInfo(dtype=dtypes[s.rule.path], shape=s.shape) for n, s in slots.items()}

    def read(name: str, rows: slice | None) -> np.ndarray:
        slot = slots[name]
        index = slot.index(rows)
        values = to_hf_layout(orbax_io.read_array(stores[slot.rule.path], index), slot.rule)
        return values if slot.layer is None or rows is None else values[rows]

    source = TensorSource(infos=infos, read=read)
    certificate = checkpoint.certificate or {}
    if certificate.get("lm_head") == "duplicate":
        source = with_head(source)
    order = [name for name in certificate.get("tensors", {}) if name in source.infos]
    order += [name for name in source.infos if name not in set(order)]
    return TensorSource(infos={name: source.infos[name] for name in order}, read=source.read)


def params_source(params: Mapping[str, Any], config: ModelConfig, short: str) -> TensorSource:
    """The Hugging Face tensors of parameters in memory, cast to the safetensors type ``short``."""
    flat = flatten(params)
    _check_shapes(flat, config, where="the parameters do not fit the configuration")
    slots = hf_slots(config)

    def read(name: str, rows: slice | None) -> np.ndarray:
        slot = slots[name]
        # Cut on the device before the copy: the host never holds more than this piece.
        values = np.asarray(flat[slot.rule.path][slot.index(rows)])
        values = to_hf_layout(values, slot.rule).astype(DTYPES[short], copy=False)
        return values if slot.layer is None or rows is None else values[rows]

    infos = {name: TensorInfo(dtype=short, shape=slot.shape) for name, slot in slots.items()}
    return TensorSource(infos=infos, read=read)


def with_head(source: TensorSource) -> TensorSource:
    """The source plus an output head that repeats the embedding, as some tied checkpoints have it."""
    infos = {**source.infos, HEAD: source.infos[EMBED]}
    return TensorSource(
        infos=infos, read=lambda name, rows: source.read(EMBED if name == HEAD else name, rows)
    )


def head_kind(infos: Mapping[str, TensorInfo], config: ModelConfig) -> str:
    """The output head of a checkpoint: its own, absent, or a duplicate of the embedding."""
    if not config.tie_embeddings:
        return "own"
    return "duplicate" if HEAD in infos else "absent"


def raise_together(problems: Sequence[str], *, where: str = "the tensors do not fit config.json") -> None:
    """One ValueError for all problems, nothing when there are none."""
    if not problems:
        return
    shown = [f"  {problem}" for problem in problems[:40]]
    if len(problems) > len(shown):
        shown.append(f"  and {len(problems) - len(shown)} more")
    raise ValueError(f"{where} ({len(problems)} problems):\n" + "\n".join(shown))


def mismatches(infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], config: ModelConfig) -> list[str]:
    """Missing, unknown and misshapen tensors, and stacks of more than one type."""
    expected = {name: slot.shape for name, slot in slots.items()}
    if config.tie_embeddings and HEAD in infos:
        expected[HEAD] = expected[EMBED]
    problems = [f"{name}: missing, expected {list(expected[name])}" for name in expected if name not in infos]
    problems += [f"{name}: unknown, {list(infos[name].shape)}" for name in infos if name not in expected]
    first: dict[str, str] = {}
    for name, shape in expected.items():
        if name not in infos:
            continue
        if infos[name].shape != shape:
            problems.append(f"{name}: shape {list(infos[name].shape)}, expected {list(shape)}")
        key = slots[name].rule.path if name in slots else slots[EMBED].rule.path
        other = first.setdefault(key, name)
        if infos[name].dtype != infos[other].dtype:
            problems.append(f"{name}: type {infos[name].dtype}, but {other} has {infos[other].dtype}")
    return problems

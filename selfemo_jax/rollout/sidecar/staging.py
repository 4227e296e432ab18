"""Read and check a whole published version before anything of the model changes.

`stage` gives tensors that are known to be the published ones: every byte has passed a digest of the
manifest, names and shapes are exactly the model's, and every value is finite. With tensor parallelism each
worker checks its share of the tensors whole and reads of the others only its own piece.
"""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arrays import Part, digest, open_arrays, read_tensor
from .manifest import Manifest, TensorEntry, check_sizes, damaged_files, read_manifest

MAX_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The model that serves: what a version must match."""

    architecture: str
    config_digest: str | None
    shapes: Mapping[str, tuple[int, ...]]
    """Every Hugging Face tensor, in the order of the layers; a tied head is not among them."""
    parts: Mapping[str, Part]
    """The pieces that this worker holds of tensors it does not hold whole."""
    rank: int = 0
    num_ranks: int = 1

    def checked(self) -> frozenset[str]:
        """The tensors that this worker reads whole to compare their digests: its share of all."""
        return frozenset(list(self.shapes)[self.rank :: self.num_ranks])


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A version that is ready to be applied."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    """In the order of the layers, on the host. Of a tensor with a part only that part is filled; the rest
    was never touched, so it takes no memory, and the model's loader cuts it off."""
    checked: frozenset[str]
    """The tensors whose digest this worker compared."""
    seconds: Mapping[str, float]

    @property
    def num_bytes(self) -> int:
        """Bytes of the staged tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def stage(folder: Path, expected: Expected, *, transport: str = "orbax") -> Staged:
    """The checked tensors of the version in `folder`; ValueError says what does not fit.

    `transport` says what is read: the published arrays (orbax) or the safetensors files beside them.
    """
    start = time.perf_counter()
    manifest = read_manifest(folder)
    check_model(manifest, expected)
    checked = expected.checked()
    try:
        check_sizes(manifest)
        read = _reader(manifest, transport)
        tensors = _load_all(manifest, expected, checked, read)
    except (ValueError, OSError) as error:
        raise ValueError(f"weights version {manifest.version}: {error}{_blame(manifest)}") from error
    seconds = {"all": round(time.perf_counter() - start, 4)}
    return Staged(version=manifest.version, tensors=tensors, checked=checked, seconds=seconds)


def _load_all(
    manifest: Manifest, expected: Expected, checked: frozenset[str], read: "Read"
) -> dict[str, torch.Tensor]:
    def load(name: str) -> torch.Tensor:
        entry = manifest.tensors[name]
        part = None if name in checked else expected.parts.get(name)
        values = read(name, entry, part)
        if name in checked and (found := digest(values)) != entry.digest:
            raise ValueError(f"{name}: digest {found}; the manifest says {entry.digest}")
        tensor = to_torch(values)
        if not finite(tensor):
            raise ValueError(f"{name}: has values that are not finite")
        return tensor if part is None else _in_place(tensor, entry, part)

    with ThreadPoolExecutor(max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))) as pool:
        futures = {name: pool.submit(load, name) for name in expected.shapes}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_model(manifest: Manifest, expected: Expected) -> None:
    """ValueError unless the version is of the model that serves: architecture, config, names and shapes."""
    where = f"weights version {manifest.version}"
    if manifest.architecture != expected.architecture:
        raise ValueError(
            f"{where}: weights of a {manifest.architecture}; this server runs a {expected.architecture}"
        )
    missing = [name for name in expected.shapes if name not in manifest.tensors]
    extra = [name for name in manifest.tensors if name not in expected.shapes]
    if missing or extra:
        raise ValueError(f"{where}: not this server's model: missing {_few(missing)}; unknown {_few(extra)}")
    for name, shape in expected.shapes.items():
        if manifest.tensors[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {manifest.tensors[name].shape}; this server's model has {shape}"
            )
    if None not in (manifest.config_digest, expected.config_digest) and (
        manifest.config_digest != expected.config_digest
    ):
        raise ValueError(
            f"{where}: published for a config with digest {manifest.config_digest}; this server "
            f"runs one with {expected.config_digest}: other settings, as rope_theta, in the same shapes"
        )


def to_torch(values: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes for a digest; bfloat16 as two-byte integers."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; a finite sum shows it in one pass, and only a large one needs the second."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _in_place(piece: torch.Tensor, entry: TensorEntry, part: Part) -> torch.Tensor:
    whole = torch.empty(entry.shape, dtype=piece.dtype)
    whole.narrow(part.dim, part.start, part.stop - part.start).copy_(piece)
    return whole


Read = Callable[[str, TensorEntry, Part | None], np.ndarray]


def _reader(manifest: Manifest, transport: str) -> Read:
    if transport == "safetensors":
        return _safetensors_reader(manifest)
    stores = open_arrays(manifest)
    return lambda name, entry, part: read_tensor(name, entry, stores, part)


def _safetensors_reader(manifest: Manifest) -> Read:
    from safetensors import SafetensorError, safe_open

    where: dict[str, Any] = {}
    for file in sorted(name for name in manifest.files if name.endswith(".safetensors")):
        try:
            opened = safe_open(manifest.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error
        where |= dict.fromkeys(opened.keys(), opened)
    absent = [name for name in manifest.tensors if name not in where]
    if absent:
        raise ValueError(f"weights version {manifest.version}: no safetensors file has {_few(absent)}")

    def read(name: str, entry: TensorEntry, part: Part | None) -> np.ndarray:
        try:
            view = where[name].get_slice(name)
            found = (tuple(view.get_shape()), view.get_dtype())
            wanted = (entry.shape, {"float32": "F32", "bfloat16": "BF16"}[entry.dtype])
            if found != wanted:
                raise ValueError(f"{name}: the file has {found}; the manifest says {wanted}")
            if part is None:
                tensor = view[:]
            elif part.dim == 0:
                tensor = view[part.start : part.stop]
            else:
                tensor = view[:, part.start : part.stop]
        except SafetensorError as error:
            raise ValueError(f"{name}: cannot be read: {error}") from error
        values = to_numpy(tensor)
        return values.view(_bfloat16()) if entry.dtype == "bfloat16" else values

    return read


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _blame(manifest: Manifest) -> str:
    try:
        names = damaged_files(manifest)
    except OSError as error:
        return f" (the files are gone: {error})"
    return f" (damaged: {_few(names)})" if names else " (every file is as published)"


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3]) if names else "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")

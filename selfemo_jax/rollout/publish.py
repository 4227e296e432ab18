"""Versions of the policy on disk, for the servers that sample from it.

A version is a folder `<root>/<version>/` with `params/`, an Orbax checkpoint of the parameter tree (zarr3,
one file an array, one layer a chunk: `shard_file.py`), and `manifest.json`, which says where each Hugging
Face tensor lies in it and gives a digest of every file and tensor. The folder is written aside, fsynced and
renamed; the rename of the manifest is the commit point. Versions count publications, so no path is used
twice; the trainer's own step is the manifest's `source_step`.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfemo_jax.model.adapters import LORA, SCALE, adapted, base_of, is_adapted, merge
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Params
from selfemo_jax.model.hf_table import Rule, active_rules, flatten, hf_slots, to_hf_layout
from selfemo_jax.model.orbax_io import shard_shape, write_metadata
from selfemo_jax.model.safetensors_io import TensorInfo, write_header
from selfemo_jax.model.weights import as_bytes
from selfemo_jax.rollout.shard_file import ALGORITHM, write_sharded

FORMAT = "selfemo_jax.weights/1"
MANIFEST = "manifest.json"
SAFETENSORS = "model.safetensors"
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_SHORT = {"float32": "F32", "bfloat16": "BF16"}
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Published:
    """A committed version."""

    version: int
    source_step: int
    """The trainer's name for these weights."""
    folder: Path
    num_bytes: int
    digests: Mapping[str, str]
    """Of each Hugging Face tensor's bytes."""
    seconds: Mapping[str, float]
    """Where the time of the publication went."""


def snapshot(params: Params, *, dtype: str) -> Params:
    """A copy in the serving type, adapters merged, each device holding what it held: the trainer may donate
    its own arrays."""

    def copy(leaf):
        return jnp.array(leaf, dtype=dtype, copy=True)

    plain = base_of(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf, jax.Array) else None, plain)
    return jax.jit(lambda tree: jax.tree.map(copy, merge(tree, dtype=dtype)), out_shardings=shardings)(params)


def remembered(params: Params, fresh: Params) -> Params:
    """What tells a served policy from the next: its `snapshot` ``fresh``, or with adapters a copy of those
    (the trainer's next update takes its own away) beside the base, which is shared."""
    if not is_adapted(params):
        return fresh
    return adapted(base_of(params), jax.tree.map(jnp.copy, params[LORA]), scale=params[SCALE])


def is_same(a: Params, b: Params) -> bool:
    """Whether two remembered policies are equal to the last bit."""
    if is_adapted(a) != is_adapted(b):
        return False
    if is_adapted(a) and a["embed"] is b["embed"]:
        a, b = a[LORA], b[LORA]
    return bool(_all_equal(a, b))


@jax.jit
def _all_equal(a: Params, b: Params) -> jax.Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.all(x == y), a, b))).all()


def served_config(model: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The Hugging Face configuration that a server starts with."""
    config = model.to_hf()
    return config | {"dtype" if "dtype" in config else "torch_dtype": dtype}


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a Hugging Face configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_table(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face name -> where it lies: array, index into the layers, transpose, shape."""
    table = {}
    for name, slot in hf_slots(model).items():
        order = _permutation(slot.rule)
        table[name] = {
            "array": slot.rule.path,
            "index": slot.layer,
            "transpose": None if order == sorted(order) else order,
            "shape": list(slot.shape),
        }
    return table


def is_committed(folder: Path) -> bool:
    """Whether a version is whole."""
    return (folder / MANIFEST).is_file()


class Publisher:
    """Writes versions below ``root``, which is locked for it; one at a time, in a thread of its own. Close
    it."""

    def __init__(
        self, root: Path, model: ModelConfig, *, dtype: str, keep: int = 3, transport: str = "orbax"
    ):
        """``keep`` versions stay, the newest included. With ``transport`` ``safetensors`` a version is one
        Hugging Face file instead. What an earlier process left is counted on, and cleaned as its own."""
        self._root, self._model, self._dtype = root.absolute(), model, dtype
        self._keep, self._transport = keep, transport
        self._config = served_config(model, dtype=dtype)
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"{self._root}: another run publishes its weights there; end it, or give this one another "
                "rollout.sidecar.weights_root"
            ) from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="digest")
        self._disk = ThreadPoolExecutor(2, thread_name_prefix="fsync")
        found = [int(name) for name, _ in self._versions()]
        self._next = max(found, default=-1) + 1
        self.clean(protect=())

    def start(self, params: Params, *, source_step: int) -> "Future[Published]":
        """Publish ``params``, which must stay as they are until the result is there (see `snapshot`)."""
        version, self._next = self._next, self._next + 1
        for leaf in jax.tree.leaves(params):
            assert getattr(leaf, "is_fully_addressable", True), "see rollout/first_process.py"
        return self._writer.submit(self._publish, params, version, source_step)

    def publish(self, params: Params, *, source_step: int) -> Published:
        """As `start`, and wait: OSError where the disk is full, and then nothing was committed."""
        return self.start(params, source_step=source_step).result()

    def folder(self, version: int) -> Path:
        """Where a version lies."""
        return self._root / str(version)

    def clean(self, *, protect: Collection[int]) -> None:
        """Remove all but the newest versions, those in ``protect``, and what was never committed."""
        committed = sorted(int(name) for name, path in self._versions() if is_committed(path))
        kept = {*committed[-self._keep :], *protect}
        for name, path in self._versions():
            if int(name) not in kept or not is_committed(path):
                # The commit goes first: a half-removed folder must not look whole.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
        for path in self._root.glob("*.partial-*"):
            if not _is_alive(path.name.rpartition("-")[2]):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Finish what is being written."""
        self._writer.shutdown()
        self._pool.shutdown()
        self._disk.shutdown()
        os.close(self._lock)

    def _versions(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._root.iterdir() if path.name.isdecimal() and path.is_dir()]

    def _publish(self, params: Params, version: int, source_step: int) -> Published:
        part = self._root / f"{version}.partial-{os.getpid()}"
        leaves = flatten(params)
        itemsize = np.dtype(jnp.dtype(self._dtype)).itemsize
        num_bytes = sum(leaf.size for leaf in leaves.values()) * itemsize
        free = shutil.disk_usage(self._root).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"publishing version {version}: needs {num_bytes / 1e9:.2f} GB and {self._root} has "
                f"{free / 1e9:.2f} GB free",
            )
        shutil.rmtree(part, ignore_errors=True)
        try:
            return self._write(part, leaves, version, source_step, num_bytes)
        except BaseException:
            (self.folder(version) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder(version), ignore_errors=True)
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write(
        self, part: Path, leaves: Mapping[str, Any], version: int, source_step: int, num_bytes: int
    ) -> Published:
        began = time.perf_counter()
        part.mkdir()
        table = tensor_table(self._model)
        if self._transport == "safetensors":
            digests = self._write_safetensors(part, leaves)
            # Such a tensor lies under its own name, as Hugging Face has it.
            table = {n: row | dict.fromkeys(("array", "index", "transpose")) for n, row in table.items()}
            known: dict[Path, tuple[int, str]] = {}
        else:
            digests, known = self._write_arrays(part / "params", leaves)
        written = time.perf_counter()
        files = sorted(path for path in part.rglob("*") if path.is_file())
        rest = [path for path in files if path not in known]
        known |= dict(zip(rest, self._pool.map(_size_and_digest, rest), strict=True))
        hashed = time.perf_counter()
        manifest = {
            "format": FORMAT,
            "version": version,
            "source_step": source_step,
            "dtype": self._dtype,
            "zarr_driver": "zarr3",
            "architecture": _ARCHITECTURES[self._model.architecture],
            "config_digest": config_digest(self._config),
            "digest": ALGORITHM,
            "files": {
                str(path.relative_to(part)): dict(zip(("bytes", "digest"), known[path], strict=True))
                for path in files
            },
            "tensors": {
                name: row | {"dtype": self._dtype, "digest": digests[name]} for name, row in table.items()
            },
        }
        # Those of arrays are on disk already; every folder between a file and the version is named too.
        folders = {parent for path in files for parent in path.relative_to(part).parents}
        list(self._disk.map(_fsync, [*rest, *(part / folder for folder in folders)]))
        final = self.folder(version)
        part.rename(final)
        aside = final / f"{MANIFEST}.tmp"
        with aside.open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(final / MANIFEST)
        _fsync(final)
        _fsync(self._root)
        seconds = {
            "write": written - began,
            "digest": hashed - written,
            "commit": time.perf_counter() - hashed,
        }
        return Published(
            version=version,
            source_step=source_step,
            folder=final,
            num_bytes=num_bytes,
            digests=digests,
            seconds=seconds,
        )

    def _write_arrays(
        self, folder: Path, leaves: Mapping[str, Any]
    ) -> tuple[dict[str, str], dict[Path, tuple[int, str]]]:
        """One array at a time from the devices to the disk; beside it the digests of its tensors are taken
        and the array before it is fsynced. Tensor -> digest, file -> (bytes, digest)."""
        folder.mkdir()
        stacked = {rule.path: rule.stacked for rule in active_rules(self._model)}
        slots: dict[str, list[tuple[str, int | None, Rule]]] = {}
        for name, slot in hf_slots(self._model).items():
            slots.setdefault(slot.rule.path, []).append((name, slot.layer, slot.rule))
        digests: dict[str, Future[str]] = {}
        files: dict[Path, tuple[int, str]] = {}
        flushed: list[Future[None]] = []
        before: str | None = None
        for path, leaf in leaves.items():
            host = np.asarray(leaf)
            assert host.dtype == jnp.dtype(self._dtype), f"{path}: {host.dtype}, expected {self._dtype}"
            for name, layer, rule in slots[path]:
                digests[name] = self._pool.submit(
                    _tensor_digest, host if layer is None else host[layer], rule
                )
            chunk = shard_shape(host.shape, stacked=stacked[path], itemsize=host.dtype.itemsize)
            found = write_sharded(folder / path, host, chunk=chunk)
            files |= found
            flushed += [self._disk.submit(_fsync, file) for file in found]
            # The host holds one array beside the one that is written.
            for name, _, _ in slots[before] if before else ():
                digests[name].result()
            before = path
        write_metadata(folder, {path: leaf.shape for path, leaf in leaves.items()})
        for flush in flushed:
            flush.result()
        return {name: digest.result() for name, digest in digests.items()}, files

    def _write_safetensors(self, part: Path, leaves: Mapping[str, Any]) -> dict[str, str]:
        short = _SHORT[self._dtype]
        slots = hf_slots(self._model)
        infos = {name: TensorInfo(dtype=short, shape=slot.shape) for name, slot in slots.items()}
        digests = {}
        with (part / SAFETENSORS).open("wb") as file:
            write_header(file, infos)
            for name, slot in slots.items():
                leaf = leaves[slot.rule.path]
                values = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
                data = as_bytes(to_hf_layout(values, slot.rule))
                digests[name] = hashlib.new(ALGORITHM, data).hexdigest()
                file.write(data)
        return digests


def write_model_folder(
    folder: Path, model: ModelConfig, *, dtype: str, tokenizer: Path, copy: Callable[[Path, Path], Any]
) -> None:
    """What a server starts on: configuration and tokenizer, no weights, which come by the first refresh."""
    folder.mkdir(parents=True, exist_ok=True)
    copy(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(served_config(model, dtype=dtype), indent=1) + "\n")


def _permutation(rule: Rule) -> list[int]:
    """Our dimensions in the order in which Hugging Face has them."""
    ours = rule.dims.split()
    return [ours.index(name) for name in rule.hf_dims.replace("(", "").replace(")", "").split()]


def _tensor_digest(values: np.ndarray, rule: Rule) -> str:
    return hashlib.new(ALGORITHM, as_bytes(to_hf_layout(values, rule))).hexdigest()


def _size_and_digest(path: Path) -> tuple[int, str]:
    digest = hashlib.new(ALGORITHM)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()

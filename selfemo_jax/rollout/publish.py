"""Versions of the policy on disk, for the servers that sample from it.

A version is a folder `<root>/<version>/` with `params/`, an Orbax checkpoint of the parameter tree (OCDBT,
zarr3, one layer a chunk, written with tensorstore), and `manifest.json`, which says where each Hugging Face
tensor lies in it and gives a digest of every file and tensor. The folder is written aside, fsynced and
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

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Params
from selfemo_jax.model.hf_table import Rule, active_rules, flatten, hf_slots, to_hf_layout
from selfemo_jax.model.orbax_io import METADATA_NAME, shard_shape, write_metadata
from selfemo_jax.model.safetensors_io import TensorInfo, write_header
from selfemo_jax.model.weights import as_bytes

FORMAT = "selfemo_jax.weights/1"
MANIFEST = "manifest.json"
SAFETENSORS = "model.safetensors"
_DIGEST = "blake2b-16"
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_SHORT = {"float32": "F32", "bfloat16": "BF16"}
_FILE_BYTES = 256 * 2**20
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
    """A copy in the serving type, each device holding what it held: the trainer may donate its own
    arrays."""

    def copy(leaf):
        return jnp.array(leaf, dtype=dtype, copy=True)

    shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf, jax.Array) else None, params)
    return jax.jit(lambda tree: jax.tree.map(copy, tree), out_shardings=shardings)(params)


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
        found = [int(name) for name, _ in self._versions()]
        self._next = max(found, default=-1) + 1
        self.clean(protect=())

    def start(self, params: Params, *, source_step: int) -> "Future[Published]":
        """Publish ``params``, which must stay as they are until the result is there (see `snapshot`)."""
        version, self._next = self._next, self._next + 1
        if jax.process_count() > 1:
            raise ValueError("publishing weights from several trainer processes is not supported yet")
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
        else:
            digests = self._write_arrays(part / "params", leaves)
        written = time.perf_counter()
        files = sorted(path for path in part.rglob("*") if path.is_file())
        entries = dict(zip(files, self._pool.map(_file_entry, files), strict=True))
        hashed = time.perf_counter()
        manifest = {
            "format": FORMAT,
            "version": version,
            "source_step": source_step,
            "dtype": self._dtype,
            "zarr_driver": "zarr3",
            "architecture": _ARCHITECTURES[self._model.architecture],
            "config_digest": config_digest(self._config),
            "digest": _DIGEST,
            "files": {str(path.relative_to(part)): entry for path, entry in entries.items()},
            "tensors": {
                name: row | {"dtype": self._dtype, "digest": digests[name]} for name, row in table.items()
            },
        }
        list(self._pool.map(_fsync, files))
        for folder in sorted({path.parent for path in files} | {part}):
            _fsync(folder)
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

    def _write_arrays(self, folder: Path, leaves: Mapping[str, Any]) -> dict[str, str]:
        """One array at a time from the devices to the disk, its tensors' digests taken on the way."""
        import tensorstore as ts

        folder.mkdir()
        stacked = {rule.path: rule.stacked for rule in active_rules(self._model)}
        slots: dict[str, list[tuple[str, int | None, Rule]]] = {}
        for name, slot in hf_slots(self._model).items():
            slots.setdefault(slot.rule.path, []).append((name, slot.layer, slot.rule))
        # Files are fsynced once, before the commit; no cache, as every chunk is written once.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        digests: dict[str, Future[str]] = {}
        pending: Any = None
        for path, leaf in leaves.items():
            host = np.asarray(leaf)
            assert host.dtype == jnp.dtype(self._dtype), f"{path}: {host.dtype}, expected {self._dtype}"
            transaction = ts.Transaction(atomic=False)
            store = ts.open(
                _array_spec(folder, path, host, stacked=stacked[path]),
                create=True,
                open=False,
                context=context,
            ).result()
            staged = store.with_transaction(transaction).write(
                host, can_reference_source_data_indefinitely=True
            )
            # What is not yet part of a transaction when it commits is left out of it without a word.
            staged.result()
            if pending is not None:
                pending.result()
            pending = transaction.commit_async()
            for name, layer, rule in slots[path]:
                part = host if layer is None else host[layer]
                digests[name] = self._pool.submit(_tensor_digest, part, rule)
        pending.result()
        write_metadata(folder, {path: leaf.shape for path, leaf in leaves.items()})
        _mark_ocdbt(folder / METADATA_NAME)
        return {name: digest.result() for name, digest in digests.items()}

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
                digests[name] = hashlib.blake2b(data, digest_size=16).hexdigest()
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


def _array_spec(folder: Path, path: str, host: np.ndarray, *, stacked: bool) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{folder}/",
            "path": f"{path}/",
            "target_data_file_size": _FILE_BYTES,
        },
        "metadata": {
            "shape": host.shape,
            "data_type": host.dtype.name,
            "fill_value": 0.0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {
                    "chunk_shape": shard_shape(host.shape, stacked=stacked, itemsize=host.dtype.itemsize)
                },
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # A chunk of zeros is stored too: a missing one then always means damage.
        "store_data_equal_to_fill_value": True,
    }


def _mark_ocdbt(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_ocdbt": True}))


def _tensor_digest(values: np.ndarray, rule: Rule) -> str:
    return hashlib.blake2b(as_bytes(to_hf_layout(values, rule)), digest_size=16).hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "digest": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()

"""Checkpoints between Hugging Face and this project, both ways, equal to the last bit, one tensor in memory
at a time.

A converted folder holds `config.json` and the tokenizer's files as they came, `params/` (an Orbax checkpoint
of the nested dict of `model/decoder.py`) and `certificate.json`: type, shape and SHA-256 of the little-endian
bytes of every Hugging Face tensor, so that a conversion back proves itself without the source. Everything is
written into a hidden folder beside the destination and renamed at the end. Needs no JAX until `load_params`
is called.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfemo_jax.model import orbax_io
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.hf_table import EMBED, HEAD, Slot, active_rules, from_hf_layout, hf_slots, param_shapes
from selfemo_jax.model.safetensors_io import DTYPES, TensorInfo, plan_shards, write_header, write_index
from selfemo_jax.model.weights import (
    CERTIFICATE_NAME,
    PARAMS_NAME,
    TensorSource,
    as_bytes,
    blocks,
    entry,
    flax_source,
    head_kind,
    hf_source,
    load_params,
    mismatches,
    open_model,
    params_source,
    raise_together,
    tensor_digest,
    tensor_source,
    with_head,
)

__all__ = [
    "load_params",
    "open_model",
    "save_hf",
    "to_flax",
    "to_hf",
    "verify",
    "write_converted",
    "written_aside",
]

MAX_SHARD_BYTES = 5 * 10**9
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HF_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_ST_DTYPE = {name: short for short, name in _HF_DTYPE.items()}


def to_flax(src: str | os.PathLike, dst: str | os.PathLike) -> dict[str, Any]:
    """Convert a Hugging Face folder and return the certificate; one ValueError lists what does not fit."""
    config, checkpoint = open_model(src)
    if checkpoint.kind != "hf":
        raise ValueError(f"{src}: already a converted folder; to-flax expects a Hugging Face one")
    note = {"note": checkpoint.note} if checkpoint.note else {}
    about = {"source": {"kind": "safetensors", "name": checkpoint.folder.resolve().name}, **note}
    return write_converted(
        hf_source(checkpoint), config, dst, carry=lambda part: _carry(checkpoint.folder, part), about=about
    )


def write_converted(
    source: TensorSource,
    config: ModelConfig,
    dst: str | os.PathLike,
    *,
    carry: Callable[[Path], None],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Stream tensors into a converted folder; ``carry`` puts configuration and tokenizer beside them."""
    slots = hf_slots(config)
    problems = [*source.problems, *mismatches(source.infos, slots, config)]
    raise_together(problems)
    head = "own" if HEAD in slots else "duplicate" if HEAD in source.infos else "absent"
    if head == "duplicate" and tensor_digest(source, HEAD) != tensor_digest(source, EMBED):
        raise ValueError(f"config.json: tie_word_embeddings=true, but {HEAD} differs from {EMBED}")
    total = sum(source.infos[name].nbytes for name in slots)
    with written_aside(dst, num_bytes=total) as part:
        params = part / PARAMS_NAME
        params.mkdir()
        stores = _create_stores(params, source.infos, slots, config)
        digests = {
            name: _convert_tensor(source, name, slot, stores[slot.rule.path], config)
            for name, slot in slots.items()
        }
        if head == "duplicate":
            digests[HEAD] = digests[EMBED]
        orbax_io.write_metadata(params, param_shapes(config))
        carry(part)
        certificate = {"format": 1, **about, "lm_head": head}
        certificate["tensors"] = {n: entry(source.infos[n], digests[n]) for n in source.infos}
        _write_json(part / CERTIFICATE_NAME, certificate)
    return certificate


def to_hf(
    src: str | os.PathLike, dst: str | os.PathLike, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Convert back to Hugging Face; every tensor is checked against the certificate as it is written."""
    config, checkpoint = open_model(src)
    if checkpoint.kind != "flax":
        raise ValueError(f"{src}: already a Hugging Face folder; to-hf expects a converted one")
    source = flax_source(checkpoint, config)
    raise_together(source.problems)
    expected = (checkpoint.certificate or {}).get("tensors", {})
    with written_aside(dst, num_bytes=sum(info.nbytes for info in source.infos.values())) as part:
        written = _write_hf(part, source, max_shard_bytes=max_shard_bytes)
        wrong = [f"{n}: differs from the certificate" for n in expected if written.get(n) != expected[n]]
        raise_together(wrong, where=f"{src}: the weights were changed or damaged after the conversion")
        _carry(checkpoint.folder, part)
        if checkpoint.certificate is not None:
            shutil.copyfile(checkpoint.folder / CERTIFICATE_NAME, part / CERTIFICATE_NAME)
    return written


def save_hf(
    params: Mapping[str, Any],
    source: str | os.PathLike | ModelConfig,
    dst: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write trained ``params`` (the nested dict, any array type) as a Hugging Face checkpoint.

    ``source`` is the folder that training began from, which lends configuration, tokenizer and note, or the
    configuration of a model made from nothing. ``dtype`` is what is written; None is the source's own type.
    """
    checkpoint = None
    if isinstance(source, ModelConfig):
        config = source
    else:
        config, checkpoint = open_model(source)
    short = _ST_DTYPE[dtype or config.dtype or "float32"]
    tensors = params_source(params, config, short)
    if checkpoint is not None and (checkpoint.certificate or {}).get("lm_head") == "duplicate":
        tensors = with_head(tensors)
    with written_aside(dst, num_bytes=sum(info.nbytes for info in tensors.infos.values())) as part:
        written = _write_hf(part, tensors, max_shard_bytes=max_shard_bytes)
        if checkpoint is not None:
            _carry(checkpoint.folder, part)
        config_json = config.to_hf()
        key = "dtype" if "dtype" in config_json else "torch_dtype"
        _write_json(part / "config.json", config_json | {key: _HF_DTYPE[short]})
        certificate = {"format": 1, "source": {"kind": "trained"}}
        if checkpoint is not None and checkpoint.note:
            certificate["note"] = checkpoint.note
        certificate |= {"lm_head": head_kind(tensors.infos, config), "tensors": written}
        _write_json(part / CERTIFICATE_NAME, certificate)


def verify(a: str | os.PathLike, b: str | os.PathLike) -> list[str]:
    """Every difference between two checkpoints, or one and a `certificate.json`; empty when equal."""
    found: list[tuple[str, ModelConfig | None, dict[str, Any]]] = []
    differences = []
    for path in (Path(a), Path(b)):
        if path.is_file():
            found.append((str(path), None, orbax_io.read_json(path)["tensors"]))
            continue
        config, checkpoint = open_model(path)
        tensors = tensor_source(checkpoint, config)
        problems = [*tensors.problems, *mismatches(tensors.infos, hf_slots(config), config)]
        raise_together(problems, where=str(path))
        entries = {name: entry(info, tensor_digest(tensors, name)) for name, info in tensors.infos.items()}
        stated = (checkpoint.certificate or {}).get("tensors", entries)
        differences += [
            f"{name}: {path} does not hold what its own certificate says"
            for name in sorted(set(stated) | set(entries))
            if stated.get(name) != entries.get(name)
        ]
        found.append((str(path), config, entries))
    (name_a, config_a, tensors_a), (name_b, config_b, tensors_b) = found
    if config_a and config_b and config_a != config_b:
        differences.append(f"config.json: {config_a} in {name_a}, {config_b} in {name_b}")
    for name in sorted(set(tensors_a) | set(tensors_b)):
        here, there = tensors_a.get(name), tensors_b.get(name)
        if here is None or there is None:
            differences.append(f"{name}: only in {name_a if there is None else name_b}")
        elif here != there:
            keys = [key for key in ("dtype", "shape", "sha256") if here[key] != there[key]]
            differences.append(f"{name}: {', '.join(f'{k} {here[k]} and {there[k]}' for k in keys)}")
    return differences


@contextlib.contextmanager
def written_aside(dst: str | os.PathLike, *, num_bytes: int) -> Iterator[Path]:
    """A hidden folder beside ``dst`` that becomes ``dst`` when the block ends well, else is removed."""
    dst = Path(dst)
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst}: already exists; name a folder that does not")
    parent = dst.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{dst}: its folder {parent} does not exist")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC, f"{dst}: needs {num_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free"
        )
    part = parent / f".{dst.name}.partial-{os.getpid()}"
    part.mkdir()
    try:
        yield part
        if dst.exists():
            raise ValueError(f"{dst}: appeared while the conversion ran")
        part.rename(dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _create_stores(
    folder: Path, infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], config: ModelConfig
) -> dict[str, Any]:
    dtypes = {slot.rule.path: DTYPES[infos[name].dtype] for name, slot in slots.items()}
    shapes = param_shapes(config)
    return {
        rule.path: orbax_io.create_array(
            folder, rule.path, shape=shapes[rule.path], dtype=dtypes[rule.path], stacked=rule.stacked
        )
        for rule in active_rules(config)
    }


def _convert_tensor(source: TensorSource, name: str, slot: Slot, store: Any, config: ModelConfig) -> str:
    digest = hashlib.sha256()
    for rows in [None] if slot.layer is not None else _file_rows(store, slot):
        values = source.read(name, rows)
        writing = store[slot.index(rows)].write(from_hf_layout(values, slot.rule, config))
        digest.update(as_bytes(values))
        writing.result()
    return digest.hexdigest()


def _file_rows(store: Any, slot: Slot) -> Iterator[slice]:
    """Rows of an unstacked tensor, so that each piece fills whole files of our array."""
    step = store.chunk_layout.write_chunk.shape[slot.row_dim] or slot.shape[0]
    for begin in range(0, slot.shape[0], step):
        yield slice(begin, min(begin + step, slot.shape[0]))


def _write_hf(part: Path, source: TensorSource, *, max_shard_bytes: int) -> dict[str, Any]:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    shards = plan_shards(source.infos, max_bytes=max_shard_bytes)
    written = {}
    for file_name, infos in shards.items():
        with (part / file_name).open("wb") as file:
            write_header(file, infos)
            for name, info in infos.items():
                digest = hashlib.sha256()
                for block in blocks(source, name):
                    data = as_bytes(block)
                    digest.update(data)
                    file.write(data)
                written[name] = entry(info, digest.hexdigest())
    write_index(part, shards)
    return written


def _carry(src: Path, part: Path) -> None:
    for name in ("config.json", *_CARRIED):
        if (src / name).is_file():
            shutil.copyfile(src / name, part / name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

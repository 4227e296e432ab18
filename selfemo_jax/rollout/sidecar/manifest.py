"""What a published version of the weights says about itself, and where it may lie.

`<weights_root>/<version>/manifest.json` is the last file of a version to appear: a folder without it is not a
version yet. Standard library only.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "selfemo_jax.weights/1"
MANIFEST = "manifest.json"
ROOT_VARIABLE = "SELFEMO_WEIGHTS_ROOT"
TRANSPORT_VARIABLE = "SELFEMO_WEIGHTS_TRANSPORT"
DTYPES = {"float32": 4, "bfloat16": 2}
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One data file of a version."""

    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One Hugging Face tensor: `array[index]`, then `transpose`, then `reshape(shape)`."""

    array: str
    """Dotted path of the array that holds it."""
    index: int | None
    transpose: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A published version, as its manifest describes it."""

    folder: Path
    version: int
    dtype: str
    zarr_driver: str
    architecture: str
    config_digest: str | None
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(entry.bytes for entry in self.files.values())


def confined(path: str, root: str | None) -> Path:
    """The folder of a version: a direct child of `root`, named by its number, links followed first.

    ValueError for any other place, so that who may ask for a refresh cannot have other files read.
    """
    if not root:
        raise ValueError(
            f"{path}: refused, as {ROOT_VARIABLE} is not set; the server must be started with the folder of "
            "published weights"
        )
    base, folder = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if folder.parent != base:
        raise ValueError(
            f"{path}: refused; a version of the weights must lie directly in the published folder {base}"
        )
    if not folder.name.isascii() or not folder.name.isdecimal() or str(int(folder.name)) != folder.name:
        raise ValueError(f"{path}: refused; a version's folder is named by its number, as {base / '7'}")
    return folder


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the version in `folder`; ValueError where missing, malformed or another version's."""
    where = f"weights version {folder.name}"
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{where}: no {MANIFEST}; it was never published whole, or is gone") from None
    except ValueError as error:
        raise ValueError(f"{where}: {MANIFEST} is not JSON: {error}") from error
    try:
        manifest = _parsed(folder, raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {type(error).__name__} {error}; expected the format {FORMAT}") from error
    if str(manifest.version) != folder.name:
        raise ValueError(f"{where}: its manifest says version {manifest.version}, its folder {folder.name}")
    return manifest


def _parsed(folder: Path, raw: dict[str, Any]) -> Manifest:
    where = f"weights version {folder.name}"
    if raw.get("format") != FORMAT or raw.get("digest") != "sha256":
        raise ValueError(
            f"{where}: format {raw.get('format')!r} with digests {raw.get('digest')!r}; expected {FORMAT!r} "
            "with 'sha256'"
        )
    if raw["dtype"] not in DTYPES or raw["zarr_driver"] not in ("zarr", "zarr3"):
        raise ValueError(f"{where}: dtype {raw['dtype']!r}, zarr_driver {raw['zarr_driver']!r}: not known")
    files = {name: FileEntry(bytes=int(e["bytes"]), digest=e["digest"]) for name, e in raw["files"].items()}
    for name in files:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"{where}: file {name!r} lies outside the version's folder")
    tensors = {name: _tensor(e) for name, e in raw["tensors"].items()}
    for name, entry in tensors.items():
        if entry.dtype not in DTYPES:
            raise ValueError(f"{where}: {name} is {entry.dtype}; expected any of {', '.join(DTYPES)}")
    return Manifest(
        folder=folder,
        version=int(raw["version"]),
        dtype=raw["dtype"],
        zarr_driver=raw["zarr_driver"],
        architecture=raw["architecture"],
        config_digest=raw.get("config_digest"),
        files=files,
        tensors=tensors,
    )


def _tensor(entry: dict[str, Any]) -> TensorEntry:
    transpose = entry.get("transpose")
    return TensorEntry(
        array=entry["array"],
        index=entry.get("index"),
        transpose=None if transpose is None else tuple(transpose),
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        digest=entry["digest"],
    )


def check_sizes(manifest: Manifest) -> None:
    """ValueError where a data file is missing, of another length, or a link out of the version's folder."""
    for name, entry in manifest.files.items():
        path = manifest.folder / name
        if manifest.folder not in Path(os.path.realpath(path)).parents:
            raise ValueError(f"{name}: refused; it leads out of the version's folder")
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{name}: missing; the manifest lists it with {entry.bytes} bytes") from None
        if size != entry.bytes:
            raise ValueError(f"{name}: {size} bytes; the manifest lists {entry.bytes}: truncated or replaced")


def damaged_files(manifest: Manifest) -> list[str]:
    """The data files whose digest is not the manifest's: asked only to say which file is to blame."""
    return [
        name for name, entry in manifest.files.items() if _file_digest(manifest.folder / name) != entry.digest
    ]


def _file_digest(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a Hugging Face config as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

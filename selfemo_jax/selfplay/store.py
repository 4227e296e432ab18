"""The flywheel's store: one JSON line a judged rollout, with an index beside it.

``flywheel.jsonl`` only grows. Its index holds where each line begins, its harvest and whether it was
accepted, so that the accepted inputs of a harvest are read without parsing the rest. The index is derived: a
part that is missing is read from the lines again, and a wrong one is dropped.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from selfemo_jax.appendlog import AppendLog

INDEX = np.dtype([("start", "<u8"), ("length", "<u4"), ("iteration", "<i4"), ("accepted", "u1")])
"""One entry of the index; ``length`` is in bytes and counts the line's end."""
REQUIRED = ("iteration", "accepted")


class Store:
    """The store of a run, open for one writer; closed by `close` or the end of a `with`.

    A crash loses at most the line that was being written.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; ValueError while another process, or another `Store`, has it open."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        self._log = AppendLog(self.path)
        self._index_path = index_path(self.path)
        self._reader = self.path.open("rb")
        self._index = _load_index(self.path, self._index_path)
        self._fresh: list[tuple[int, int, int, int]] = []
        self._on_disk = 0
        # What the saved index holds beyond the file must be gone before anything else is written there.
        self._write_index()

    def __len__(self) -> int:
        return len(self._index) + len(self._fresh)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a judged rollout; it reaches the operating system at once and the disk at `flush`."""
        missing = [key for key in REQUIRED if key not in record]
        assert not missing, f"a record of the store lacks {missing}"
        start, _ = self._log.length_and_digest()
        self._log.append(record)
        end, _ = self._log.length_and_digest()
        self._fresh.append((start, end - start, record["iteration"], record["accepted"]))

    def records(
        self, *, iteration: int | None = None, accepted: bool | None = None
    ) -> Iterator[dict[str, Any]]:
        """The records in the order in which they were written; of one harvest, or accepted ones, alone."""
        self._merge()
        wanted = np.ones(len(self._index), bool)
        if iteration is not None:
            wanted &= self._index["iteration"] == iteration
        if accepted is not None:
            wanted &= self._index["accepted"] == accepted
        return read_lines(self._reader, self._index[wanted])

    def flush(self) -> None:
        """Return once everything appended is on disk."""
        self._log.flush()
        self._write_index()

    def length_and_digest(self) -> tuple[int, str]:
        """Bytes in the file and the hexadecimal SHA-256 of them."""
        return self._log.length_and_digest()

    def truncate_to(self, length: int, digest: str, orphan_dir: Path) -> int:
        """Go back to the content that a checkpoint recorded, as `AppendLog.truncate_to` does."""
        beyond = self._log.truncate_to(length, digest, orphan_dir)
        self._merge()
        self._index = self._index[self._index["start"] + self._index["length"] <= length]
        self._on_disk = 0
        self._write_index()
        return beyond

    def close(self) -> None:
        """Flush to disk and let another writer in; a second call does nothing."""
        if not self._lock.closed:
            self._log.close()
            self._write_index()
            self._reader.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _merge(self) -> None:
        if self._fresh:
            self._index = np.concatenate([self._index, np.array(self._fresh, INDEX)])
            self._fresh = []

    def _write_index(self) -> None:
        self._merge()
        if self._on_disk == 0:
            aside = self._index_path.with_name(f".{self._index_path.name}.{os.getpid()}.tmp")
            aside.write_bytes(self._index.tobytes())
            aside.replace(self._index_path)
        elif self._on_disk < len(self._index):
            with self._index_path.open("ab") as file:
                file.write(self._index[self._on_disk :].tobytes())
        self._on_disk = len(self._index)


def read_store(
    path: Path, *, iteration: int | None = None, accepted: bool | None = None
) -> Iterator[dict[str, Any]]:
    """Records of a store that somebody else may be writing; a line that is not whole yet is left out."""
    index = _load_index(Path(path), index_path(path))
    wanted = np.ones(len(index), bool)
    if iteration is not None:
        wanted &= index["iteration"] == iteration
    if accepted is not None:
        wanted &= index["accepted"] == accepted
    with Path(path).open("rb") as file:
        yield from read_lines(file, index[wanted])


def read_lines(file: BinaryIO, index: np.ndarray) -> Iterator[dict[str, Any]]:
    """The records that the entries of an index point to."""
    for start, length in zip(index["start"].tolist(), index["length"].tolist(), strict=True):
        file.seek(start)
        yield json.loads(file.read(length))


def index_path(path: Path) -> Path:
    """Where the index of a store lies."""
    return Path(path).with_suffix(".index")


def _load_index(path: Path, saved: Path) -> np.ndarray:
    """The index of every whole line: as far as the saved one holds, then from the lines."""
    size = path.stat().st_size
    content = saved.read_bytes() if saved.exists() else b""
    index = np.frombuffer(content[: len(content) // INDEX.itemsize * INDEX.itemsize], INDEX)
    ends = index["start"] + index["length"]
    follows = np.concatenate([np.zeros(min(len(ends), 1), "<u8"), ends[:-1]])
    good = (index["start"] == follows) & (index["length"] > 0) & (ends <= size)
    index = index[: len(index) if good.all() else int(np.argmin(good))]
    with path.open("rb") as file:
        if len(index):
            # One line's end tells whether the index belongs to this file.
            file.seek(int(index[-1]["start"]) - 1 if len(index) > 1 else int(ends[0]) - 1)
            if file.read(1) != b"\n":
                index = index[:0]
        start = int(index[-1]["start"] + index[-1]["length"]) if len(index) else 0
        return np.concatenate([index, _scan(file, start)])


def _scan(file: BinaryIO, start: int) -> np.ndarray:
    entries = []
    file.seek(start)
    for line in file:
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                entries.append((start, len(line), record["iteration"], record["accepted"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{file.name}: the line at byte {start} is no record of a flywheel's store; restore the "
                    "file, or start a new run"
                ) from None
        start += len(line)
    return np.array(entries, INDEX)


def _locked(path: Path) -> BinaryIO:
    """A handle that holds the store's lock; the system frees it when the process ends, however it does."""
    handle = path.open("ab")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ValueError(
            f"{path}: another process is writing this run; wait for it, stop it, or give this one another "
            "run_dir"
        ) from None
    except OSError as error:
        # A file system without locks (some network ones) cannot refuse a second writer.
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
    return handle

"""The files a run resumes from: append-only JSONL with a running digest, and files written all at once."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["AppendLog", "atomic_write", "read_json"]


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write the file aside, flush it to disk and rename it: a reader sees the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError naming the file where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not JSON: {error}; the file is damaged, put back a copy or make it anew"
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendLog:
    """A JSONL file that only grows, one JSON object a line; closed by `close` or the end of a `with`.

    The length and SHA-256 of all that is in it are kept up to date, so a checkpoint can record them and a
    resumed run can prove that it goes on from the same content. One writer at a time.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; file and folder are made when missing, an existing file is read once."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._read_digest()

    def _read_digest(self) -> None:
        self._digest = hashlib.sha256()
        self._length = 0
        self._torn = False
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            self._digest.update(block)
            self._length += len(block)
            self._torn = not block.endswith(b"\n")

    def append(self, record: Any) -> None:
        """Add one JSON line; it reaches the operating system at once and the disk at `flush`.

        ValueError for NaN or an infinity, which JSON does not have, and for a file whose last line was cut
        off by a crash: `truncate_to` mends it.
        """
        if self._torn:
            raise ValueError(
                f"{self.path}: the last line is cut off; resume the run from a checkpoint to mend it"
            )
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        self._file.write(line)
        self._file.flush()
        self._digest.update(line)
        self._length += len(line)

    def flush(self) -> None:
        """Return once everything appended is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def length_and_digest(self) -> tuple[int, str]:
        """Bytes in the file and the hexadecimal SHA-256 of them."""
        return self._length, self._digest.hexdigest()

    def truncate_to(self, length: int, digest: str, orphan_dir: Path) -> int:
        """Go back to the content a checkpoint recorded; return how many bytes lay beyond it.

        They are moved to `orphan_dir/<file name>`. ValueError, and nothing changes, when the file is shorter
        than recorded or its first `length` bytes have another SHA-256.
        """
        if self._length < length:
            raise ValueError(
                f"{self.path}: {self._length} bytes, but the checkpoint recorded {length}: the file lost "
                "content that the run rests on; restore it, or resume from an older checkpoint"
            )
        self._file.seek(0)
        found = hashlib.sha256()
        left = length
        while left and (block := self._file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
        if found.hexdigest() != digest:
            raise ValueError(
                f"{self.path}: the first {length} bytes have SHA-256 {found.hexdigest()[:12]}..., but the "
                f"checkpoint recorded {digest[:12]}...: the file was changed; restore it, or resume from "
                "an older checkpoint"
            )
        beyond = self._length - length
        if beyond:
            orphan = Path(orphan_dir) / self.path.name
            orphan.parent.mkdir(parents=True, exist_ok=True)
            with orphan.open("ab") as file:
                shutil.copyfileobj(self._file, file)
                file.flush()
                os.fsync(file.fileno())
            self._file.truncate(length)
            self.flush()
        self._digest, self._length, self._torn = found, length, False
        return beyond

    def close(self) -> None:
        """Flush to disk and release the file; a second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

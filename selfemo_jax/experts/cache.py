"""Every answer that was ever paid for, one JSON line each.

The file only grows. It is never cut back when a run resumes: an answer found by its key is the same whenever
it was written. What a run has used is the length and SHA-256 of the file at its checkpoint; `check_prefix`
holds a resumed run to them.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selfemo_jax.appendlog import AppendLog
from selfemo_jax.experts.ask import Answer, ChatSampling, Question

SYNC_EVERY = 50
"""Answers after which the file is forced to disk; each line reaches the operating system at once."""


class AnswerCache:
    """Answers by key; closed by `close` or the end of a ``with``. One writer at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. ValueError when another process writes it, or a line of it is damaged.

        A last line that a crash cut off is removed: its answer was never used.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lock of its own: the log may come to lock its file itself.
        self._lock = self.path.with_name(f"{self.path.name}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"{self.path}: another process is writing this expert cache; wait for it, or give this run "
                "its own file by expert.cache"
            ) from None
        try:
            _drop_torn_line(self.path)
            self._answers = {answer.key: answer for answer in read_answers(self.path)}
            self.cost = sum(answer.cost for answer in self._answers.values())
            """What all answers together cost."""
            self._log = AppendLog(self.path)
        except BaseException:
            self._lock.close()
            raise
        self._unsynced = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """The answer of that key, if it was ever given."""
        return self._answers.get(key)

    def has_spoken(self, model: str) -> bool:
        """Whether the model ever answered a question other than by a refusal."""
        return any(answer.model == model and not answer.refused for answer in self._answers.values())

    def add(self, answer: Answer, question: Question, sampling: ChatSampling) -> None:
        """Keep an answer with what was asked; the line reaches the operating system before this returns."""
        self._log.append(
            answer.to_json()
            | {
                "question": question.id,
                "system": _writable(question.system),
                "user": _writable(question.user),
                "seed": question.attempt,
                "sampling": asdict(sampling),
            }
        )
        self._answers[answer.key] = answer
        self.cost += answer.cost
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            self.flush()

    def flush(self) -> None:
        """Return once every answer is on disk."""
        self._log.flush()
        self._unsynced = 0

    def length_and_digest(self) -> tuple[int, str]:
        """Bytes in the file and their SHA-256, for a checkpoint."""
        return self._log.length_and_digest()

    def check_prefix(self, length: int, digest: str) -> None:
        """ValueError unless the file still begins with what a checkpoint recorded."""
        found = hashlib.sha256()
        left = length
        with self.path.open("rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                found.update(block)
                left -= len(block)
        if left:
            raise ValueError(
                f"{self.path}: {length - left} bytes, but the checkpoint recorded {length}: the expert cache "
                "lost answers that the run rests on; restore it, or start a new run"
            )
        if found.hexdigest() != digest:
            raise ValueError(
                f"{self.path}: the first {length} bytes have SHA-256 {found.hexdigest()[:12]}..., but the "
                f"checkpoint recorded {digest[:12]}...: the expert cache was changed; restore it, or start a "
                "new run"
            )

    def close(self) -> None:
        """Flush and release the file; a second call does nothing."""
        self._log.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_answers(path: Path) -> Iterator[Answer]:
    """The answers of a cache file, in the order they came; nothing for a file that does not exist yet.

    ValueError names the line that is no answer.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Answer.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a recorded expert answer ({type(error).__name__}: {error}); "
                    "restore the file, or remove that line"
                ) from None


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        keep, at = 0, end
        while at > 0:
            start = max(0, at - (1 << 16))
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            at = start
        if keep < end:
            file.truncate(keep)


def _writable(text: str) -> Any:
    return text.encode("utf-8", "replace").decode("utf-8")

"""Who may ask the servers now, and whether an answer is of the version that it was asked under."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from selfemo_jax.rollout.engine import RolloutError
from selfemo_jax.rollout.server_api import Rejected


class Gate:
    """Lets requests in while it is open, and counts those inside. It begins closed."""

    def __init__(self):
        self._changed = threading.Condition()
        self._open, self._inside = False, 0
        self._failure: str | None = None

    @contextmanager
    def admitted(self, seconds: float) -> Iterator[None]:
        """Wait until the gate is open, at most ``seconds``; inside until the block ends. RolloutError where
        it will not open again."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open or self._failure, seconds):
                raise RolloutError(f"a request waited {seconds:g} s for the servers to be refreshed")
            if self._failure:
                raise RolloutError(self._failure)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether it will not open again."""
        return self._failure is not None

    def open(self) -> None:
        """Admit requests."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def close(self) -> None:
        """Admit no more for now."""
        with self._changed:
            self._open = False

    def drain(self, seconds: float) -> None:
        """Admit no more, and wait for those inside; RolloutError where they take longer."""
        with self._changed:
            self._open = False
            if not self._changed.wait_for(lambda: self._inside == 0, seconds):
                raise RolloutError(
                    f"a refresh of the servers waited {seconds:g} s for {self._inside} requests that they "
                    "are sampling"
                )

    def fail(self, reason: str) -> None:
        """Admit no more for good; who waits is told."""
        with self._changed:
            self._open, self._failure = False, reason
            self._changed.notify_all()


def check_versions(versions: Sequence[str], expected: int, request_id: str) -> None:
    """`Rejected` unless the server sampled all tokens from the version ``expected``; its kind is unversioned,
    mixed, stale or future."""
    if tuple(versions) == (str(expected),):
        return
    named = ", ".join(versions) or "none"
    if len(versions) > 1:
        kind = "mixed"
    elif not versions or not versions[0].isdecimal():
        kind = "unversioned"
    else:
        kind = "stale" if int(versions[0]) < expected else "future"
    raise Rejected(
        kind,
        f"request {request_id!r}: sampled by version {named} of the weights, admitted under {expected}",
    )

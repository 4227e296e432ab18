"""A run of several processes: what must be alike before they begin, and what only the first one holds."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from selfemo_jax.config import Config
from selfemo_jax.config_io import to_yaml
from selfemo_jax.distributed import check_alike, from_first, is_first
from selfemo_jax.run_data import RunData
from selfemo_jax.selfplay.store import Store


def check_hosts(config: Config, data: RunData) -> None:
    """ValueError where the processes of a run do not have the same settings, JAX or labelled inputs."""
    settings = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    check_alike(settings, what="the settings (SHA-256)")
    check_alike(jax.__version__, what="the version of JAX")
    check_alike(data.fingerprint, what="the labelled inputs (SHA-256)")


class SharedStore:
    """The flywheel's store of a run: process 0 holds the file, the others ask it. All processes make the same
    calls in the same order; closed by `close`."""

    def __init__(self, path: Path) -> None:
        self._store = Store(path) if is_first() else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a judged rollout, which every process found."""
        if self._store is not None:
            self._store.append(record)

    def records(self, **which: Any) -> list[dict[str, Any]]:
        """As `Store.records`."""
        store = self._store
        return from_first(lambda: [] if store is None else list(store.records(**which)), channel="store")

    def flush(self) -> None:
        """Return once everything appended is on disk."""
        if self._store is not None:
            self._store.flush()

    def length_and_digest(self) -> tuple[int, str]:
        """Of the file; for the first process."""
        assert self._store is not None
        return self._store.length_and_digest()

    def truncate_to(self, length: int, digest: str, orphan_dir: Path) -> int:
        """Go back to what a checkpoint recorded; for the first process."""
        assert self._store is not None
        return self._store.truncate_to(length, digest, orphan_dir)

    def close(self) -> None:
        """Flush to disk and let another writer in."""
        if self._store is not None:
            self._store.close()

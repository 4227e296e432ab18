"""The servers of a run as the engine sees them: clients, health, and bringing dead ones back."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from selfemo_jax.rollout.engine import RolloutError
from selfemo_jax.rollout.publish import Published
from selfemo_jax.rollout.refresh import apply_on, stage_on
from selfemo_jax.rollout.server_api import Server, ServerError
from selfemo_jax.settings.rollout import Sidecar

_DYING_SECONDS = 3.0
"""How long a dying server may go on to say that it is well after it answered with an error."""


class Processes(Protocol):
    """The processes behind the servers: `supervisor.Sidecar`, or a test's stand-in."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Where they listen; may differ after a restart."""
        ...

    @property
    def key(self) -> str:
        """What each request must carry."""
        ...

    def exit_reason(self) -> str | None:
        """Why one does not run; None while all do."""
        ...

    def restart(self, which: Any = None) -> Any:
        """End and start some again; RuntimeError when that is given up."""
        ...

    def close(self) -> None:
        """End those that are ours."""
        ...


class Fleet:
    """Starts the servers in the background; everything else needs them and waits. Close it."""

    def __init__(self, start: Callable[[], Processes], settings: Sidecar, *, say: Callable[[str], None]):
        self._settings, self._say = settings, say
        pool = ThreadPoolExecutor(1, thread_name_prefix="sidecar-start")
        self._starting = pool.submit(start)
        pool.shutdown(wait=False)
        self._processes: Processes | None = None
        self._every: list[Server] = []
        self.servers: tuple[Server, ...] = ()
        self.epoch = 0
        """How often servers were brought back."""

    def wait(self) -> None:
        """Until the servers answer; the error of their start is raised here."""
        if self._processes is None:
            self._processes = self._starting.result()
            self._connect()

    def sick(self) -> tuple[int, ...]:
        """Positions of the servers that do not say that they are well."""
        return tuple(index for index, server in enumerate(self.servers) if not server.healthy())

    def serves(self, server: Server, version: int) -> bool:
        """Whether a server answers and names this version as what it serves."""
        try:
            return server.healthy() and server.version() == str(version)
        except ServerError:
            return False

    def all_serve(self, version: int) -> bool:
        """Whether every server does."""
        return all(self.serves(server, version) for server in self.servers)

    def is_dying(self, server: Server) -> bool:
        """Whether a server that answered with an error is on its way out: it says so only a moment later."""
        until = time.monotonic() + _DYING_SECONDS
        while time.monotonic() < until:
            if not server.healthy():
                return True
            time.sleep(0.2)
        return False

    def bring_back(self, published: Published, reason: str) -> None:
        """Restart what is sick (all, where none is) and give every server the version.

        RolloutError when the processes give up, or after as many tries as they may be restarted. Proof is the
        caller's business.
        """
        assert self._processes is not None
        for _ in range(1 + self._settings.max_restarts):
            sick = self.sick() or tuple(range(len(self.servers)))
            self._say(f"rollout: {self._processes.exit_reason() or reason}; bringing it back")
            try:
                if self._settings.attach:
                    self._wait_for_attached()
                else:
                    self._processes.restart(sick)
            except RuntimeError as error:
                raise RolloutError(f"the servers of the rollouts are lost: {error}") from error
            self._connect()
            self.epoch += 1
            try:
                stage_on(self.servers, published)
                apply_on(self.servers, published)
                return
            except ServerError as error:
                reason = str(error)
        raise RolloutError(f"the servers of the rollouts are lost: they cannot be refreshed: {reason}")

    def close(self) -> None:
        """End the servers that are ours and all connections."""
        error = self._starting.exception()
        if error is None:
            self._starting.result().close()
        for server in self._every:
            server.close()

    def _connect(self) -> None:
        assert self._processes is not None
        limits = {
            "request_timeout": self._settings.request_timeout,
            "refresh_timeout": self._settings.refresh_timeout,
            "health_timeout": self._settings.health_timeout,
        }
        self.servers = tuple(Server(url, self._processes.key, **limits) for url in self._processes.urls)
        # Threads may still wait on the clients before; all are closed in the end.
        self._every += self.servers

    def _wait_for_attached(self) -> None:
        limit = self._settings.start_timeout
        until = time.monotonic() + limit
        while sick := self.sick():
            if time.monotonic() > until:
                where = ", ".join(self.servers[index].url for index in sick)
                raise RuntimeError(f"the trainer waited {limit:g} s for {where}, which someone else runs")
            time.sleep(0.5)


def deal(servers: Sequence[Server], turn: int) -> Server:
    """The server whose turn it is."""
    return servers[turn % len(servers)]

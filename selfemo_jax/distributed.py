"""Several processes as one run: how they find each other, what they tell each other, how they end together.

Every process runs the same page on the same settings. Arrays are JAX's business; what is decided on the host
and must be alike everywhere (a file's content, whether to stop) goes through the coordinator's key-value
store: `from_first` and `any_of`. In a single process each of these is the plain call. Files are written by
process 0 alone (`is_first`), below a folder that all of them see.

A process that fails says so, and one that is silent for the timeout counts as dead: the others then print why
and end, instead of waiting for ever inside a collective.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax._src import distributed as _jax_distributed  # JAX has no public name for the store.

from selfemo_jax.config_io import Flag

T = TypeVar("T")
LOST = 70
"""Exit status of a process that ended because another did."""
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_PIECE = 2**20
"""Bytes of one value in the store, well below what one message may hold."""

LAUNCH_FLAGS: Mapping[str, Flag] = {
    "coordinator": Flag(
        help="HOST:PORT of process 0, when several processes run together (docs/several_hosts.md); auto: as "
        "Slurm, Open MPI or the cloud says; else the variable SELFEMO_COORDINATOR"
    ),
    "num_processes": Flag(type=int, help="how many processes run together (SELFEMO_NUM_PROCESSES)"),
    "process_id": Flag(type=int, help="which of them this is, from 0 (SELFEMO_PROCESS_ID)"),
    "host_timeout": Flag(
        type=float, help="seconds of silence after which a process counts as dead (SELFEMO_HOST_TIMEOUT; 60)"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a process finds the others."""

    coordinator: str
    """``host:port`` of process 0, or ``auto``."""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 60.0
    """Seconds of silence after which a process counts as dead."""


def launch_of(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What the flags, else the environment, say of the other processes; None for a run by itself.

    ValueError where something is missing or does not fit together.
    """
    found = {name: flags.get(name) for name in LAUNCH_FLAGS}
    for name, value in found.items():
        text = environ.get(f"SELFEMO_{name.upper()}")
        if value is None and text:
            try:
                found[name] = LAUNCH_FLAGS[name].type(text)
            except ValueError:
                raise ValueError(f"SELFEMO_{name.upper()} is {text!r}; expected a number") from None
    coordinator, number, index = found["coordinator"], found["num_processes"], found["process_id"]
    if coordinator is None:
        given = [name for name in ("num_processes", "process_id") if found[name] is not None]
        if given:
            raise ValueError(
                f"--{given[0]} is given without --coordinator; name process 0 as --coordinator HOST:PORT"
            )
        return None
    if coordinator != "auto":
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise ValueError(f"--coordinator {coordinator!r}: expected HOST:PORT of process 0, or auto")
        if number is None or index is None:
            raise ValueError("--coordinator needs --num_processes and --process_id too, or the value auto")
        if not 0 <= index < number:
            raise ValueError(f"--process_id {index}: expected 0 to {number - 1} (--num_processes {number})")
    timeout = 60.0 if found["host_timeout"] is None else found["host_timeout"]
    if not timeout > 0:
        raise ValueError(f"--host_timeout {timeout}: expected seconds above 0")
    return Launch(coordinator=coordinator, num_processes=number, process_id=index, timeout=timeout)


@contextmanager
def joined(launch: Launch | None, *, together: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Join the other processes for the block, before anyone asks JAX for devices; leave together with them.

    A block that raises ends the other processes, unless it is one of the exceptions that all processes raise
    ``together``. ValueError where the others are not found.
    """
    if launch is None:
        yield
        return
    # Otherwise two CPU processes cannot add up their gradients; other devices have means of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    beat = max(2, round(3 * launch.timeout))
    automatic = launch.coordinator == "auto"
    try:
        jax.distributed.initialize(
            None if automatic else launch.coordinator,
            launch.num_processes,
            launch.process_id,
            cluster_detection_method=None if automatic else "deactivate",
            initialization_timeout=max(30, round(5 * launch.timeout)),
            # The watch below comes first and says more.
            heartbeat_timeout_seconds=beat,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--coordinator {launch.coordinator}: the processes of this run did not find each other ({error})"
        ) from error
    watch = _Watch(launch.timeout)
    _watching.append(watch)
    try:
        yield
    except together:
        watch.leave()
        raise
    except BaseException as error:
        tell_others(error)
        raise
    watch.leave()


def tell_others(error: BaseException) -> None:
    """Let the other processes, if there are any, end by the error of this one; nothing waits for them then.

    To be called before whatever would: a collective, a barrier, the end of a shared write.
    """
    if _watching:
        _watching[0].fail(error)


def alone() -> bool:
    """Whether the other processes were told to end, so that nobody may be waited for."""
    return bool(_watching) and _watching[0].told


def is_first() -> bool:
    """Whether this process writes files and prints: process 0, or the only one."""
    return _jax_distributed.global_state.process_id == 0


def num_processes() -> int:
    """How many processes run together."""
    return _jax_distributed.global_state.num_processes


def local_share(number: int) -> int:
    """How many of ``number`` devices this process brings; ValueError where they cannot be shared evenly."""
    processes = num_processes()
    if number % processes:
        raise ValueError(
            f"--mesh asks for {number} devices, which {processes} processes cannot share evenly; ask for "
            f"--mesh {max(1, number // processes) * processes}"
        )
    return number // processes


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if num_processes() > 1:
        _client().wait_at_barrier(f"selfemo/{name}/{_next(name)}", _PATIENCE_MS)


def from_first(make: Callable[[], T], *, channel: str) -> T:
    """What ``make`` gives on process 0, as JSON makes it, on every process; elsewhere it is not called.

    All processes call with the same ``channel`` in the same order; two threads need two channels.
    """
    if num_processes() == 1:
        return make()
    content = bytes_from_first(lambda: json.dumps(make()).encode(), channel=channel)
    return json.loads(content)


def bytes_from_first(make: Callable[[], bytes], *, channel: str) -> bytes:
    """As `from_first`, for bytes."""
    if num_processes() == 1:
        return make()
    client, number = _client(), _next(channel)
    where = f"selfemo/from_first/{channel}/{number}"
    if is_first():
        content = make()
        pieces = [content[i : i + _PIECE] for i in range(0, len(content), _PIECE)]
        for index, piece in enumerate(pieces):
            client.key_value_set_bytes(f"{where}/{index}", piece)
        client.key_value_set(f"{where}/num", str(len(pieces)))
    else:
        num = int(client.blocking_key_value_get(f"{where}/num", _PATIENCE_MS))
        content = b"".join(
            client.blocking_key_value_get_bytes(f"{where}/{index}", _PATIENCE_MS) for index in range(num)
        )
    client.wait_at_barrier(f"{where}/read", _PATIENCE_MS)
    if is_first():
        client.key_value_delete(where)
    return content


def any_of(words: str, *, channel: str) -> str:
    """The first words that are not empty, by process number, on every process; empty where none has any."""
    if num_processes() == 1:
        return words
    return next((found for found in _from_each(words, channel=channel) if found), "")


def check_alike(value: str, *, what: str) -> None:
    """ValueError on every process where ``value`` is not the same on all of them."""
    if num_processes() == 1:
        return
    values = _from_each(value, channel="alike")
    different = [index for index, found in enumerate(values) if found != values[0]]
    if different:
        raise ValueError(
            f"{what} of process {different[0]} ({values[different[0]][:16]}) is not that of process 0 "
            f"({values[0][:16]}); start every process with the same settings, files and version"
        )


def _from_each(value: str, *, channel: str) -> list[str]:
    client, where = _client(), f"selfemo/each/{channel}/{_next(channel)}"
    client.key_value_set(f"{where}/{_jax_distributed.global_state.process_id}", value)
    found = [
        client.blocking_key_value_get(f"{where}/{index}", _PATIENCE_MS) for index in range(num_processes())
    ]
    client.wait_at_barrier(f"{where}/read", _PATIENCE_MS)
    if is_first():
        client.key_value_delete(where)
    return found


_watching: list["_Watch"] = []
_calls: Counter[str] = Counter()
_calls_lock = threading.Lock()


def _next(channel: str) -> int:
    with _calls_lock:
        _calls[channel] += 1
        return _calls[channel]


def _client() -> Any:
    client = _jax_distributed.global_state.client
    assert client is not None, "several processes, but not inside `joined`"
    return client


class _Watch:
    """A thread that says that this process lives, and ends it when another one does not."""

    def __init__(self, timeout: float):
        state = _jax_distributed.global_state
        self._index, self._number, self._timeout = state.process_id, state.num_processes, timeout
        self._interval = min(2.0, timeout / 5)
        self._host = socket.gethostname()
        self._said: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self.told = False
        self._say("0")
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wait for the others to be done too, and part."""
        _client().wait_at_barrier("selfemo/leave", _PATIENCE_MS)
        self._over.set()
        self._thread.join()
        jax.distributed.shutdown()
        _watching.clear()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends, and why; a second call does nothing."""
        if self.told:
            return
        self.told = True
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most often another process went first, and the collective broke: the watch finds out which.
            self._over.wait(1.5 * self._timeout)
        self._over.set()
        self._thread.join()
        words = str(error).strip().splitlines() or [""]
        self._say(f"ended: {type(error).__name__}: {words[0][:300]}")
        # JAX's own way out would wait for the others, who wait for this one.
        atexit.register(self._end_when_told)

    def _end_when_told(self) -> None:
        """The others have this long to read why: with process 0 goes the store."""
        time.sleep(2.5 * self._interval)
        _end(1)

    def _say(self, words: str) -> None:
        _client().key_value_set(self._key(self._index), f"{self._host}|{words}", allow_overwrite=True)

    def _key(self, index: int) -> str:
        return f"selfemo/alive/{index}"

    def _run(self) -> None:
        number = 0
        while not self._over.wait(self._interval):
            number += 1
            try:
                self._say(str(number))
                reason = self._who_is_gone()
            except Exception as error:  # The coordinator is process 0: without it there is no store.
                reason = f"process 0 does not answer ({str(error).splitlines()[0][:120]})"
            if reason and not self._over.is_set():
                print(f"error: {reason}; process {self._index} ends too", file=sys.stderr, flush=True)
                _end(LOST)

    def _who_is_gone(self) -> str:
        now = time.monotonic()
        for key, words in _client().key_value_dir_get("selfemo/alive"):
            index = int(key.rpartition("/")[2])
            if index == self._index:
                continue
            host, _, said = words.partition("|")
            if said.startswith("ended: "):
                return f"process {index} on {host} {said}"
            before = self._said.get(index)
            if before is None or before[0] != said:
                self._said[index] = (said, now)
            elif now - before[1] > self._timeout:
                return (
                    f"process {index} on {host} was silent for {now - before[1]:.0f} s and counts as dead "
                    "(--host_timeout)"
                )
        return ""


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

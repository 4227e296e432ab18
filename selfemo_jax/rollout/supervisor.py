"""Start the vLLM servers, watch over them, start them again. vLLM is never imported here.

Each replica is one `sidecar/server.py` in the environment of `rollout.sidecar.environment`, in a session of
its own: a Ctrl-C at the terminal reaches the trainer alone, and the trainer's death, however sudden, ends the
servers. Any end of a server that was not asked for is a crash, whatever its exit status.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfemo_jax.settings.rollout import Sidecar as Settings

SERVER = Path(__file__).resolve().parent / "sidecar" / "server.py"
PYTHON_VARIABLE = "SELFEMO_VLLM_PYTHON"
KEY_VARIABLE = "SELFEMO_SIDECAR_KEY"
BACK_OFF = (1.0, 5.0, 30.0, 60.0)
"""Seconds before the first, second, ... restart in a row; the last is the cap."""
HEALTHY_SPELL = 600.0
"""Seconds without a restart after which the count of restarts in a row begins anew."""
_POLL = 0.25
_LOG_LINES = 12


def sidecar_python(environment: str) -> Path:
    """The Python of the sidecar's environment: SELFEMO_VLLM_PYTHON, else `environment`, a folder or a Python.

    ValueError where there is none, with the command that makes one.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    path = Path(named or environment).absolute()
    python = path / "bin" / "python" if path.is_dir() else path
    if not os.access(python, os.X_OK):
        source = PYTHON_VARIABLE if named else "rollout.sidecar.environment"
        raise ValueError(
            f"{source}: no Python at {python}; make the sidecar's environment with `python "
            f"tools/vllm_sidecar.py setup --dir {environment}`"
        )
    return python


def start_sidecar(
    settings: Settings,
    *,
    model_folder: Path,
    run_dir: Path,
    weights_root: Path,
    max_model_len: int | None = None,
) -> "Sidecar":
    """Start `settings.replicas` servers on `model_folder` and wait until each answers.

    `model_folder` is a Hugging Face folder; without weights in it the servers start on random ones and must
    be refreshed before anything is sampled. They read versions below `weights_root` only and log to
    `run_dir/logs`. RuntimeError where one ends or does not answer within `settings.start_timeout`.
    """
    python = sidecar_python(settings.environment)
    needed = settings.replicas * settings.tensor_parallel
    if settings.devices and len(settings.devices) != needed:
        raise ValueError(
            f"rollout.sidecar.devices names {len(settings.devices)} GPUs; {settings.replicas} replicas x "
            f"tensor_parallel {settings.tensor_parallel} need {needed}"
        )
    logs = run_dir.absolute() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    weights_root.mkdir(parents=True, exist_ok=True)
    arguments = [
        *("--model", str(model_folder.absolute())),
        *("--weights_root", str(weights_root.absolute())),
        *("--transport", settings.transport),
        *("--dtype", settings.dtype),
        *("--tensor_parallel", str(settings.tensor_parallel)),
        *("--memory_share", str(settings.memory_share)),
        *("--cpu_cache_gb", str(settings.cpu_cache_gb)),
        *("--cpu_threads", str(settings.cpu_threads)),
    ]
    if max_model_len is not None:
        arguments += ["--max_model_len", str(max_model_len)]
    key = secrets.token_urlsafe(32)
    width, devices = settings.tensor_parallel, _devices(settings, needed)
    replicas = [
        _Replica(
            name=f"vLLM server {index + 1} of {settings.replicas}",
            command=(str(python), str(SERVER), *arguments),
            key=key,
            log=logs / f"vllm-{index}.log",
            devices=devices[index * width : (index + 1) * width],
        )
        for index in range(settings.replicas)
    ]
    sidecar = Sidecar(replicas, key=key, settings=settings)
    try:
        sidecar.start()
    except BaseException:
        sidecar.close()
        raise
    return sidecar


def attach(urls: str | Sequence[str], key: str, *, timeout: float = 60.0) -> "Sidecar":
    """Servers that someone else runs: watched by their /health alone, never started or ended here.

    RuntimeError where one does not answer within `timeout` seconds.
    """
    urls = (urls,) if isinstance(urls, str) else tuple(urls)
    if not urls or not key:
        raise ValueError(f"attach: {len(urls)} URLs and {'a' if key else 'no'} key; set {KEY_VARIABLE} to it")
    sidecar = Sidecar([_Attached(name=url, url=url.rstrip("/")) for url in urls], key=key, settings=None)
    deadline = time.monotonic() + timeout
    for replica in sidecar.replicas:
        replica.wait_healthy(deadline, timeout)
    return sidecar


def healthy(url: str, *, timeout: float = 5.0) -> bool:
    """Whether the server at `url` says it is well."""
    try:
        # A proxy of the environment must not stand between us and our own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/health", timeout=timeout) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


@dataclass(kw_only=True)
class _Attached:
    """A server that we did not start."""

    name: str
    url: str

    def exit_reason(self) -> str | None:
        return None if healthy(self.url) else f"{self.url}/health does not answer"

    def wait_healthy(self, deadline: float, limit: float) -> None:
        while not healthy(self.url):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the trainer waited {limit:.0f} s for {self.url}/health, a server that someone else "
                    "runs; is it started, and is the address right?"
                )
            time.sleep(_POLL)

    def close(self) -> None:
        """It is not ours to end."""


@dataclass(kw_only=True)
class _Replica:
    """One server process."""

    name: str
    command: tuple[str, ...]
    key: str
    log: Path
    devices: tuple[str, ...]
    port: int = 0
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.port = self.port if self.port and _is_free(self.port) else _free_port()
        environment = os.environ | {KEY_VARIABLE: self.key, "SELFEMO_PARENT_PID": str(os.getpid())}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        with self.log.open("ab") as log:
            log.write(f"\n==== {time.strftime('%F %T')} {self.name}, port {self.port}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [*self.command, "--port", str(self.port)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_healthy(self, deadline: float, limit: float) -> None:
        while not healthy(self.url):
            if reason := self.exit_reason():
                raise RuntimeError(f"{reason}\n{self.last_lines()}")
            if time.monotonic() > deadline:
                assert self.process is not None
                raise RuntimeError(
                    f"the trainer waited {limit:.0f} s (rollout.sidecar.start_timeout) for {self.name} (pid "
                    f"{self.process.pid}) to answer {self.url}/health; it is running but not ready.\n"
                    f"{self.last_lines()}"
                )
            time.sleep(_POLL)

    def exit_reason(self) -> str | None:
        if self.process is None:
            return f"{self.name} was not started"
        status = self.process.poll()
        if status is None:
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{self.name} (pid {self.process.pid}) {how}, though nobody asked it to"

    def last_lines(self) -> str:
        text = self.log.read_bytes()[-20_000:].decode(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
        return f"The end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)

    def close(self, *, at_once: bool = False) -> None:
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1 if at_once else signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                # The server follows: the kernel kills it with its parent.
                process.kill()
        process.wait()


class Sidecar:
    """The servers of a run. Close it; it is also closed by the death of this process."""

    def __init__(
        self, replicas: Sequence[_Replica] | Sequence[_Attached], *, key: str, settings: Settings | None
    ):
        """`settings` None: the servers are not ours to start."""
        self.replicas, self.key = tuple(replicas), key
        self._settings = settings
        self._restarts = 0
        self._last_restart = float("-inf")
        self._closed = False

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the servers listen; may differ after a restart."""
        return tuple(replica.url for replica in self.replicas)

    def alive(self) -> bool:
        """Whether every server runs; of attached ones, whether /health answers."""
        return self.exit_reason() is None

    def exit_reason(self) -> str | None:
        """Why it is not alive: one line for each server that ended; None while all run."""
        if self._closed:
            return "the sidecar was closed"
        reasons = [reason for replica in self.replicas if (reason := replica.exit_reason())]
        return "; ".join(reasons) or None

    def dead(self) -> tuple[int, ...]:
        """Positions of the servers that do not run."""
        return tuple(i for i, replica in enumerate(self.replicas) if replica.exit_reason() is not None)

    def start(self) -> None:
        """Start all servers at once and wait for each."""
        self._start(range(len(self.replicas)))

    def restart(self, which: Iterable[int] | None = None) -> tuple[int, ...]:
        """End and start again the servers `which` (None: those that ended, or all if none did); returns them.

        They come up on the weights they first started on and must be refreshed before they sample. Waits
        longer before each restart in a row; RuntimeError after `max_restarts` of them, for attached servers,
        and where one does not come up.
        """
        if self._settings is None:
            raise RuntimeError(f"{', '.join(self.urls)}: not ours to restart; whoever runs it must")
        if self._closed:
            raise RuntimeError("the sidecar was closed")
        reason = self.exit_reason() or "the servers run but do not serve"
        chosen = tuple(self.dead() or range(len(self.replicas)) if which is None else which)
        if time.monotonic() - self._last_restart > HEALTHY_SPELL:
            self._restarts = 0
        if self._restarts >= self._settings.max_restarts:
            logs = "\n".join(replica.last_lines() for replica in self._ours(chosen))
            raise RuntimeError(
                f"{reason}; restarted {self._restarts} times in a row (rollout.sidecar.max_restarts) without "
                f"success.\n{logs}"
            )
        for replica in self._ours(chosen):
            replica.close(at_once=True)
        pause = BACK_OFF[min(self._restarts, len(BACK_OFF) - 1)]
        print(f"sidecar: {reason}; restarting in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        self._restarts += 1
        self._last_restart = time.monotonic()
        self._start(chosen)
        return chosen

    def close(self) -> None:
        """End our servers and wait until they are gone; attached ones go on."""
        self._closed = True
        for replica in self.replicas:
            if (
                isinstance(replica, _Replica)
                and replica.process is not None
                and replica.process.poll() is None
            ):
                replica.process.send_signal(signal.SIGTERM)
        for replica in self.replicas:
            replica.close()

    def __enter__(self) -> "Sidecar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ours(self, which: Iterable[int]) -> list[_Replica]:
        return [r for i, r in enumerate(self.replicas) if i in set(which) and isinstance(r, _Replica)]

    def _start(self, which: Iterable[int]) -> None:
        assert self._settings is not None
        limit = self._settings.start_timeout
        started = self._ours(which)
        for replica in started:
            replica.start()
        deadline = time.monotonic() + limit
        for replica in started:
            replica.wait_healthy(deadline, limit)


def _devices(settings: Settings, needed: int) -> tuple[str, ...]:
    """The GPUs of all servers, one after another; none where a single server takes what it finds."""
    if settings.devices:
        return tuple(map(str, settings.devices))
    if needed == 1:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # -1 hides all: servers on a CPU then, to which the variable says nothing.
    named = [] if "-1" in visible else [name.strip() for name in visible.split(",") if name.strip()]
    if named and len(named) < needed:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}; {settings.replicas} replicas x tensor_parallel "
            f"{settings.tensor_parallel} need {needed} GPUs; name them in rollout.sidecar.devices"
        )
    return tuple(named[:needed] or map(str, range(needed)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

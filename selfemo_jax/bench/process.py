"""The processes of the sides, seen from the driver."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfemo_jax.accelerators import memory_settings, platform_of
from selfemo_jax.bench import worker
from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.xla_flags import with_applied


class SideError(RuntimeError):
    """A side could not do what it was asked; the message is its own."""


class SideProcess:
    """One side, running; several devices of PyTorch are as many processes, of which the first answers."""

    def __init__(self, commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], log: Path):
        self._log_path = log
        self._log = log.open("ab")
        self._processes = []
        self._ended = False
        for rank, (command, env) in enumerate(zip(commands, envs, strict=True)):
            piped = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            self._processes.append(
                subprocess.Popen(
                    command, env=dict(env), stdin=piped, stdout=piped, stderr=self._log, cwd=log.parent
                )
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether one of them is gone, so that no more can be asked."""
        return self._ended or any(process.poll() is not None for process in self._processes)

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """The answer to one command; SideError where it failed or the process ended."""
        first = self._processes[0]
        assert first.stdin is not None and first.stdout is not None
        try:
            first.stdin.write((json.dumps({"command": command, **request}) + "\n").encode())
            first.stdin.flush()
            line = first.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._ended = True
            tail = self._log_path.read_text(errors="replace").strip().splitlines()[-8:]
            raise SideError(f"the process ended ({first.poll()}); its last words: " + " | ".join(tail))
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def close(self) -> None:
        """End the processes: they stop by themselves when their input ends."""
        first = self._processes[0]
        assert first.stdin is not None and first.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            first.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        first.stdout.close()
        self._log.close()


ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**64 - 1),
}
"""glibc's names for what `selfemo_jax/allocator.py` sets inside a run of ours."""


def allocator(chosen: Mapping[str, str], *, platform: str) -> dict[str, str]:
    """What every side's environment gets, so that none keeps freed memory alone; nothing where the
    environment or the settings choose an allocator, or a GPU computes."""
    has_gpu = platform != "cpu" and Path("/proc/driver/nvidia").exists()
    return {} if worker.allocator_of(chosen) or has_gpu else dict(ALLOCATOR)


def start_side(side: str, settings: BenchSettings, folder: Path, *, devices: int, tools: Path) -> SideProcess:
    """Start ``jax``, ``torch``, ``trl`` or ``tunix``; ``tools`` is the folder that holds torch_side and
    tunix_side."""
    cores = settings.cores or ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = dict(os.environ) | {
        # Waiting threads of torch would otherwise burn the cores that the other side runs on.
        "OMP_WAIT_POLICY": "passive",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch_cache"),
    }
    env |= allocator(env | settings.env, platform=settings.platform)
    pinned = ["taskset", "-c", cores] if settings.cores else []
    log = folder / f"{side}.log"
    if side in ("jax", "tunix"):
        env |= settings.env
        # Beside a side that may fill the GPU, three quarters of it would not be the same machine.
        env |= memory_settings(env)
        flags = f"{env.get('XLA_FLAGS', '')} {settings.jax_flags}".strip()
        platform = platform_of(settings.platform, env)
        env["XLA_FLAGS"] = with_applied(flags, platform=platform, several=devices > 1)
        if side == "jax":
            env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
            command = [*pinned, sys.executable, "-m", "selfemo_jax.bench.jax_side", "--devices", str(devices)]
        else:
            assert settings.tunix_python is not None
            command = [*pinned, settings.tunix_python, *_start("tunix_side", tools)]
        command += ["--platform", settings.platform]
        command += ["--precision", "highest" if settings.dtype == "float32" else "default"]
        return SideProcess([command], [env], log)
    env |= settings.env | settings.torch_env
    python = settings.torch_python or sys.executable
    if side == "trl":
        python = settings.trl_python or python
    command = [*pinned, python, *_start("torch_side", tools), "--platform", settings.platform]
    if devices == 1:
        return SideProcess([command], [env], log)
    group = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    envs = [env | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(devices)]
    return SideProcess([command] * devices, envs, log)


def _start(package: str, tools: Path) -> list[str]:
    """What a Python of another environment is told, to serve from a package of ``tools``."""
    start = f"import sys; sys.path.append(sys.argv.pop(1)); from {package}.worker import main; main()"
    return ["-c", start, str(tools), "--protocol", str(Path(worker.__file__))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

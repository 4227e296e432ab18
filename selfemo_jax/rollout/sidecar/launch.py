"""The server itself: vLLM's API server, in a process that does not outlive the one that started it.

Started by `server.py`, never by hand. vLLM's engine processes run the top of this file again when they are
spawned, so each of them watches its own parent too.
"""

import os
import select
import signal
import sys
import threading
from pathlib import Path

STARTER_VARIABLE = "SELFEMO_STARTER_PID"
FOLDER = Path(__file__).resolve().parent


def find_package() -> None:
    """Let `sidecar.worker` and `sidecar.guard` be imported, and let no file of ours hide a library.

    Python puts the folder of a script first in the path, and there are modules beside it with plain names;
    the folder above goes last instead.
    """
    sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]
    if str(FOLDER.parent) not in sys.path:
        sys.path.append(str(FOLDER.parent))


def die_with_parent() -> None:
    """Kill this process and its group as soon as the process that started it is gone, however early that is.

    Each process leaves its number in the environment for those it starts: the system's own answer would be
    another process already when the parent died before it was asked.
    """
    parent = int(os.environ.get(STARTER_VARIABLE, os.getppid()))
    os.environ[STARTER_VARIABLE] = str(os.getpid())
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):
        _poll(parent)
    else:
        select.select([descriptor], [], [])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _poll(parent: int) -> None:
    """For kernels without pidfd."""
    pause = threading.Event()
    while os.path.exists(f"/proc/{parent}"):
        pause.wait(0.5)


find_package()
die_with_parent()

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()

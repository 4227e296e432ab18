"""The C library's allocator, set for a CPU that computes; imported by the commands before anything else.

XLA:CPU allocates an executable's temporaries anew at each call. Above 32 MiB glibc takes them from the kernel
and gives them back at once, so that every page of every step is mapped and zeroed again.
"""

import ctypes
import os
from pathlib import Path

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation of this process; whether it was set.

    One arena without memory maps of its own, never trimmed. The number of arenas is fixed by the first
    thread, and NumPy starts threads when it is imported: hence the early import. Nothing is done where the
    user set the allocator (``MALLOC_*``, ``GLIBC_TUNABLES``), where a GPU computes, or where the C library has
    no mallopt.
    """
    chosen_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    has_gpu = Path("/proc/driver/nvidia").exists() and os.environ.get("JAX_PLATFORMS") != "cpu"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen_by_user or has_gpu or mallopt is None:
        return False
    chosen = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(number, value) == 1 for number, value in chosen])


KEPT = keep_freed_memory()

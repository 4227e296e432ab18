"""The C library's allocator, set for a CPU that computes.

XLA:CPU allocates an executable's temporaries anew at each call. Above 32 MiB glibc takes them from the kernel
and gives them back at once, so that every page of every step is mapped and zeroed again.
"""

import ctypes
import os
from pathlib import Path

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


_kept = False
"""Whether what is freed is kept, as it is for the whole process."""


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation of this process; whether it was set.

    One arena without memory maps of its own, never trimmed. The number of arenas is fixed by the first
    thread, and NumPy starts threads when it is imported: call it before. Nothing is done where the user set
    the allocator (``MALLOC_*``, ``GLIBC_TUNABLES``), where a GPU computes, or where the C library has no
    mallopt.
    """
    chosen_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    has_gpu = Path("/proc/driver/nvidia").exists() and os.environ.get("JAX_PLATFORMS") != "cpu"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen_by_user or has_gpu or mallopt is None:
        return False
    chosen = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    global _kept
    _kept = all([mallopt(number, value) == 1 for number, value in chosen])
    return _kept


class _Counts(ctypes.Structure):
    """`struct mallinfo2` of mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    ]  # fmt: skip


def limit_freed_memory(above: int = 3 << 29) -> bool:
    """Give freed memory back to the kernel once more than ``above`` bytes of it are kept; whether it was.

    Arrays of ever new sizes, as the caches of a decode, leave holes that the next one does not fit into, so
    that what is kept would grow for as long as the sizes vary. Nothing is done where nothing is kept.
    """
    count = getattr(ctypes.CDLL(None), "mallinfo2", None) if _kept else None
    if count is None:
        return False
    count.restype = _Counts
    now = count()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident - now.uordblks - now.hblkhd <= above:
        return False
    return ctypes.CDLL(None).malloc_trim(0) == 1

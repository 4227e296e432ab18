"""Read pickles of plain containers and numpy arrays, and nothing else.

A pickle can name any function to be called, so a downloaded one must never be read by `pickle.load`.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from numpy._core import multiarray
except ImportError:  # numpy < 2
    from numpy.core import multiarray


def load_pickle(data: bytes, where: str) -> Any:
    """The object in a pickle of builtin containers, strings, numbers and numpy arrays.

    Strings of Python 2 are read as Latin-1.

    Raises:
        ValueError: the pickle names any other global, or is no pickle.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _Refused as error:
        raise ValueError(f"{where}: {error}; only plain containers and numpy arrays are read.") from None
    except Exception as error:
        # A damaged pickle can fail at any opcode, with any type of exception.
        raise ValueError(
            f"{where}: not a readable pickle ({type(error).__name__}: {error}); take a fresh copy."
        ) from None


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"refused global '{module}.{name}'")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("refused a persistent id")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"refused the codec {encoding!r}")
    return codecs.encode(text, encoding)


def _scalar(dtype: np.dtype, data: Any = None) -> Any:
    # The bytes of an object scalar would be read as pointers.
    if dtype.hasobject:
        raise _Refused("refused a numpy scalar of objects")
    return multiarray.scalar(dtype, data)


def _reconstruct(subtype: type, shape: tuple[int, ...], kind: Any) -> Any:
    if subtype is not np.ndarray:
        raise _Refused("refused a subclass of numpy.ndarray")
    return multiarray._reconstruct(subtype, shape, kind)


def _table() -> dict[tuple[str, str], Callable[..., Any]]:
    plain = (set, frozenset, list, dict, tuple, bytearray)
    table: dict[tuple[str, str], Callable[..., Any]] = {
        (module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in plain
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[module, "_reconstruct"] = _reconstruct
        table[module, "scalar"] = _scalar
    table["numpy", "ndarray"], table["numpy", "dtype"] = np.ndarray, np.dtype
    table["_codecs", "encode"] = _encode
    return table


_ALLOWED = _table()

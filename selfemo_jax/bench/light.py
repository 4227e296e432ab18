"""A stand-in for jaxtyping where it is not installed: its annotations then say nothing and check nothing.

The benchmark and the GPU tests have to run beside a fixed environment that holds only jax, flax, optax, orbax
and torch; of what the rest of the package needs they use nothing but these annotations.
"""

import importlib.util
import sys
import types
from typing import Any


class _Shaped:
    """``Float[Array, "B T"]`` is whatever stands for the array."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0] if isinstance(item, tuple) else item


def without_jaxtyping() -> bool:
    """Install the stand-in if jaxtyping is missing; whether it was."""
    if "jaxtyping" in sys.modules or importlib.util.find_spec("jaxtyping") is not None:
        return False
    import jax

    module = types.ModuleType("jaxtyping", __doc__)
    for name in ("Bool", "Float", "Int", "Int32", "Key", "Num", "Shaped", "UInt", "UInt32"):
        setattr(module, name, _Shaped)
    module.Array = jax.Array  # pyrefly: ignore[missing-attribute]
    module.ArrayLike = module.ScalarLike = module.PyTree = Any  # pyrefly: ignore[missing-attribute]
    sys.modules["jaxtyping"] = module
    return True

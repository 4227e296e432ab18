"""Compilations are counted while the counter is open, and not after."""

import jax
import jax.numpy as jnp

from selfemo_jax.compiles import CompileCounter


def test_compilations_are_counted_until_the_counter_is_closed():
    counter = CompileCounter()
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(5)).block_until_ready()
    found = counter.take()
    assert found["compile/count"] >= 1 and found["compile/seconds"] > 0
    again = jax.jit(lambda x: x * 5 - 1)
    again(jnp.ones(5))
    counter.take()
    again(jnp.ones(5))
    assert counter.take() == {"compile/count": 0.0, "compile/seconds": 0.0}
    counter.close()
    jax.jit(lambda x: x * 7 - 2)(jnp.ones(5))
    assert counter.take() == {"compile/count": 0.0, "compile/seconds": 0.0}

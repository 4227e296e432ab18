"""The hand-written backward passes against automatic differentiation of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from selfemo_jax.model.linear import gated, matmul, rms_norm

EPS = 1e-6


def plain_rms_norm(x, weight):
    return weight * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)


def test_rms_norm_by_hand():
    # Mean square (9 + 16) / 2 = 12.5, root 3.535534.
    out = rms_norm(jnp.array([[3.0, 4.0], [0.0, 2.0]]), jnp.array([1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(out, [[0.848528, 2.262742], [0.0, 2.828427]], rtol=1e-6)


@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 3, 4)])
def test_matmul_gradients_equal_plain_ones(lead):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (*lead, 6)), jax.random.normal(keys[1], (6, 7))
    seed = jax.random.normal(keys[2], (*lead, 7))
    found = jax.grad(lambda x, w: jnp.sum(seed * matmul(x, w)), argnums=(0, 1))(x, w)
    expected = jax.grad(lambda x, w: jnp.sum(seed * (x @ w)), argnums=(0, 1))(x, w)
    np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-6)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 3, 4)])
def test_rms_norm_gradients_equal_plain_ones(lead):
    keys = jax.random.split(jax.random.key(1), 3)
    x, weight = 3 * jax.random.normal(keys[0], (*lead, 6)), jax.random.normal(keys[1], (6,))
    seed = jax.random.normal(keys[2], x.shape)
    found = jax.grad(lambda x, w: jnp.sum(seed * rms_norm(x, w, eps=EPS)), argnums=(0, 1))(x, weight)
    expected = jax.grad(lambda x, w: jnp.sum(seed * plain_rms_norm(x, w)), argnums=(0, 1))(x, weight)
    np.testing.assert_allclose(rms_norm(x, weight, eps=EPS), plain_rms_norm(x, weight), rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences():
    keys = jax.random.split(jax.random.key(2), 3)
    x, w = jax.random.normal(keys[0], (2, 3, 4)), jax.random.normal(keys[1], (4, 5))

    # The differences are numpy arrays, which the shape checks refuse.
    def multiply(x, w):
        return matmul(jnp.asarray(x), jnp.asarray(w))

    check_grads(multiply, (x, w), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    weight = jax.random.normal(keys[2], (4,))

    def normed(x, weight):
        return rms_norm(jnp.asarray(x), jnp.asarray(weight), eps=EPS)

    check_grads(normed, (x, weight), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_bfloat16_stays_bfloat16_with_float32_statistics():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)
    out, gradients = jax.value_and_grad(
        lambda x, w: rms_norm(x, w, eps=EPS).astype(jnp.float32).sum(), argnums=(0, 1)
    )(x, jnp.ones(4096))
    # In bfloat16 a running sum of 4096 squares would stall long before its end.
    assert float(out) == 4096.0
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    assert matmul(x, jnp.ones((4096, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_narrow_weight_keeps_wide_activations_and_float32_sums():
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 5, 600))
    w = jax.random.normal(keys[1], (600, 7)).astype(jnp.bfloat16)
    seed = jax.random.normal(keys[2], (2, 5, 7))
    rounded, wide = x.astype(jnp.bfloat16).astype(jnp.float32), w.astype(jnp.float32)
    out, backward = jax.vjp(matmul, x, w)
    dx, dw = backward(seed)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    # Products of bfloat16 numbers are exact in float32: only the order of the sum is left.
    np.testing.assert_allclose(out, rounded @ wide, rtol=0, atol=2e-4)
    narrow = seed.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(dx, narrow @ wide.T, rtol=0, atol=1e-5)
    expected = jnp.einsum("btd,bte->de", rounded, narrow)
    np.testing.assert_allclose(dw.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
    assert float(jnp.abs(out - x @ wide).max()) > 1e-3


@pytest.mark.parametrize("wide, narrow", [(256, 96), (96, 256), (576, 192)])
def test_gradients_of_stacked_layers_run_with_bfloat16_products(wide, narrow):
    """XLA merges a transposed weight gradient with its product unless it is kept from it, and for what comes
    out a CPU has no kernel in bfloat16."""

    def layer(x, weights):
        first, second = (weight.astype(jnp.bfloat16) for weight in weights)
        return x + matmul(matmul(x, first), second), None

    def add_gradients(total, weights, x):
        found = jax.grad(lambda weights: (jax.lax.scan(layer, x, weights)[0] ** 2).sum())(weights)
        return jax.tree.map(jnp.add, total, found)

    keys = jax.random.split(jax.random.key(0), 3)
    weights = (
        jax.random.normal(keys[0], (3, wide, narrow)) / wide,
        jax.random.normal(keys[1], (3, narrow, wide)) / narrow,
    )
    x = jax.random.normal(keys[2], (1, 64, wide))
    total = jax.jit(add_gradients, donate_argnums=0)(jax.tree.map(jnp.zeros_like, weights), weights, x)
    assert all(bool(jnp.isfinite(leaf).all()) and bool((leaf != 0).any()) for leaf in total)


def test_gated_has_the_gradients_of_silu_times_up_and_keeps_its_two_factors_alone():
    gate, up, g = (jax.random.normal(jax.random.key(i), (2, 5, 7)) for i in range(3))
    out, pull = jax.vjp(gated, gate, up)
    expected, expected_pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    for found, wanted in zip(pull(g), expected_pull(g), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == gate.shape]
    assert len(kept) == 2

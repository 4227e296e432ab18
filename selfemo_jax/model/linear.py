"""Matrix product and RMS norm with hand-written backward passes.

JAX's own transpose rule emits the weight gradient as ``(dy^T x)^T``, a transposed copy of an activation-sized
array on a CPU, and sums the norm's weight gradient over the leading axis, which XLA:CPU does slowly. The
forms here are the same numbers without those two costs. Shape letters: B rows, T tokens, D model, E any
output dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"
"""Name of every result of `matmul`, for rematerialisation policies: they cannot see into a hand-written
backward pass."""
ATTENDED = "attended"
"""Name of what attention's backward pass needs of its forward pass."""


def matmul(
    x: Float[Array, "*M D"], w: Float[Array, "D E"], *, product: str | None = None
) -> Float[Array, "*M E"]:
    """``x @ w`` for activations ``[..., D]`` and a weight ``[D, E]``; the result has ``x``'s dtype.

    Both factors are cast to ``product``, by default the weight's dtype, and summed in float32 where ``x`` has
    another, forward and backward. The backward pass keeps them as they were given, and casts them again.
    """
    return checkpoint_name(_matmul(x, w, product or w.dtype.name), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, product):
    return _product(x.astype(product), w.astype(product), (((x.ndim - 1,), (0,)), ((), ())), x.dtype)


def _product(a, b, dimensions, dtype):
    # XLA:CPU has fast kernels for bfloat16 products with a float32 result, and none with a bfloat16 one.
    sums = None if a.dtype == dtype else jnp.float32
    return lax.dot_general(a, b, dimensions, preferred_element_type=sums).astype(dtype)


def _matmul_forward(x, w, product):
    # What is cast would be kept in a scan's stacks: a copy of the weights, and XLA:CPU rewrites a whole stack
    # of bfloat16 at every layer.
    return _matmul(x, w, product), (x, w)


def _matmul_backward(product, residuals, g):
    x, w = residuals
    narrow = g.astype(product)
    dx = _product(narrow, w.astype(product), (((g.ndim - 1,), (1,)), ((), ())), g.dtype)
    rows = tuple(range(x.ndim - 1))
    # XLA:CPU copies the first factor transposed, slowly: that is the narrower of the two.
    over_rows = ((rows, rows), ((), ()))
    # Behind the barrier XLA:CPU cannot make one product of this and a transpose, of a form for which it has a
    # slow kernel in float32 and none in bfloat16. A GPU's products take transposed results as they are.
    apart = lax.optimization_barrier if jax.default_backend() == "cpu" else lambda product: product
    if x.shape[-1] > g.shape[-1]:
        dw = apart(_product(narrow, x.astype(product), over_rows, g.dtype)).T
    else:
        dw = apart(_product(x.astype(product), narrow, over_rows, g.dtype))
    return dx, dw.astype(product).astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """``silu(gate) * up`` (SwiGLU, arXiv:2002.05202). The backward pass keeps the two factors alone and works
    the sigmoid out again."""
    return gate * jax.nn.sigmoid(gate) * up


def _gated_forward(gate, up):
    return gated(gate, up), (gate, up)


def _gated_backward(factors, g):
    gate, up = factors
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return g * up * (sigmoid + silu * (1 - sigmoid)), g * silu


gated.defvjp(_gated_forward, _gated_backward)


def sum_of_products(a: Float[Array, "*B D"], b: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """``(a * b).sum(-1)``."""
    # XLA:CPU takes some 10 times as long where a leading dimension is 1, as for a micro-batch of one row.
    shape = a.shape[:-1]
    a, b = (x.reshape(-1, *x.shape[2:]) if x.ndim > 2 else x for x in (a, b))
    return jnp.sum(a * b, axis=-1).reshape(shape)


def _normalise(x, eps):
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32 * scale, scale


@jax.custom_vjp
def _rms_norm(x, weight, eps):
    xhat, _ = _normalise(x, eps)
    return _weighted(weight, xhat.astype(x.dtype))


def _weighted(weight, xhat):
    return jnp.broadcast_to(weight, xhat.shape) * xhat


def _rms_norm_forward(x, weight, eps):
    xhat, scale = _normalise(x, eps)
    return _weighted(weight, xhat.astype(x.dtype)), (x, weight, scale)


def _rms_norm_backward(residuals, g):
    x, weight, scale = residuals
    g32, xhat = g.astype(jnp.float32), x.astype(jnp.float32) * scale
    gw = g32 * jnp.broadcast_to(weight.astype(jnp.float32), g.shape)
    dx = scale * (gw - xhat * (sum_of_products(gw, xhat) / x.shape[-1])[..., None])
    # A product with ones: XLA:CPU sums over a leading axis many times slower than it multiplies.
    product = (g32 * xhat).reshape(-1, x.shape[-1])
    dw = jnp.ones((1, product.shape[0]), jnp.float32) @ product
    return dx.astype(x.dtype), dw[0].astype(weight.dtype), None


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), statistics in float32, result in
    ``x``'s dtype."""
    return _rms_norm(x, weight.astype(x.dtype), eps)

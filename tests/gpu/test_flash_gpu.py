"""The attention kernel on an NVIDIA GPU against the reference, and the time of both; run with `-s` to see it.

python -m pytest --noconftest -m gpu -s tests/gpu
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.bench.light import without_jaxtyping

without_jaxtyping()

from selfemo_jax.model.attention import packed_attention  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda_device() -> jax.Device:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {str(error).splitlines()[0]}")


def group_rows(num_rows: int, *, prompt: int, completion: int, group_size: int, padding: int):
    """Rows that hold a group each: a prompt, its completions, padding."""
    segments = np.concatenate(
        [np.full(prompt, 1), np.repeat(2 + np.arange(group_size), completion), np.zeros(padding, int)]
    )
    prefixes = np.where(segments > 1, 1, -1)
    return (jnp.tile(jnp.array(x, jnp.int32), (num_rows, 1)) for x in (segments, prefixes))


def inputs(
    num_rows: int, num_tokens: int, *, dtype: str, num_heads: int = 8, num_kv_heads: int = 4, head_dim=128
):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [
        jax.random.normal(key, (num_rows, num_tokens, n, head_dim), dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="backend")
def with_gradients(q, k, v, g, segments, prefixes, *, backend):
    value, back = jax.vjp(lambda *qkv: packed_attention(*qkv, segments, prefixes, backend=backend), q, k, v)
    return value, *back(g)


# float32 products of the kernel may keep the 10 bits of TF32; bfloat16 keeps 8 and rounds the weights.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-3), ("bfloat16", 2e-2)])
def test_kernel_equals_the_reference(dtype, bound):
    segments, prefixes = group_rows(2, prompt=333, completion=70, group_size=4, padding=17)
    arrays = inputs(2, segments.shape[1], dtype=dtype)
    found = with_gradients(*arrays, segments, prefixes, backend="pallas")
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        expected = with_gradients(*wide, segments, prefixes, backend="dense")
    for a, b in zip(found, expected, strict=True):
        difference = jnp.abs(a.astype(jnp.float32) - b).max()
        assert difference <= bound * jnp.abs(b).max(), (dtype, float(difference))


def test_equal_inputs_give_equal_gradients():
    segments, prefixes = group_rows(2, prompt=400, completion=60, group_size=8, padding=0)
    arrays = inputs(2, segments.shape[1], dtype="bfloat16")
    first, second = (with_gradients(*arrays, segments, prefixes, backend="pallas") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_the_kernel_is_faster_than_blocks(cuda_device):
    segments, prefixes = group_rows(4, prompt=1024, completion=896, group_size=8, padding=0)
    arrays = inputs(4, segments.shape[1], dtype="bfloat16", num_heads=32, num_kv_heads=8)
    took = {}
    for backend in ("blocked", "pallas"):
        run = functools.partial(with_gradients, *arrays, segments, prefixes, backend=backend)
        jax.block_until_ready(run())
        began = time.perf_counter()
        for _ in range(5):
            result = run()
        jax.block_until_ready(result)
        took[backend] = (time.perf_counter() - began) / 5 * 1e3
    print(f"\n{cuda_device.device_kind}: forward and backward of 4 rows of 8192, ms: {took}")
    assert took["pallas"] < took["blocked"]

"""The GPU kernel of attention, step by step on a CPU: equal to the reference, and skipping what is hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.model.attention import choose_backend, packed_attention, visible
from selfemo_jax.model.decoder import Compute, forward
from selfemo_jax.model.flash import (
    Blocks,
    attention_plan,
    block_plan,
    flash_attention,
    sharded_flash_attention,
)
from selfemo_jax.model.sharding import make_mesh
from tests.model.test_attention import PREFIXES, SEGMENTS, groups, inputs
from tests.model.tiny import TINY, weights

BLOCKS = Blocks(queries=16, keys=16)


def with_gradients(run, arrays, seed):
    value, back = jax.vjp(run, *arrays)
    return value, *back(seed)


# Two rows of three blocks, the last one not full; heads that share keys; a head below the smallest block.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "blocks"),
    [(4, 2, 16, BLOCKS), (2, 2, 8, BLOCKS), (2, 1, 16, Blocks(queries=16, keys=32))],
)
def test_kernel_equals_the_reference_in_value_and_gradients(num_heads, num_kv_heads, head_dim, blocks):
    arrays = inputs(41, num_rows=2, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    segments, prefixes = groups(41, num_rows=2)
    seed = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def kernel(q, k, v):
        return flash_attention(q, k, v, segments, prefixes, blocks=blocks, interpret=True)

    def reference(q, k, v):
        return packed_attention(q, k, v, segments, prefixes, backend="dense")

    found = jax.jit(functools.partial(with_gradients, kernel))(arrays, seed)
    for a, b in zip(found, with_gradients(reference, arrays, seed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_kernel_in_bfloat16_sums_in_float32():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(48, head_dim=16)]
    segments, prefixes = groups(48)
    found = flash_attention(*arrays, segments, prefixes, blocks=BLOCKS, interpret=True)
    wide = packed_attention(*(x.astype(jnp.float32) for x in arrays), segments, prefixes, backend="dense")
    assert found.dtype == jnp.bfloat16
    # Two roundings to 8 bits, of the weights and of the result.
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=0.02)


def test_plan_names_exactly_the_blocks_that_are_seen():
    segments, prefixes = groups(48, num_rows=3, seed=4)
    blocks = Blocks(queries=8, keys=16)
    table = np.asarray(visible(segments, prefixes, segments, query_offset=0))
    expected = table.reshape(3, 6, 8, 3, 16).any(axis=(2, 4))
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(block_plan(segments, prefixes, blocks=blocks), expected)


def test_hidden_blocks_are_never_read():
    # Two segments of a block each: were the first multiplied by weights of 0, its NaN would be seen.
    q, k, v = inputs(32, head_dim=16)
    segments = jnp.repeat(jnp.array([[1, 2]]), 16, axis=1)
    nothing = jnp.full_like(segments, -1)
    k, v = k.at[:, :16].set(jnp.nan), v.at[:, :16].set(jnp.nan)

    def run(q, k, v):
        return flash_attention(q, k, v, segments, nothing, blocks=BLOCKS, interpret=True)[:, 16:]

    value, back = jax.vjp(run, q, k, v)
    assert np.isfinite(value).all()
    dq, dk, dv = back(jnp.ones_like(value))
    for gradient in (dq, dk, dv):
        assert np.isfinite(gradient[:, 16:]).all()


def test_what_is_hidden_gets_no_gradient_from_the_kernel():
    q, k, v = inputs(8, head_dim=16)

    def run(k, v):
        return flash_attention(q, k, v, SEGMENTS, PREFIXES, blocks=BLOCKS, interpret=True)[0, 4].sum()

    for gradient in jax.grad(run, argnums=(0, 1))(k, v):
        reached = np.abs(np.asarray(gradient[0])).sum(axis=(1, 2)) > 0
        np.testing.assert_array_equal(reached, [1, 1, 0, 0, 1, 0, 0, 0])


def test_kernel_over_a_mesh_equals_one_device():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    arrays = inputs(16, num_rows=4, head_dim=16)
    segments, prefixes = groups(16, num_rows=4)
    seed = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def run(q, k, v, *, mesh):
        return sharded_flash_attention(q, k, v, segments, prefixes, mesh=mesh, blocks=BLOCKS, interpret=True)

    split = jax.jit(functools.partial(with_gradients, functools.partial(run, mesh=mesh)))(arrays, seed)
    whole = with_gradients(functools.partial(run, mesh=None), arrays, seed)
    for a, b in zip(split, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_lower_to_triton(dtype):
    """What can be known without a GPU: forward and both backward kernels become Triton programs."""
    arrays = [x.astype(dtype) for x in inputs(300, num_heads=4, num_kv_heads=2, head_dim=64)]
    segments, prefixes = groups(300)

    def loss(q, k, v):
        return flash_attention(q, k, v, segments, prefixes).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3


def test_a_plan_made_once_gives_the_same_numbers():
    segments, prefixes = groups(40)
    arrays = inputs(40, num_heads=4, num_kv_heads=2, head_dim=16)
    plan = attention_plan(segments, prefixes, blocks=BLOCKS)
    settings = {"blocks": BLOCKS, "interpret": True}
    np.testing.assert_array_equal(
        flash_attention(*arrays, segments, prefixes, plan=plan, **settings),
        flash_attention(*arrays, segments, prefixes, **settings),
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_layer_works_out_the_blocks_again(remat, monkeypatch):
    # Nothing runs or is lowered here, so that the kernel may be chosen without a GPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tokens = jnp.ones((2, 80), jnp.int32)
    segments, prefixes = groups(80, num_rows=2)
    compute = Compute(remat=remat, attention="pallas")

    def loss(params):
        hidden = forward(
            params, TINY, compute, tokens=tokens, positions=tokens, segment_ids=segments, prefix_ids=prefixes
        )
        return hidden.sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(weights(TINY))
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and "pallas_call" in str(eqn)]
    assert len(loops) == 2
    assert all(" sort[" not in str(eqn) for eqn in loops) and " sort[" in str(jaxpr)


def test_the_kernel_is_refused_and_not_replaced_where_it_cannot_run():
    with pytest.raises(ValueError, match="pallas is a kernel for NVIDIA GPUs and the devices are cpu"):
        choose_backend("pallas", 1024)
    ids = jnp.ones((1, 16), jnp.int32)
    with pytest.raises(ValueError, match="take auto, dense or blocked"):
        forward(
            {}, TINY, Compute(attention="pallas"), tokens=ids, positions=ids, segment_ids=ids, prefix_ids=-ids
        )

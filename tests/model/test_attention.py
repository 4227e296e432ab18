"""The attention rule by hand, and both backends against a loop over positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from selfemo_jax.model.attention import MAX_BLOCKS, MIN_BLOCK, choose_backend, packed_attention, visible

# Two tokens of prompt, completions of two and one, a plain sequence of one, padding of two.
SEGMENTS = jnp.array([[1, 1, 2, 2, 3, 4, 0, 0]])
PREFIXES = jnp.array([[-1, -1, 1, 1, 1, -1, -1, -1]])
TABLE = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ],
    bool,
)


def inputs(num_tokens, *, num_rows=1, num_heads=4, num_kv_heads=2, head_dim=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [
        jax.random.normal(key, (num_rows, num_tokens, n, head_dim))
        for key, n in zip(keys, heads, strict=True)
    ]


def groups(num_tokens, *, num_rows=1, seed=0):
    """Segments of random lengths, each third one a prefix of the two after it; padding at the end."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((num_rows, num_tokens), np.int32)
    prefixes = np.full((num_rows, num_tokens), -1, np.int32)
    for row in range(num_rows):
        cuts = np.sort(rng.choice(np.arange(1, num_tokens), min(9, num_tokens - 1), replace=False))
        for index, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[row, start:stop] = index + 1
            prefixes[row, start:stop] = -1 if index % 3 == 0 else index - index % 3 + 1
    return jnp.array(segments), jnp.array(prefixes)


def by_loop(q, k, v, segments, prefixes):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments, prefixes = np.asarray(segments), np.asarray(prefixes)
    repeats = q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(q.shape[:3]):
        seen = [j for j in range(i + 1) if segments[b, j] in (segments[b, i], prefixes[b, i])]
        scores = np.array([q[b, i, n] @ k[b, j, n // repeats] for j in seen]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = sum(
            w * v[b, j, n // repeats] for w, j in zip(weights / weights.sum(), seen, strict=True)
        )
    return out


def test_visibility_by_hand():
    np.testing.assert_array_equal(visible(SEGMENTS, PREFIXES, SEGMENTS, query_offset=0)[0], TABLE)


def test_visibility_of_a_block_of_queries_is_a_part_of_the_table():
    part = visible(SEGMENTS[:, 3:6], PREFIXES[:, 3:6], SEGMENTS[:, :6], query_offset=3)
    np.testing.assert_array_equal(part[0], TABLE[3:6, :6])


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_attention_equals_a_loop_over_positions(backend):
    q, k, v = inputs(8)
    found = packed_attention(q, k, v, SEGMENTS, PREFIXES, backend=backend)
    np.testing.assert_allclose(found, by_loop(q, k, v, SEGMENTS, PREFIXES), atol=1e-5)


# Below a block, one position more than a block or two, and more positions than the largest number of
# smallest blocks.
@pytest.mark.parametrize("num_tokens", [5, 129, 257, 300, MIN_BLOCK * MAX_BLOCKS + 77])
def test_blocked_equals_dense_in_value_and_gradients(num_tokens):
    num_rows = 1 if num_tokens > 1000 else 2
    arrays = inputs(num_tokens, num_rows=num_rows, num_heads=2, num_kv_heads=1, head_dim=4)
    segments, prefixes = groups(num_tokens, num_rows=num_rows)
    seed = jax.random.normal(jax.random.key(9), arrays[0].shape)

    @functools.partial(jax.jit, static_argnames="backend")
    def run(q, k, v, backend):
        def loss(*a):
            return jnp.sum(seed * packed_attention(*a, segments, prefixes, backend=backend))

        value = packed_attention(q, k, v, segments, prefixes, backend=backend)
        return value, jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    dense, blocked = run(*arrays, "dense"), run(*arrays, "blocked")
    for a, b in zip(jax.tree.leaves(blocked), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_gradients_against_finite_differences(backend):
    def run(*qkv):
        # The differences are numpy arrays, which the shape checks refuse.
        return packed_attention(*map(jnp.asarray, qkv), SEGMENTS, PREFIXES, backend=backend)

    check_grads(run, tuple(inputs(8, head_dim=2)), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_what_is_hidden_gets_no_gradient(backend):
    q, k, v = inputs(8)

    def run(k, v):
        return packed_attention(q, k, v, SEGMENTS, PREFIXES, backend=backend)[0, 4].sum()

    for gradient in jax.grad(run, argnums=(0, 1))(k, v):
        reached = np.abs(np.asarray(gradient[0])).sum(axis=(1, 2)) > 0
        np.testing.assert_array_equal(reached, TABLE[4])


def test_bfloat16_inputs_are_summed_in_float32():
    # 1024 equal weights: a bfloat16 softmax could not count beyond 256.
    q, k = jnp.zeros((1, 1024, 1, 2), jnp.bfloat16), jnp.zeros((1, 1024, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 1024, 1, 2), jnp.bfloat16)
    segments = jnp.ones((1, 1024), jnp.int32)
    out = packed_attention(q, k, v, segments, -segments, backend="dense")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)


def test_backend_by_name_and_by_length():
    assert choose_backend("auto", 2 * MIN_BLOCK - 1) == "dense"
    assert choose_backend("auto", 2 * MIN_BLOCK) == "blocked"
    assert choose_backend("dense", 10_000) == "dense" and choose_backend("blocked", 4) == "blocked"
    with pytest.raises(ValueError, match=r"model.attention: unknown backend 'flash'; expected auto, dense"):
        choose_backend("flash", 4)

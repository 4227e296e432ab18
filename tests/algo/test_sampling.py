import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.algo import sampling

EDGES = jnp.array([0.0, 2.0**-24, 0.25, 0.5, 1 - 2.0**-23, 1 - 2.0**-24], jnp.float32)
STEPS = 2**23  # jax.random.uniform in float32 gives the multiples of 2^-23.


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample(logits, uniforms, *, temperature=1.0, top_k=0, top_p=1.0):
    return sampling.sample(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)


@jax.jit
def drawn_shares(weights):
    """Exact probability of each entry of each row under inverse_cdf and all 2^23 uniforms, by bisection."""

    def row(weights_N):
        num = weights_N.shape[0]
        boundaries = jnp.arange(1, num + 1)

        def halve(_, interval):
            # The fewest steps whose uniform already falls on the boundary or beyond it.
            low, high = interval
            middle = (low + high) // 2
            uniforms = (middle / STEPS).astype(jnp.float32)
            copies = jnp.broadcast_to(weights_N[None, :], (num, num))
            beyond = sampling.inverse_cdf(copies, uniforms) >= boundaries
            return jnp.where(beyond, low, middle + 1), jnp.where(beyond, middle, high)

        start = (jnp.zeros(num, jnp.int32), jnp.full(num, STEPS, jnp.int32))
        first, _ = jax.lax.fori_loop(0, 24, halve, start)
        first = jnp.minimum(first, STEPS)
        return jnp.diff(first, prepend=jnp.zeros(1, jnp.int32))

    return jax.lax.map(row, weights)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_total_variation_from_softmax_is_below_5e_5_at_the_vocabulary_of_qwen3(spread):
    vocab = 151_936
    logits = jnp.asarray(np.random.default_rng(0).normal(0, spread, (1, vocab)).astype(np.float32))
    highest = logits.max(axis=-1, keepdims=True)
    sums = jax.jit(sampling._block_sums, static_argnums=2)(logits, highest, 1.0)
    inside = jnp.pad(jnp.exp(logits - highest)[0], (0, -vocab % sampling.BLOCK)).reshape(-1, sampling.BLOCK)
    blocks = np.asarray(drawn_shares(sums)[0], np.float64) / STEPS
    tokens = np.asarray(drawn_shares(inside), np.float64) / STEPS
    assert blocks.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(tokens.sum(axis=1), 1.0, atol=1e-12)
    drawn = (blocks[:, None] * tokens).ravel()[:vocab]
    exact = np.exp(np.asarray(logits[0], np.float64) - float(highest[0, 0]))
    distance = 0.5 * np.abs(drawn - exact / exact.sum()).sum()
    assert 0 < distance < 5e-5


def test_each_level_draws_its_share_of_a_fine_grid_to_one_step():
    # Three blocks, the last one partly filled. A grid makes each share right to one of its steps.
    vocab, steps = 1100, 10_000
    logits = np.random.default_rng(1).normal(0, 1.5, vocab).astype(np.float32)
    exact = np.exp(logits.astype(np.float64) / 0.7)
    exact /= exact.sum()
    grid = ((np.arange(steps) + 0.5) / steps).astype(np.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None, :], (steps, vocab))

    def shares(first, second):
        tokens, _ = sample(rows, jnp.asarray(np.stack([first, second], -1)), temperature=0.7)
        return np.bincount(np.asarray(tokens), minlength=vocab) / steps

    edges = np.append(np.arange(0, vocab, sampling.BLOCK), vocab)
    blocks = np.add.reduceat(exact, edges[:-1])
    drawn = np.add.reduceat(shares(grid, np.full_like(grid, 0.5)), edges[:-1])
    np.testing.assert_allclose(drawn, blocks, atol=1.01 / steps)
    middles = np.cumsum(blocks) - blocks / 2
    for middle, block, start, end in zip(middles, blocks, edges[:-1], edges[1:], strict=True):
        found = shares(np.full_like(grid, middle), grid)
        assert found[start:end].sum() == pytest.approx(1.0)
        np.testing.assert_allclose(found[start:end], exact[start:end] / block, atol=1.01 / steps)


@pytest.mark.parametrize("vocab", [7, 300, 1024])
def test_random_draws_pass_a_chi_square(vocab):
    logits = np.random.default_rng(2).normal(0, 1, vocab).astype(np.float32)
    num = 60_000
    uniforms = jax.random.uniform(jax.random.key(3), (num, 2))
    counts = np.zeros(vocab)
    for chunk in np.split(uniforms, 30):
        tokens, _ = sample(jnp.broadcast_to(jnp.asarray(logits)[None, :], (len(chunk), vocab)), chunk)
        counts += np.bincount(np.asarray(tokens), minlength=vocab)
    expected = np.exp(logits.astype(np.float64))
    expected *= num / expected.sum()
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), vocab - 1
    # Mean `freedom`, standard deviation sqrt(2 freedom): four of them.
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_logprobs_are_those_of_the_untruncated_softmax_at_the_temperature(temperature):
    logits = jax.random.normal(jax.random.key(0), (4, 1000)) * 4
    uniforms = jax.random.uniform(jax.random.key(1), (4, 2))
    expected = jax.nn.log_softmax(logits / temperature, axis=-1)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.9}):
        tokens, logprobs = sample(logits, uniforms, temperature=temperature, **filters)
        np.testing.assert_allclose(logprobs, expected[jnp.arange(4), tokens], atol=2e-6)


def all_edge_pairs():
    return jnp.stack(jnp.meshgrid(EDGES, EDGES), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("vocab", [1, 5, 511, 512, 513, 1300])
def test_tokens_stay_inside_the_vocabulary_at_extreme_uniforms(vocab):
    pairs = all_edge_pairs()
    for logits in (np.zeros(vocab), np.linspace(-40, 0, vocab), np.linspace(0, -40, vocab)):
        rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None, :], (len(pairs), vocab))
        tokens, logprobs = sample(rows, pairs)
        assert tokens.dtype == jnp.int32 and (tokens >= 0).all() and (tokens < vocab).all()
        assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("floor", [-jnp.inf, -1e4])
def test_a_token_without_probability_is_never_drawn(floor):
    vocab = 1300
    pairs = all_edge_pairs()
    for alive in ([0], [vocab - 1], [511, 512], [3, 700], list(range(520, 530))):
        logits = jnp.full((len(pairs), vocab), floor).at[:, jnp.array(alive)].set(1.5)
        for filters in ({}, {"top_k": 900}, {"top_p": 0.999}):
            tokens, logprobs = sample(logits, pairs, **filters)
            assert set(np.asarray(tokens).tolist()) <= set(alive)
            np.testing.assert_allclose(logprobs, -np.log(len(alive)), atol=1e-6)


def test_a_weight_of_zero_is_skipped_even_where_rounding_points_at_it():
    # Parallel prefix sums round differently at each place, so they may rise at an entry without weight.
    weights = np.random.default_rng(4).random((40, 400)).astype(np.float32)
    weights[:, ::2] = 0
    for row, end in enumerate(range(320, 400, 2)):
        weights[row, end:] = 0
    cumulated = np.asarray(jax.jit(functools.partial(jnp.cumsum, axis=-1))(weights))
    rises = (np.diff(cumulated, axis=-1) > 0) & (weights[:, 1:] == 0)
    assert rises.any()
    boundaries = cumulated[:, :-1] / cumulated[:, -1:] - np.float32(2**-24)
    near = np.stack([boundaries + step * np.float32(2**-25) for step in range(-2, 3)])
    uniforms = np.clip(near, 0, 1 - 2.0**-24).astype(np.float32)
    draw = jax.jit(sampling.inverse_cdf)
    for row in np.flatnonzero(rises.any(axis=1)):
        points = jnp.asarray(uniforms[:, row].ravel())
        entries = np.asarray(draw(jnp.broadcast_to(jnp.asarray(weights[row]), (len(points), 400)), points))
        assert (weights[row, entries] > 0).all()


def test_nothing_to_draw_from_stays_inside_the_row():
    for weights in (jnp.zeros((1, 5)), jnp.full((1, 5), jnp.nan)):
        assert 0 <= int(sampling.inverse_cdf(weights, jnp.array([0.7]))[0]) < 5


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, -jnp.inf, 0.0, 0.0]])
    tokens, logprobs = sample(logits, jnp.full((2, 2), 0.99), temperature=0.0)
    assert tokens.tolist() == [1, 0] and tokens.dtype == jnp.int32
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], atol=1e-6)


def drawn_set(logits, **filters):
    pairs = jnp.asarray(np.stack([np.full(400, 0.5), (np.arange(400) + 0.5) / 400], -1), jnp.float32)
    rows = jnp.broadcast_to(jnp.log(jnp.array(logits))[None, :], (400, len(logits)))
    tokens = np.asarray(sample(rows, pairs, **filters)[0])
    return {int(token): float((tokens == token).mean()) for token in np.unique(tokens)}


def test_filters_keep_the_set_worked_out_by_hand():
    probs = [0.1, 0.4, 0.2, 0.3]
    assert drawn_set(probs) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.005)
    assert drawn_set(probs, top_k=2) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.005)
    # .4 + .3 reaches .6; the token that crosses it is kept.
    assert drawn_set(probs, top_p=0.6) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.005)
    assert drawn_set(probs, top_p=0.01) == {1: 1.0}
    # top_k first: .4 / .7 alone is above .5.
    assert drawn_set(probs, top_k=2, top_p=0.5) == {1: 1.0}
    assert drawn_set(probs, top_k=1) == {1: 1.0}


def test_bfloat16_logits_are_summed_in_float32():
    logits = (jax.random.normal(jax.random.key(5), (3, 2000)) * 3).astype(jnp.bfloat16)
    uniforms = jax.random.uniform(jax.random.key(6), (3, 2))
    half, wide = sample(logits, uniforms), sample(logits.astype(jnp.float32), uniforms)
    np.testing.assert_array_equal(half[0], wide[0])
    np.testing.assert_allclose(half[1], wide[1], atol=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sample(jnp.zeros((1, 4)), jnp.zeros((1, 2)), **settings)


def test_a_penalty_moves_the_choice_and_not_the_logprob():
    logits = jnp.array([[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]])
    counts = jnp.array([[1, 0, 0], [0, 0, 5]])
    tokens, logprobs = sampling.sample_penalised(
        logits, jnp.zeros((2, 2)), counts, frequency_penalty=0.6, temperature=0.0
    )
    assert tokens.tolist() == [1, 0]
    total = np.log(np.exp(2.0) + np.exp(1.5) + 1)
    np.testing.assert_allclose(logprobs, [1.5 - total, 2.0 - total], rtol=1e-6)
    # At temperature 2 the logits halve: 1.0, 0.75, 0.
    _, halved = sampling.sample_penalised(
        logits, jnp.zeros((2, 2)), counts, frequency_penalty=0.6, temperature=2.0, top_k=1
    )
    np.testing.assert_allclose(halved, np.array([0.75, 1.0]) - np.log(np.e + np.exp(0.75) + 1), rtol=1e-6)

"""The decoder in its three layouts, with each of its switches, and the head in chunks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfemo_jax.data.batching import NO_PREFIX, gather
from selfemo_jax.model.decoder import (
    Compute,
    Decoder,
    abstract_params,
    forward,
    init_params,
    logits,
    token_logprobs,
)
from tests.model.tiny import (
    BIASED_LLAMA,
    BUDGET,
    GROUPS,
    KINDS,
    LONG_GROUPS,
    TINY,
    arrays,
    assert_trees_close,
    logprobs_of,
    objective,
    packed,
    sequences,
    value_and_grad,
    weights,
)

QWEN_VOCAB = 151_936
SHALLOW = dataclasses.replace(TINY, num_layers=1)


@functools.cache
def separate_rows(kind: str, *, long: bool = False, config=TINY):
    """Loss and gradients of one sequence in a row, dense attention, nothing recomputed: what all else must
    equal."""
    items = sequences(LONG_GROUPS if long else GROUPS)
    rows = packed(items, layout="separate", row_tokens=300 if long else 16)
    return value_and_grad(
        weights(config), arrays(rows.batch), kind=kind, config=config, compute=Compute(attention="dense")
    )


def assert_same(found, expected):
    assert abs(float(found[0]) - float(expected[0])) <= 1e-5
    assert abs(float(expected[0])) > 0.01
    assert_trees_close(found[1], expected[1], bound=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_layouts_agree_in_loss_and_gradients(layout, kind):
    rows = packed(sequences(), layout=layout, row_tokens=24)
    assert len(rows.batch.tokens) < len(sequences())
    assert_same(value_and_grad(weights(), arrays(rows.batch), kind=kind), separate_rows(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_group_cut_over_two_rows_agrees(kind):
    rows = packed(sequences(), layout="shared_prefix", row_tokens=16)
    first_group = {rows.places[index].row for index in range(3)}
    assert len(first_group) == 2
    assert_same(value_and_grad(weights(), arrays(rows.batch), kind=kind), separate_rows(kind))


@pytest.mark.parametrize(
    ("layout", "remat"), [("packed", "dots"), ("packed", "attention"), ("shared_prefix", "full")]
)
def test_layouts_agree_with_recomputation(layout, remat):
    rows = packed(sequences(), layout=layout, row_tokens=24)
    found = value_and_grad(weights(), arrays(rows.batch), kind="rl", compute=Compute(remat=remat))
    assert_same(found, separate_rows("rl"))


@pytest.mark.parametrize(
    ("layout", "remat"),
    [("separate", "none"), ("packed", "full"), ("shared_prefix", "attention"), ("shared_prefix", "dots")],
)
def test_layouts_agree_with_blocked_attention(layout, remat):
    rows = packed(sequences(LONG_GROUPS), layout=layout, row_tokens=300)
    compute = Compute(attention="blocked", remat=remat)
    found = value_and_grad(weights(), arrays(rows.batch), kind="rl", compute=compute)
    assert_same(found, separate_rows("rl", long=True))


def test_layouts_agree_for_llama_with_biases_and_its_own_head():
    rows = packed(sequences(), layout="shared_prefix", row_tokens=24)
    found = value_and_grad(weights(BIASED_LLAMA), arrays(rows.batch), kind="sft", config=BIASED_LLAMA)
    assert {"head", "embed"} < set(found[1])
    assert_same(found, separate_rows("sft", config=BIASED_LLAMA))


def test_blocked_attention_makes_no_square_array():
    tokens = jnp.zeros((1, 300), jnp.int32)
    batch = {
        "tokens": tokens,
        "positions": jnp.arange(300)[None],
        "segment_ids": tokens + 1,
        "prefix_ids": tokens + NO_PREFIX,
    }

    def text(attention):
        def run(params):
            return forward(params, TINY, Compute(attention=attention), **batch).sum()

        return jax.jit(jax.grad(run)).lower(weights()).as_text()

    assert "300x300" in text("dense")
    assert "300x300" not in text("blocked")
    assert "300x300" not in text("auto")


def step_memory(compute: Compute, *, config=TINY, num_rows: int = 2, num_tokens: int = 256) -> int:
    """Bytes that the compiled gradient of the SFT loss keeps beside its arguments and results."""
    shapes, _ = abstract_params(config)
    one = packed(sequences(((3, (2,)),)), layout="separate", row_tokens=num_tokens, micro_rows=num_rows)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays(one.batch))
    run = jax.jit(jax.grad(functools.partial(objective, kind="sft", config=config, compute=compute)))
    return run.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes


def test_recomputation_lowers_the_compiled_memory():
    deep = dataclasses.replace(TINY, num_layers=8)
    none, dots, full = (step_memory(Compute(remat=remat), config=deep) for remat in ("none", "dots", "full"))
    assert full < 0.7 * dots < 0.7 * 0.9 * none


def test_recomputation_of_all_but_attention_keeps_its_results_alone():
    deep = dataclasses.replace(TINY, num_layers=8)

    def kept(remat):
        compute = Compute(remat=remat, attention="blocked")
        return step_memory(compute, config=deep, num_rows=2, num_tokens=300)

    full, attention, none = kept("full"), kept("attention"), kept("none")
    # Of 8 layers and 2 rows of 300: 4 heads of 16 numbers, and a sum for each head, in float32.
    results = 8 * 2 * 300 * 4 * (16 + 1) * 4
    assert full + 0.8 * results < attention < full + 2.5 * results
    assert attention < 0.6 * none


def softmaxes(remat):
    """How often the traced gradient of a layer takes the exponential of attention's scores, which their shape
    tells from those of the MLP and the head: 1 row, 2 key-value heads of 2 query heads each."""
    shapes, _ = abstract_params(SHALLOW)
    one = packed(sequences(((3, (2,)),)), layout="separate", row_tokens=300, micro_rows=1)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays(one.batch))
    compute = Compute(remat=remat, attention="blocked")
    run = jax.jit(jax.grad(functools.partial(objective, kind="sft", config=SHALLOW, compute=compute)))
    lines = run.lower(shapes, batch).as_text().splitlines()
    return sum("stablehlo.exponential" in line and "tensor<1x2x2x" in line for line in lines)


def test_recomputation_of_all_but_attention_does_not_repeat_its_softmax():
    # Rows of 300 are three blocks, each once forward and once backward; full takes the forward pass again.
    assert {remat: softmaxes(remat) for remat in ("none", "attention", "full")} == {
        "none": 6,
        "attention": 6,
        "full": 9,
    }


@pytest.mark.parametrize("compute", [Compute(product="bfloat16"), Compute(dtype="bfloat16")])
def test_the_backward_pass_keeps_no_cast_copy_of_the_weights(compute):
    shapes, _ = abstract_params(TINY)
    batch = arrays(packed(sequences(), layout="separate", row_tokens=40).batch)
    run = jax.jit(jax.grad(functools.partial(objective, kind="sft", config=TINY, compute=compute)))
    text = run.lower(shapes, batch).as_text()
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        whole = shapes["layers"][name].shape
        for shape in (whole, (*whole[:2], -1), (whole[0], -1, whole[-1])):
            rest = math.prod(whole) // -math.prod(shape)
            stack = "x".join(str(rest if size < 0 else size) for size in shape)
            assert f"tensor<{stack}xbf16>" not in text, (name, stack)


def test_blocked_attention_lowers_the_compiled_memory():
    dense, blocked = (
        step_memory(Compute(attention=attention), config=SHALLOW, num_rows=1, num_tokens=1024)
        for attention in ("dense", "blocked")
    )
    assert blocked < 0.5 * dense


def test_memory_grows_linearly_with_rows():
    compute = Compute(attention="blocked", remat="full")
    # Up to three rows XLA:CPU takes an eighth less for each than from four on.
    few, many = (step_memory(compute, config=SHALLOW, num_rows=rows, num_tokens=300) for rows in (4, 12))
    assert 2 * few < many < 3.1 * few


def test_bfloat16_compute_keeps_float32_weights_and_stays_near_float32():
    rows = packed(sequences(), layout="shared_prefix", row_tokens=24)
    exact, exact_gradients = separate_rows("sft")
    compute = Compute(dtype="bfloat16")
    loss, gradients = value_and_grad(weights(), arrays(rows.batch), kind="sft", compute=compute)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    hidden = forward(weights(), TINY, compute, **model_inputs(rows.batch))
    assert hidden.dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa: 0.4 % a product, a few products deep, on a loss of about 4.9.
    assert 0 < abs(float(loss) - float(exact)) < 0.03

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    a, b = flat(gradients), flat(exact_gradients)
    assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_head_in_float32_is_a_switch():
    hidden = jax.random.normal(jax.random.key(0), (1, 4, TINY.embed_dim), jnp.bfloat16)
    wide = logits(weights(), TINY, Compute(dtype="bfloat16"), hidden)
    narrow = logits(weights(), TINY, Compute(dtype="bfloat16", logits_float32=False), hidden)
    assert wide.dtype == narrow.dtype == jnp.float32
    assert not np.array_equal(wide, wide.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.array_equal(narrow, narrow.astype(jnp.bfloat16).astype(jnp.float32))


def model_inputs(batch) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(getattr(batch, name))
        for name in ("tokens", "positions", "segment_ids", "prefix_ids")
    }


def test_module_and_functions_are_one_model():
    module = Decoder(TINY, rngs=nnx.Rngs(params=jax.random.key(3)))
    params = init_params(TINY, jax.random.key(3))
    inputs = model_inputs(packed(sequences(), layout="packed", row_tokens=24).batch)
    whole = module(**inputs)
    parts = logits(params, TINY, Compute(), forward(params, TINY, Compute(), **inputs))
    assert whole.shape == (*inputs["tokens"].shape, TINY.vocab_size)
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("config", [TINY, BIASED_LLAMA], ids=["qwen3", "llama"])
def test_abstract_params_describe_what_init_makes(config):
    shapes, axes = abstract_params(config)
    made = init_params(config, jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), made
    )
    named = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert named == jax.tree.map(lambda a: a.ndim, made)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_matters(kind):
    items = sequences()
    tight = packed(items, layout="shared_prefix", row_tokens=24)
    wide = packed(items, layout="shared_prefix", row_tokens=31, micro_rows=5)
    assert wide.batch.tokens.shape == (5, 31) and wide.padding_share > tight.padding_share
    batch = arrays(wide.batch)
    nothing = batch["token_weights"] == 0
    padding = batch["segment_ids"] == 0
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "importance_weights"):
        batch[name] = np.where(nothing, np.nan, batch[name]).astype(np.float32)
    batch["tokens"] = np.where(padding, 41, batch["tokens"])
    batch["targets"] = np.where(nothing, 17, batch["targets"])
    batch["positions"] = np.where(padding, 999, batch["positions"])
    found = value_and_grad(weights(), batch, kind=kind)
    assert_same(found, separate_rows(kind))


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_no_sequence_sees_another(layout):
    items = sequences()
    changed = [
        dataclasses.replace(item, completion_ids=tuple((token + 1) % 97 for token in item.completion_ids))
        if index == 1
        else item
        for index, item in enumerate(items)
    ]
    run = jax.jit(logprobs_of)
    rows = [packed(each, layout=layout, row_tokens=60) for each in (items, changed)]
    before, after = (gather(np.asarray(run(weights(), arrays(r.batch))[0]), r.places) for r in rows)
    for index, (a, b) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(a, b) == (index != 1)


def test_chunked_logprobs_equal_full_ones_in_value_and_gradient():
    # 45 tokens cut into uneven chunks, and 48 into even ones.
    for num_tokens in (45, 48):
        hidden = jax.random.normal(jax.random.key(0), (2, num_tokens, TINY.embed_dim))
        targets = jax.random.randint(jax.random.key(1), (2, num_tokens), 0, TINY.vocab_size)
        seed = jax.random.normal(jax.random.key(2), (2, 2, num_tokens))

        def run(params, hidden, budget, *, targets=targets, seed=seed):
            logprobs, entropy = token_logprobs(
                params, TINY, Compute(), hidden, targets, temperature=0.7, budget_bytes=budget
            )
            return jnp.sum(seed[0] * logprobs + seed[1] * entropy) / 45, (logprobs, entropy)

        run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
        whole, whole_gradients = run(weights(), hidden, BUDGET)
        expected = jax.nn.log_softmax(logits(weights(), TINY, Compute(), hidden) / 0.7)
        chosen = np.take_along_axis(np.asarray(expected), np.asarray(targets)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(whole[1][0], chosen, atol=1e-5)
        np.testing.assert_allclose(whole[1][1], -(np.exp(expected) * expected).sum(-1), atol=1e-5)
        for budget in (2 * 97 * 4 * 14, 1):
            assert f"2x{num_tokens}x97" not in run.lower(weights(), hidden, budget).as_text()
            cut, gradients = run(weights(), hidden, budget)
            assert_trees_close((cut, gradients), (whole, whole_gradients), bound=1e-5)


def test_head_at_the_targets_alone_gives_their_numbers_and_gradients():
    # Logits of at most 2: of larger ones, float32 itself is 1e-6 off in log of their sum and in the entropy.
    hidden = jax.random.normal(jax.random.key(0), (3, 20, TINY.embed_dim)) / 4
    targets = jax.random.randint(jax.random.key(1), (3, 20), 0, TINY.vocab_size)
    # Rows with targets in several places, with as many as the head looks at, and with none.
    wanted = jnp.zeros((3, 20), bool).at[0, jnp.array([3, 4, 11])].set(True).at[1, 5:12].set(True)
    seed = jax.random.normal(jax.random.key(2), (2, 3, 20)) * wanted

    def run(params, hidden, width, budget):
        logprobs, entropy = token_logprobs(
            params, TINY, Compute(), hidden, targets, temperature=0.7, budget_bytes=budget, wanted=wanted,
            width=width,
        )  # fmt: skip
        return jnp.sum(seed[0] * logprobs + seed[1] * entropy), (logprobs, entropy)

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), static_argnums=(2, 3))
    (value, found), gradients = run(weights(), hidden, None, BUDGET)
    scaled = np.asarray(hidden, np.float64) @ np.asarray(weights()["embed"], np.float64).T / 0.7
    exact = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    chosen = np.take_along_axis(exact, np.asarray(targets)[..., None], axis=-1)[..., 0]
    expected = chosen, -(np.exp(exact) * exact).sum(-1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[wanted], b[wanted], rtol=0, atol=1e-6)
    for budget in (BUDGET, 3 * 97 * 4 * 2):
        (narrow, cut), narrow_gradients = run(weights(), hidden, 7, budget)
        for a, b in zip(cut, expected, strict=True):
            np.testing.assert_allclose(a[wanted], b[wanted], rtol=0, atol=1e-6)
            assert not np.asarray(a)[2, 7:].any()
        assert_trees_close((narrow, narrow_gradients), (value, gradients), bound=1e-5)


def head_memory(num_tokens: int, *, budget_bytes: int) -> int:
    config = dataclasses.replace(TINY, vocab_size=QWEN_VOCAB, embed_dim=16)
    shapes, _ = abstract_params(config)

    def run(params, hidden, targets):
        logprobs, _ = token_logprobs(
            params, config, Compute(), hidden, targets, temperature=1.0, budget_bytes=budget_bytes
        )
        return logprobs.sum()

    hidden = jax.ShapeDtypeStruct((2, num_tokens, config.embed_dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, num_tokens), jnp.int32)
    compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(shapes, hidden, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_no_array_of_rows_by_tokens_by_vocabulary_exists_above_the_budget():
    # 500 is no power of two: the budget holds for any length of row.
    whole = {num_tokens: 2 * num_tokens * QWEN_VOCAB * 4 for num_tokens in (500, 1000, 2000)}
    chunked = {num_tokens: head_memory(num_tokens, budget_bytes=16 * 2**20) for num_tokens in whole}
    assert all(chunked[num_tokens] < 0.25 * whole[num_tokens] for num_tokens in whole)
    assert chunked[2000] < 0.06 * whole[2000]
    assert head_memory(500, budget_bytes=2**40) > whole[500]
    # What is left to grow is the hidden states, at most linearly.
    assert chunked[1000] < 2 * chunked[500] and chunked[2000] < 2 * chunked[1000]
    assert chunked[2000] - chunked[1000] < 1000 * 2 * 16 * 4 * 8

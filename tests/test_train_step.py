"""The sharded update: its numbers against torch and by hand, its meshes, and what it leaves untouched."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import PackedBatch, micro_batches, scatter
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import SMALL_BYTES, make_mesh
from selfemo_jax.optimizer import learning_rate
from selfemo_jax.train_step import (
    NonFiniteError,
    Steps,
    TrainState,
    born_sharded,
    device_batch,
    make_steps,
    sequence_logprobs,
    update,
)
from tests.model.tiny import GROUPS, TINY, assert_trees_close, packed, sequences, weights

# Every weight but the norms is above 64 KiB.
WIDE = ModelConfig(
    architecture="qwen3",
    vocab_size=512,
    embed_dim=128,
    mlp_dim=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=1e4,
    tie_embeddings=True,
    max_positions=512,
)
MESHES = {
    "1": {"fsdp": 1},
    "8": {"fsdp": 8},
    "fsdp=4,tp=2": {"fsdp": 4, "tp": 2},
    "data=2,fsdp=2,tp=2": {"data": 2, "fsdp": 2, "tp": 2},
}
# An eps near the size of the gradients: with the usual one Adam's first step is their sign, which rounding
# flips where they are near 0.
OPTIM = Optim(lr=1e-2, weight_decay=0.1, clip_norm=0.5, eps=1e-3)
LOSS = Loss()
COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.cache
def steps_of(
    model: ModelConfig = TINY,
    mesh: str = "1",
    *,
    optim: Optim = OPTIM,
    loss: Loss = LOSS,
    budget_mib: int = 64,
) -> Steps:
    return make_steps(
        model,
        Compute(),
        make_mesh(MESHES[mesh]),
        optim=optim,
        loss=loss,
        temperature=0.9,
        logits_budget_mib=budget_mib,
    )


def fresh_state(steps: Steps, params=None) -> TrainState:
    params = weights() if params is None else params
    return steps.init_state(jax.device_put(params, steps.param_shardings))


def rows(
    *, micro_rows: int = 1, layout: str = "shared_prefix", row_tokens: int = 24, groups=GROUPS
) -> PackedBatch:
    return packed(sequences(groups), layout=layout, row_tokens=row_tokens, micro_rows=micro_rows).batch


def host(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


def summed(steps: Steps, params, batch: PackedBatch, *, micro_rows: int, kind: str):
    total, parts = steps.zeros[kind](), steps.parts(params)
    for part in micro_batches(batch, micro_rows=micro_rows):
        on_mesh = device_batch(part, steps.mesh)
        if kind == "sft":
            total = steps.sft_gradients(parts, total, on_mesh)
        else:
            total = steps.rl_gradients(parts, total, on_mesh, on_policy=False)
    return host(total)


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of every compilation that happens inside."""
    seen: list[float] = []
    active = [True]

    def listen(event: str, seconds: float, **_) -> None:
        if active and event == COMPILED:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        active.clear()


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_micro_batches_cut_any_way_agree(kind):
    steps, params = steps_of(), weights()
    batch = rows(micro_rows=6, layout="packed")
    assert batch.tokens.shape[0] == 6
    whole = summed(steps, params, batch, micro_rows=6, kind=kind)
    assert abs(whole.sums["loss"][0]) > 0.01
    for micro_rows in (1, 2):
        cut = summed(steps, params, batch, micro_rows=micro_rows, kind=kind)
        # The gradients are of the order of 0.1.
        check = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
        jax.tree.map(check, cut.gradients, whole.gradients)
        for name, pair in whole.sums.items():
            # A metric's sum over 36 targets of either sign: relative to the terms that were added.
            np.testing.assert_allclose(
                cut.sums[name], pair, rtol=1e-6, atol=1e-6 * max(1.0, pair[1]), err_msg=name
            )


def test_optimizer_equals_torch_adamw_after_clipping():
    torch = pytest.importorskip("torch")
    steps = steps_of()
    state = fresh_state(steps)
    leaves, _ = jax.tree.flatten(host(state.params))
    theirs = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in leaves]
    optimizer = torch.optim.AdamW(
        theirs, lr=1.0, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    norms = []
    for step, scale in enumerate((1.0, 0.05, 3.0, 0.4)):
        # The third factor makes the norm large and the second keeps it below the bound.
        batch = rows()
        batch = dataclasses.replace(batch, token_weights=np.float32(scale) * batch.token_weights)
        gradients = summed(steps, state.params, batch, micro_rows=1, kind="sft").gradients
        for parameter, gradient in zip(theirs, jax.tree.leaves(gradients), strict=True):
            parameter.grad = torch.tensor(gradient)
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs, OPTIM.clip_norm)))
        rate = learning_rate(dataclasses.replace(OPTIM, schedule="cosine"), step=step, total_steps=4)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        state, metrics = update(steps, state, batch, kind="sft", micro_rows=1, rate=rate, where="step 0")
        assert metrics["grad_norm"] == pytest.approx(norms[-1], rel=1e-5)
        for found, expected in zip(jax.tree.leaves(host(state.params)), theirs, strict=True):
            np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-5)
    assert min(norms) < OPTIM.clip_norm < max(norms)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(host(state.params)), leaves, strict=True)]
    assert min(moved) > 1e-2
    assert int(state.step) == 4


def test_update_lowers_the_sft_loss():
    steps = steps_of()
    state, before = update(
        steps, fresh_state(steps), rows(), kind="sft", micro_rows=1, rate=1e-2, where="step 0"
    )
    _, after = update(steps, state, rows(), kind="sft", micro_rows=1, rate=0.0, where="step 1")
    assert after["loss"] < before["loss"] - 0.1
    assert before["nll"] == pytest.approx(before["loss"], rel=1e-5)


def test_rate_of_zero_changes_no_weight():
    steps = steps_of()
    before = host(weights())
    state, _ = update(steps, fresh_state(steps), rows(), kind="rl", micro_rows=1, rate=0.0, where="step 0")
    jax.tree.map(np.testing.assert_array_equal, host(state.params), before)


def test_on_policy_shortcut_equals_the_current_logprobs_as_old_ones():
    steps = steps_of()
    batch = rows()
    current = sequence_logprobs(steps, weights(), batch, micro_rows=1)
    asked = dataclasses.replace(batch, old_logprobs=current)
    far = dataclasses.replace(batch, old_logprobs=current - 5.0)
    run = functools.partial(update, steps, kind="rl", micro_rows=1, rate=1e-3, where="step 0")
    short_state, short = run(fresh_state(steps), far, on_policy=True)
    long_state, long = run(fresh_state(steps), asked, on_policy=False)
    _, other = run(fresh_state(steps), far, on_policy=False)
    assert short.keys() == long.keys()
    for name in short:
        assert short[name] == pytest.approx(long[name], abs=1e-5), name
    assert other["loss"] != pytest.approx(long["loss"], abs=1e-3)
    assert_trees_close(host(short_state.opt_state), host(long_state.opt_state), bound=1e-5)


def test_rl_loss_of_two_sequences_by_hand():
    # All weights 0: every token has log-probability -log 97 = -4.574711 and entropy log 97.
    loss = Loss(clip_low=0.2, clip_high=0.3, clip_dual=3.0, kl_coef=0.5, kl_kind="k3", entropy_coef=0.1)
    steps = steps_of(loss=loss)
    groups = ((2, (2,)), (3, (3,)))
    items = [
        dataclasses.replace(item, token_weight=weight, advantage=advantage)
        for item, weight, advantage in zip(sequences(groups), (0.25, 0.1), (1.0, -2.0), strict=True)
    ]
    together = packed(items, layout="packed", row_tokens=8)
    uniform = -np.log(97.0)
    ratios = [np.array([1.5, 1.1]), np.array([0.5, 1.0, 4.0])]
    gaps = [np.array([0.0, np.log(2.0)]), np.array([0.0, 0.0, -np.log(2.0)])]
    batch = dataclasses.replace(
        together.batch,
        old_logprobs=scatter([uniform - np.log(ratio) for ratio in ratios], together, fill=np.nan),
        ref_logprobs=scatter([uniform - gap for gap in gaps], together, fill=np.nan),
        importance_weights=scatter([np.array([1.0, 2.0]), np.ones(3)], together, fill=np.nan),
    )
    params = jax.tree.map(np.zeros_like, host(weights()))
    _, metrics = update(
        steps,
        fresh_state(steps, params),
        batch,
        kind="rl",
        micro_rows=1,
        rate=0.0,
        where="s",
        on_policy=False,
    )
    # First: ratio 1.5 is clipped to 1.3; 1.1 is not, and counts twice. Second: 0.5 is clipped to 0.8 (times
    # 2), 1.0 stays (2), 4.0 is held at 3 (6).
    first, second = -1.3 - 2 * 1.1, 1.6 + 2.0 + 6.0
    # k3 of a gap: exp(-gap) + gap - 1. log 2: 0.5 + 0.693147 - 1; -log 2: 2 - 0.693147 - 1.
    kl_first, kl_second = 0.193147, 0.306853
    entropy = np.log(97.0)
    expected = 0.25 * (first + 0.5 * kl_first - 0.1 * 2 * entropy) + 0.1 * (
        second + 0.5 * kl_second - 0.1 * 3 * entropy
    )
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["kl"] == pytest.approx((kl_first + kl_second) / 5, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(2 / 5)
    assert metrics["clip_fraction_dual"] == pytest.approx(1 / 5)
    assert metrics["policy_loss"] == pytest.approx((first + second) / 5, abs=1e-5)


@pytest.mark.parametrize(("kind", "field"), [("sft", "token_weights"), ("rl", "advantages")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_loss_names_the_step_and_leaves_everything_bit_identical(kind, field, bad):
    steps = steps_of()
    state, _ = update(steps, fresh_state(steps), rows(), kind="sft", micro_rows=1, rate=1e-3, where="step 0")
    before = host(state)
    batch = rows()
    spoiled = getattr(batch, field).copy()
    spoiled[tuple(np.argwhere(batch.token_weights)[-1])] = bad
    batch = dataclasses.replace(batch, **{field: spoiled})
    with pytest.raises(
        NonFiniteError, match=r"phase 3, step 41: loss (nan|-?inf), gradient norm nan; the upd"
    ) as error:
        update(steps, state, batch, kind=kind, micro_rows=1, rate=1e-3, where="phase 3, step 41")
    kept = error.value.state
    jax.tree.map(np.testing.assert_array_equal, host(kept), before)
    assert int(kept.step) == 1
    _, metrics = update(steps, kept, rows(), kind="sft", micro_rows=1, rate=1e-3, where="step 42")
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("mesh", ["1", "8"])
def test_update_gives_the_old_state_s_memory_away(mesh):
    steps = steps_of(WIDE, mesh)
    state = wide_state(mesh)
    old = jax.tree.leaves((state.params, state.opt_state))
    new, _ = update(
        steps, state, wide_rows(), kind="rl", micro_rows=8, rate=1e-3, where="step 0", on_policy=False
    )
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@functools.cache
def born(mesh: str):
    return born_sharded(WIDE, make_mesh(MESHES[mesh]), seed=4, dtype="float32")


def wide_state(mesh: str) -> TrainState:
    """A fresh state of the wide model; the update may donate it."""
    return steps_of(WIDE, mesh).init_state(jax.tree.map(jnp.copy, born(mesh)))


def wide_rows() -> PackedBatch:
    items = sequences(GROUPS, vocab_size=WIDE.vocab_size)
    return packed(items, layout="separate", row_tokens=16, micro_rows=8).batch


@functools.cache
def first_update(mesh: str, kind: str):
    """Metrics of two updates, the state after the first, and its weights on the host."""
    steps = steps_of(WIDE, mesh)
    state = wide_state(mesh)
    run = functools.partial(update, steps, kind=kind, micro_rows=8, rate=1e-2, on_policy=False)
    state, first = run(state, wide_rows(), where="step 0")
    after = host(state)
    state, second = run(state, wide_rows(), where="step 1")
    return first, second, after, state


@pytest.mark.parametrize(
    ("mesh", "kind"), [("8", "sft"), ("8", "rl"), ("fsdp=4,tp=2", "rl"), ("data=2,fsdp=2,tp=2", "rl")]
)
def test_meshes_give_the_same_losses_and_the_same_first_update(mesh, kind):
    one, other = first_update("1", kind), first_update(mesh, kind)
    for found, expected in zip(other[:2], one[:2], strict=True):
        assert found.keys() == expected.keys() and abs(expected["loss"]) > 1e-3
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert_trees_close(other[2].opt_state, one[2].opt_state, bound=1e-5)
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(check, other[2].params, one[2].params)
    assert np.abs(one[2].params["embed"] - born("1")["embed"]).max() > 1e-3


@pytest.mark.parametrize("mesh", list(MESHES))
def test_each_device_holds_its_share_of_weights_and_moments_after_updates(mesh):
    *_, state = first_update(mesh, "rl")
    axes = MESHES[mesh]
    ways = axes.get("fsdp", 1) * axes.get("tp", 1)
    moments = state.opt_state[1]
    shardings = steps_of(WIDE, mesh).param_shardings
    large = 0
    for tree in (state.params, moments.mu, moments.nu):
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
            large += leaf.nbytes > SMALL_BYTES
            share = leaf.nbytes // (ways if leaf.nbytes > SMALL_BYTES else 1)
            assert len(leaf.addressable_shards) == np.prod(list(axes.values()))
            for shard in leaf.addressable_shards:
                assert shard.data.shape == sharding.shard_shape(leaf.shape)
                assert shard.data.nbytes == share
    assert large == 3 * 8


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_born_sharded_draws_the_same_numbers_on_every_mesh(mesh):
    jax.tree.map(np.testing.assert_array_equal, host(born(mesh)), host(born("1")))
    assert born(mesh)["layers"]["q"].sharding == steps_of(WIDE, mesh).param_shardings["layers"]["q"]


def test_born_sharded_draws_by_its_seed_in_the_asked_type():
    mesh = make_mesh(MESHES["1"])
    draws = [born_sharded(TINY, mesh, seed=seed, dtype="bfloat16")["embed"] for seed in (4, 4, 5)]
    assert draws[0].dtype == jnp.bfloat16
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize("mesh", ["1", "fsdp=4,tp=2"])
def test_nothing_compiles_after_the_first_step_whatever_the_number_of_rows(mesh):
    steps = steps_of(WIDE, mesh)
    state = wide_state(mesh)
    items = sequences(GROUPS * 2, vocab_size=WIDE.vocab_size)

    def batch(num_sequences):
        return packed(items[:num_sequences], layout="separate", row_tokens=16, micro_rows=8).batch

    def step(state, num_sequences, rate):
        rows = batch(num_sequences)
        logprobs = sequence_logprobs(steps, state.params, rows, micro_rows=8)
        rows = dataclasses.replace(rows, old_logprobs=logprobs)
        state, _ = update(
            steps, state, rows, kind="rl", micro_rows=8, rate=rate, where="step", on_policy=False
        )
        return state, len(rows.tokens)

    state, num_rows = step(state, 3, 1e-3)
    assert num_rows == 8
    with compilations() as seen:
        state, more_rows = step(state, 16, 2e-3)
        state, _ = step(state, 3, 0.0)
    assert more_rows == 16
    assert seen == []
    with compilations() as seen:
        jax.jit(lambda x: x * 3.25)(np.float32(1.0))
    assert len(seen) == 1


def test_logprobs_are_those_of_the_temperature_and_of_every_chunking():
    batch = rows(micro_rows=2)
    found = sequence_logprobs(steps_of(), weights(), batch, micro_rows=2)
    assert found.shape == batch.tokens.shape and found.dtype == np.float32
    whole = sequence_logprobs(steps_of(), weights(), batch, micro_rows=len(batch.tokens))
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)
    # Nothing fits a budget of 0: one token at a time.
    chunked = sequence_logprobs(steps_of(budget_mib=0), weights(), batch, micro_rows=2)
    np.testing.assert_allclose(found, chunked, rtol=0, atol=1e-5)

"""From scored groups to optimizer updates: weights of tokens, whose log-probs, which updates."""

import contextlib
import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax import learn
from selfemo_jax.config import Optim
from selfemo_jax.learn import rl_update, sft_update
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, init_params
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.rollout.engine import Completion, Request
from selfemo_jax.rollout.records import load_groups, save_groups, step_file
from selfemo_jax.scoring import Scored, make_scorer, score_groups
from selfemo_jax.train_step import make_steps, sequence_logprobs
from tests.fabricated import codec, group, prompt, sample, settings, text

LENGTHS = ((3, 1), (5, 2), (1, 1), (7, 4))
"""Completion lengths of four prompts; the two mini-batches of two prompts have 11 and 13 tokens."""


def no_timer(name: str):
    return contextlib.nullcontext()


def scored(lengths=LENGTHS, *, lost=()) -> Scored:
    """Groups whose every target is another token, counted up from 20; the sampler's log-prob is -1."""
    ids = iter(range(20, 20 + sum(map(sum, lengths))))
    completions = tuple(
        tuple(
            Completion(
                token_ids=tuple(next(ids) for _ in range(length)),
                logprobs=(-1.0,) * length,
                finish_reason="stop",
                policy_versions=(0,),
            )
            for length in row
        )
        for row in lengths
    )
    num, size = len(lengths), len(lengths[0])
    samples = tuple(sample(n, gold={"joy": 1.0}) for n in range(num))
    present = np.array([[p not in lost] * size for p in range(num)])
    zeros = np.zeros((num, size), np.float32)
    return Scored(
        samples=samples,
        prompts=tuple(prompt(2 + n) for n in range(num)),
        completions=tuple(() if p in lost else row for p, row in enumerate(completions)),
        texts=(),
        answers=(),
        present=present,
        valid=present,
        r1=zeros,
        r2=zeros,
        rewards=zeros,
        advantages=np.arange(num * size, dtype=np.float32).reshape(num, size) - 3.0,
        metrics={},
    )


@dataclass(frozen=True)
class State:
    params: float


@dataclass
class Recorder:
    """Stands in for the compiled functions: log p of a target is -params times its id over 100."""

    updates: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    at_once: list = field(default_factory=list)

    def update(self, steps, state, batch, **settings):
        self.updates.append((batch, settings))
        return State(state.params * 2), {"loss": float(len(self.updates)), "kl": 9.0}

    def sequence_logprobs(self, steps, params, batch, *, micro_rows, at_once):
        self.asked.append(params)
        self.at_once.append(at_once)
        return -np.float32(params) * batch.targets.astype(np.float32) / 100


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(learn, "update", found.update)
    monkeypatch.setattr(learn, "sequence_logprobs", found.sequence_logprobs)
    return found


def configured(*, mini_prompts=2, loss=None, **rl):
    sizes = {"prompts_per_step": 4, "mini_prompts": mini_prompts, "group_size": 2}
    return settings(rl=sizes | rl, loss=loss or {})


def learned(config, found=None, *, reference=4.0):
    return rl_update(
        None, State(1.0), reference, found or scored(), config, rate=0.1, where="here", timer=no_timer
    )


def by_target(batch, name: str) -> dict[int, float]:
    """Value of a field at each target that counts, by the target's id."""
    places = batch.token_weights != 0
    ids = batch.targets[places].tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, getattr(batch, name)[places].tolist(), strict=True))


def test_passes_for_logprobs_are_as_wide_as_the_settings_say(recorder):
    learned(settings(rl={"prompts_per_step": 4, "mini_prompts": 2}, batch={"logprobs_at_once": 3}))
    # Of two mini-batches, the reference's and the old ones each.
    assert recorder.at_once == [3] * 4


def test_each_mini_batch_has_its_own_token_mean(recorder):
    learned(configured())
    (first, _), (second, _) = recorder.updates
    assert by_target(first, "token_weights") == dict.fromkeys(range(20, 31), pytest.approx(1 / 11))
    assert by_target(second, "token_weights") == dict.fromkeys(range(31, 44), pytest.approx(1 / 13))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"aggregation": "seq-mean-token-mean"}, {20: 1 / 12, 23: 1 / 4, 24: 1 / 20, 29: 1 / 8}),
        ({"aggregation": "seq-mean-token-sum"}, {20: 1 / 4, 23: 1 / 4, 24: 1 / 4, 29: 1 / 4}),
        ({"aggregation": "seq-mean-token-sum-norm"}, {20: 1 / 64, 29: 1 / 64}),
        ({"aggregation": "seq-mean-token-sum-norm", "norm_constant": 10.0}, {20: 0.1, 29: 0.1}),
    ],
    ids=["token mean of sequences", "token sum", "over max_tokens", "over a constant"],
)
def test_aggregations_weigh_the_tokens_of_a_mini_batch(recorder, loss, expected):
    learned(configured(loss=loss))
    found = by_target(recorder.updates[0][0], "token_weights")
    assert {target: found[target] for target in expected} == pytest.approx(expected)


def test_micro_token_mean_gives_each_micro_batch_the_same_say(recorder):
    sizes = {"prompts_per_step": 4, "mini_prompts": 2, "group_size": 2, "layout": "separate"}
    config = settings(
        rl=sizes, loss={"aggregation": "micro-token-mean"}, batch={"row_tokens": 256, "micro_rows": 2}
    )
    learned(config)
    found = by_target(recorder.updates[0][0], "token_weights")
    # Rows, longest first: 5 and 3 targets in the first micro-batch, 2 and 1 in the second.
    assert found == {
        **dict.fromkeys(range(20, 23), pytest.approx(1 / 16)),
        23: pytest.approx(1 / 6),
        **dict.fromkeys(range(24, 29), pytest.approx(1 / 16)),
        **dict.fromkeys(range(29, 31), pytest.approx(1 / 6)),
    }
    assert sum(found.values()) == pytest.approx(1)


def test_every_token_carries_the_advantage_of_its_rollout(recorder):
    learned(configured())
    found = by_target(recorder.updates[0][0], "advantages")
    assert [found[t] for t in range(20, 31)] == [-3, -3, -3, -2, -1, -1, -1, -1, -1, 0, 0]
    assert set(by_target(recorder.updates[0][0], "rollout_logprobs").values()) == {-1.0}


def test_lost_groups_take_part_in_nothing(recorder):
    _, metrics = learned(configured(), scored(lost=(0,)))
    assert by_target(recorder.updates[0][0], "token_weights") == dict.fromkeys(
        range(24, 31), pytest.approx(1 / 7)
    )
    assert metrics["update/count"] == 2.0


def test_a_mini_batch_that_was_lost_whole_is_no_update(recorder):
    _, metrics = learned(configured(), scored(lost=(2, 3)))
    assert metrics["update/count"] == 1.0
    # What is left is a single update, whose ratio is 1.
    assert recorder.updates[0][1]["on_policy"] is True


def test_a_step_that_was_lost_whole_leaves_the_state(recorder):
    state, metrics = learned(configured(), scored(lost=(0, 1, 2, 3)))
    assert (state, recorder.updates, metrics["update/count"]) == (State(1.0), [], 0.0)
    assert metrics["batch/tokens"] == 0.0


@pytest.mark.parametrize(
    ("config", "num_updates", "on_policy"),
    [
        (configured(mini_prompts=4), 1, True),
        (configured(mini_prompts=2), 2, False),
        (configured(mini_prompts=4, updates_per_batch=2), 2, False),
        (configured(mini_prompts=4, loss={"importance": "token"}), 1, False),
    ],
    ids=["one", "two mini-batches", "two passes", "one with a correction of the sampler"],
)
def test_the_ratio_is_taken_as_one_only_with_a_single_uncorrected_update(
    recorder, config, num_updates, on_policy
):
    _, metrics = learned(config)
    assert [given["on_policy"] for _, given in recorder.updates] == [on_policy] * num_updates
    assert metrics["update/count"] == num_updates
    # The reference is asked once a mini-batch, the policy itself only off-policy.
    num_packs = 4 // config.rl.mini_prompts
    assert recorder.asked.count(4.0) == num_packs
    assert recorder.asked.count(1.0) == (0 if on_policy else num_packs)


def test_old_and_reference_log_probs_are_those_of_before_the_first_update(recorder):
    learned(configured(updates_per_batch=2))
    batches = [batch for batch, _ in recorder.updates]
    assert [min(by_target(batch, "advantages")) for batch in batches] == [20, 31, 20, 31]
    for batch in batches:
        for name, params in (("old_logprobs", 1.0), ("ref_logprobs", 4.0)):
            found = by_target(batch, name)
            assert found == pytest.approx({target: -params * target / 100 for target in found})


def test_without_a_reference_nothing_is_asked_of_it_and_no_kl_is_logged(recorder):
    _, metrics = learned(configured(loss={"kl_coef": 0.0}), reference=None)
    assert recorder.asked == [1.0, 1.0]
    assert "kl" not in metrics and metrics["loss"] == 1.5


def test_metrics_are_means_over_the_updates_and_the_rate_reaches_each(recorder):
    state, metrics = learned(configured(updates_per_batch=2))
    assert state == State(16.0)
    assert (metrics["loss"], metrics["kl"]) == (2.5, 9.0)
    assert metrics["batch/positions"] == sum(recorder.updates[i][0].tokens.size for i in (0, 1))
    for _, given in recorder.updates:
        assert (given["kind"], given["rate"], given["where"]) == ("rl", 0.1, "here")


LAYOUTS = ("shared_prefix", "packed", "separate")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_importance_weights_of_tokens_reach_the_batch(recorder, layout):
    learned(configured(layout=layout, loss={"importance": "token", "importance_cap": 1.9}))
    # The trainer's log p of target n is -n/100, the sampler's -1.
    for batch, _ in recorder.updates:
        found = by_target(batch, "importance_weights")
        assert found == pytest.approx({n: min(1.9, np.exp(1 - n / 100)) for n in found})
        assert np.all(batch.importance_weights[batch.token_weights == 0] == 1.0)
    assert by_target(recorder.updates[0][0], "importance_weights")[20] == pytest.approx(1.9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_importance_weights_of_sequences_reach_the_batch(recorder, layout):
    loss = {"importance": "sequence", "importance_cap": 5.0}
    learned(configured(layout=layout, loss=loss))
    found = by_target(recorder.updates[0][0], "importance_weights")
    sequences = ((20, 21, 22), (23,), (24, 25, 26, 27, 28), (29, 30))
    expected = {n: min(5.0, np.exp(sum(1 - m / 100 for m in whole))) for whole in sequences for n in whole}
    assert sorted(set(expected.values()))[:3] == pytest.approx([np.exp(0.77), np.exp(1.41), 5.0])
    assert found == pytest.approx(expected)


def test_supervised_examples_weigh_every_completion_token_alike(recorder):
    examples = [((1, 2, 3), (20, 21, 22)), ((4,), (23,)), ((5, 6), (24, 25))]
    state, metrics = sft_update(
        None, State(1.0), examples, settings(), rate=0.3, where="cold", timer=no_timer
    )
    ((batch, given),) = recorder.updates
    assert by_target(batch, "token_weights") == dict.fromkeys(range(20, 26), pytest.approx(1 / 6))
    assert (given["kind"], given["rate"], state) == ("sft", 0.3, State(2.0))
    assert metrics["batch/tokens"] == 5 + 1 + 3


TINY = ModelConfig(
    architecture="qwen3",
    vocab_size=1920,
    embed_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=1e4,
    tie_embeddings=True,
    max_positions=256,
)


@pytest.fixture(scope="module")
def steps():
    config = settings()
    # Most of the time of these tests is compilation.
    jax.config.update("jax_disable_most_optimizations", True)
    yield make_steps(
        TINY,
        Compute(),
        make_mesh({"data": 1, "fsdp": 1, "tp": 1}, jax.devices()),
        # Near 0 a gradient of last bits would decide the sign of a whole step.
        optim=Optim(lr=0.01, eps=1e-4),
        loss=config.loss,
        temperature=1.0,
        logits_budget_mib=64,
    )
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def drawn(seed: int):
    return jax.device_get(jax.jit(functools.partial(init_params, TINY))(jax.random.key(seed)))


def policy(seed: int = 0):
    """Weights of their own for each call, since an update donates them."""
    return jax.tree.map(jnp.array, drawn(seed))


def answered():
    """Two prompts with their groups as an engine gives them."""
    samples = [sample(n, gold={"joy": 1.0}) for n in range(2)]
    rows = (("joy", "fear"), ("anger", "joy"))
    groups = [
        group(f"1:{n}", [text([(label, 1.0)], reply=f"Row {label} row.") for label in row])
        for n, row in enumerate(rows)
    ]
    return samples, [prompt(3), prompt(5)], groups


@functools.cache
def scorer():
    return make_scorer(settings())


def trained(steps, config, groups):
    samples, prompts, _ = answered()
    found = score_groups(
        samples,
        prompts,
        groups,
        codec(),
        scorer(),
        config,
        num_classes=8,
        step=1,
        total_steps=2,
    )
    return rl_update(
        steps, steps.init_state(policy()), policy(1), found, config, rate=0.01, where="1", timer=no_timer
    )


SMALL = {"prompts_per_step": 2, "mini_prompts": 1, "group_size": 2, "updates_per_batch": 2}


def test_replayed_groups_give_the_same_update_to_the_last_bit(steps, tmp_path):
    config = settings(rl=SMALL)
    _, prompts, groups = answered()
    requests = [
        Request(id=g.request_id, token_ids=p.token_ids, num=2, seed=0)
        for g, p in zip(groups, prompts, strict=True)
    ]
    save_groups(tmp_path, 1, requests, groups)
    state, metrics = trained(steps, config, groups)
    again, metrics_again = trained(steps, config, load_groups(step_file(tmp_path, 1, "npz"))[1])
    assert metrics == metrics_again and metrics["update/count"] == 4.0
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert np.array_equal(one, other)
    moved = [
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(policy()), strict=True)
    ]
    assert min(moved) > 0


def test_the_shortcut_of_a_single_update_is_the_update_with_computed_old_log_probs(steps, monkeypatch):
    config = settings(rl=SMALL | {"mini_prompts": 2, "updates_per_batch": 1})
    groups = answered()[2]
    short, metrics = trained(steps, config, groups)
    real = learn.update
    found = []

    def forced(steps, state, batch, **given):
        assert given.pop("on_policy") is True
        old = sequence_logprobs(steps, state.params, batch, micro_rows=given["micro_rows"])
        found.append(old)
        batch = learn.replace(batch, old_logprobs=old)
        return real(steps, state, batch, on_policy=False, **given)

    monkeypatch.setattr(learn, "update", forced)
    full, metrics_full = trained(steps, config, groups)
    assert len(found) == 1 and metrics_full == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for one, other in zip(jax.tree.leaves(short.params), jax.tree.leaves(full.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)

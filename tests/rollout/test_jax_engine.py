"""The JAX engine against the trainer and transformers, and the promises of its contract."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from selfemo_jax.model.decoder import Compute, forward, logits
from selfemo_jax.model.hf_convert import save_hf
from selfemo_jax.model.sharding import make_mesh, param_shardings
from selfemo_jax.rollout.decode import weight_shardings
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine
from tests.rollout.common import (
    POLICY,
    make_engine,
    make_requests,
    pointers,
    prompts,
    run,
    sharp_weights,
    tokens_of,
    trainer_logprobs,
)


def test_greedy_tokens_and_logprobs_equal_those_of_transformers_and_of_the_trainer(tmp_path):
    params = sharp_weights()
    save_hf(params, POLICY, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    requests = make_requests()
    ours = run(make_engine(params), requests, temperature=0.0)
    longest = max(map(len, prompts()))
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts()]),
            attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts()]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    for request, row in zip(requests, out, strict=True):
        assert tokens_of(ours)[request.id] == [tuple(row[longest:].tolist())] * 2
    # Repetition of one token would hide a wrong position or a wrong cache.
    assert all(len(set(row[longest:].tolist())) > 5 for row in out)
    check_logprobs(params, requests, ours, temperature=1.0)


def test_prompts_that_grow_with_a_dialogue_share_their_rows_and_change_no_token():
    params = sharp_weights()
    rng = np.random.default_rng(3)

    def draw(length):
        return tuple(int(token) for token in rng.integers(0, POLICY.vocab_size, length))

    requests = []
    for dialogue in range(3):
        history = draw(4)
        for turn in range(5):
            history += draw(3 + (turn * dialogue) % 4)
            ids = history + draw(1 + turn % 3)
            requests.append(Request(id=f"{dialogue}.{turn}", token_ids=ids, num=1 + turn % 2, seed=turn))
    requests.append(Request(id="alone", token_ids=draw(1), num=2, seed=9))
    plain = run(make_engine(params), requests, temperature=0.8)
    for options in ({}, {"unroll": False, "max_rows": 6, "prompt_multiple": 16, "prefill_tokens": 96}):
        shared = run(make_engine(params, share_prompts=True, **options), requests, temperature=0.8)
        assert tokens_of(shared) == tokens_of(plain)
        check_logprobs(params, requests, shared, temperature=0.8)


def check_logprobs(params, requests, answers, *, temperature: float):
    pairs = [(request.token_ids, c.token_ids) for request in requests for c in answers[request.id]]
    found = [c.logprobs for request in requests for c in answers[request.id]]
    expected = trainer_logprobs(params, pairs, temperature=temperature)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_a_frequency_penalty_chooses_by_logits_less_what_was_said_and_reports_them_whole():
    params = sharp_weights()
    requests, penalty = make_requests(), 1.5
    options = {"max_rows": 4, "completion_bucket": 12, "chunk": 5}
    plain = run(make_engine(params), requests, temperature=0.0)
    found = run(make_engine(params, **options), requests, temperature=0.0, frequency_penalty=penalty)
    assert tokens_of(found) != tokens_of(plain)
    for request in requests:
        for completion in found[request.id]:
            start, ids = len(request.token_ids), (*request.token_ids, *completion.token_ids)
            scores = whole_logits(params, ids)[start - 1 : -1]
            counts = np.zeros(POLICY.vocab_size)
            for row, token in zip(scores, completion.token_ids, strict=True):
                less = row - penalty * counts
                assert less[token] > less.max() - 1e-4
                counts[token] += 1
    check_logprobs(params, requests, found, temperature=1.0)


def whole_logits(params, ids):
    tokens = jnp.array([ids], jnp.int32)
    places = {"positions": jnp.arange(len(ids))[None], "segment_ids": jnp.zeros_like(tokens)}
    hidden = forward(params, POLICY, Compute(), tokens=tokens, prefix_ids=jnp.full_like(tokens, -1), **places)
    return np.asarray(logits(params, POLICY, Compute(), hidden))[0]


@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        (1.0, {}),
        # Looped layers, a row that moves, waves with refills, and columns that grow within a chunk's length.
        (0.7, {"unroll": False, "max_rows": 4, "completion_bucket": 12, "chunk": 5}),
    ],
)
def test_logprobs_equal_the_trainers(temperature, options):
    params = sharp_weights()
    requests = make_requests()
    answers = run(make_engine(params, **options), requests, temperature=temperature, stop_ids=(3, 7, 9))
    assert len({len(c.token_ids) for group in answers.values() for c in group}) > 3
    check_logprobs(params, requests, answers, temperature=temperature)


def test_a_completion_ends_with_its_stop_token_and_says_so():
    requests = make_requests()
    free = run(make_engine(), requests)
    counts = Counter(token for group in free.values() for c in group for token in c.token_ids[2:20])
    stops = tuple(token for token, _ in counts.most_common(2))
    stopped = run(make_engine(), requests, stop_ids=stops)
    reasons = Counter()
    for name, group in stopped.items():
        for completion, whole in zip(group, free[name], strict=True):
            ends = [i for i, token in enumerate(whole.token_ids) if token in stops]
            expected = whole.token_ids[: ends[0] + 1] if ends else whole.token_ids
            assert completion.token_ids == expected
            assert completion.finish_reason == ("stop" if ends else "length")
            reasons[completion.finish_reason] += 1
    assert reasons["stop"] > 3 and reasons["length"] > 0
    assert {c.finish_reason for group in free.values() for c in group} == {"length"}


def test_tokens_depend_on_seed_and_rollout_and_not_on_the_batch():
    requests = make_requests()
    together = tokens_of(run(make_engine(), requests))
    assert tokens_of(run(make_engine(), requests)) == together
    assert tokens_of(run(make_engine(), requests[1:2])) == {"r1": together["r1"]}
    # Waves and other chunks and buckets; the last request is then not among the first rows.
    waves = make_engine(max_rows=4, chunk=5, completion_bucket=12)
    assert tokens_of(run(waves, requests[::-1])) == together
    rollouts = [completion for group in together.values() for completion in group]
    assert len(set(rollouts)) == len(rollouts)
    for bits in (0, 35):
        other = [dataclasses.replace(request, seed=request.seed ^ (1 << bits)) for request in requests]
        changed = tokens_of(run(make_engine(), other))
        assert all(changed[name] != together[name] for name in together)


def test_a_larger_group_keeps_the_rollouts_of_the_smaller_one():
    (request,) = make_requests((9,), num=2)
    small = tokens_of(run(make_engine(max_rows=4), [request]))["r0"]
    # Eleven rollouts in four rows: three prefills of one request.
    large = run(make_engine(max_rows=4), [dataclasses.replace(request, num=11)])
    assert tokens_of(large)["r0"][:2] == small
    assert len(set(tokens_of(large)["r0"])) == 11


def test_sampling_frequencies_are_those_of_the_softmax():
    params, prompt, temperature = sharp_weights(), prompts()[0], 1.5
    num, vocab = 4096, POLICY.vocab_size
    answers = run(
        make_engine(params, max_rows=1024),
        [Request(id="a", token_ids=prompt, num=num, seed=5)],
        max_tokens=1,
        temperature=temperature,
    )
    drawn = np.bincount([c.token_ids[0] for c in answers["a"]], minlength=vocab)
    pairs = [(prompt, [token]) for token in range(vocab)]
    expected = num * np.exp(np.concatenate(trainer_logprobs(params, pairs, temperature=temperature)))
    assert np.isclose(expected.sum(), num)
    likely = expected >= 5
    observed = np.append(drawn[likely], drawn[~likely].sum())
    hoped = np.append(expected[likely], expected[~likely].sum())
    chi_square = ((observed - hoped) ** 2 / hoped).sum()
    freedom = len(hoped) - 1
    assert freedom > 10
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_top_k_restricts_the_draw_and_not_the_logprobs():
    requests = make_requests()
    engine = make_engine()
    greedy = run(engine, requests, temperature=0.0)
    answers = run(engine, requests, top_k=1)
    assert tokens_of(answers) == tokens_of(greedy)
    for name in answers:
        np.testing.assert_allclose(answers[name][0].logprobs, greedy[name][0].logprobs, atol=1e-5)
    assert min(min(c.logprobs) for c in answers["r1"]) < -0.05


def test_the_engine_survives_the_donation_of_the_arrays_it_was_given():
    params = sharp_weights()
    engine = make_engine(params)
    assert not pointers(engine._weights) & pointers(params)
    before = tokens_of(run(engine, make_requests()))
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert tokens_of(run(engine, make_requests())) == before


def test_bfloat16_keeps_the_head_in_float32_and_stays_near():
    engine = make_engine(compute=Compute(dtype="bfloat16"))
    assert engine._weights["head"].dtype == "float32"
    assert engine._weights["stacks"][0]["gate"].dtype == "bfloat16"
    requests = make_requests()
    answers = run(engine, requests)
    pairs = [(request.token_ids, c.token_ids) for request in requests for c in answers[request.id]]
    expected = np.concatenate(trainer_logprobs(sharp_weights(), pairs, temperature=1.0))
    found = np.concatenate([c.logprobs for request in requests for c in answers[request.id]])
    assert 0 < np.abs(found - expected).mean() < 0.1


def test_rows_that_a_new_policy_finishes_name_both_versions():
    engine = make_engine()
    decode = engine._decode

    def update_after_the_chunk(board, sampling):
        finished = decode(board, sampling)
        engine.update_policy(sharp_weights(seed=9), version=2)
        return finished

    (old, new) = make_requests(), make_requests()
    assert {c.policy_versions for group in run(engine, old).values() for c in group} == {(1,)}
    engine._decode = update_after_the_chunk
    assert {c.policy_versions for group in run(engine, new).values() for c in group} == {(1, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": ()}, "empty"),
        ({"token_ids": (1, POLICY.vocab_size)}, "outside the vocabulary of 96"),
        ({"token_ids": (-1,)}, "token -1 is outside"),
        ({"token_ids": (1,) * POLICY.max_positions}, "shorten the prompt to 4072"),
        ({"num": 0}, "num is 0"),
        ({"seed": 2**64}, "seed"),
        ({"id": "r0"}, "occurs twice"),
    ],
)
def test_a_bad_request_is_refused_by_its_id_before_anything_is_sampled(changes, message):
    engine = make_engine()
    bad = dataclasses.replace(Request(id="bad one", token_ids=(1, 2), num=1, seed=0), **changes)
    with pytest.raises(ValueError, match=message) as error:
        engine.generate([*make_requests((4,)), bad], Sampling(max_tokens=24, stop_ids=()))
    assert repr(bad.id) in str(error.value)
    assert engine.stats().num_tokens == 0


def test_an_engine_without_a_policy_or_closed_says_so():
    engine = JaxEngine(POLICY, Compute())
    with pytest.raises(ValueError, match="update_policy first"):
        engine.generate(make_requests(), Sampling(max_tokens=2, stop_ids=()))
    engine.update_policy(sharp_weights(), version=0)
    assert list(engine.generate([], Sampling(max_tokens=2, stop_ids=()))) == []
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.generate(make_requests(), Sampling(max_tokens=2, stop_ids=()))
    with pytest.raises(ValueError, match="closed"):
        engine.update_policy(sharp_weights(), version=1)


@pytest.mark.parametrize(
    "field",
    [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"frequency_penalty": 3.0}],
)
def test_impossible_sampling_settings_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Sampling(**({"max_tokens": 4, "stop_ids": ()} | field))


@pytest.mark.parametrize(
    ("axes", "decode_layout"),
    [
        ({"data": 2, "fsdp": 2, "tp": 2}, "replicate"),
        ({"fsdp": 4, "tp": 2}, "shard"),
    ],
)
def test_a_mesh_gives_the_greedy_tokens_of_one_device(axes, decode_layout):
    params = sharp_weights(seed=3)
    requests = make_requests((5, 70, 1, 33, 18), num=3)

    def sampled(mesh, params, layout):
        engine = JaxEngine(POLICY, Compute(), mesh, max_rows=16, decode_layout=layout)
        engine.update_policy(params, version=0)
        return engine, run(engine, requests, temperature=0.0, max_tokens=12, stop_ids=(5, 6, 7, 8))

    _, expected = sampled(None, params, "replicate")
    mesh = make_mesh(axes)
    sharded = jax.device_put(params, param_shardings(POLICY, mesh))
    engine, answers = sampled(mesh, sharded, decode_layout)
    assert tokens_of(answers) == tokens_of(expected)
    for name in expected:
        for ours, theirs in zip(answers[name], expected[name], strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    gate = engine._weights["stacks"][0]["gate"]
    assert gate.addressable_shards[0].data.size * axes["tp"] == gate.size or decode_layout == "shard"
    caches, _ = engine._programs.empty(slots=8, width=1, prompt_length=8, length=8)
    assert caches[0][0].addressable_shards[0].data.size * 8 == caches[0][0].size


def test_two_devices_of_tp_sample_the_tokens_of_one():
    requests = make_requests((5, 33, 18), num=3)

    def sampled(mesh):
        engine = JaxEngine(POLICY, Compute(), mesh, max_rows=16)
        engine.update_policy(sharp_weights(seed=3), version=0)
        return run(engine, requests, temperature=0.9, max_tokens=12)

    one, two = sampled(None), sampled(make_mesh({"tp": 2}))
    assert len(set(tokens_of(one)["r0"])) == 3, "rollouts that are all alike would prove little"
    assert tokens_of(two) == tokens_of(one)


def test_only_the_sharded_decode_layout_splits_weights_over_fsdp():
    config = dataclasses.replace(POLICY, mlp_dim=1024)
    mesh = make_mesh({"fsdp": 4, "tp": 2})
    for shard, ways in ((True, 8), (False, 2)):
        placed = weight_shardings(config, Compute(), mesh, unroll=True, shard=shard)
        for name, shape in (("gate", (1, 32, 1024)), ("down", (1, 1024, 32))):
            local = placed["stacks"][0][name].shard_shape(shape)
            assert np.prod(local) * ways == np.prod(shape)

"""What the engine must not pay for: finished rows, repeated prefills, compilation of shapes it has seen."""

import dataclasses
import re
import time

import jax
import numpy as np
import pytest

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, init_params
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine
from tests.rollout.common import make_engine, make_requests, run

COUNTER = ModelConfig(
    architecture="qwen3",
    vocab_size=512,
    embed_dim=256,
    mlp_dim=768,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=1e4,
    max_positions=512,
)
STOP = 511


def counting_policy():
    """Weights under which the token after t is t + 1, so that a prompt's last token decides how long its
    completion is: the layers add nothing and the head looks up the successor."""
    params = init_params(COUNTER, jax.random.key(0))
    codes = np.random.default_rng(0).choice([-1.0, 1.0], size=(COUNTER.vocab_size, COUNTER.embed_dim))
    params["embed"] = codes.astype(np.float32)
    params["head"] = np.roll(codes, 1, axis=0).T.astype(np.float32)
    for name in ("o", "down"):
        params["layers"][name] = params["layers"][name] * 0
    return params


def counting_requests(num_long: int, num_short: int) -> list[Request]:
    """Groups of 8 whose rollouts stop at token 120 or at token 5."""
    long = [Request(id=f"long{i}", token_ids=(1, STOP - 120), num=8, seed=i) for i in range(num_long)]
    short = [Request(id=f"short{i}", token_ids=(1, STOP - 5), num=8, seed=i) for i in range(num_short)]
    return long + short


def test_finished_rows_are_not_paid_for():
    engine = JaxEngine(COUNTER, Compute(), max_rows=64)
    engine.update_policy(counting_policy(), version=0)
    sampling = Sampling(max_tokens=128, temperature=0.0, stop_ids=(STOP,))

    def seconds(requests):
        before, began = engine.stats(), time.perf_counter()
        groups = list(engine.generate(requests, sampling))
        took = time.perf_counter() - began
        expected = {request.id: 120 if "long" in request.id else 5 for request in requests}
        for group in groups:
            assert {len(c.token_ids) for c in group.completions} == {expected[group.request_id]}
        return took, engine.stats().num_row_steps - before.num_row_steps

    mixed, alone = counting_requests(1, 7), counting_requests(1, 0)
    seconds(mixed), seconds(alone)
    # Interleaved, and the best of several: other processes only ever add time.
    pairs = [(seconds(mixed), seconds(alone)) for _ in range(7)]
    assert pairs[0][1][1] == 8 * 120
    assert pairs[0][0][1] == 64 * 5 + 8 * 115
    assert min(m[0] for m, _ in pairs) <= 1.5 * min(a[0] for _, a in pairs)


def test_rows_of_many_prompts_are_compacted_too():
    engine = JaxEngine(COUNTER, Compute(), max_rows=64)
    engine.update_policy(counting_policy(), version=0)
    sampling = Sampling(max_tokens=128, temperature=0.0, stop_ids=(STOP,))
    requests = [
        Request(id=f"{i}", token_ids=(1, STOP - (120 if i < 8 else 5)), num=1, seed=i) for i in range(64)
    ]
    assert len(list(engine.generate(requests, sampling))) == 64
    assert engine.stats().num_row_steps == 64 * 5 + 8 * 115


def test_waiting_prompts_take_the_places_of_finished_rows():
    engine = JaxEngine(COUNTER, Compute(), max_rows=16)
    engine.update_policy(counting_policy(), version=0)
    sampling = Sampling(max_tokens=128, temperature=0.0, stop_ids=(STOP,))
    groups = [group.request_id for group in engine.generate(counting_requests(1, 6), sampling)]
    assert sorted(groups) == sorted(r.id for r in counting_requests(1, 6))
    # The short groups pass beside the long one, not after it.
    assert groups[-1] == "long0"
    assert engine.stats().num_row_steps < 120 * 16


def test_a_second_call_with_other_lengths_in_the_same_buckets_compiles_nothing():
    engine = make_engine(max_rows=16)
    run(engine, make_requests((50, 61, 17, 30), num=2), max_tokens=40)
    before = engine.stats().num_compilations, engine._programs.num_compiled()
    run(engine, make_requests((64, 3, 40, 9), num=2, seed=1), max_tokens=40)
    after = engine.stats().num_compilations, engine._programs.num_compiled()
    assert before == after
    assert before[0] > 0
    run(engine, make_requests((65, 100, 40, 9), num=2, seed=1), max_tokens=40)
    assert engine.stats().num_compilations > before[0]


def test_stats_add_up_and_each_prompt_is_prefilled_once_per_group():
    engine = make_engine()
    requests = make_requests(num=2)
    answers = run(engine, requests)
    stats = engine.stats()
    assert stats.num_tokens == sum(len(c.token_ids) for group in answers.values() for c in group)
    assert stats.num_prompt_tokens == sum(len(request.token_ids) - 1 for request in requests)
    assert stats.num_row_steps == 16 * 24
    assert 0 < stats.prefill_seconds <= stats.seconds
    assert (stats.num_compilations > 0) == (stats.compile_seconds > 0)


def compiled_step(engine: JaxEngine, *, slots: int = 4, width: int = 2):
    """The decode step of slots x width rows, and the shapes of its caches: given, and by row in its loop."""
    columns, chunk = 40, 4
    prompts, caches = engine._programs.empty(slots=slots, width=width, prompt_length=24, length=columns)
    rows = {name: np.zeros((slots, width), np.int32) for name in ("token", "count")}
    rows |= {"live": np.ones((slots, width), bool), "prompt_length": np.zeros(slots, np.int32)}
    numbers = {name: np.int32(1) for name in ("column", "limit", "stop_at", "max_tokens")}
    compiled = engine._programs.decode.lower(
        engine._weights,
        prompts,
        caches,
        rows,
        np.zeros((slots * width, chunk, 2), np.float32),
        numbers | {"stop_ids": np.zeros(8, np.int32)},
        chunk=chunk,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        frequency_penalty=0.0,
    ).compile()
    by_row = {(*x.shape[:-5], slots * width, *x.shape[-3:]) for x in jax.tree.leaves(caches)}
    return compiled.as_text(), by_row | {x.shape for x in jax.tree.leaves((prompts, caches))}


@pytest.mark.parametrize(("slots", "width"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("unroll", [True, False])
def test_no_step_copies_a_whole_cache(unroll, slots, width):
    text, caches = compiled_step(make_engine(unroll=unroll), slots=slots, width=width)
    shapes = {f"= f32[{','.join(map(str, shape))}]" for shape in caches}
    # What a call copies once, before its loop, is not of a step.
    text, entry = text.split("\nENTRY")
    once = tuple(re.findall(r"calls=(%[\w.]+)", entry))
    bodies = [part for part in text.split("\n\n") if not part.startswith(once)]
    lines = [line for part in bodies for line in part.splitlines() if any(shape in line for shape in shapes)]
    assert lines
    assert [line for line in lines if " copy(" in line] == []


@pytest.mark.parametrize(("unroll", "widened"), [(None, False), (False, True)])
def test_a_deep_model_on_a_cpu_reads_its_bfloat16_weights_as_they_are(unroll, widened):
    deep = dataclasses.replace(COUNTER, num_layers=12)
    engine = JaxEngine(deep, Compute(product="bfloat16"), unroll=unroll)
    engine.update_policy(init_params(deep, jax.random.key(0)), version=0)
    text, _ = compiled_step(engine)
    assert f"bf16[{deep.embed_dim},{deep.mlp_dim}]" in text
    assert (f"f32[12,{deep.embed_dim},{deep.mlp_dim}]" in text) == widened

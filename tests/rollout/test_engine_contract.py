"""What every engine promises, held by the JAX engine, the client over the fake, and the client over vLLM."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine
from selfemo_jax.rollout.publish import served_config
from selfemo_jax.rollout.supervisor import sidecar_python, start_sidecar
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.settings.rollout import Rollout, Sidecar
from tests.rollout.common import make_requests, run
from tests.rollout.served import SERVED, fake_engine, nudged, over, sharp

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 7, 140, 33)
"""One of a single token, one longer than a block of the cache of prompts."""


def vllm_engine(folder: Path):
    try:
        python = sidecar_python(str(ROOT / ".venv-vllm"))
    except ValueError as error:
        pytest.skip(f"no vLLM: {error}")
    model_folder, root = folder / "model", folder / "weights"
    model_folder.mkdir(parents=True)
    (model_folder / "config.json").write_text(json.dumps(served_config(SERVED, dtype="float32")))
    for file in bundled_tokenizer().iterdir():
        if file.is_file():
            (model_folder / file.name).write_bytes(file.read_bytes())
    sidecar = Sidecar(environment=str(python), dtype="float32", start_timeout=400.0)
    settings = Rollout(engine="vllm", max_rows=16, sidecar=sidecar)

    def start():
        return start_sidecar(
            sidecar, model_folder=model_folder, run_dir=folder, weights_root=root, max_model_len=448
        )

    return over(start, SERVED, settings, root)


@pytest.fixture(scope="module")
def params():
    return sharp(SERVED)


@pytest.fixture(
    scope="module",
    params=["jax", "fake", pytest.param("vllm", marks=[pytest.mark.vllm])],
)
def engine(request, tmp_path_factory, params):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fake":
        with fake_engine(folder) as (found, _):
            found.update_policy(params, version=3)
            yield found
        return
    found = JaxEngine(SERVED, Compute(), max_rows=16) if request.param == "jax" else vllm_engine(folder)
    try:
        found.update_policy(params, version=3)
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers_for_every_prompt_and_group(engine, params, temperature):
    requests = make_requests(LENGTHS, num=3)
    # Asked twice: the second time prompts may come from a cache.
    for _ in range(2):
        groups = run(engine, requests, temperature=temperature, max_tokens=12)
        assert {found.policy_versions for group in groups.values() for found in group} == {(3,)}
        assert_trainers(params, requests, groups, temperature=temperature)


def assert_trainers(params, requests, groups, *, temperature):
    score = TrainerLogprobs(SERVED, Compute(), make_mesh({}))
    pairs = [(request, found) for request in requests for found in groups[request.id]]
    expected = score(
        params,
        [(*request.token_ids, *found.token_ids) for request, found in pairs],
        starts=[len(request.token_ids) for request, _ in pairs],
        temperature=temperature,
    )
    for (request, found), values in zip(pairs, expected, strict=True):
        np.testing.assert_allclose(found.logprobs, values, rtol=0, atol=1e-4, err_msg=request.id)


def test_a_completion_ends_with_the_first_stop_token_or_at_the_limit(engine):
    reasons = Counter()
    for group in run(engine, make_requests(LENGTHS, num=6), stop_ids=(3, 11, 40), max_tokens=8).values():
        for found in group:
            reasons[found.finish_reason] += 1
            stops = [token in (3, 11, 40) for token in found.token_ids]
            if found.finish_reason == "stop":
                assert stops[-1] and not any(stops[:-1])
            else:
                assert len(found.token_ids) == 8 and not any(stops)
            assert len(found.logprobs) == len(found.token_ids)
    assert reasons["stop"] and reasons["length"]


def test_no_token_stops_a_completion_unless_it_is_asked_to(engine):
    groups = run(engine, make_requests((5, 9), num=8), stop_ids=(), max_tokens=10)
    assert {len(found.token_ids) for group in groups.values() for found in group} == {10}


def test_greedy_takes_the_likeliest_token_and_reports_the_plain_softmax(engine, params):
    requests = make_requests(LENGTHS, num=1)
    groups = run(engine, requests, temperature=0.0, max_tokens=6)
    assert run(engine, requests, temperature=0.0, max_tokens=6) == groups
    assert_trainers(params, requests, groups, temperature=1.0)
    score = TrainerLogprobs(SERVED, Compute(), make_mesh({}))
    for request in requests:
        (found,) = groups[request.id]
        every = score(
            params,
            [(*request.token_ids, token) for token in range(SERVED.vocab_size)],
            starts=[len(request.token_ids)] * SERVED.vocab_size,
        )
        assert int(np.argmax([float(value[0]) for value in every])) == found.token_ids[0]


def test_the_seed_decides_the_samples_of_a_group_and_they_differ_inside_it(engine):
    (request,) = make_requests((7,), num=6)
    first = run(engine, [request], max_tokens=12)[request.id]
    assert run(engine, [request], max_tokens=12)[request.id] == first
    assert len({found.token_ids for found in first}) == 6
    other = dataclasses.replace(request, seed=request.seed + 12345)
    assert run(engine, [other], max_tokens=12)[request.id] != first


def test_more_prompts_than_fit_into_one_step_of_a_server_are_all_answered(engine):
    # vLLM's engine for the CPU ended at the first seeded prompt that was prefilled in pieces.
    requests = make_requests((300,) * 8, num=8)
    groups = run(engine, requests, max_tokens=3)
    assert sum(len(group) for group in groups.values()) == 64


def test_tokens_are_drawn_as_often_as_the_policy_says(engine, params):
    prompt = (5, 17, 60)
    requests = [Request(id=f"r{i}", token_ids=prompt, num=16, seed=999_331 * i) for i in range(32)]
    groups = run(engine, requests, max_tokens=1)
    counts = Counter(found.token_ids[0] for group in groups.values() for found in group)
    score = TrainerLogprobs(SERVED, Compute(), make_mesh({}))
    every = score(
        params, [(*prompt, token) for token in range(SERVED.vocab_size)], starts=[3] * SERVED.vocab_size
    )
    probabilities = np.exp([float(value[0]) for value in every])
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-4)
    found = np.array([counts[token] for token in range(SERVED.vocab_size)]) / 512
    spread = 0.5 * np.sqrt(2 / np.pi) * np.sum(np.sqrt(probabilities * (1 - probabilities) / 512))
    assert 0.5 * np.abs(found - probabilities).sum() < 1.6 * spread


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": ()}, "the prompt is empty"),
        ({"num": 0}, "num is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"token_ids": (1, 96)}, "token 96 is outside the vocabulary of 96"),
        ({"token_ids": (1,) * 445}, "shorten the prompt to 444"),
    ],
    ids=["empty", "num", "seed", "vocabulary", "long"],
)
def test_a_request_that_cannot_be_served_is_refused_before_any_is(engine, changes, words):
    good, bad = make_requests((5, 6))
    with pytest.raises(ValueError, match=words):
        engine.generate([good, dataclasses.replace(bad, **changes)], Sampling(max_tokens=4, stop_ids=()))


def test_two_requests_of_one_name_are_refused_and_no_request_gives_no_group(engine):
    (request,) = make_requests((5,))
    with pytest.raises(ValueError, match="occurs twice"):
        engine.generate([request, request], Sampling(max_tokens=4, stop_ids=()))
    assert list(engine.generate([], Sampling(max_tokens=4, stop_ids=()))) == []


def test_a_new_policy_is_sampled_from_at_once(engine, params):
    requests = make_requests(LENGTHS, num=1)
    before = run(engine, requests, temperature=0.0)
    newer = nudged(params, size=3e-2)
    try:
        engine.update_policy(newer, version=4)
        after = run(engine, requests, temperature=0.0)
        assert {group[0].policy_versions for group in after.values()} == {(4,)}
        assert [g[0].logprobs for g in after.values()] != [g[0].logprobs for g in before.values()]
        assert_trainers(newer, requests, after, temperature=1.0)
    finally:
        engine.update_policy(params, version=3)
    assert run(engine, requests, temperature=0.0) == before

"""A policy as its own expert: its template, its weights' digest, what it cannot read."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from selfemo_jax.data.prompts import TextCodec
from selfemo_jax.experts.ask import ChatSampling, Question, question_key
from selfemo_jax.experts.panel import Panel
from selfemo_jax.experts.policy import PolicyExpert, params_digest
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh, param_shardings
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine
from selfemo_jax.settings.experts import Endpoint, Expert
from tests.fabricated import codec
from tests.model.tiny import TINY, weights

MODEL = dataclasses.replace(TINY, vocab_size=-(-codec().vocab_size // 128) * 128)
MINE = Endpoint(name="mine", kind="policy")
GREEDY = ChatSampling(temperature=0.0, top_p=1.0, max_tokens=12)
QUESTIONS = [
    Question(id=f"q{n}", system="You help.", user=f"Say{' more' * n} </think><|im_end|>") for n in range(3)
]


def expert(params, *, sampling=GREEDY, max_prompt=200) -> PolicyExpert:
    engine = JaxEngine(MODEL, Compute(), None, max_rows=4)
    return PolicyExpert(MINE, sampling, engine, codec(), params, thinking=False, max_prompt=max_prompt)


def written_out(question: Question, text: TextCodec) -> list[int]:
    """The ids of the chat, put together by the tokenizer's own template around harmless words."""
    messages = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "USR"}]
    shown = text.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, rest = shown.split("SYS")
    between, after = rest.split("USR")
    ids = text.encode_markup(before) + text.encode_data(question.system)
    return ids + text.encode_markup(between) + text.encode_data(question.user) + text.encode_markup(after)


def test_it_answers_what_the_engine_says_to_the_chat():
    params = weights(MODEL, seed=3)
    mine = expert(params)
    answers = {question.id: answer for question, answer in mine.ask(QUESTIONS, lambda: False)}
    engine = JaxEngine(MODEL, Compute(), None, max_rows=4)
    engine.update_policy(params, version=1)
    asked = [Request(id=q.id, token_ids=tuple(written_out(q, codec())), num=1, seed=0) for q in QUESTIONS]
    sampling = Sampling(max_tokens=12, temperature=0.0, stop_ids=codec().stop_ids)
    for group in engine.generate(asked, sampling):
        said, answer = group.completions[0], answers[group.request_id]
        ids = said.token_ids[:-1] if said.finish_reason == "stop" else said.token_ids
        assert answer.text == codec().decode(ids).encode("utf-8", "replace").decode()
        assert answer.finish_reason == said.finish_reason and answer.source == "mine"
        assert answer.usage.completion_tokens == len(said.token_ids)
    for question in QUESTIONS:
        assert answers[question.id].usage.prompt_tokens == len(written_out(question, codec()))
        assert answers[question.id].key == question_key(mine.model, question, GREEDY)


def test_sampled_answers_repeat_and_a_second_try_differs():
    params = weights(MODEL, seed=3)
    warm = dataclasses.replace(GREEDY, temperature=1.0)
    first, second = (
        [answer.text for _, answer in expert(params, sampling=warm).ask(QUESTIONS, lambda: False)]
        for _ in range(2)
    )
    again = [q.again() for q in QUESTIONS]
    assert first == second
    assert first != [a.text for _, a in expert(params, sampling=warm).ask(again, lambda: False)]


def test_a_chat_that_does_not_fit_is_refused_and_the_others_answered():
    long = dataclasses.replace(QUESTIONS[0], user="word " * 300)
    found = dict(expert(weights(MODEL, seed=3)).ask([long, QUESTIONS[1]], lambda: False))
    assert "tokens, the policy reads 200" in found[long].refused and found[QUESTIONS[1]].refused is None


def test_nothing_is_asked_after_a_stop():
    assert not list(expert(weights(MODEL, seed=3)).ask(QUESTIONS, lambda: True))


def test_another_policys_answers_are_not_its_own(tmp_path):
    params = weights(MODEL, seed=3)
    other = params | {"final_norm": params["final_norm"].at[0].add(1e-7)}
    settings = Expert(endpoints=[MINE], temperature=0.0, max_tokens=12)

    def asked(params) -> int:
        def make(endpoint, sampling):
            return expert(params, sampling=sampling)

        with Panel(settings, tmp_path / "c.jsonl", make_policy=make, say=lambda words: None) as panel:
            assert all(given[0].model.startswith("policy-") for given in panel.ask(QUESTIONS, what="test"))
            return panel.asked

    assert [asked(params), asked(params), asked(other), asked(params)] == [3, 0, 3, 0]


def test_outside_a_run_a_policy_is_refused_in_words(tmp_path):
    with (
        Panel(Expert(endpoints=[MINE]), tmp_path / "c.jsonl") as panel,
        pytest.raises(ValueError, match="kind policy answers inside a training run only"),
    ):
        panel.ask(QUESTIONS, what="test")


def test_the_digest_sees_every_bit_and_no_mesh():
    params = weights(MODEL, seed=3)
    digest = params_digest(params)
    assert digest == params_digest(jax.tree.map(jnp.array, params))
    mesh = make_mesh({"data": 1, "fsdp": 4, "tp": 2})
    assert digest == params_digest(jax.device_put(params, param_shardings(MODEL, mesh)))
    swapped = params | {
        "embed": params["embed"].at[jnp.array([5, 9])].set(params["embed"][jnp.array([9, 5])])
    }
    last = params["embed"].view(jnp.uint32).at[-1, -1].add(1).view(jnp.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert len({digest, *map(params_digest, (swapped, params | {"embed": last}, half))}) == 4

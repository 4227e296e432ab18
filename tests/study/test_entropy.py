"""Entropy by part of the answer: tokens fall into the parser's parts, entropies are the model's."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.data.grammar import parse, serialise
from selfemo_jax.devices import prepare
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, forward, init_params, logits
from selfemo_jax.rollout.engine import Completion
from selfemo_jax.study import entropy
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.entropy import (
    Spoken,
    inputs_of,
    part_means,
    phase_rows,
    spoken,
    stretches,
    variety_rows,
)
from selfemo_jax.study.spans import PARTS, part_ranges, token_parts, token_ranges
from selfemo_jax.study.token_entropy import TokenEntropies
from tests import micro
from tests.fabricated import codec, sample, settings, synthetic

MELD = ("joy", "fear", "anger")
REPLY = "Café \U0001f642 at nine – yes."


def written(*, think: str | None = None, reply: str = REPLY) -> str:
    return serialise([("joy", 0.7), ("fear", 0.2)], [("anger", 0.5)], reply, think=think)


def test_parts_are_what_the_parser_read():
    text = "\n" + written(think="He is <emotion>glad</emotion>, I think.")
    answer = parse(text, inventory=MELD, thinking=True)
    assert answer.valid
    ranges = part_ranges(text, answer)
    cut = {part: text[start:end] for part, (start, end) in ranges.items()}
    assert cut["reasoning"].strip() == "He is <emotion>glad</emotion>, I think."
    assert cut["emotion"] == "joy:0.70, fear:0.20" and cut["self-emotion"] == "anger:0.50"
    assert cut["response"] == REPLY


def test_a_thought_that_the_prompt_opened_begins_with_the_answer():
    text = "so it is.\n</think>\n\n" + written()
    answer = parse(text, inventory=MELD, thinking=True, think_open_in_prompt=True)
    assert answer.valid and part_ranges(text, answer)["reasoning"] == (0, text.index("</think>"))


def test_an_answer_outside_the_grammar_has_no_parts():
    with pytest.raises(ValueError, match="outside the grammar"):
        part_ranges("<emotion>joy", parse("<emotion>joy", inventory=MELD))


def test_tokens_have_their_places_in_the_text_also_inside_a_character():
    # Cut everywhere: bytes of one character fall into different tokens.
    text = written()
    ids = [one for char in text for one in codec().encode_data(char)]
    assert len(ids) > len(text)
    ranges = token_ranges(ids, codec().decode)
    assert len(ranges) == len(ids)
    covered = "".join(text[start:end] for start, end in dict.fromkeys(ranges))
    assert covered == text
    whole = codec().encode_data(text)
    for one, (start, end) in zip(whole, token_ranges(whole, codec().decode), strict=True):
        piece = codec().decode([one])
        assert "\ufffd" in piece or text[start:end] == piece


def test_broken_bytes_do_not_move_the_tokens_behind_them():
    smile = codec().encode_data("\U0001f642")
    ids = [*smile[:1], *codec().encode_data("ab"), *smile]
    text = codec().decode(ids)
    ranges = token_ranges(ids, codec().decode)
    assert len(ranges) == len(ids) and ranges[-1][1] == len(text)
    assert all(start <= later for (start, _), (later, _) in zip(ranges, ranges[1:], strict=False))


def test_a_tokenizer_whose_tokens_have_no_places_is_refused():
    texts = {(1,): "ab", (1, 2): "a", (2,): "", (1, 2, 3): "abc", (3,): ""}
    with pytest.raises(ValueError, match="no places"):
        token_ranges([1, 2, 3], lambda ids: texts[tuple(ids)])


def test_each_token_belongs_to_the_part_that_its_middle_lies_in():
    parts = {"emotion": (4, 8), "response": (10, 12)}
    ranges = [(0, 4), (3, 5), (2, 7), (6, 8), (8, 10), (10, 12), (11, 11)]
    assert token_parts(ranges, parts).tolist() == [-1, -1, 1, 1, -1, 3, -1]


def test_a_completion_is_cut_and_its_end_of_turn_belongs_to_nothing():
    text = written()
    ids = (*codec().encode_markup(text), codec().eos_id)
    parts = SimpleNamespace(config=settings(), codec=codec())
    completion = Completion(
        token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", policy_versions=(0,)
    )
    one = spoken("d/1", (1, 2), completion, parts, inventory=MELD)
    assert len(one.parts) == len(ids) and one.parts[-1] == -1
    for index, part in enumerate(PARTS[1:], start=1):
        said = codec().decode([token for token, place in zip(ids, one.parts, strict=True) if place == index])
        start, end = part_ranges(text, parse(text, inventory=MELD))[part]
        # A token that reaches over a tag's edge belongs to one side as a whole.
        assert abs(len(said) - (end - start)) <= 4 and (said in text)
    cut = Completion(token_ids=ids[:6], logprobs=(0.0,) * 6, finish_reason="length", policy_versions=(0,))
    assert spoken("d/1", (1, 2), cut, parts, inventory=MELD) is None


def test_entropies_are_those_of_the_softmax_whatever_is_beside_in_the_batch():
    config = ModelConfig(
        architecture="qwen3", vocab_size=96, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=8, rope_theta=1e4, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    mesh, _ = prepare({"data": 1, "fsdp": 1, "tp": 1}, platform="cpu")
    rng = np.random.default_rng(0)
    sequences = [tuple(rng.integers(0, 96, size).tolist()) for size in (9, 14)]
    found = TokenEntropies(config, Compute(), mesh)(params, sequences, starts=[4, 2], temperature=0.7)
    for ids, start, values in zip(sequences, (4, 2), found, strict=True):
        tokens = jnp.array([ids])
        hidden = forward(
            params, config, Compute(), tokens=tokens, positions=jnp.arange(len(ids))[None],
            segment_ids=jnp.zeros_like(tokens), prefix_ids=jnp.full_like(tokens, -1),
        )  # fmt: skip
        scores = np.asarray(logits(params, config, Compute(), hidden)[0], np.float64) / 0.7
        chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = -(chances * np.log(chances)).sum(-1)[start - 1 : len(ids) - 1]
        assert values.shape == (len(ids) - start,)
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_means_by_part_weigh_tokens_and_draw_dialogues():
    answers = [
        answer
        for n in range(5)
        for answer in (
            Spoken(id=f"s/t/a{n}/0", prompt=(), completion=(1, 2, 3), parts=np.array([1, 1, -1])),
            Spoken(id=f"s/t/b{n}/0", prompt=(), completion=(1, 2), parts=np.array([1, 3])),
        )
    ]
    row = part_means(answers, [np.array([1.0, 2.0, 9.0]), np.array([6.0, 4.0])] * 5)
    assert row["emotion"] == 3.0 and row["response"] == 4.0 and "self-emotion" not in row
    # With k of ten drawn dialogues of the first kind the mean is (3 k + 6 (10 - k)) / (2 k + 10 - k); k lies
    # between 2 and 8 in 98 % of draws, between 3 and 7 in 89 %.
    assert row["emotion ci"] == [2.0, 4.5]
    assert row["response ci"] is None, "in five dialogues"
    assert row["all tokens"] == pytest.approx(22 / 5)


def test_the_fall_of_a_run_by_hand():
    lines = [{"step": n, "phase": "rl", "entropy": value} for n, value in enumerate([4.0, 2.0, 1.5, 1.0])]
    (row,) = phase_rows({"rl": lines})
    assert (row["first"], row["last"], row["difference"]) == (4.0, 1.0, -3.0)
    assert row["spearman with step"] == pytest.approx(-1.0)
    assert row["fall in first half, percent"] == pytest.approx(100 * 2.5 / 3)
    rising = [line | {"entropy": -line["entropy"]} for line in lines]
    assert phase_rows({"rl": rising})[0]["fall in first half, percent"] is None


def test_the_variety_of_replies_is_set_against_the_entropy():
    lines = [
        {"step": n, "phase": "rl", "entropy": value, "reply/self_bleu": bleu}
        for n, (value, bleu) in enumerate([(4.0, 0.2), (3.0, 0.4), (2.0, 0.5), (1.0, 0.9)])
    ]
    (row,) = variety_rows({"rl": lines})
    assert (row["measure"], row["phase"], row["first"], row["last"]) == ("self_bleu", "rl", 0.2, 0.9)
    # More alike as the entropy falls.
    assert row["spearman with step"] == pytest.approx(1) and row["spearman with entropy"] == pytest.approx(-1)
    assert variety_rows({"rl": [{"step": 1, "phase": "rl", "entropy": 1.0}]}) == []


@pytest.mark.parametrize(("init", "joined"), [("current", ["rl_1 + rl_final"]), ("cold", [])])
def test_entropy_is_not_followed_across_a_new_start_of_the_policy(init, joined, tmp_path):
    steps = [{"step": n, "phase": phase, "entropy": 1.0, "reward/r1": 0.1, "loss": 0.0}
             for n, phase in enumerate(["rl_1", "rl_1", "rl_final"])]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    (tmp_path / "config.yaml").write_text(f"flywheel: {{retrain: {{init: {init}}}}}\n")
    found = stretches(tmp_path)
    assert sorted(found) == sorted(["rl_1", "rl_final", *joined])
    assert len(found["rl_1"]) == 2 and all(len(found[name]) == 3 for name in joined)


@pytest.mark.parametrize("answers", ["recorded", "sampled"])
def test_a_run_is_measured(answers, tmp_path, capsys):
    run = micro.base_run()
    words = ["entropy", str(run), "--answers", answers, "--rollouts", "24", "--split", "dev"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "entropy.json").read_text())
    assert [row["phase"] for row in found["by part"]] == ["00_cold step 60", "00_cold", "01_rl_final"]
    half, cold, _ = (row["all tokens"] for row in found["by part"])
    assert abs(half - cold) > 1e-3
    for row in found["by part"]:
        assert row["answers"] >= row["valid"] > 0 and row["emotion"] > 0 and row["response"] > 0
        assert row["emotion ci"] is None, "fewer than ten dialogues answered inside the grammar"
    if answers == "recorded":
        # The same answers for every phase.
        assert len({row["valid"] for row in found["by part"]}) == 1
    measures = {row["measure"] for row in found["variety of replies"]}
    assert measures == {"distinct_1", "distinct_2", "self_bleu", "self_bleu_in_group"}
    assert all(0 <= row["first"] <= 1 for row in found["variety of replies"])
    printed = capsys.readouterr().out
    assert micro.NOTE in printed and found["note"] == micro.NOTE
    assert found["remark"].startswith("-: fewer than 10 dialogues") and found["remark"] in printed


def test_a_policy_without_a_valid_answer_has_a_row_without_parts(tmp_path, monkeypatch, capsys):
    answered = entropy.sampled_answers

    def sampled(parts, params, inputs, *, most, version):
        asked, valid = answered(parts, params, inputs, most=most, version=version)
        return asked, valid if version else []

    monkeypatch.setattr(entropy, "sampled_answers", sampled)
    words = ["entropy", str(micro.base_run()), "--answers", "sampled", "--rollouts", "8", "--split", "dev"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    early, cold, _ = json.loads((tmp_path / "entropy.json").read_text())["by part"]
    assert early == {"phase": "00_cold step 60", "answers": 8, "valid": 0} and cold["valid"] > 0
    monkeypatch.setattr(entropy, "sampled_answers", lambda *_, **__: (8, []))
    assert main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "nothing has parts" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_held_out_synthetic_inputs_are_those_of_the_harvest_or_missing_with_a_reason(tmp_path):
    config = settings(flywheel={"heldout": 0.5, "iterations": 1})
    with pytest.raises(ValueError, match="labelled --split"):
        inputs_of(tmp_path, config, "selfemo")
    children = [
        synthetic(sample(gold={"joy": 1.0}, dialogue=f"d{place}"), iteration=1) for place in range(20)
    ]
    lines = [{"accepted": True, "iteration": 1, "sample": child.to_json()} for child in children]
    lines.append({"accepted": False, "iteration": 1, "sample": None})
    (tmp_path / "flywheel.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = inputs_of(tmp_path, config, "selfemo")
    assert 0 < len(held) < 20 and {one.id for one in held} < {one.id for one in children}
    none = settings(flywheel={"heldout": 0, "iterations": 1})
    with pytest.raises(ValueError, match="was held out"):
        inputs_of(tmp_path, none, "selfemo")

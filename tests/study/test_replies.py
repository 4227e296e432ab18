"""Replies of two checkpoints: the same inputs in both, drawn by seed, and pages that no reply can break."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfemo_jax import run_biographies, run_data, run_personas
from selfemo_jax.config_io import read_config, to_yaml
from selfemo_jax.settings.experts import Endpoint
from selfemo_jax.study import replies
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.replies import distinct_bigrams, example, inputs_of, read_pairs, settings_of
from tests import micro
from tests.fabricated import sample, settings


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run, out = micro.base_run(), tmp_path_factory.mktemp("replies")
    words = [str(run / "phases" / "00_cold"), str(run), "--num", "6", "--split", "dev", "--out", str(out)]
    assert main(["replies", *words]) == 0
    return out


def test_both_answer_the_same_inputs_and_the_answers_are_those_of_an_evaluation(written):
    pairs, note = read_pairs(written / "replies.jsonl")
    assert len(pairs) == 6 and note == micro.NOTE
    assert len({pair["dataset"] for pair in pairs}) > 1
    lines = (micro.base_run() / "eval" / "dev_predictions.jsonl").read_text().splitlines()
    scored = {line["id"]: line for line in map(json.loads, lines)}
    for pair in pairs:
        assert pair["second"]["text"] == scored[pair["id"]]["text"]
        # What the policy was not told is not shown as if it had been.
        assert pair["persona"] is None
        if not pair["second"]["valid"]:
            assert pair["second"]["r1"] == 0.0 and pair["second"]["codes"]


def test_the_page_shows_every_input_and_what_the_numbers_are(written):
    page = (written / "replies.md").read_text()
    pairs, _ = read_pairs(written / "replies.jsonl")
    assert micro.NOTE in page
    assert all(f"### {pair['id']}" in page for pair in pairs)


def test_each_policy_is_asked_with_the_biographies_of_its_own_run(monkeypatch):
    """What another policy was told of a speaker would be no prompt of this one."""
    configs = {
        name: settings(run_dir=name, output={"biography": kind})
        for name, kind in (("plain", "none"), ("told", "train_lines"), ("other", "train_lines"))
    }
    loaded, asked = [], []

    def load(config):
        loaded.append(config.run_dir)
        inputs = tuple(sample(n, gold={"joy": 1.0}, about=config.run_dir) for n in range(3))
        return SimpleNamespace(split=lambda name: inputs)

    def answer(config, samples):
        asked.append({one.about for one in samples})
        return [{} for _ in samples], ""

    monkeypatch.setattr(replies, "settings_of", lambda path, **_: configs[path.name])
    monkeypatch.setattr(run_data, "load_data", load)
    monkeypatch.setattr(run_biographies, "with_biographies", lambda config, data: data)
    monkeypatch.setattr(replies, "answers_of", answer)
    args = argparse.Namespace(num=2, data_root=None, persona=None, split="dev", seed=0)
    for first, second in (("plain", "told"), ("told", "other"), ("plain", "plain")):
        loaded.clear(), asked.clear()
        pairs, _ = replies.answer_pairs(args, Path(first), Path(second))
        assert len(pairs) == 2 and asked == [{first}, {second}]
        assert loaded == [first] if first == second else loaded == [first, second]


@pytest.fixture
def with_experts(tmp_path):
    """A finished run whose experts wrote of each dev history, in another folder than it was made in."""
    run = tmp_path / "moved"
    shutil.copytree(micro.base_run(), run)
    config = read_config(run / "config.yaml")
    asks = replace(config.persona, source="expert", scope="history", splits=["train", "dev"])
    owl = Endpoint(name="owl", kind="replay", model="m", record="gone")
    config = replace(config, persona=asks, expert=replace(config.expert, endpoints=[owl]))
    (run / "config.yaml").write_text(to_yaml(config))
    lines = [
        {"piece": f"{one.id}#history", "source": "owl", "theme": "rain",
         "personas": {name: f"{name} is patient." for name, _ in one.history}}
        for one in run_data.load_data(config).split("dev")
    ]  # fmt: skip
    (run / "personas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_replies_are_given_as_the_persons_that_experts_described(with_experts, tmp_path):
    for told, expected in (("given", True), ("none", False)):
        inputs = inputs_of(settings_of(with_experts, data_root=None, persona=told), "dev")
        of_experts = [one for one in inputs if one.theme == "rain"]
        assert bool(of_experts) == expected
    words = [str(with_experts / "phases" / "00_cold"), str(with_experts), "--num", "6", "--split", "dev"]
    assert main(["replies", *words, "--persona", "given", "--out", str(tmp_path / "out")]) == 0
    pairs, _ = read_pairs(tmp_path / "out" / "replies.jsonl")
    for pair in pairs:
        spoken = pair["responder"] in {name for name, _ in pair["history"]}
        assert pair["persona"] == (f"{pair['responder']} is patient." if spoken else None)
    assert any(pair["persona"] for pair in pairs)


def test_both_policies_speak_as_the_same_persons(monkeypatch):
    """Each run's experts wrote sentences of their own; a judge is shown one."""
    configs = {
        name: settings(run_dir=name, eval={"persona": told})
        for name, told in (("bare", "given"), ("old", "given"), ("new", "given"), ("shy", "none"))
    }
    knows = {"bare": {}, "old": {0: "a", 1: "b"}, "new": {0: "c"}, "shy": {}}
    asked = []

    def tell(config, data, *, split):
        inputs = [
            replace(one, persona=knows[config.run_dir].get(n)) for n, one in enumerate(data.split(split))
        ]
        return SimpleNamespace(split=lambda name: tuple(inputs))

    def answer(config, samples):
        asked.append([one.persona for one in samples])
        return [{} for _ in samples], ""

    inputs = tuple(sample(n, gold={"joy": 1.0}) for n in range(3))
    monkeypatch.setattr(replies, "settings_of", lambda path, **_: configs[path.name])
    monkeypatch.setattr(run_data, "load_data", lambda config: SimpleNamespace(split=lambda name: inputs))
    monkeypatch.setattr(run_personas, "with_personas", tell)
    monkeypatch.setattr(replies, "answers_of", answer)
    args = argparse.Namespace(num=3, data_root=None, persona=None, split="dev", seed=0)
    for first, second, expected in (
        ("bare", "old", ["a", "b", None]),
        ("old", "bare", ["a", "b", None]),
        ("old", "new", ["c", "b", None]),
        ("shy", "new", ["c", None, None]),
        ("shy", "shy", [None, None, None]),
    ):
        asked.clear()
        pairs, _ = replies.answer_pairs(args, Path(first), Path(second))
        assert asked == [expected, expected]
        assert [pair["persona"] for pair in pairs] == expected


def test_a_reply_is_text_in_the_page():
    answer = {"valid": True, "codes": [], "think": "", "emotion": {"joy": 1.0}, "self_emotion": {}}
    answer["r1"] = 1.0
    pair = {
        "id": "s/test/d/1", "history": [["A|b", "two\nlines"]], "persona": None, "gold": {"joy": 1.0},
        "responder": "B", "first": answer | {"response": "| <b>x</b> `y`"},
        "second": answer | {"response": ""},
    }  # fmt: skip
    lines = example(pair, ["before", "after"]).splitlines()
    reply = next(line for line in lines if line.startswith("| reply"))
    assert reply == "| reply | \\| \\<b\\>x\\</b\\> \\`y\\` | - |"
    assert "1. **A\\|b**: two lines" in lines


def test_distinct_bigrams_by_hand():
    assert distinct_bigrams(["a b c", "A b"]) == pytest.approx(100 * 2 / 3)
    assert distinct_bigrams(["word", ""]) is None


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["replies", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["replies", str(micro.base_run()), str(micro.base_run()), "--num", "0"]) == 2
    assert "--num is 0" in capsys.readouterr().err

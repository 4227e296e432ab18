"""Biographies in the inputs of a run: counted at loading, or written by experts and found again."""

import json
from dataclasses import replace

import pytest

from selfemo_jax import extract, run_data
from selfemo_jax.data.dialogues import MELD, Dialogue, Turn, make_corpus
from selfemo_jax.experts.panel import Panel
from selfemo_jax.label_phase import training_dialogues
from selfemo_jax.run_biographies import FILE, add_biographies, with_biographies
from selfemo_jax.run_data import load_data
from tests.experts.chat_server import requests, serving
from tests.fabricated import settings

WRITTEN = "Ada is calm and speaks of boats."


def dialogue(name: str, split: str, label: str = "joy") -> Dialogue:
    turns = tuple(
        Turn(speaker=speaker, text=f"{speaker} talks about boats.", labels={label: 1.0})
        for speaker in ("Ada", "Bo") * 5
    )
    return Dialogue(dataset="meld", split=split, dialogue_id=name, turns=turns)


@pytest.fixture
def load(monkeypatch):
    train = [dialogue(str(n), "train") for n in range(7)] + [dialogue("odd", "train", "anger")]
    corpus = make_corpus(MELD, {"train": train, "dev": [dialogue("d", "dev", "fear")]})
    monkeypatch.setattr(run_data, "load_corpora", lambda names, root, **options: (corpus,))

    def loaded(biography: str, **more):
        config = settings(output={"biography": biography}, data={"sets": ["meld"]}, **more)
        return config, load_data(config)

    return loaded


def test_counted_biographies_are_in_every_input_and_change_the_fingerprint(load):
    plain = load("none")[1]
    config, data = load("train_lines")
    assert data.fingerprint != plain.fingerprint and plain.train["meld"][0].about is None
    (of_odd,) = {
        s.about for s in data.train["meld"] if s.root_id.endswith("/odd") and s.target_speaker == "Ada"
    }
    assert "joy 100%" in of_odd and "anger" not in of_odd, "its own dialogue is the only angry one"
    dev = data.evaluation["dev"]["meld"][0].about
    assert "anger" in dev and "fear" not in dev
    rows = training_dialogues(data, config)["meld"]
    assert all(sample.about for row in rows for sample in row), "the phase on labels is told them too"


def test_experts_write_them_once_and_an_evaluation_finds_them(load, tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(
        json.dumps([["lines that Ada says", f"<think>Hm.</think>{WRITTEN}"], ["lines that Bo", " "]])
    )
    with serving(tmp_path / "log", "--answers", str(answers)) as url:
        endpoint = {"name": "one", "base_url": url, "model": "m"}
        config, data = load("expert", expert={"endpoints": [endpoint]})
        config = replace(config, run_dir=str(tmp_path))
        with pytest.raises(ValueError, match="biographies.json does not exist"):
            with_biographies(config, data)
        with Panel(config.expert, tmp_path / "cache.jsonl") as panel:
            told = add_biographies(config, data, panel, tmp_path)
            assert add_biographies(config, data, panel, tmp_path).fingerprint == told.fingerprint
    assert len(requests(tmp_path / "log")) == 2, "one question a speaker, asked once"
    by_speaker = {s.target_speaker: s.about for s in told.evaluation["dev"]["meld"]}
    assert by_speaker == {"Ada": WRITTEN, "Bo": None}
    assert json.loads((tmp_path / FILE).read_text())["source"] == "one"
    again = with_biographies(config, data)
    assert again.fingerprint == told.fingerprint and again.train == told.train


@pytest.mark.usefixtures("load")
def test_the_command_that_asks_without_training_asks_for_them(tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([["lines that Ada says", WRITTEN], ["lines that Bo", " "]]))
    words = ["--data.sets=[meld]", "--data.speaker_style=name", f"--out={tmp_path}"]
    with serving(tmp_path / "log", "--answers", str(answers)) as url:
        endpoint = json.dumps([{"name": "one", "base_url": url, "model": "m"}])
        words += [f"--expert.endpoints={endpoint}", "--output.biography=expert"]
        assert extract.main([*words, "--what=cold_start"]) == 2
        assert extract.main([*words, "--what=biographies"]) == extract.main(words) == 0
    assert len(requests(tmp_path / "log")) == 2, "one question a speaker, asked once"
    (found,) = json.loads((tmp_path / FILE).read_text())["biographies"]
    assert (found["speaker"], found["text"]) == ("Ada", WRITTEN)


def test_settings_without_biographies_change_nothing(load, tmp_path):
    config, data = load("none")
    assert with_biographies(config, data) is data

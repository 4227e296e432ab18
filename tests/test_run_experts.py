"""What experts add to a run: personas of training inputs, cold-start answers; how a stopped run goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from selfemo_jax import extract
from selfemo_jax.checkpoint import StateStore
from selfemo_jax.config_io import parse_config
from selfemo_jax.data.grammar import parse
from selfemo_jax.phases import Phase
from selfemo_jax.run_data import load_data
from selfemo_jax.run_experts import ask_experts, cold_inputs
from selfemo_jax.run_inputs import encode_example, phase_examples
from selfemo_jax.run_personas import persona_pieces, with_personas
from selfemo_jax.run_resume import Stopped
from tests import micro
from tests.experts.chat_server import answered, requests, serving
from tests.fabricated import codec, settings

COLD = Phase(index=0, kind="sft", name="cold", iteration=0, init="base", buffer=("original",))
PARTS = SimpleNamespace(codec=codec())


def config(url: str = "http://127.0.0.1:9/v1", **sections):
    base = {
        "expert": {"endpoints": [{"name": "owl", "base_url": url, "model": "m"}]},
        "data": {"sets": ["sample/meld"], "max_prompt": 128, "max_items": 12},
        "rollout": {"max_tokens": 96},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return settings(**base)


def asked(config_, data, folder, say=lambda text: None):
    return ask_experts(config_, PARTS, data, folder, say)


def right_answers(path, samples) -> None:
    """Answers of an expert that knows the gold, found by the last turn of the prompt."""
    found = []
    for number, sample in enumerate(samples):
        label = next(iter(sample.gold))
        last = f"{sample.target_speaker}: {sample.history[-1][1]}    <-- the last turn"
        text = (
            "1. It shows in the words.\n2. I feel with them.\n3. I say so.\n"
            f"<emotion>{label}:0.90</emotion>\n"
            f"<self_emotion>neutral:0.50</self_emotion>\n<response>Let us look at item{number} once "
            "more.</response>"
        )
        found.append([json.dumps(last)[1:-1], text])
    path.write_text(json.dumps(found))


def test_personas_go_to_training_inputs_alone(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        settings_ = config(url, persona={"source": "expert"})
        before = load_data(settings_)
        data = asked(settings_, before, tmp_path)
    assert all(s.persona is None and s.theme is None for s in before.all_train())
    for sample in data.all_train():
        assert sample.persona.startswith(f"{sample.responder} seems calm, is probably grown up")
        assert sample.theme == "people who talk about an everyday matter"
        assert sample.tags == ("persona:owl",)
        # Self-play asks for the persona of whoever speaks next.
        speakers = {turn.speaker for turn in data.dialogues[sample.root_id].turns}
        assert set(data.personas[sample.root_id]) == speakers
    roots = {sample.root_id for sample in data.all_train()}
    assert len(requests(log)) == len(roots)
    for split in data.evaluation:
        assert all(s.persona is None and s.theme is None for s in data.split(split))
    assert data.fingerprint != before.fingerprint
    lines = list(map(json.loads, (tmp_path / "personas.jsonl").read_text().splitlines()))
    assert len(lines) == len(roots) and {line["source"] for line in lines} == {"owl"}
    # Commands that look at the run later tell the same.
    again = replace(settings_, run_dir=str(tmp_path))
    assert with_personas(again, before, split="test") is before
    read = with_personas(again, before, split="train")
    assert (read.train, read.personas) == (data.train, data.personas)
    with pytest.raises(ValueError, match="elsewhere/personas.jsonl does not exist"):
        with_personas(replace(settings_, run_dir="elsewhere"), before, split="train")


def test_personas_of_other_splits_are_made_of_each_history_alone(tmp_path):
    history = {"source": "expert", "scope": "history", "splits": ["train", "test"]}
    with serving(tmp_path / "log") as url:
        settings_ = config(url, persona=history, data={"max_items": 4})
        loaded = load_data(settings_)
        some = {
            split: {"sample_meld": loaded.evaluation[split]["sample_meld"][:9]} for split in loaded.evaluation
        }
        loaded = replace(loaded, evaluation=some)
        pieces = persona_pieces(settings_, loaded)
        assert {split: len(found) for split, found in pieces.items()} == {"train": 4, "test": 9}
        data = asked(settings_, loaded, tmp_path)
    prompts = [json.loads(line) for line in (tmp_path / "experts.jsonl").read_text().splitlines()]
    by_question = {line["question"]: line["user"] for line in prompts}
    test = data.split("test")
    for sample in test:
        known = {speaker for speaker, _ in sample.history}
        # One who has not spoken yet is unknown.
        assert (sample.persona is not None) == (sample.responder in known)
        later = [s for s in test if s.root_id == sample.root_id and len(s.history) > len(sample.history)]
        shown = by_question.get(f"{sample.id}#history", "")
        assert all(f": {s.history[-1][1]}\n" not in shown for s in later)
    assert any(sample.persona for sample in test)
    assert all(s.persona is None for s in data.split("dev"))


def test_accepted_answers_become_the_cold_start(tmp_path):
    settings_ = config(cold_start={"source": "expert", "num": 8}, model={"thinking": True})
    data = load_data(settings_)
    chosen = [s for samples in cold_inputs(settings_, data).values() for s in samples]
    right_answers(tmp_path / "answers", chosen[:5])
    with serving(tmp_path / "log", "--answers", str(tmp_path / "answers")) as url:
        settings_ = config(url, cold_start={"source": "expert", "num": 8}, model={"thinking": True})
        said = []
        data = asked(settings_, data, tmp_path, said.append)
    examples = phase_examples(COLD, data, (), codec(), settings_)["sample_meld"]
    assert [s.id for s, _ in examples[:5]] == [s.id for s in chosen[:5]] and len(examples) < 8
    for number, (sample, ids) in enumerate(examples[:5]):
        assert sample.tags == ("expert:owl",)
        prompt, completion = encode_example((sample, ids), codec(), settings_)
        assert completion == ids and prompt == encode_example((chosen[number], ids), codec(), settings_)[0]
        text = codec().decode(ids[:-1])
        parsed = parse(text, inventory=sample.inventory, thinking=True)
        assert parsed.valid and parsed.think.startswith("1. It shows in the words.")
        assert parsed.response == f"Let us look at item{number} once more."
    lines = list(map(json.loads, (tmp_path / "cold_start.jsonl").read_text().splitlines()))
    assert [line["sample_id"] for line in lines] == [s.id for s in chosen]
    assert sum(line["accepted"] for line in lines) == len(examples)
    assert f"{len(examples)} of 8 expert answers accepted" in said[-1]


def test_an_expert_is_told_no_more_of_the_person_and_the_scene_than_the_policy(tmp_path):
    log, cold = tmp_path / "log", {"source": "mixed", "num": 2}
    with serving(log) as url:
        for told in (True, False):
            settings_ = config(url, cold_start=cold, data={"persona": told})
            data = asked(settings_, load_data(settings_), tmp_path / str(told))
            chosen = [s for samples in cold_inputs(settings_, data).values() for s in samples]
            assert all(sample.persona and sample.theme for sample in chosen)
            lines = (tmp_path / str(told) / "experts.jsonl").read_text().splitlines()
            prompts = {line["question"]: line["user"] for line in map(json.loads, lines)}
            for sample in chosen:
                prompt = prompts[f"{sample.id}#cold"]
                assert (f"The scene: {sample.theme}" in prompt) is told
                assert (sample.persona in prompt) is told


def test_the_mixed_cold_start_falls_back_to_the_human_turn(tmp_path):
    cold = {"source": "mixed", "num": 8}
    data = load_data(config(cold_start=cold))
    chosen = [s for samples in cold_inputs(config(cold_start=cold), data).values() for s in samples]
    right_answers(tmp_path / "answers", chosen[:3])
    with serving(tmp_path / "log", "--answers", str(tmp_path / "answers")) as url:
        settings_ = config(url, cold_start=cold | {"tau": 1.0})
        data = asked(settings_, data, tmp_path)
    examples = phase_examples(COLD, data, (), codec(), settings_)["sample_meld"]
    assert [s.id for s, _ in examples] == [s.id for s in chosen]
    assert [ids is None for _, ids in examples[:3]] == [False] * 3
    assert [s.tags for s, ids in examples if ids is None] == [()] * sum(ids is None for _, ids in examples)
    assert any(ids is None for _, ids in examples)


def test_no_accepted_answer_is_an_error_that_says_why(tmp_path):
    data = load_data(config(cold_start={"source": "expert", "num": 4}))
    (tmp_path / "answers").write_text(json.dumps([["", "I cannot do that."]]))
    with serving(tmp_path / "log", "--answers", str(tmp_path / "answers")) as url:
        settings_ = config(url, cold_start={"source": "expert", "num": 4})
        with pytest.raises(ValueError, match=r"no answer was accepted \(E_NO_EMOTION 4\)"):
            asked(settings_, data, tmp_path)


def test_no_persona_at_all_is_an_error_that_says_why(tmp_path):
    (tmp_path / "answers").write_text(json.dumps([["", "I cannot do that."]]))
    with serving(tmp_path / "log", "--answers", str(tmp_path / "answers")) as url:
        settings_ = config(url, persona={"source": "expert"})
        with pytest.raises(ValueError, match="no answer could be read; .* have none .*no closed code block"):
            asked(settings_, load_data(settings_), tmp_path)
    assert "no closed code block" in (tmp_path / "personas.jsonl").read_text()


def test_a_second_start_asks_nothing_and_finds_the_same_data(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        settings_ = config(url, persona={"source": "expert"})
        first = asked(settings_, load_data(settings_), tmp_path)
        number = len(requests(log))
        again = asked(settings_, load_data(settings_), tmp_path)
        assert again.fingerprint == first.fingerprint and again.train == first.train
        assert len(requests(log)) == number
        cache = tmp_path / "experts.jsonl"
        lines = cache.read_bytes().splitlines(keepends=True)
        cache.write_bytes(b"".join(lines[1:] + lines[:1]))
        with pytest.raises(ValueError, match="the expert cache was changed"):
            asked(settings_, load_data(settings_), tmp_path)
        cache.write_bytes(b"".join(lines[1:]))
        with pytest.raises(ValueError, match="lost answers that the run rests on"):
            asked(settings_, load_data(settings_), tmp_path)


def test_two_runs_may_share_a_cache_one_after_the_other(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        shared = {"cache": str(tmp_path / "shared.jsonl")}
        small = config(url, persona={"source": "expert"})
        small = replace(small, expert=replace(small.expert, **shared))
        wide = replace(small, data=replace(small.data, max_items=60))
        first = asked(small, load_data(small), tmp_path / "a")
        num_first = len(requests(log))
        asked(wide, load_data(wide), tmp_path / "b")
        number = len(requests(log))
        # The file has grown since; what this run used is still in front.
        assert asked(small, load_data(small), tmp_path / "a").fingerprint == first.fingerprint
        assert len(requests(log)) == number > num_first
    assert not (tmp_path / "a" / "experts.jsonl").exists()


def test_a_run_that_asks_nobody_leaves_its_data_alone(tmp_path):
    settings_ = settings(data={"sets": ["sample/meld"], "max_prompt": 128})
    data = load_data(settings_)
    assert asked(settings_, data, tmp_path) is data and not list(tmp_path.iterdir())
    told = {sample.persona is not None for sample in data.all_train()}
    without = load_data(
        settings(data={"sets": ["sample/meld"], "max_prompt": 128}, persona={"source": "none"})
    )
    assert told == {True} and all(s.persona is None and s.theme is None for s in without.all_train())


def test_a_stop_signal_ends_the_asking_and_the_next_start_goes_on(tmp_path):
    log = tmp_path / "log"
    with serving(log, "--delay", "0.2") as url:
        owl = {"name": "owl", "base_url": url, "model": "m", "concurrency": 2}
        settings_ = config(persona={"source": "expert"}, data={"max_items": 200}, expert={"endpoints": [owl]})
        data = load_data(settings_)

        def stop() -> None:
            until = time.monotonic() + 30
            while len(requests(log)) < 5 and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(Stopped, match="stopped.*start again .a training run with --resume"):
            asked(settings_, data, tmp_path)
        stopper.join()
        num_first = len(requests(log))
        done = asked(settings_, data, tmp_path)
    pieces = len(persona_pieces(settings_, data)["train"])
    assert 5 <= num_first < pieces == len(requests(log)) == len(set(answered(log)))
    assert all(sample.persona for sample in done.all_train())


def test_the_command_asks_without_training(tmp_path, capsys):
    common = ["--data.sets=[sample/meld]", "--data.max_items=40", f"--out={tmp_path / 'out'}"]
    assert extract.main([*common, "--what=personas"]) == 2
    assert "no expert is asked for it" in capsys.readouterr().err
    with serving(tmp_path / "log") as url:
        endpoint = json.dumps([{"name": "owl", "base_url": url, "model": "m"}])
        words = [*common, f"--expert.endpoints={endpoint}", "--persona.source=expert"]
        assert extract.main([*words, "--what=personas"]) == 0
        num_pieces = len(requests(tmp_path / "log"))
        words += ["--cold_start.source=mixed", "--cold_start.num=4"]
        assert extract.main(words) == 0
        # The personas were there already; what is new are the cold-start answers.
        assert len(requests(tmp_path / "log")) == num_pieces + 4
    assert len((tmp_path / "out" / "personas.jsonl").read_text().splitlines()) == num_pieces
    assert "personas: " in capsys.readouterr().out


def test_the_settings_in_the_readme_load():
    readme = Path(__file__).resolve().parents[1] / "README.md"
    blocks = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if "endpoints:" in block]
    found = parse_config(yaml.safe_load(block) | {"flywheel": {"retrain": {"init": "cold"}}})
    assert [endpoint.name for endpoint in found.expert.endpoints] == ["one", "two"]
    assert found.persona.source == found.cold_start.source == "expert"


@pytest.mark.slow
def test_a_run_killed_while_it_asks_goes_on_to_train_and_pays_for_nothing_twice(tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    shape = {f"model.shape.{name}": value for name, value in micro.SHAPE.items()}
    sizes = micro.SIZES | shape | {
        "data.sets": "[sample/meld]",
        "data.max_items": 60,
        "persona.source": "expert",
        "cold_start.source": "mixed",
        "cold_start.num": 16,
        "cold_start.epochs": 8,
        "flywheel.iterations": 0,
        "rl.steps": 1,
        "checkpoint.every": 1,
    }  # fmt: skip
    with serving(log, "--delay", "0.3", "--faults", "ok,500,ok,cut") as url:
        endpoint = f'[{{"name": "owl", "base_url": "{url}", "model": "m", "concurrency": 2}}]'
        words = [*micro.flags(sizes), f"--expert.endpoints={endpoint}", f"--run_dir={run_dir}"]
        command = [sys.executable, "-u", "-m", "selfemo_jax.train", *words, "--resume=auto"]
        process = subprocess.Popen(command, env=micro.environment(), stdout=subprocess.DEVNULL)
        while not log.exists() or len(answered(log)) < 6:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = (run_dir / "experts.jsonl").read_bytes().count(b"\n")
        before = len(answered(log))
        again = subprocess.Popen(
            command, env=micro.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in again.stdout:
            # It trains on what was written: enough seen.
            if line.startswith("cold step 1"):
                again.send_signal(signal.SIGTERM)
        assert again.wait() == 75
    cache = (run_dir / "experts.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in cache]
    assert len(keys) == len(set(keys)) > before and 4 <= kept <= before
    # Only what was under way when the process died is answered again.
    assert len(answered(log)) - len(keys) <= 2
    store = StateStore(run_dir / "checkpoints" / "states", keep=2, asynchronous=False)
    recorded = store.meta(store.steps()[-1])["experts"]
    store.close()
    assert recorded == json.loads((run_dir / "experts.json").read_text())
    assert recorded["length"] == (run_dir / "experts.jsonl").stat().st_size

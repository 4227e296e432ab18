"""A model behind a server of another process: what it is asked, what is kept, what it costs to stop."""

import json
import os
import time
from dataclasses import replace

import pytest

from selfemo_jax import evaluate
from selfemo_jax.data.prompts import build_messages, build_prompt
from selfemo_jax.evaluation.endpoint import EndpointAnswers, folder_name
from selfemo_jax.experts.ask import ExpertError
from tests.experts.chat_server import requests, serving
from tests.fabricated import codec, run_data, sample, settings, text

CONFIG = settings(output={"prompt_style": "full"}, expert={"tries": 3})


def inputs(number: int = 3):
    return [sample(n, gold={"joy": 1.0}) for n in range(number)]


def opened(folder, url, **options):
    return EndpointAnswers(CONFIG, folder, url=url, model="M/one", key_env=options.get("key_env"))


@pytest.mark.parametrize("style", ["full", "brief", "dialogue"])
def test_the_server_reads_the_words_of_the_policys_prompt(style):
    one = sample(gold={"joy": 1.0}, persona="Cy is calm.", theme="a boat", about="Bo: 4 words a line")
    options = {"max_labels": 3, "thinking": False, "style": style, "descriptions": True}
    system, user = build_messages(one, **options)
    frame = codec().chat_frame(thinking=False)
    prompt = build_prompt(one, codec(), max_tokens=4096, **options)
    between = frame.between if frame.between is not None else "\n\n"
    whole = f"{frame.before}{system}{between}{user}{frame.after}"
    assert codec().decode(prompt.token_ids).split() == whole.split()


def test_answers_are_scored_and_never_asked_for_twice(tmp_path):
    log, answers = tmp_path / "log", tmp_path / "answers.json"
    answers.write_text(json.dumps([["Last turn", f"\n{text([('joy', 0.9)])}\n"]]))
    with serving(log, "--faults", "ok,500,cut", "--answers", str(answers)) as url:
        with opened(tmp_path, url) as endpoint:
            first = list(endpoint.greedy(inputs()))
        assert [p.label for p in first] == ["joy"] * 3, "blanks around an answer are the server's"
        assert all(p.num_tokens > 0 and p.num_prompt_tokens > 0 and p.seconds > 0 for p in first)
        assert len(requests(log)) == 5, "three questions, two of them tried again"
        with opened(tmp_path, url) as endpoint:
            again = list(endpoint.greedy(inputs()))
        assert [p.text for p in again] == [p.text for p in first]
        assert [p.seconds for p in again] == [None] * 3, "what the cache gave took no request"
        assert len(requests(log)) == 5


def test_a_server_is_never_scored_by_the_answers_of_another_of_the_same_model_name(tmp_path):
    found = {}
    for label in ("joy", "fear"):
        answers = tmp_path / f"{label}.json"
        answers.write_text(json.dumps([["Last turn", text([(label, 0.9)])]]))
        with serving(tmp_path / label, "--answers", str(answers)) as url:
            for address in (url, f"{url}/"):
                with opened(tmp_path / "out", address) as endpoint:
                    found.setdefault(label, []).extend(p.label for p in endpoint.greedy(inputs()))
        assert len(requests(tmp_path / label)) == 3, "a slash at the end is no other server"
    assert found == {"joy": ["joy"] * 6, "fear": ["fear"] * 6}


def test_what_the_cache_answered_is_told_with_its_date_and_how_to_ask_anew(tmp_path):
    told, log = [], tmp_path / "log"

    def ask(number):
        told.clear()
        with EndpointAnswers(CONFIG, tmp_path, url=url, model="M", key_env=None, say=told.append) as endpoint:
            assert len(list(endpoint.greedy(inputs(number)))) == number
        return [line for line in told if "are from" in line]

    with serving(log) as url:
        assert ask(2) == [], "all were asked now"
        (path,) = tmp_path.glob("endpoint_answers_*.jsonl")
        noon = time.mktime((2026, 3, 4, 12, 30, 0, 0, 0, -1))
        os.utime(path, (noon, noon))
        (line,) = ask(3)
        assert line.startswith(f"greedy answers: 2 of 3 are from {path}, last written 2026-03-04 12:30;")
        assert f"model answers at {url} since, delete that file to ask anew" in line
        assert len(requests(log)) == 3
        path.unlink()
        assert ask(3) == [] and len(requests(log)) == 6


def test_inputs_of_one_prompt_share_a_request_and_its_time(tmp_path):
    twins = [sample(0, gold={"joy": 1.0}), sample(0, gold={"joy": 1.0}, id="meld/train/d1/again")]
    with serving(tmp_path / "log") as url, opened(tmp_path, url) as endpoint:
        first, second = endpoint.greedy(twins)
    assert len(requests(tmp_path / "log")) == 1
    assert first.text == second.text and first.seconds > 0 and second.seconds is None


def test_samples_of_one_input_are_different_questions(tmp_path):
    with serving(tmp_path / "log") as url, opened(tmp_path, url) as endpoint:
        groups = list(endpoint.sampled(inputs(2), 3))
        assert [len(group) for group in groups] == [3, 3]
        assert [group[0].sample.id for group in groups] == [s.id for s in inputs(2)]
        list(endpoint.greedy(inputs(2)))
    digests = [record["digest"] for record in requests(tmp_path / "log")]
    assert len(digests) == len(set(digests)) == 8, "the seed tells samples apart, and 0 is the greedy answer"


@pytest.mark.parametrize(("field", "value"), [("frequency_penalty", 0.5), ("top_k", 20)])
def test_a_penalty_and_the_likeliest_tokens_are_asked_of_the_server_where_they_are_set(
    tmp_path, field, value
):
    for name, given in (("plain", 0), ("set", value)):
        config = settings(output={"prompt_style": "full"}, eval={field: given})
        with (
            serving(tmp_path / name) as url,
            EndpointAnswers(config, tmp_path / f"{name}_out", url=url, model="M", key_env=None) as endpoint,
        ):
            assert len(list(endpoint.greedy(inputs(1)))) == len(list(endpoint.sampled(inputs(1), 1))) == 1
        greedy, drawn = (record["asked"] for record in requests(tmp_path / name))
        assert (field in drawn, drawn.get(field, 0)) == (bool(given), given)
        # The likeliest token needs no list of the likeliest: greedy answers keep their place in the cache.
        assert greedy.get(field) == (drawn.get(field) if field == "frequency_penalty" else None)


def test_a_field_that_the_settings_give_the_server_goes_before_ours(tmp_path):
    given = {"endpoints": [{"name": "one", "base_url": "http://h/v1", "model": "M"}]}
    given["endpoints"][0]["extra_body"] = '{"top_k": null, "min_p": 0.1}'
    config = settings(output={"prompt_style": "full"}, eval={"top_k": 20}, expert=given)
    with (
        serving(tmp_path / "log") as url,
        EndpointAnswers(config, tmp_path, url=url, model="M", key_env=None) as endpoint,
    ):
        list(endpoint.sampled(inputs(1), 1))
    (record,) = requests(tmp_path / "log")
    assert "top_k" not in record["asked"] and record["asked"]["min_p"] == 0.1


def test_a_server_that_takes_no_field_of_the_draw_is_not_scored_as_wrong(tmp_path):
    config = settings(output={"prompt_style": "full"}, eval={"top_k": 20})
    with (
        serving(tmp_path / "log", "--faults", "ok,400,400") as url,
        EndpointAnswers(config, tmp_path, url=url, model="M", key_env=None) as endpoint,
    ):
        assert len(list(endpoint.greedy(inputs(1)))) == 1
        with pytest.raises(ExpertError, match=r"refused all 2, .*HTTP 400.*Look at eval\.top_k"):
            list(endpoint.sampled(inputs(1), 2))


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "open-sesame")
    with serving(tmp_path / "log", "--key", "open-sesame") as url:
        with opened(tmp_path, url, key_env="SOME_KEY") as endpoint:
            assert len(list(endpoint.greedy(inputs(1)))) == 1
        with opened(tmp_path / "without", url) as endpoint, pytest.raises(ExpertError, match="key_env"):
            list(endpoint.greedy(inputs(1)))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"open-sesame" not in written.replace((tmp_path / "log").read_bytes(), b"")
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ValueError, match="SOME_KEY"):
        opened(tmp_path, "http://127.0.0.1:1/v1", key_env="SOME_KEY")


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected an address"):
        opened(tmp_path, "127.0.0.1:8000")
    with pytest.raises(ValueError, match="--key_env") as refused:
        opened(tmp_path, "http://me:secret@127.0.0.1:8000/v1")
    assert "secret" not in str(refused.value)


def test_every_model_and_address_has_a_folder_of_its_own():
    name = folder_name("M/one two", "http://127.0.0.1:8000/v1")
    assert name.startswith("M_one_two_at_127.0.0.1_8000_v1-")
    assert folder_name("M/one two", "http://127.0.0.1:8000/v1/") == name
    assert folder_name("///", "http://h/v1").startswith("endpoint_at_h_v1-")
    others = ("http://127.0.0.1:8001/v1", "http://127.0.0.1/8000/v1", "https://127.0.0.1:8000/v1")
    assert len({name, *(folder_name("M/one two", other) for other in others)}) == 4


def test_scores_of_two_servers_of_one_model_name_lie_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for log in ("a", "b"):
        with serving(tmp_path / log) as url:
            words = ["--endpoint", url, "--model", "M", "--data.sets=[sample/emorynlp]", "--split", "dev"]
            assert evaluate.main(words) == 0
    assert len(list((tmp_path / "runs" / "endpoints").glob("M_at_127.0.0.1_*/dev.json"))) == 2


def test_the_command_scores_a_served_model(tmp_path, capsys):
    with serving(tmp_path / "log") as url:
        words = [
            "--endpoint",
            url,
            "--model",
            "M/one",
            "--data.sets=[sample]",
            "--eval.frequency_penalty=0.5",
            "--out",
            str(tmp_path / "out"),
        ]
        assert evaluate.main([*words, "--split", "dev", "--samples", "2", "--yardsticks"]) == 0
    found = json.loads((tmp_path / "out" / "dev.json").read_text())
    assert found["note"] == f"M/one at {url}" and found["frequency_penalty"] == 0.5
    assert {"accuracy", "lenient", "instructerc", "calibration", "parts"} <= set(found["sets"]["sample_meld"])
    drawn = found["samples"]["sample_meld"]
    assert drawn["n"] == 2 and drawn["parts"].keys() == found["sets"]["sample_meld"]["parts"].keys()
    assert set(found["yardsticks"]["sample_meld"]) == {"majority", "stratified random", "TF-IDF + LR"}
    lines = (tmp_path / "out" / "dev_samples.jsonl").read_text().splitlines()
    assert len(lines) == 402 and {"responder", "r1", "r2", "R"} <= json.loads(lines[0]).keys()
    assert found["reward"]["is"].startswith("R = r1 + 1 r2 over groups of 2")
    speed = found["speed"]
    assert speed["latency"]["n"] == 201 and 0 < speed["latency"]["p50"] <= speed["latency"]["p95"]
    assert speed["latency"]["of"] == "request" and speed["unasked"] == 0
    assert speed["inputs_per_s"] * found["seconds"] == pytest.approx(201)
    lines = (tmp_path / "out" / "dev_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 201 and speed["completion_tokens"] == sum(json.loads(x)["num_tokens"] for x in lines)
    printed = capsys.readouterr().out
    assert "side by side" in printed and "sampled answers" in printed and "latency p50" in printed


def test_the_rate_counts_no_answer_that_the_cache_gave(tmp_path):
    asked = [replace(sample(n, gold={"joy": 1.0}), split="dev", root_id="meld/dev/d1") for n in range(3)]
    data = replace(run_data({"meld": ()}), majority={"meld": "joy"}, parts={"meld/dev/d1": "clean"})

    def speed(url, number):
        whole = replace(data, evaluation={"dev": {"meld": tuple(asked[:number])}})
        with opened(tmp_path, url) as endpoint:
            found = evaluate.evaluate_splits(
                endpoint.answers(), whole, splits=["dev"], note="", folder=tmp_path, say=print
            )["dev"]
        rate = found["speed"]["inputs_per_s"]
        return rate and rate * found["seconds"], found["speed"]["unasked"], found["speed"]["latency"]

    with serving(tmp_path / "log") as url:
        assert speed(url, 2)[:2] == (pytest.approx(2), 0)
        assert speed(url, 3)[:2] == (pytest.approx(1), 2)
        assert speed(url, 3) == (None, 3, None)


def test_the_command_says_what_is_missing(tmp_path, capsys):
    for words in (
        [],
        ["--endpoint", "http://127.0.0.1:1/v1"],
        ["--model", "x"],
        ["--checkpoint", str(tmp_path), "--endpoint", "http://h/v1", "--model", "x"],
    ):
        assert evaluate.main(words) == 2
        assert "error: " in capsys.readouterr().err


def test_yardsticks_alone_need_no_model(tmp_path, capsys):
    assert (
        evaluate.main(["--yardsticks", "--data.sets=[sample]", "--split", "dev", "--out", str(tmp_path)]) == 0
    )
    assert not (tmp_path / "dev.json").exists(), "a run's scores must not be written over"
    assert json.loads((tmp_path / "dev_yardsticks.json").read_text())["yardsticks"]
    assert "TF-IDF + LR" in capsys.readouterr().out

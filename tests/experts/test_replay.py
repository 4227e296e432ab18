"""Recordings in an expert's place: a cache of an earlier run, lines written by hand, and the bundled ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfemo_jax.config_io import read_config
from selfemo_jax.experts.ask import ExpertError
from selfemo_jax.experts.panel import Panel
from selfemo_jax.experts.replay import read_recording, recording
from selfemo_jax.run_data import load_data
from selfemo_jax.run_experts import add_examples
from tests.experts.test_http_client import endpoint, panel, questions
from tests.fabricated import codec

ARM = Path(__file__).resolve().parents[2] / "configs" / "ablations" / "tiny" / "with_cold.yaml"


def by_hand(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tape(path: Path | str, **changes):
    return endpoint(None, name="tape", kind="replay", record=str(path), **changes)


def test_an_answer_written_by_hand_is_found_by_its_question_whatever_the_prompt_says(tmp_path):
    path = by_hand(tmp_path / "r", {"question": "owl1", "text": "Hello."}, {"question": "x", "text": ""})
    asked = [replace(question, user=question.user + " more words") for question in questions(2)]
    with panel(tmp_path, tape(path)) as experts:
        ((given,),) = experts.ask(asked[1:], what="test")
        assert (given.text, given.source, given.cost, given.refused) == ("Hello.", "tape", 0.0, None)
        with pytest.raises(ExpertError, match=f"the recording {path} does not hold it"):
            experts.ask(asked, what="test")


def test_what_is_missing_may_count_as_refused(tmp_path):
    path = by_hand(tmp_path / "r", {"question": "owl1", "text": "Hello."})
    with panel(tmp_path, tape(path, missing="refuse")) as experts:
        answers = experts.ask([*questions(3), questions(2)[1].again()], what="test")
    assert [given[0].text for given in answers] == ["", "Hello.", "", ""]
    assert [given[0].refused is None for given in answers] == [False, True, False, False]


@pytest.mark.parametrize(
    "line", ['{"question": "a"}', '{"question": "a", "text": 3}', "[]", "nonsense", '{"key": "a"}']
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "r"
    path.write_text('{"question": "b", "text": "Yes."}\n' + line + "\n")
    with pytest.raises(ValueError, match="r:2: not a recorded expert answer"):
        read_recording(path)


def test_two_answers_to_one_question_are_refused(tmp_path):
    same = {"question": "b", "text": "Yes."}
    with pytest.raises(ValueError, match="r:2: .*b was answered before"):
        read_recording(by_hand(tmp_path / "r", same, same))


def test_the_bundled_answers_fit_the_bundled_inputs_and_are_learned_from(tmp_path):
    config = read_config(ARM)
    data = load_data(config)
    _, written = read_recording(recording("sample"))
    inputs = {f"{sample.id}#cold" for sample in data.all_train()}
    assert len(written) >= 120 and set(written) <= inputs
    said: list[str] = []
    with Panel(config.expert, tmp_path / "cache.jsonl", say=lambda text: None) as experts:
        told = add_examples(config, codec(), data, experts, tmp_path, said.append)
    lines = [json.loads(line) for line in (tmp_path / "cold_start.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["reason"] != "refused"]
    assert len(judged) == len(written)
    rejected = {line["sample_id"]: line["reason"] for line in judged if not line["accepted"]}
    # An expert that did not see the gold is not always right.
    assert len(rejected) <= 0.1 * len(judged), rejected
    assert len(told.expert_examples) == len(judged) - len(rejected)
    assert len({line["response"] for line in judged}) == len(judged)

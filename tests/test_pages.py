"""`evaluate` and `predict` from the command line: what they write, and how they refuse."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest

from selfemo_jax import evaluate, predict
from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config_io import read_config
from selfemo_jax.evaluate import scores_folder
from selfemo_jax.study.reading import read_predictions
from tests import micro

DIALOGUES = [
    {
        "dialogue_id": "d1",
        "turns": [{"speaker": "Ana", "text": "They cancelled it."}, {"speaker": "Ben", "text": "Oh no!"}],
    },
    {"dialogue_id": "d2", "turns": [{"speaker": "Cleo", "text": "I won!"}], "labels": ["Joy", "gloom"]},
]
KEYS = {"dialogue_id", "speaker", "label", "emotion", "responder", "self_emotion", "response", "valid"}


@pytest.fixture(scope="module")
def run_dir():
    return micro.base_run()


def written(lines) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def asked(capsys, run_dir, *words) -> tuple[int, list[dict], str]:
    """Status, objects printed and messages of `predict`."""
    capsys.readouterr()
    code = predict.main([f"--checkpoint={run_dir}", *map(str, words)])
    found = capsys.readouterr()
    return code, [json.loads(line) for line in found.out.splitlines()], found.err


@pytest.mark.parametrize("inside", ["", "checkpoints/best"])
def test_evaluate_repeats_the_scores_of_the_run(run_dir, tmp_path, inside):
    words = ["--checkpoint", str(run_dir / inside), "--split", "dev", "--out", str(tmp_path)]
    assert evaluate.main(words) == 0
    found = json.loads((tmp_path / "dev.json").read_text())
    expected = json.loads((run_dir / "eval" / "dev.json").read_text())
    assert found["sets"] == expected["sets"]
    assert micro.NOTE in found["note"]
    answers = [(folder / "dev_predictions.jsonl").read_bytes() for folder in (tmp_path, run_dir / "eval")]
    assert answers[0] == answers[1]


def test_scores_under_other_settings_leave_those_of_the_run_in_place(run_dir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    kept = {path: path.read_bytes() for path in run.glob("eval/*")}
    words = ["--checkpoint", str(run), "--split", "dev"]
    assert evaluate.main([*words, "--output.max_labels=1", "--rollout.max_tokens", "24"]) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    other = run / "eval" / "output.max_labels=1,rollout.max_tokens=24"
    assert {path.name for path in other.iterdir()} == {"dev.json", "dev_predictions.jsonl"}
    assert str(other) in capsys.readouterr().out
    assert read_predictions(other, split="dev", name="other").note == micro.NOTE
    # What says where and how to run is no other setting.
    assert evaluate.main([*words, "--mesh=1", "--note=mine"]) == 0
    assert not [path for path in run.glob("eval/*") if path not in kept and path != other]
    assert (run / "eval" / "dev_predictions.jsonl").read_bytes() == kept[
        run / "eval" / "dev_predictions.jsonl"
    ]
    assert read_predictions(run, split="dev", name="run").sets


def test_a_folder_of_scores_has_a_name_that_a_file_system_takes(run_dir):
    found, config = find_checkpoint(run_dir), read_config(run_dir / "config.yaml")
    assert scores_folder(found, config) == run_dir / "eval"
    sets = [
        replace(config, data=replace(config.data, sets=[f"/data/{'x' * size}"])) for size in (9, 200, 201)
    ]
    names = [scores_folder(found, one).relative_to(run_dir / "eval") for one in sets]
    assert all(len(name.parts) == 1 and len(name.name) <= 100 for name in names)
    assert len(set(names)) == 3


def test_evaluate_refuses_what_is_not_there(run_dir, tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(tmp_path)]) == 2
    assert "expected a run" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(run_dir), "--split", "tset", "--out", str(tmp_path)]) == 2
    assert "no split 'tset'" in capsys.readouterr().err


def test_evaluate_refuses_a_split_without_labels(tmp_path, capsys):
    turns = [
        {"speaker": "A", "text": "Up we go.", "label": "up"},
        {"speaker": "B", "text": "No.", "label": "down"},
    ]
    (tmp_path / "dataset.json").write_text('{"name": "own", "labels": ["up", "down"]}')
    (tmp_path / "train.jsonl").write_text(written([{"dialogue_id": "d1", "turns": turns}]))
    words = ["--yardsticks", "--data.sets", f"[{tmp_path}]", "--out", str(tmp_path / "out")]
    assert evaluate.main(words) == 2
    assert "error: --split test: no labelled utterance" in capsys.readouterr().err


def test_a_policy_with_a_changed_bit_or_a_missing_file_is_not_used(run_dir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    values = copy / "checkpoints" / "best" / "params" / "layers.down" / "c"
    array = next(path for path in values.rglob("*") if path.is_file())
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    words = ["--checkpoint", str(copy), "--split", "dev", "--out", str(tmp_path)]
    assert evaluate.main(words) == 2
    said = capsys.readouterr().err
    assert "best/params" in said and "layers.down" in said and "another SHA-256" in said
    array.unlink()
    assert evaluate.main(words) == 2
    assert "is missing" in capsys.readouterr().err


def test_an_unknown_key_names_the_nearest(run_dir, capsys):
    assert evaluate.main(["--checkpoint", str(run_dir), "--eval.max_item", "3"]) == 2
    assert "eval.max_items" in capsys.readouterr().err
    assert predict.main(["--checkpoint", str(run_dir), "--rollout.max_token=3"]) == 2
    assert "rollout.max_tokens" in capsys.readouterr().err


def test_predict_answers_a_file_and_stdin_alike(run_dir, tmp_path, capsys, monkeypatch):
    path = tmp_path / "dialogues.jsonl"
    path.write_text(written(DIALOGUES))
    code, from_file, messages = asked(capsys, run_dir, path)
    assert code == 0 and micro.NOTE in messages
    assert [line["dialogue_id"] for line in from_file] == ["d1", "d2"]
    assert all(line.keys() >= KEYS for line in from_file)
    assert [(line["speaker"], line["responder"]) for line in from_file] == [
        ("Ben", "Ana"),
        ("Cleo", "Listener"),
    ]
    asked_for = {"joy", "gloom"}
    assert from_file[1]["label"] in {*asked_for, None}
    assert set(from_file[1]["emotion"]) <= asked_for or "W_UNK_LABEL" in from_file[1]["codes"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(written(DIALOGUES)))
    assert asked(capsys, run_dir)[:2] == (0, from_file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "not a JSON object"),
        ("[1]", "expected {"),
        ('{"turns": []}', "expected {"),
        ('{"turns": [{"speaker": "A", "text": " "}]}', "turn 0"),
        ('{"turns": [{"speaker": "A", "text": "x"}], "labels": ["joy"]}', "at least two"),
        ('{"turns": [{"speaker": "A", "text": "x"}], "responder": "A"}', "is the last speaker"),
    ],
)
def test_predict_says_which_line_is_wrong(run_dir, tmp_path, capsys, line, words):
    path = tmp_path / "dialogues.jsonl"
    path.write_text(written(DIALOGUES[:1]) + line + "\n")
    code, answers, messages = asked(capsys, run_dir, path)
    assert (code, answers) == (2, [])
    assert f"{path}:2: " in messages and words in messages


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"persona": 5}, "persona: expected text, found 5"),
        ({"theme": ["a boat"]}, "theme: expected text"),
        ({"responder": {"name": "B"}}, "responder: expected text"),
        ({"labels": ["very happy", "sad"]}, "'very happy' is not one word"),
        ({"labels": ["joy", "Joy"]}, "repeats joy"),
        ({"labels": [chr(97 + n) for n in range(26)] * 2}, "52 labels; expected 2 to 32"),
    ],
)
def test_predict_refuses_what_a_prompt_cannot_hold(given, words):
    lines = written([DIALOGUES[0], {"turns": DIALOGUES[0]["turns"]} | given]).splitlines()
    with pytest.raises(ValueError, match="in.jsonl:2: ") as caught:
        list(predict.read_dialogues(lines, "in.jsonl", ("joy", "fear")))
    assert words in str(caught.value)


def test_predict_calls_speakers_as_in_training():
    turns = [{"speaker": name, "text": f"{name} spoke."} for name in ("Ana", "Ben", "Ana")]
    given = [{"turns": turns}, {"turns": turns[:1]}, {"turns": turns, "responder": "Cleo"}]
    samples = list(predict.read_dialogues(written(given).splitlines(), "in.jsonl", ("joy", "fear")))
    assert [predict.as_trained(sample, "name") for sample in samples] == samples
    asked = [predict.as_trained(sample, "index") for sample in samples]
    assert asked[0].history == (
        ("Speaker 1", "Ana spoke."), ("Speaker 2", "Ben spoke."), ("Speaker 1", "Ana spoke.")
    )  # fmt: skip
    called = [(sample.target_speaker, sample.responder) for sample in asked]
    assert called == [("Speaker 1", "Speaker 2"), ("Speaker 1", "Listener"), ("Speaker 1", "Speaker 3")]


def test_predict_names_the_file_whose_bytes_are_no_text(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"turns": [{"speaker": "A", "text": "caf\xe9"}]}\n')
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match="in.jsonl: byte 0xE9"):
        list(predict.read_dialogues(file, "in.jsonl", ("joy", "fear")))


def test_predict_refuses_a_missing_file(run_dir, tmp_path, capsys):
    code, _, messages = asked(capsys, run_dir, tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in messages

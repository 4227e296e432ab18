"""Browsing rollouts: what is picked, what the filters leave, how two steps are compared, what is refused."""

import json

import pytest

from selfemo_jax import browse
from selfemo_jax.rollout.records import step_file

GOOD, BAD = {"joy": 1.0}, {"anger": 0.8, "joy": 0.2}


def rollout(idx, emotion, *, r1, advantage=0.0, codes=(), step=5, reply="Row!", **changes) -> dict:
    """A line as a run writes it; codes that begin with E_ make it malformed."""
    valid = not any(code.startswith("E_") for code in codes)
    reading = {
        "valid": valid,
        "codes": list(codes),
        "emotion": emotion,
        "self_emotion": GOOD,
        "response": reply,
    }
    return {
        "step": step,
        "sample_id": "meld/train/d1/0",
        "dataset": "meld",
        "origin": "original",
        "idx": idx,
        "history": [["Ada", "The ferry left."], ["Bo", "Then we row."]] if idx == 0 else None,
        "gold": GOOD,
        "text": f"<emotion>{emotion}</emotion>{reply}",
        "parse": reading,
        "finish": "stop",
        "r1": r1,
        "r2": 0.5,
        "R": r1 + 0.25,
        "advantage": advantage,
        "policy_versions": [3],
    } | changes


def group(number: int, *answers, **changes) -> list[dict]:
    named = {"sample_id": f"meld/train/d{number}/0"} | changes
    return [rollout(idx, *answer[:1], **answer[1], **named) for idx, answer in enumerate(answers)]


STEP_5 = [
    *group(1, (GOOD, {"r1": 1.0}), (GOOD, {"r1": 1.0}), (GOOD, {"r1": 0.9}), (BAD, {"r1": 0.1})),
    *group(
        2, (BAD, {"r1": 0.2}), (BAD, {"r1": 0.2}), (BAD, {"r1": 0.2, "reply": "Oar!"}), (BAD, {"r1": 0.05})
    ),
    *group(
        3,
        (GOOD, {"r1": 0.6}),
        ({}, {"r1": 0.0, "codes": ["E_LENGTH", "E_NO_REPLY"]}),
        ({}, {"r1": 0.0, "codes": ["E_NO_SELF"], "reply": "\x1b[2J"}),
        (BAD, {"r1": 0.3, "codes": ["W_CASE"]}),
        origin="synthetic",
        gold={"anger": 1.0},
        dataset="emorynlp",
    ),
]
STEP_6 = [
    *group(2, *[(GOOD, {"r1": 0.9, "step": 6})] * 4),
    *group(1, *[(GOOD, {"r1": 0.8, "step": 6})] * 4),
    *group(9, *[(GOOD, {"r1": 0.8, "step": 6})] * 4),
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for number, lines in ((5, STEP_5), (6, STEP_6)):
        path = step_file(folder, number, "jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    phases = [{"step": 4, "phase": "cold"}, {"step": 5, "phase": "rl_1"}, {"step": 6, "phase": "harvest_1"}]
    # A run that is going on: its last line is half written.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in phases) + '{"step": 7')
    return folder


def asked(capsys, run, *words) -> tuple[int, str, str]:
    code = browse.main([str(run), *words])
    found = capsys.readouterr()
    return code, found.out, found.err


def picked(capsys, run, *words) -> list[tuple[str, int]]:
    """(dialogue, index) of the rollouts that are chosen."""
    code, out, messages = asked(capsys, run, "--json", "--step", "5", *words)
    assert code == 0, messages
    lines = [json.loads(line) for line in out.splitlines()]
    return [(line["sample_id"].split("/")[2], line["idx"]) for line in lines]


def test_each_kind_finds_its_own(capsys, run):
    assert picked(capsys, run, "--show", "best") == [("d1", 0), ("d3", 0), ("d2", 0)]
    assert picked(capsys, run, "--show", "worst") == [("d2", 3), ("d1", 3), ("d3", 3)]
    assert picked(capsys, run, "--show", "malformed") == [("d3", 1), ("d3", 2)]
    # A malformed answer agrees with no label; d2 is of one mind.
    disagreeing = picked(capsys, run, "--show", "disagreeing")
    assert list(dict.fromkeys(name for name, _ in disagreeing)) == ["d3", "d1"] and len(disagreeing) == 8
    assert picked(capsys, run, "--show", "best", "--num", "1") == [("d1", 0)]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--set", "emorynlp"], ["d3"]),
        (["--origin", "original"], ["d1", "d2"]),
        (["--gold", "anger"], ["d3"]),
        (["--id", "d2/"], ["d2"]),
        (["--text", "OAR!"], ["d2"]),
        (["--text", "ferry"], ["d1", "d3", "d2"]),
        (["--label", "anger"], ["d1", "d3", "d2"]),
        (["--label", "joy"], ["d1", "d3"]),
        (["--label", "malformed"], ["d3"]),
        (["--code", "W_CASE"], ["d3"]),
        (["--origin", "original", "--label", "joy"], ["d1"]),
    ],
)
def test_filters_leave_the_inputs_that_fit(capsys, run, words, left):
    assert [name for name, _ in picked(capsys, run, *words)] == left


def test_a_code_narrows_the_malformed_answers(capsys, run):
    assert picked(capsys, run, "--show", "malformed", "--code", "E_LENGTH") == [("d3", 1)]


def test_steps_are_found_by_number_place_and_phase(run):
    assert [browse.find_step(run, words) for words in ("first", "last", "6", "rl_1", "harvest_1")] == [
        5,
        6,
        6,
        5,
        6,
    ]


def test_the_page_shows_the_numbers_the_dialogue_and_the_answer(capsys, run):
    code, out, _ = asked(capsys, run, "--step", "rl_1", "--show", "best", "--num", "1")
    assert code == 0
    assert "run:5" in out and "3, 12" in out and "83.3%" in out
    assert "Bo: Then we row." in out and "gold joy 1.00" in out
    assert "sees joy 1.00; feels joy 1.00; r1 1.00, r2 0.50, R 1.25, A 0.00" in " ".join(out.split())


def test_malformed_text_cannot_steer_the_terminal(capsys, run):
    _, out, _ = asked(capsys, run, "--step", "5", "--show", "malformed")
    assert "\x1b" not in out and "E_LENGTH E_NO_REPLY" in out


def test_two_steps_are_compared_input_by_input(capsys, run):
    code, out, _ = asked(capsys, run, "--step", "5", "--against", "last", "--num", "1")
    assert code == 0 and "2 inputs were answered on both sides" in out
    # d2 went from .1625 to .9, d1 from .75 to .8.
    assert "meld/train/d2/0" in out and "meld/train/d1/0" not in out
    assert "run:5: mean r1 0.16" in out and "run:6: mean r1 0.90" in out


def test_another_run_is_compared_at_its_own_step(capsys, run):
    for words in (f"{run}:5", str(run)):
        code, out, _ = asked(capsys, run, "--step", "first", "--against", words)
        assert code == 0 and ("3 inputs were answered" in out) == words.endswith(":5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "7"], "rl_1: 5 to 5; harvest_1: 6 to 6"),
        (["--step", "cold"], "no rollouts of it"),
        (["--num", "0"], "expected 1 or more"),
        (["--set", "iemocap"], "it holds sets emorynlp, meld, origins original, synthetic"),
        (["--against", "none:5"], "none: no such folder"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(capsys, run, words, message):
    code, out, messages = asked(capsys, run, *(["--step", "5"] if "--step" not in words else []), *words)
    assert code == 2 and message in messages and out == ""


def test_a_folder_without_rollouts_is_refused(capsys, tmp_path):
    assert browse.main([str(tmp_path)]) == 2
    assert "no rollouts in" in capsys.readouterr().err
    assert browse.main([str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err

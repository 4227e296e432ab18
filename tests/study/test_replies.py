"""Replies of two checkpoints: the same inputs in both, drawn by seed, and pages that no reply can break."""

import json

import pytest

from selfemo_jax.study.__main__ import main
from selfemo_jax.study.replies import distinct_bigrams, example, read_pairs
from tests import micro


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

"""The report of lengths: hand-counted groups, and what a run leaves and prints."""

import io
import json

import pytest
from rich.console import Console

from selfemo_jax import lengths
from selfemo_jax.config import Config
from selfemo_jax.config_io import load_config
from selfemo_jax.data.label_rows import Answered, Question
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.data.prompts import Prompt
from selfemo_jax.rollout.engine import Completion, Group, Request
from selfemo_jax.rollout.stream import Rollouts
from tests import micro


def config() -> Config:
    words = ["--data.max_prompt=64", "--rollout.max_tokens=9", "--batch.row_tokens=128"]
    return load_config([*words, "--batch.micro_rows=4"], prog="test")[0]


def completion(length: int, reason: str = "stop") -> Completion:
    return Completion(
        token_ids=tuple(range(length)),
        logprobs=(0.0,) * length,
        finish_reason=reason,
        policy_versions=(0,),
    )


def rollouts() -> Rollouts:
    prompts = [
        Prompt(token_ids=(1,) * length, think_open=False, num_dropped_turns=turns, sample_id="s")
        for length, turns in ((10, 0), (20, 2), (30, 0))
    ]
    groups = (
        Group(request_id="a", completions=(completion(3), completion(5))),
        Group(request_id="b", completions=(completion(9, "length"), completion(1))),
        Group(request_id="c", error="lost"),
    )
    requests = tuple(Request(id=g.request_id, token_ids=(1,), num=2, seed=0) for g in groups)
    batch = Batch(items=tuple((None, prompt) for prompt in prompts), state={})
    return Rollouts(batch=batch, requests=requests, groups=groups)


def test_rollouts_are_counted_by_prompt_completion_sequence_and_group():
    found = lengths.step_lengths(rollouts(), config())
    got = {name: (q["lengths"], q["budget"]) for name, q in found["quantities"].items()}
    # A sequence has one position less than tokens: its last token is only a target.
    assert got == {
        "prompt": ([10, 20], 64),
        "completion": ([3, 5, 9, 1], 9),
        "sequence": ([12, 14, 28, 20], 128),
        "group": ([17, 29], 128),
    }
    assert (found["completions_cut"], found["prompts_with_dropped_turns"]) == (1, 1)
    assert found["micro_batch_tokens"] == 4 * 128


def test_supervised_pairs_are_counted_without_groups():
    batch = Batch(items=(((1, 2, 3), (4, 5)), ((1,), (2, 3, 4))), state={})
    found = lengths.step_lengths(batch, config())
    got = {name: q["lengths"] for name, q in found["quantities"].items()}
    assert got == {"prompt": [3, 1], "completion": [2, 3], "sequence": [4, 3]}
    assert found["completions_cut"] is None


def test_answers_are_counted_dialogue_after_dialogue():
    def answered(prompt: int, completion: int) -> Answered:
        ids = {"prompt_ids": (1,) * prompt, "completion_ids": (2,) * completion}
        return Answered(**ids, window=("d1", 0), label_at=None)

    batch = Batch(items=([answered(9, 4), answered(12, 5)], [answered(7, 6)]), state={})
    found = lengths.step_lengths(batch, config())
    got = {name: q["lengths"] for name, q in found["quantities"].items()}
    assert got == {"prompt": [9, 12, 7], "completion": [4, 5, 6], "sequence": [12, 16, 12]}


def test_questions_are_counted_dialogue_after_dialogue(tmp_path):
    def question(length: int) -> Question:
        return Question(dataset="a", prompt_ids=(1,) * length, label=0, window=("d1", 0))

    batch = Batch(items=((question(9), question(12)), (question(7),)), state={})
    found = lengths.step_lengths(batch, config())
    assert found["quantities"] == {
        "question": {"limit": "batch.row_tokens", "budget": 128, "lengths": [9, 12, 7]}
    }
    content = lengths.report("labels", 1, found)
    assert content["quantities"]["question"]["max"] == 12 and lengths.table(content).row_count == 1
    lengths.save(tmp_path, "00_labels", content)
    assert (tmp_path / "00_labels.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_lengths_gives_none():
    assert lengths.step_lengths(Batch(items=("text",), state={}), config()) is None
    assert lengths.step_lengths(None, config()) is None


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([5], [5, 6], [1]),
        ([1, 1, 2, 4], [1, 2, 3, 4, 5], [2, 1, 0, 1]),
        ([0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6, 8], [2, 2, 2, 1]),
    ],
)
def test_bins_are_whole_tokens_and_hold_every_length(values, edges, counts):
    assert lengths.histogram(values, max_bins=4) == {"edges": edges, "counts": counts}


def test_numbers_are_those_of_the_lengths():
    found = lengths.summarise([2, 4, 9])
    assert (found["num"], found["min"], found["mean"], found["median"], found["max"]) == (3, 2, 5.0, 4.0, 9)
    assert found["p95"] == pytest.approx(8.5)


def test_the_table_fits_a_narrow_terminal_and_names_what_was_cut():
    content = lengths.report("rl_1", 1, lengths.step_lengths(rollouts(), config()))
    console = Console(file=io.StringIO(), width=80)
    console.print(lengths.table(content))
    text = console.file.getvalue()
    assert "rl_1, step 1: lengths in tokens; 1 completions cut off" in text
    row = next(line for line in text.splitlines() if "completion " in line and "│" in line)
    assert row.replace("│", " ").split()[:7] == ["completion", "4", "1", "4", "8", "9", "9"]
    assert max(map(len, text.splitlines())) <= 80


def test_a_resumed_phase_keeps_the_report_of_its_first_step(tmp_path):
    content = lengths.report("rl_1", 1, lengths.step_lengths(rollouts(), config()))
    lengths.save(tmp_path, "01_rl_1", content)
    lengths.save(tmp_path, "01_rl_1", content | {"step": 7})
    assert json.loads((tmp_path / "01_rl_1.json").read_text())["step"] == 1
    assert (tmp_path / "01_rl_1.png").read_bytes().startswith(b"\x89PNG")


def test_every_phase_of_a_run_leaves_its_lengths():
    run = micro.full_run()
    names = sorted(path.name for path in (run / "lengths").iterdir())
    assert [name for name in names if name.endswith(".json")] == [
        f"{folder}.json" for folder in sorted(path.name for path in (run / "phases").iterdir())
    ]
    assert [name.replace(".json", ".png") for name in names if name.endswith(".json")] == [
        name for name in names if name.endswith(".png")
    ]
    first = json.loads((run / "lengths" / "01_rl_1.json").read_text())
    line = next(line for line in micro.metrics(run) if line["phase"] == "rl_1")
    assert first["step"] == 1
    assert first["quantities"]["completion"]["mean"] == pytest.approx(line["completion/tokens_mean"])
    assert first["quantities"]["completion"]["num"] == sum(first["quantities"]["completion"]["counts"])

"""tunix's side of the benchmark: what it is fed and what is checked of its answers, and the real thing."""

import dataclasses
import json
import os
import queue
import re
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax.bench import process
from selfemo_jax.bench.contestants import contestants
from selfemo_jax.bench.settings import BenchSettings
from tools import bench_throughput
from tools.tunix_side.feed import PAD, Gate, Words, check_example, check_rollout, reward

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7], [8, 9]]
SIZES = {"model": "tiny", "groups": 2, "group_size": 2, "prompt": 12, "completion": 5}
HOW = {"rounds": 2, "platform": "cpu", "warmup": 0, "backend": "jax", "phases": "rl_step"}
TINY = [word for name, value in {**SIZES, **HOW}.items() for word in (f"--{name}", str(value))]


def sampled(**changed):
    """Two completions of 4 tokens for each prompt, as tunix's sampler answers."""
    found = {
        "tokens": [np.array([1, 0, 3, 10], np.int32)] * 4,
        "padded_prompts": np.array([[5, 6, 7], [5, 6, 7], [PAD, 8, 9], [PAD, 8, 9]], np.int32),
        **changed,
    }
    return check_rollout(**found, prompts=PROMPTS, num=2, length=4, vocab_size=11)


def test_a_prompt_as_text_is_its_own_ids_and_no_token_pads_or_ends():
    words = Words()
    assert words.encode(words.decode([0, 96, 3])) == [0, 96, 3]
    # tunix takes a false bos for none, and masks what equals its padding.
    assert words.bos_id() is None
    assert words.pad_id() < 0 and words.eos_id() < 0


def test_the_reward_is_the_share_of_even_tokens():
    assert reward(prompts=["5 6", "5 6"], completions=["1 2 3 4", "0 3 5 7"], mode="train") == [0.5, 0.25]


def test_a_whole_rollout_is_counted():
    assert sampled() == 16


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": [np.arange(4)] * 3 + [np.arange(3)]}, r"4 tokens were demanded.*\[4, 4, 4, 3\]"),
        ({"tokens": [np.arange(4)] * 3}, r"demanded of each of 4 rows"),
        ({"tokens": [np.array([1, 2, 3, 11])] * 4}, "sampled ids from 1 to 11, of a vocabulary of 11"),
        ({"tokens": [np.array([1, 2, 3, PAD])] * 4}, "sampled ids from -1"),
        ({"padded_prompts": np.array([[5, 6, 7], [PAD, 8, 9]])}, r"read prompts \(2, 3\)"),
        ({"padded_prompts": np.array([[5, 6, 7], [PAD, 8, 9], [5, 6, 7], [PAD, 8, 9]])}, "read prompts"),
    ],
)
def test_a_rollout_that_is_not_what_was_asked_for_has_no_time(changed, words):
    with pytest.raises(ValueError, match=words):
        sampled(**changed)


@dataclasses.dataclass
class Example:
    """The fields of tunix's that are read: 2 rows, prompts of 3 places, completions of 4 tokens."""

    prompt_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 3)))
    completion_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 4)))
    completion_mask: np.ndarray = dataclasses.field(default_factory=lambda: np.ones((2, 4), bool))
    ref_per_token_logps: np.ndarray | None = dataclasses.field(default_factory=lambda: np.zeros((2, 4)))
    advantages: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))


def test_an_update_on_other_rows_has_no_time():
    assert check_example(Example(), longest=3, length=4) == 2
    for changed in (
        {"prompt_ids": np.zeros((2, 4))},
        {"completion_ids": np.zeros((2, 3))},
        {"ref_per_token_logps": None},
        {"advantages": np.zeros((2, 4))},
    ):
        with pytest.raises(ValueError, match=f"updates on .*{next(iter(changed))}"):
            check_example(Example(**changed), longest=3, length=4)
    masked = np.array([[True] * 4, [True, True, True, False]])
    with pytest.raises(ValueError, match="tokens are masked"):
        check_example(Example(completion_mask=masked), longest=3, length=4)


def test_a_trainer_takes_one_step_for_each_call_and_ends_with_the_gate():
    taken: queue.Queue = queue.Queue()
    gate = Gate(PROMPTS)

    def train(data):
        for batch in data:
            taken.put(batch["prompts"].tolist())

    gate.start(train)
    for _ in range(3):
        assert gate.step() >= 0.0
        assert taken.get_nowait() == ["5 6 7", "8 9"]
        assert taken.empty()
    gate.close()
    assert gate._thread is not None and not gate._thread.is_alive()


@pytest.mark.parametrize(("error", "words"), [(ValueError("three tokens"), "three"), (None, "ended before")])
def test_what_ends_a_trainer_ends_the_step_that_waits_for_it_and_all_later_ones(error, words):
    gate = Gate(PROMPTS)

    def train(data):
        next(data)
        if error is not None:
            raise error

    gate.start(train)
    with pytest.raises((ValueError, RuntimeError), match=words):
        gate.step()
    with pytest.raises(RuntimeError, match="has failed before"):
        gate.step()
    gate.close()


def test_tunix_takes_part_in_the_whole_step_on_one_device_where_it_is_named():
    def sides(phase, **settings):
        entered = contestants(phase, BenchSettings(**settings), attentions=("sdpa",), trl=False)
        return {who.side for who in entered}

    assert sides("rl_step", tunix_python="p") == {"jax", "torch", "tunix"}
    assert sides("rl_step", tunix_python="p", backend="jax") == {"jax", "tunix"}
    assert "tunix" not in sides("rl_step")
    assert "tunix" not in sides("rl_step", tunix_python="p", devices=2)
    assert "tunix" not in sides("generate", tunix_python="p")


def test_its_process_is_started_like_that_of_the_jax_side(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SideProcess", lambda commands, envs, log: (commands[0], envs[0]))
    settings = BenchSettings(tunix_python="/its/python", platform="cpu", cores="0", jax_flags="--xla_x=1")
    started = {
        side: process.start_side(side, settings, tmp_path, devices=1, tools=ROOT / "tools")
        for side in ("jax", "tunix")
    }
    command, env = started["tunix"]
    assert command[:4] == ["taskset", "-c", "0", "/its/python"]
    assert command[-4:] == started["jax"][0][-4:] == ["--platform", "cpu", "--precision", "highest"]
    assert env["XLA_FLAGS"] == started["jax"][1]["XLA_FLAGS"]
    assert "--xla_x=1" in env["XLA_FLAGS"]


def test_tunix_side_imports_nothing_of_ours():
    for path in (ROOT / "tools" / "tunix_side").glob("*.py"):
        code = re.sub(r"(?s)\"\"\".*?\"\"\"|help=\"[^\"]*\"", "", path.read_text())
        assert "selfemo_jax" not in code, path.name


@pytest.mark.slow
def test_tunix_takes_a_step(tmp_path, monkeypatch):
    python = os.environ.get("SELFEMO_TUNIX_PYTHON")
    if python is None:
        pytest.skip("SELFEMO_TUNIX_PYTHON does not name the Python of an environment with google-tunix")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    out = tmp_path / "result.json"
    words = [*TINY, "--tunix_python", python, "--work", str(tmp_path / "work"), "--json", str(out)]
    assert bench_throughput.main(words) == 0
    found = json.loads(out.read_text())
    # What its sampler takes for the likeliest tokens is what ours does, or there would be no rows.
    assert found["unavailable"] == [] and found["disagreements"] == []
    rows = {row["side"]: row for row in found["rows"]}
    assert set(rows) == {"jax", "tunix"}
    assert rows["tunix"]["parts"].keys() == {"rollout_s", "reference_s", "update_s"}
    assert 0.0 < sum(rows["tunix"]["parts"].values()) <= rows["tunix"]["median_s"]
    assert rows["tunix"]["tokens"] == rows["jax"]["tokens"]
    assert [one["theirs"] for one in found["ratios"]] == ["tunix"]
    assert "google-tunix" in found["sides"]["tunix"]["versions"]

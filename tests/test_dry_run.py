"""The dry run prints what the run would do, and refuses what the run would refuse."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from selfemo_jax import dry_run
from selfemo_jax.config import Config
from selfemo_jax.config_io import config_folder, read_config
from selfemo_jax.data.dialogues import IEMOCAP, MELD, Dialogue, Turn
from selfemo_jax.settings.model import ModelSection, Shape
from selfemo_jax.settings.selfplay import Flywheel, Retrain
from tests.fabricated import run_data, sample, settings

QWEN3_4B = Shape(
    num_layers=36,
    embed_dim=2560,
    mlp_dim=9728,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
)


@pytest.fixture(autouse=True)
def fabricated_data(monkeypatch):
    # The simulated devices of all tests exist before a run asks for one device.
    assert len(jax.devices()) == 8
    train = {
        labels.name: [
            sample(n, labels=labels, dialogue=f"d{n}", gold={labels.labels[0]: 1.0}) for n in range(number)
        ]
        for labels, number in ((MELD, 40), (IEMOCAP, 10))
    }
    monkeypatch.setattr(dry_run, "load_data", lambda config: run_data(train))


def described(config: Config, capsys) -> str:
    dry_run.describe(config)
    return capsys.readouterr().out


def rows(text: str) -> dict[str, list[str]]:
    """First cell of each table row -> the other cells."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


def test_phases_with_their_steps_and_what_they_leave_on_disk(capsys):
    config = settings(
        rl={"epochs": 2.0, "prompts_per_step": 4, "mini_prompts": 2, "group_size": 4},
        cold_start={"epochs": 2.0, "batch_size": 16},
        rollout={"max_tokens": 64},
    )
    text = described(config, capsys)
    assert "training inputs: 50 (meld 40, iemocap 10)" in text
    assert "4 prompts x 4 rollouts, 2 optimizer updates" in text
    found = rows(text)
    # 100 examples by 16; 100 prompts by 4; 25 steps of 16 rollouts of 64 tokens of 14 bytes: .34 MiB; three
    # turns of 50 dialogues in one call each, 4 rollouts a dialogue: .51 MiB.
    assert found["cold"] == ["sft", "base", "original", "7", "-"]
    assert found["rl_1"] == ["rl", "cold", "original", "25", "0.3"]
    assert found["harvest_1"] == ["harvest", "rl_1", "original", "3", "0.5"]
    assert found["rl_final"] == ["rl", "cold", "original + harvest_1", "25 or more", "0.3"]


@pytest.mark.parametrize(("keep", "mebibytes"), [("all", "13.7"), ("last 10", "0.1"), ("every 3", "4.6")])
def test_the_size_on_disk_follows_the_keep_rule(keep, mebibytes, capsys):
    config = settings(rl={"steps": 1000}, rollout={"keep": keep, "max_tokens": 64})
    assert rows(described(config, capsys))["rl_final"][3:] == ["1000", mebibytes]


def test_a_harvest_answers_at_most_max_inputs_and_sft_on_it_is_of_unknown_length(capsys):
    wheel = {"max_inputs": 9, "dialogues_per_step": 4, "retrain": {"init": "cold", "method": "sft"}}
    found = rows(described(settings(flywheel=wheel), capsys))
    # Three calls of at most four dialogues for each of three turns.
    assert found["harvest_1"][3] == "9"
    assert found["sft_2"] == ["sft", "cold", "harvest_1", "?", "-"]


def test_weights_are_listed_with_their_place_on_the_mesh(capsys):
    config = settings(mesh="fsdp=4,tp=2", batch={"row_tokens": 256, "micro_rows": 4})
    text = described(config, capsys)
    assert "mesh fsdp=4 tp=2: 8 CPU devices are simulated on" in text
    found = {name: cells for name, cells in rows(text).items() if "down" in name}
    ((shape, split, kib),) = found.values()
    # F 384 by D 128 of four layers in float32, over eight devices.
    assert (shape, kib) == ("(4, 384, 128)", "96.0")
    assert "fsdp" in split and "tp" in split
    assert "whole on each device" in text


def test_the_plan_of_the_4b_model_needs_no_weights(capsys):
    config = read_config(config_folder() / "qwen3_4b.yaml")
    config = replace(config, platform="cpu", model=replace(config.model, path=None, shape=QWEN3_4B))
    text = described(config, capsys)
    found = rows(text)
    assert [name for name in found if name in ("cold", "rl_1", "harvest_1", "rl_final")] == [
        "cold",
        "rl_1",
        "harvest_1",
        "rl_final",
    ]
    assert found["rl_final"][:3] == ["rl", "base", "original + harvest_1"]
    assert "64 prompts x 8 rollouts, 2 optimizer updates" in text
    layer = 2560 * (32 + 8 + 8 + 32) * 128 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    total = 36 * layer + 1920 * 2560 + 2560  # the bundled tokenizer has 1920 tokens
    assert re.search(r"qwen3 ([0-9.]+) M parameters", text)[1] == f"{total / 1e6:.2f}"
    ((shape, _, kib),) = [cells for name, cells in found.items() if "down" in name]
    assert (shape, kib) == ("(36, 9728, 2560)", f"{36 * 9728 * 2560 * 4 / 8 / 1024:.1f}")


def test_the_default_configuration_is_described(capsys):
    found = rows(described(read_config(config_folder() / "tiny.yaml"), capsys))
    assert {"cold", "rl_1", "harvest_1", "rl_final"} <= set(found)


def test_a_mesh_that_does_not_divide_the_model_is_refused(capsys):
    with pytest.raises(ValueError, match="tp"):
        dry_run.describe(settings(mesh="tp=8", model={"shape": {"num_kv_heads": 2}}))


def test_a_tokenizer_that_is_not_there_is_named():
    config = Config(flywheel=Flywheel(retrain=Retrain(init="cold")), platform="cpu")
    config = replace(config, model=ModelSection(tokenizer="no/such/folder"))
    with pytest.raises((ValueError, OSError), match="no/such/folder"):
        dry_run.describe(config)


def test_a_gpu_run_without_a_gpu_says_what_was_found():
    code = (
        "from selfemo_jax.devices import prepare\n"
        "try:\n"
        "    prepare({'data': 1, 'fsdp': 1, 'tp': 1}, platform='gpu')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "platform gpu: JAX finds no such device" in done.stdout, done.stderr
    assert "set platform to cpu" in done.stdout


def test_phase_on_labels_counts_dialogues(capsys):
    config = settings(
        cold_start={"labels": {"epochs": 0.5, "batch_size": 4}, "rows": "dialogues"},
        flywheel={"iterations": 0, "retrain": {"init": "cold"}},
    )
    found = rows(described(config, capsys))
    # No dialogue of the fabricated data has lines of its own; the cold start has 50, two passes of them.
    assert found["labels"][:2] == ["labels", "base"] and found["labels"][3] == "0"
    assert found["cold"][:2] == ["sft", "labels"] and found["cold"][3] == "2"


def test_a_cold_start_on_all_lines_counts_all_dialogues(capsys, monkeypatch):
    turns = tuple(Turn(speaker=name, text="a line", labels={"joy": 1.0}) for name in ("Ada", "Bo"))
    dialogues = {
        f"meld/train/d{n}": Dialogue(dataset="meld", split="train", dialogue_id=f"d{n}", turns=turns)
        for n in range(12)
    }
    data = replace(run_data({"meld": [sample(1, dialogue="d0", gold={"joy": 1.0})]}), dialogues=dialogues)
    monkeypatch.setattr(dry_run, "load_data", lambda config: data)
    cold = {"rows": "dialogues", "lines": "all", "epochs": 2.0, "batch_size": 4}
    found = rows(described(settings(cold_start=cold, phases="cold"), capsys))
    assert found["cold"][3] == "6"

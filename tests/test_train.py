"""The default command end to end: every file and metric it promises, and what it refuses."""

import json
from unittest.mock import MagicMock

import numpy as np
import pytest

from selfemo_jax import train
from selfemo_jax.config import Config, DataSection
from selfemo_jax.config_io import read_config
from selfemo_jax.phases import Phase
from tests import micro

STEP = {"step", "phase", "phase_step", "time/step", "perf/tokens_per_s", "memory/host_peak_gib"}
UPDATE = {"loss", "lr", "grad_norm"}
REWARD = {"reward/r1", "reward/r2", "reward/total", "group/share_r2_only", "parse/valid"}
RL = {"kl", "clip_fraction", "rollout_gap/mean"}
RL |= {f"time/{part}" for part in ("rollout", "reward", "reference", "update")}
SETS = ("sample_meld", "sample_emorynlp", "sample_iemocap")


@pytest.fixture(scope="module")
def base():
    return micro.base_run()


@pytest.fixture(scope="module")
def full(base):
    return micro.full_run()


def test_a_run_leaves_the_files_of_its_folder(full):
    files = (
        "config.yaml env.json metrics.jsonl flywheel.jsonl eval/final.json eval/dev.json "
        "eval/dev_predictions.jsonl checkpoints/best/config.json report.html"
    )
    assert [name for name in files.split() if not (full / name).is_file()] == []
    assert list((full / "checkpoints" / "states").iterdir())
    phases = sorted(path.name for path in (full / "phases").iterdir())
    assert phases == ["00_cold", "01_rl_1", "02_harvest_1", "03_rl_final"]
    assert all((full / "phases" / name / "DONE").exists() for name in phases)
    assert not list(full.rglob("*.partial")), "something was not finished"
    config = read_config(full / "config.yaml")
    assert config.rl.group_size == micro.SIZES["rl.group_size"]


def test_every_step_is_a_line_with_the_metrics_of_its_kind(full):
    lines = micro.metrics(full)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    kinds = {line["phase"] for line in lines}
    assert kinds == {"cold", "rl_1", "harvest_1", "rl_final"}
    for line in lines:
        expected = set(STEP)
        expected |= UPDATE if line["phase"] != "harvest_1" else set()
        expected |= REWARD if line["phase"] != "cold" else set()
        expected |= RL if line["phase"].startswith("rl") else set()
        assert expected <= line.keys(), (line["phase"], expected - line.keys())
        assert all(value is not None for value in line.values()), line
    learned = [line for line in lines if line["phase"] == "cold"]
    for line in learned:
        assert sum(line.get(f"data/{name}", 0) for name in SETS) == micro.SIZES["cold_start.batch_size"]
    scored = [line for line in lines if line["phase"] == "rl_final"]
    assert all("dev/sample_meld/wf1" in line for line in scored)


def test_the_rewards_of_the_run_are_not_all_alike(full):
    # Without this, what other tests compare between runs would be zeros.
    rl = [line for line in micro.metrics(full) if line["phase"].startswith("rl")]
    assert any(line["reward/total"] > 0 for line in rl)
    assert any(line["grad_norm"] > 0 for line in rl)
    accepted = [json.loads(line)["accepted"] for line in (full / "flywheel.jsonl").read_text().splitlines()]
    assert any(accepted) and not all(accepted)


def test_rollouts_are_kept_for_each_sampled_step(full):
    sampled = [line["step"] for line in micro.metrics(full) if line["phase"] != "cold"]
    for suffix in ("npz", "jsonl"):
        steps = sorted(int(path.stem[5:]) for path in (full / "rollouts").glob(f"*.{suffix}"))
        assert steps == sampled
    lines = (full / "rollouts" / f"step_{sampled[0]:06d}.jsonl").read_text().splitlines()
    assert len(lines) == micro.SIZES["rl.prompts_per_step"] * micro.SIZES["rl.group_size"]
    assert {"text", "parse", "r1", "r2", "R", "advantage", "policy_versions"} <= json.loads(lines[0]).keys()


def test_the_environment_names_code_versions_devices_and_data(full):
    env = json.loads((full / "env.json").read_text())
    assert {"commit", "versions", "devices", "data"} <= env.keys()
    assert env["versions"]["jax"] and len(env["data"]["inputs"]) == 64


def test_scores_carry_the_note_of_a_plumbing_run(base, full):
    for folder in (base, full):
        final = json.loads((folder / "eval" / "final.json").read_text())
        assert micro.NOTE in final["note"]
        assert final["splits"]["dev"]["note"] == final["note"]
        assert final["best"]["phase"] == "rl_final"
        assert all("TF-IDF + LR" in final["splits"]["dev"]["yardsticks"][name] for name in SETS)


def test_a_second_start_in_the_same_folder_is_refused(base, capsys):
    before = (base / "metrics.jsonl").read_bytes()
    assert micro.run(base, *micro.random_settings()) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (base / "metrics.jsonl").read_bytes() == before


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert train.main([f"--run_dir={tmp_path / 'run'}", "--dry_run", *micro.random_settings()]) == 0
    assert "rl_final" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_rate_of_zero_leaves_the_weights_as_they_were(tmp_path):
    only_rl = {"cold_start__source": "none", "flywheel__iterations": 0, "rl__steps": 1, "optim__lr": 0}
    assert micro.run(tmp_path, *micro.settings(**only_rl)) == 0
    assert micro.metrics(tmp_path)[0]["grad_norm"] > 0
    micro.assert_same_weights(micro.base_policy(), tmp_path / "phases" / "00_rl_final" / "weights")


def test_training_moves_the_weights(full):
    cold, final = (micro.arrays(full / "phases" / name / "weights") for name in ("00_cold", "03_rl_final"))
    base = micro.arrays(micro.base_policy())
    assert any(np.any(base[name] != cold[name]) for name in base)
    assert any(np.any(cold[name] != final[name]) for name in cold)


class Reached(Exception):
    """The page asked for its stream of inputs."""


@pytest.mark.parametrize("page", [train.supervised, train.self_grpo])
def test_every_phase_reads_with_the_workers_of_the_settings(page, monkeypatch):
    asked = {}

    def input_stream(sources, weights, encode, **settings):
        asked.update(settings)
        raise Reached

    monkeypatch.setattr(train, "input_stream", input_stream)
    phase = Phase(index=0, kind="sft", name="cold", iteration=0, init="base", buffer=("original",))
    run = MagicMock(config=Config(data=DataSection(num_workers=3)))
    run.start.return_value = (None, MagicMock(step=0, iterator=None))
    with pytest.raises(Reached):
        page(run, phase)
    assert asked["num_workers"] == 3

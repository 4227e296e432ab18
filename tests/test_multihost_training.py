"""A whole run of two processes against that of one: the losses, the files, and who may go on with it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax.config_io import read_config
from tests import micro
from tests.test_multihost import PATIENCE, ended, free_port, wait_for

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def settings(**changes) -> list[str]:
    """Every phase in a few steps from random weights; no answer earns anything, so the entropy bonus is what
    the updates of RL have to do."""
    few = {
        **{f"model.shape.{name}": value for name, value in micro.SHAPE.items()},
        **micro.SIZES,
        "mesh": 8,
        "data.max_items": 32,
        "cold_start.num": 32,
        "cold_start.epochs": 1,
        "flywheel.max_inputs": 8,
        "flywheel.max_depth": 1,
        "flywheel.dialogues_per_step": 8,
        "loss.entropy_coef": 0.02,
        "eval.max_items": 2,
        "eval.final_splits": "[]",
        "checkpoint.every": 1,
    }
    return micro.flags(few | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process on eight simulated devices."""
    folder = tmp_path_factory.mktemp("one")
    assert micro.run(folder, *settings()) == 0
    return folder


def start(folder: Path, *words: str) -> list[subprocess.Popen]:
    port = free_port()
    command = [sys.executable, "-m", "selfemo_jax.train", f"--run_dir={folder}", *words]
    launch = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--host_timeout={PATIENCE}"]
    return [
        subprocess.Popen(
            [*command, *launch, f"--process_id={index}"],
            cwd=ROOT, env=micro.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> tuple[Path, list[str]]:
    """The same with two processes of four devices each, on the rollouts of the first run; what they print."""
    folder = tmp_path_factory.mktemp("two")
    done = ended(start(folder, *settings(rollout__replay=one)), patience=5 * PATIENCE)
    assert [status for status, _ in done] == [0, 0], [words[-3000:] for _, words in done]
    return folder, [words for _, words in done]


def losses(folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in micro.metrics(folder) if "loss" in line])


def test_two_processes_have_the_losses_of_one(one, two):
    expected, found = losses(one), losses(two[0])
    assert len(expected) == 6 and np.abs(expected).min() > 1e-3, "losses of zero would prove nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_folder_of_two_processes_is_that_of_one(one, two):
    folder, _ = two
    assert [(x["step"], x["phase"]) for x in micro.metrics(folder)] == [
        (x["step"], x["phase"]) for x in micro.metrics(one)
    ]
    assert (folder / "flywheel.jsonl").read_bytes() == (one / "flywheel.jsonl").read_bytes()
    assert (folder / "flywheel.jsonl").stat().st_size > 0
    for pattern in ("rollouts/*", "phases/*/*", "lengths/*", "eval/*", "checkpoints/states/*"):
        names = [sorted(str(p.relative_to(run)) for p in run.glob(pattern)) for run in (one, folder)]
        assert names[0] == names[1], pattern
    assert not list(folder.rglob("*.partial"))


def test_weights_of_two_processes_are_read_by_one(one, two):
    for name in ("00_cold", "03_rl_final"):
        first, second = (micro.arrays(run / "phases" / name / "weights") for run in (one, two[0]))
        assert first.keys() == second.keys()
        for key, values in first.items():
            np.testing.assert_allclose(second[key], values, rtol=0, atol=2e-3, err_msg=key)


def test_only_the_first_process_prints_steps(two):
    words = two[1]
    assert "cold step 1" in words[0] and "4 in each of 2 processes" in words[0]
    assert "cold step" not in words[1] and "report:" not in words[1]


def test_a_stop_of_one_process_stops_both_and_one_alone_goes_on(one, tmp_path):
    processes = start(tmp_path, *settings(rollout__replay=one))
    try:
        wait_for(tmp_path / "metrics.jsonl", patience=5 * PATIENCE)
        while not micro.metrics(tmp_path):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        done = ended(processes, patience=5 * PATIENCE)
    finally:
        for process in processes:
            process.kill()
    assert [status for status, _ in done] == [75, 75], [words[-3000:] for _, words in done]
    steps = len(micro.metrics(tmp_path))
    assert steps < len(micro.metrics(one))
    assert read_config(tmp_path / "config.yaml").mesh == "8"
    assert micro.run(tmp_path, "--resume") == 0
    assert [line["step"] for line in micro.metrics(tmp_path)] == [line["step"] for line in micro.metrics(one)]
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=0, atol=1e-5)

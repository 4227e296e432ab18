"""Recorded rollouts give the same losses again: every bit on the same mesh, 1e-5 on another."""

import numpy as np
import pytest

from tests import micro


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of three RL steps alone, so that a replay on eight simulated devices is short."""
    folder = tmp_path_factory.mktemp("recorded")
    assert micro.run(folder, *settings()) == 0
    return folder


def settings(**changes) -> list[str]:
    few = {"cold_start__source": "none", "flywheel__iterations": 0, "rl__steps": 3, "eval__every": 0}
    return micro.settings(**few, checkpoint__every=1000, **changes)


def losses(run_dir) -> np.ndarray:
    return np.array([line["loss"] for line in micro.metrics(run_dir)])


def test_a_replay_of_every_phase_is_equal_to_the_last_bit(tmp_path):
    full = micro.full_run()
    assert micro.run(tmp_path, *micro.settings(rollout__replay=full)) == 0
    micro.assert_same_runs(full, tmp_path)


@pytest.mark.parametrize("mesh", ["8", pytest.param("fsdp=4,tp=2", marks=pytest.mark.slow)])
def test_a_replay_on_another_mesh_has_the_same_losses(recorded, tmp_path, mesh):
    assert micro.run(tmp_path, *settings(rollout__replay=recorded, mesh=mesh)) == 0
    first, second = losses(recorded), losses(tmp_path)
    assert np.abs(first).max() > 1e-3, "losses of zero would prove nothing"
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-5)


def test_a_replay_with_other_prompts_is_refused(recorded, tmp_path, capsys):
    assert micro.run(tmp_path, *settings(rollout__replay=recorded, seed=1)) == 2
    assert "holds another prompt" in capsys.readouterr().err


def test_a_replay_of_another_group_size_is_refused(recorded, tmp_path, capsys):
    assert micro.run(tmp_path, *settings(rollout__replay=recorded, rl__group_size=2)) == 2
    assert "rl.group_size is 2" in capsys.readouterr().err

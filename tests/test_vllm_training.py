"""Training on rollouts of servers: one command, with real vLLM where it is installed, else with the fake."""

import sys
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax import serving
from selfemo_jax.rollout.records import load_groups
from selfemo_jax.rollout.supervisor import PYTHON_VARIABLE, sidecar_python
from tests import micro
from tests.rollout.fake_vllm import FakeServers
from tests.rollout.served import fault

ROOT = Path(__file__).parents[1]
STEPS = 3


def settings(**changes) -> list[str]:
    """Cold start and RL of a random policy of two layers, with a head size that vLLM serves on a CPU."""
    shape = micro.SHAPE | {"num_layers": 2, "embed_dim": 64, "mlp_dim": 128, "head_dim": 32}
    values = {f"model.shape.{name}": value for name, value in shape.items()} | micro.SIZES
    few = {
        "cold_start.num": 48,
        "cold_start.epochs": 2,
        "flywheel.iterations": 0,
        "rl.steps": STEPS,
        "rollout.engine": "vllm",
        "eval.final_splits": "[]",
    }
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return micro.flags(values | few | changed)


def rl_lines(run_dir) -> list[dict]:
    return [line for line in micro.metrics(run_dir) if line["phase"].startswith("rl")]


def versions(run_dir) -> list[set[int]]:
    """Policy versions of each recorded step, in order."""
    found = []
    for path in sorted((run_dir / "rollouts").glob("*.npz")):
        _, groups = load_groups(path)
        assert all(group.error is None for group in groups)
        found.append({v for group in groups for c in group.completions for v in c.policy_versions})
    return found


@pytest.fixture
def fake_servers(monkeypatch):
    """`rollout.engine: vllm` starts the fake."""
    started = []

    def start(settings, folder, run_dir, root, longest):
        started.append(FakeServers(folder, root, replicas=settings.replicas, delay=0.05))
        return started[-1]

    monkeypatch.setattr(serving, "_start", start)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    return started


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_command_trains_on_rollouts_of_vllm_that_are_the_trainers_own(tmp_path, tied):
    try:
        python = sidecar_python(str(ROOT / ".venv-vllm"))
    except ValueError as error:
        pytest.skip(f"no vLLM: {error}")
    words = settings(
        rollout__sidecar__environment=python,
        rollout__sidecar__start_timeout=400,
        model__shape__tie_embeddings=str(tied).lower(),
    )
    assert micro.run(tmp_path, *words) == 0
    assert_trained_on_its_own(tmp_path)


@pytest.mark.slow
def test_one_command_trains_on_rollouts_of_the_fake_and_replays(tmp_path, fake_servers):
    live, again = tmp_path / "live", tmp_path / "again"
    assert micro.run(live, *settings(rollout__sidecar__replicas=2)) == 0
    assert_trained_on_its_own(live)
    assert len(fake_servers) == 1, "one start serves cold start, RL and scores"
    assert sorted(int(path.name) for path in (live / "weights").iterdir())[-1] >= STEPS
    assert len(list((live / "weights").iterdir())) <= 3, "old versions are cleaned"
    # What was sampled elsewhere gives the same losses again, without any server.
    assert micro.run(again, *settings(rollout__engine="jax", rollout__replay=live)) == 0
    assert [line["loss"] for line in rl_lines(again)] == [line["loss"] for line in rl_lines(live)]
    assert len(fake_servers) == 1


def assert_trained_on_its_own(run_dir):
    lines = rl_lines(run_dir)
    assert len(lines) == STEPS
    for line in lines:
        assert 0 < line["rollout_gap/dlogp_mean"] < 1e-4
        assert line["rollout_gap/dlogp_mean"] <= line["rollout_gap/dlogp_max"] < 1e-3
        assert line["rollout_gap/mean"] < 1e-4 and abs(line["rollout_gap/ratio"] - 1) < 1e-4
        assert line["sync/by_digests"] == 0.0, "each of these updates is seen in log-probs"
        assert line["sync/canary_slope"] == pytest.approx(1.0, abs=0.05)
        assert line["group/lost"] == 0
    assert lines[-1]["sync/slope"] == pytest.approx(1.0, abs=0.1)
    first = lines[0]["step"]
    assert versions(run_dir) == [{first - 1 + n} for n in range(STEPS)], "the policy before the step's update"


@pytest.mark.slow
def test_overlap_trains_on_rollouts_one_update_older_and_corrects_for_them(tmp_path, fake_servers):
    assert micro.run(tmp_path, *settings(rollout__overlap=1, loss__importance="token", rl__steps=4)) == 0
    lines = rl_lines(tmp_path)
    first = lines[0]["step"] - 1
    assert versions(tmp_path)[:2] == [{first}, {first}]
    for step, found in enumerate(versions(tmp_path)):
        assert found <= {first + max(0, step - 1), first + step}
    gaps = np.array([line["rollout_gap/dlogp_mean"] for line in lines])
    assert gaps[0] < 1e-4 < gaps[1:].max(), "the first step is on policy, later ones are behind"
    assert any(line.get("rollout/hidden_s", 0) > 0 for line in lines[1:])
    assert all("rollout_gap/ratio_lowest" in line for line in lines)


@pytest.mark.slow
def test_a_run_whose_servers_serve_something_else_stops_and_says_why(tmp_path, monkeypatch, capsys):
    def start(settings, folder, run_dir, root, longest):
        servers = FakeServers(folder, root)
        fault(servers, stale_layer=0)
        return servers

    monkeypatch.setattr(serving, "_start", start)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert micro.run(tmp_path, *settings()) == 1
    assert "is not proven: served log-probs differ from the trainer's" in capsys.readouterr().err
    assert not list((tmp_path / "rollouts").glob("*")) if (tmp_path / "rollouts").exists() else True


def test_a_run_without_the_servers_environment_ends_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert micro.run(tmp_path, *settings(rollout__sidecar__environment=tmp_path / "none")) == 2
    assert "tools/vllm_sidecar.py setup" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"rollout__overlap": 1}, "nothing corrects for it"),
        ({"rollout__overlap": 2, "loss__importance": "token"}, "may run one step ahead"),
        ({"rollout__engine": "jax", "rollout__overlap": 1, "loss__importance": "token"}, "trainer's devices"),
        ({"rollout__top_p": 0.9, "loss__importance": "token"}, "the ratio of trainer and sampler"),
        ({"rollout__top_k": 20, "loss__importance": "sequence"}, "the ratio of trainer and sampler"),
        (
            {"rollout__sidecar__on_unproven": "rollback"},
            "after a rollback rollouts come from an older policy",
        ),
        ({"rollout__sidecar__probes": 7}, "expected 8 or more"),
    ],
)
def test_settings_that_would_train_on_the_wrong_distribution_are_refused(tmp_path, capsys, words, reason):
    assert micro.run(tmp_path, *settings(**words)) == 2
    assert reason in " ".join(capsys.readouterr().err.split())

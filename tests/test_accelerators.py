"""What is set for a GPU before JAX sees it, on a machine that has none."""

import os
import subprocess
import sys

import pytest

from selfemo_jax.accelerators import memory_settings, memory_share, platform_of, visible_gpus
from selfemo_jax.bench import process
from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.parts import taken_by_servers
from tests.fabricated import settings

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
ASKED = """
import os
from selfemo_jax.devices import prepare
try:
    prepare({"data": 1, "fsdp": 1, "tp": 1}, platform=%r, taken=%r)
except ValueError:
    pass
print([os.environ.get(name) for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")])
print("--xla_cpu" in os.environ["XLA_FLAGS"])
"""


@pytest.mark.parametrize(
    ("given", "share", "added"),
    [({}, 0.92, {NAMES[0]: "0.92"}), ({NAMES[0]: ".6"}, 0.6, {}), ({NAMES[1]: ".55"}, 0.55, {})],
)
def test_a_share_of_the_user_s_stays(given, share, added):
    assert (memory_share(given), memory_settings(given)) == (share, added)


@pytest.mark.parametrize(
    ("platform", "taken", "given", "expected"),
    [
        ("gpu", 0.0, {}, ["0.92", None]),
        ("gpu", 0.0, {NAMES[1]: ".55"}, [None, ".55"]),
        ("gpu", 0.35, {}, ["0.57", None]),
        ("gpu", 0.35, {NAMES[1]: ".55"}, [None, ".55"]),
        ("cpu", 0.35, {}, [None, None]),
    ],
)
def test_a_run_takes_its_share_of_a_gpu_before_jax_sees_it(platform, taken, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in (*NAMES, "XLA_FLAGS")}
    found = subprocess.run(
        [sys.executable, "-c", ASKED % (platform, taken)], env=environment | given, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == [str(expected), str(platform == "cpu")]


@pytest.mark.parametrize(
    ("given", "taken", "told"),
    [
        ({}, 0.85, "memory_share is 0.85 of each GPU.*that leaves JAX 0.07; .*lower memory_share"),
        ({NAMES[1]: ".75"}, 0.35, "XLA_PYTHON_CLIENT_MEM_FRACTION gives JAX 0.75; expected at most 1 "),
        ({NAMES[0]: ".1"}, 0.35, "gives JAX 0.1; .* at least 0.2 for JAX"),
    ],
)
def test_a_server_and_a_trainer_that_do_not_fit_on_a_gpu_are_refused(given, taken, told):
    with pytest.raises(ValueError, match=told):
        memory_settings(given, taken=taken)


def test_servers_on_the_run_s_own_gpus_are_seen():
    def taken(**sidecar) -> float:
        config = settings(rollout={"engine": "vllm", "sidecar": sidecar})
        return taken_by_servers(config, ("0", "1", "2", "3"))

    assert taken() == taken(devices=[3], replicas=1) == 0.85
    assert taken(devices=[3], replicas=1, memory_share=0.4) == 0.4
    assert taken(devices=[4], replicas=1) == taken(attach=["http://10.0.0.1:8000"]) == 0.0
    assert taken_by_servers(settings(), ("0",)) == 0.0


def test_jax_gets_as_much_of_the_gpu_as_pytorch_in_the_benchmark(tmp_path, monkeypatch):
    for name in (*NAMES, "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process, "SideProcess", lambda commands, envs, log: envs)

    def env(side: str, **own: str) -> dict[str, str]:
        chosen = BenchSettings(platform="gpu", env=own)
        return process.start_side(side, chosen, tmp_path, devices=1, tools=tmp_path)[0]

    assert env("jax")[NAMES[0]] == "0.92" and NAMES[0] not in env("torch")
    assert NAMES[0] not in env("jax", **{NAMES[1]: ".8"})
    # Patience with simulated devices is nothing to a GPU.
    assert "--xla_cpu" not in env("jax")["XLA_FLAGS"]


def test_what_the_environment_hides_is_not_counted(monkeypatch):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert platform_of("auto", {"JAX_PLATFORMS": "cpu"}) == "cpu"
    assert [platform_of(name, {}) for name in ("cpu", "gpu")] == ["cpu", "gpu"]
    assert platform_of("auto", {"CUDA_VISIBLE_DEVICES": ""}) == "cpu"

"""What is set for a GPU before JAX sees it, on a machine that has none."""

import os
import subprocess
import sys

import pytest

from selfemo_jax import parts
from selfemo_jax.accelerators import memory_settings, memory_share, platform_of, visible_gpus
from selfemo_jax.bench import process
from selfemo_jax.bench.settings import BenchSettings
from tests.fabricated import settings

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
ASKED = """
import os
from selfemo_jax.devices import prepare
try:
    prepare({"data": 1, "fsdp": 1, "tp": 1}, platform=%r, alone=%r)
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
    ("platform", "alone", "given", "expected"),
    [
        ("gpu", True, {}, ["0.92", None]),
        ("gpu", True, {NAMES[1]: ".55"}, [None, ".55"]),
        ("gpu", False, {}, [None, None]),
        ("cpu", True, {}, [None, None]),
    ],
)
def test_a_run_takes_its_share_of_a_gpu_before_jax_sees_it(platform, alone, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in (*NAMES, "XLA_FLAGS")}
    found = subprocess.run(
        [sys.executable, "-c", ASKED % (platform, alone)], env=environment | given, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == [str(expected), str(platform == "cpu")]


def test_servers_on_the_run_s_own_gpus_are_seen(monkeypatch):
    monkeypatch.setattr(parts, "visible_gpus", lambda: ("0", "1", "2", "3"))

    def beside(**sidecar) -> bool:
        return parts._beside_servers(settings(rollout={"engine": "vllm", "sidecar": sidecar}))

    assert beside() and beside(devices=[3], replicas=1) and not beside(devices=[4], replicas=1)
    assert not beside(attach=["http://10.0.0.1:8000"])
    assert not parts._beside_servers(settings())


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

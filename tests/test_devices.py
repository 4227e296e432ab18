"""Simulated devices of a CPU must not starve each other of threads."""

import json
import subprocess
import sys

import pytest

from selfemo_jax.devices import THREADS_PER_DEVICE, thread_settings
from tests import micro

THREADS = """
import json
from pathlib import Path
from selfemo_jax import devices
mesh, _ = devices.prepare({"fsdp": 8}, platform="cpu")
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(json.dumps([len(mesh.devices.ravel()), sum(name.endswith("XLAEigen") for name in names)]))
"""


def test_one_device_and_a_number_of_the_user_s_are_left_alone():
    assert thread_settings(1, {}) == {}
    assert thread_settings(8, {"NPROC": "12"}) == {}
    assert int(thread_settings(64, {})["NPROC"]) >= 64 * THREADS_PER_DEVICE


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_every_simulated_device_may_wait_in_several_collectives():
    environment = {name: value for name, value in micro.environment().items() if name != "NPROC"}
    environment["XLA_FLAGS"] = ""
    found = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout.splitlines()[-1]) == [8, THREADS_PER_DEVICE * 8]

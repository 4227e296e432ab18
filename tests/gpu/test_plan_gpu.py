"""What an update takes of an NVIDIA GPU's memory against what was planned; run with `-s` to see it.

python -m pytest --noconftest -m gpu -s tests/gpu
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cuda_device() -> jax.Device:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {str(error).splitlines()[0]}")


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ({"compute_dtype": "bfloat16"}, {"micro_rows": 32}),
        ({"compute_dtype": "bfloat16", "remat": "full"}, {"micro_rows": 16, "logprobs_at_once": 8}),
    ],
)
def test_an_update_takes_what_was_planned(tmp_path, cuda_device, model, batch):
    command = [sys.executable, "-m", "tests.plan_worker", str(tmp_path), json.dumps(model), json.dumps(batch)]
    # Beside this process, which holds a part of the GPU.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    # The first time compiles, and tries kernels on memory that the second does not need.
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{cuda_device.device_kind}: {found}")
    assert found["platform"] == "gpu"
    assert found["measured"] == pytest.approx(found["planned"], rel=0.1), found

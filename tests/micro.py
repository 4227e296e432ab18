"""Whole runs small enough for a test: a policy of one narrow layer on the bundled sample.

`base_run` trains it until some of its answers are valid; its cold start is the base policy of `settings`,
whose runs go through every phase in a few steps.
"""

import atexit
import fcntl
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from selfemo_jax import train
from selfemo_jax.model.weights import load_params
from selfemo_jax.run import Run

SHAPE = {"num_layers": 1, "embed_dim": 32, "mlp_dim": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
SIZES = {
    "data.max_items": 96,
    "cold_start.num": 96,
    "cold_start.batch_size": 16,
    "cold_start.epochs": 20,
    "cold_start.optim.lr": 1e-2,
    "rl.steps": 2,
    "rl.prompts_per_step": 8,
    "rl.mini_prompts": 8,
    "rl.group_size": 4,
    "batch.row_tokens": 256,
    "batch.micro_rows": 8,
    "rollout.max_rows": 32,
    "flywheel.max_inputs": 16,
    "flywheel.dialogues_per_step": 6,
    "flywheel.tau": 0,
    "flywheel.heldout": 0,
    "eval.max_items": 6,
    "eval.every": 1000,
    "eval.batch_rows": 32,
    "eval.final_splits": "[dev]",
    "checkpoint.every": 1000,
}
NOTE = "plumbing run, not a result"


def flags(values: dict) -> list[str]:
    """Settings by dotted name as words of a command line."""
    return [f"--{name}={value}" for name, value in values.items()]


def random_settings() -> list[str]:
    """A run from random weights; what it leaves is `base_run`."""
    shape = {f"model.shape.{name}": value for name, value in SHAPE.items()}
    return flags(shape | SIZES | {"flywheel.iterations": 0, "rl.steps": 1, "checkpoint.weights_every": 60})


def settings(**changes) -> list[str]:
    """A run of every phase from `base_policy`, two steps each, saved at each step; `a__b=1` is `--a.b=1`."""
    few = {
        "model.path": base_policy(),
        "cold_start.num": 40,
        "cold_start.epochs": 1,
        "cold_start.optim.lr": 1e-3,
        "eval.every": 1,
        "checkpoint.every": 1,
        "checkpoint.weights_every": 2,
    }
    return flags(SIZES | few | {name.replace("__", "."): value for name, value in changes.items()})


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="micro"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run(run_dir: Path, *words: str) -> int:
    """Train in this process; the exit status."""
    # The devices of the session exist before a run asks for fewer.
    assert len(jax.devices()) == 8
    return train.main([f"--run_dir={run_dir}", *words])


def _made_once(name: str, words: Callable[[], list[str]]) -> Path:
    """This process's copy of a finished run; the first process of the test session that needs it makes it."""
    made, copy = Path(os.environ["SELFEMO_TEST_RUNS"]) / name, _scratch() / name
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            assert run(_scratch() / "new" / name, *words()) == 0
            (_scratch() / "new" / name).rename(made)
    shutil.copytree(made, copy)
    return copy


@functools.cache
def base_run() -> Path:
    """A finished run from random weights."""
    return _made_once("base", random_settings)


def base_policy() -> Path:
    """Its cold start: a policy of which some answers are valid."""
    return base_run() / "phases" / "00_cold" / "weights"


@functools.cache
def full_run() -> Path:
    """A finished, uninterrupted run with `settings`."""
    return _made_once("full", settings)


@contextmanager
def stopped_at(*global_steps: int) -> Iterator[None]:
    """Runs inside get a SIGTERM after these steps."""
    original = Run._why_stop

    def why_stop(self: Run) -> str:
        if self.global_step in global_steps:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    Run._why_stop = why_stop
    try:
        yield
    finally:
        Run._why_stop = original


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl less what depends on the clock."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "perf/", "memory/", "compile/"))
        }
        for line in metrics(run_dir)
    ]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a converted folder by name."""
    params = load_params(folder, dtype="float32")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal to the last bit."""
    first, second = arrays(one), arrays(other)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    assert not different, f"{one} and {other} differ in {different}"


def policies(run_dir: Path) -> list[Path]:
    """The folders of weights in the phases of a run, those inside a phase too."""
    found = (*run_dir.glob("phases/*/weights"), *run_dir.glob("phases/*/steps/*"))
    return sorted(path.relative_to(run_dir) for path in found)


def assert_same_runs(one: Path, other: Path) -> None:
    """Everything two runs leave is equal, but for clocks and folders."""
    assert untimed(one) == untimed(other)
    assert (one / "flywheel.jsonl").read_bytes() == (other / "flywheel.jsonl").read_bytes()
    names = sorted(path.name for path in (one / "rollouts").iterdir())
    assert names == sorted(path.name for path in (other / "rollouts").iterdir())
    for name in names:
        first, second = one / "rollouts" / name, other / "rollouts" / name
        if name.endswith(".jsonl"):
            assert first.read_bytes() == second.read_bytes(), name
            continue
        with np.load(first) as a, np.load(second) as b:
            assert a.files == b.files
            for key in a.files:
                assert a[key].tobytes() == b[key].tobytes(), (name, key)
    weights = policies(one)
    assert weights == policies(other)
    for folder in (*weights, Path("checkpoints/best")):
        assert_same_weights(one / folder, other / folder)
    predictions = "eval/dev_predictions.jsonl"
    assert (one / predictions).read_bytes() == (other / predictions).read_bytes()


def environment() -> dict[str, str]:
    """Of a subprocess: one CPU device."""
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return os.environ | ours

"""One real vLLM server for all tests that need it, or the reason why there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfemo_jax.rollout import supervisor
from selfemo_jax.rollout.supervisor import Sidecar, sidecar_python, start_sidecar
from selfemo_jax.settings.rollout import Sidecar as Settings
from tests.rollout.sidecar.client import Client
from tests.rollout.sidecar.published import hf_config, publish, random_weights, write_model_folder

ROOT = Path(__file__).parents[3]
MAX_LEN = 512
REPACK = "        repacked = repack(self._model)\n"


@pytest.fixture(scope="session")
def vllm_environment() -> str:
    """The sidecar's environment; skips the test without one."""
    try:
        return str(sidecar_python(str(ROOT / ".venv-vllm")))
    except ValueError as error:
        pytest.skip(f"no vLLM: {error}")


class World:
    """A served model: its folder, its published versions 1 (as the server starts) and 2, its server."""

    def __init__(self, folder: Path, environment: str, *, tied: bool):
        self.folder, self.tied, self.environment = folder, tied, environment
        self.config = hf_config(tied=tied)
        self.arrays = {version: random_weights(version, tied=tied) for version in (1, 2)}
        self.model = write_model_folder(folder / "model", self.config, self.arrays[1])
        self.root = folder / "weights"
        for version, arrays in self.arrays.items():
            publish(self.root, version, arrays, self.config, safetensors=True)
        self.sidecar: Sidecar | None = None
        self.no_repack = folder / "no_repack"
        """While this file exists, the session's server forgets to pack a tied head again."""
        self.fresh: list = []
        """Answers of the server as it started."""

    def settings(self, **changes) -> Settings:
        return Settings(**({"environment": self.environment, "start_timeout": 300.0} | changes))

    def start(self, **changes) -> Client:
        """Start the server; its client."""
        self.sidecar = start_sidecar(
            self.settings(**changes),
            model_folder=self.model,
            run_dir=self.folder / "run",
            weights_root=self.root,
            max_model_len=MAX_LEN,
        )
        return self.client()

    def client(self) -> Client:
        assert self.sidecar is not None
        return Client(self.sidecar.urls[0], self.sidecar.key)

    def close(self) -> None:
        if self.sidecar is not None:
            self.sidecar.close()


def sidecar_that_can_forget(folder: Path) -> tuple[Path, Path]:
    """A copy of the sidecar's code with one line changed, and the file that makes the change act: while it
    exists a tied head is not packed again after a refresh, which is how vLLM itself behaves."""
    copy, switch = folder / "sidecar", folder / "no_repack"
    shutil.copytree(supervisor.SERVER.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    worker = copy / "worker.py"
    text = worker.read_text()
    assert text.count(REPACK) == 1
    changed = f"        repacked = 0 if Path({str(switch)!r}).exists() else repack(self._model)\n"
    worker.write_text(text.replace(REPACK, changed))
    return copy / supervisor.SERVER.name, switch


@pytest.fixture(scope="session")
def tied(tmp_path_factory, vllm_environment) -> Iterator[World]:
    """The one server of the session: a tied model, as every small Qwen3; `fresh` holds its first answers."""
    folder = tmp_path_factory.mktemp("tied")
    world = World(folder, vllm_environment, tied=True)
    original = supervisor.SERVER
    supervisor.SERVER, world.no_repack = sidecar_that_can_forget(folder)
    try:
        client = world.start()
    finally:
        supervisor.SERVER = original
    try:
        world.fresh = client.answers()
        yield world
    finally:
        world.close()

"""One real vLLM server for all tests that need it, or the reason why there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from selfemo_jax.rollout.supervisor import Sidecar, sidecar_python, start_sidecar
from selfemo_jax.settings.rollout import Sidecar as Settings
from tests.rollout.sidecar.client import Client
from tests.rollout.sidecar.published import hf_config, publish, random_weights, write_model_folder

ROOT = Path(__file__).parents[3]
MAX_LEN = 512


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


@pytest.fixture(scope="session")
def tied(tmp_path_factory, vllm_environment) -> Iterator[World]:
    """The one server of the session: a tied model, as every small Qwen3; `fresh` holds its first answers."""
    world = World(tmp_path_factory.mktemp("tied"), vllm_environment, tied=True)
    try:
        world.fresh = world.start().answers()
        yield world
    finally:
        world.close()

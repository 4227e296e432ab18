"""The trainer's engine over a server that the tests started."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params
from selfemo_jax.model.hf_table import unflatten
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.rollout.supervisor import Sidecar
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.rollout.vllm_engine import VllmEngine
from selfemo_jax.settings.rollout import Rollout
from selfemo_jax.settings.rollout import Sidecar as Settings
from tests.rollout.served import over
from tests.rollout.sidecar.conftest import MAX_LEN, World


class Borrowed:
    """A running server as the engine's processes; the engine's end is not its end."""

    def __init__(self, sidecar: Sidecar):
        self.sidecar = sidecar

    @property
    def urls(self) -> tuple[str, ...]:
        return self.sidecar.urls

    @property
    def key(self) -> str:
        return self.sidecar.key

    def exit_reason(self) -> str | None:
        return self.sidecar.exit_reason()

    def restart(self, which=None):
        return self.sidecar.restart(which)

    def close(self) -> None:
        pass


def model_of(world: World) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_hf(world.config), max_positions=MAX_LEN)


def params_of(world: World, version: int) -> Params:
    """The arrays that a version of the world was published from."""
    return unflatten({path: np.array(values) for path, values in world.arrays[version].items()})


def engine_over(world: World, **sidecar) -> VllmEngine:
    assert world.sidecar is not None
    borrowed = Borrowed(world.sidecar)
    settings = Settings(**({"dtype": "float32", "keep_versions": 1000} | sidecar))
    rollout = Rollout(engine="vllm", max_rows=16, sidecar=settings)
    engine = over(lambda: borrowed, model_of(world), rollout, world.root)
    # The server started on a configuration that was written by hand.
    engine._publisher._config = world.config
    return engine


def gap(world: World, params: Params, requests, groups: Mapping, *, temperature: float = 1.0) -> float:
    """The largest difference of sampled log-probs from the trainer's under these weights."""
    score = TrainerLogprobs(model_of(world), Compute(), make_mesh({}))
    pairs = [(request, found) for request in requests for found in groups[request.id]]
    expected = score(
        params,
        [(*request.token_ids, *found.token_ids) for request, found in pairs],
        starts=[len(request.token_ids) for request, _ in pairs],
        temperature=temperature,
    )
    return max(
        float(np.abs(values - np.array(found.logprobs)).max())
        for (_, found), values in zip(pairs, expected, strict=True)
    )

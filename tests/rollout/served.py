"""Engines over servers: the fake, or real vLLM, with a tiny policy whose outputs differ when weights do."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import jax
import numpy as np

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.rollout.proof import NOISE
from selfemo_jax.rollout.publish import Publisher, served_config
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.rollout.vllm_engine import VllmEngine
from selfemo_jax.settings.rollout import Rollout, Sidecar
from tests.model.tiny import weights
from tests.rollout.common import POLICY
from tests.rollout.fake_vllm import FakeServers

SERVED = dataclasses.replace(POLICY, max_positions=448, head_dim=32)
"""With a head size that vLLM serves on a CPU."""
TIED = dataclasses.replace(SERVED, tie_embeddings=True)


def sharp(model: ModelConfig, *, seed: int = 0) -> Params:
    """Weights far from uniform; an embedding that is also the head must not drown what the layers do."""
    params = weights(model, seed=seed)
    scaled = params | {"embed": params["embed"] * 2}
    return scaled | {"head": params["head"] * 2} if "head" in params else scaled


def nudged(params: Params, *, size: float, seed: int = 9) -> Params:
    """Each weight moved by +-size: what one step of Adam does at that rate."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    steps = [
        size * jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten([leaf + step for leaf, step in zip(leaves, steps, strict=True)])


def probes(model: ModelConfig = SERVED, *, num: int = 8, length: int = 150) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(77)
    return [tuple(int(t) for t in rng.integers(0, model.vocab_size, length + i)) for i in range(num)]


@contextmanager
def fake_engine(
    folder: Path, model: ModelConfig = SERVED, *, replicas: int = 1, delay: float = 0.0, seeded: bool = True,
    overlap: int = 0, **sidecar,
) -> Iterator[tuple[VllmEngine, FakeServers]]:  # fmt: skip
    """An engine over the fake, without a policy yet."""
    model_folder, root = folder / "model", folder / "weights"
    model_folder.mkdir(parents=True)
    (model_folder / "config.json").write_text(json.dumps(served_config(model, dtype="float32")))
    settings = Rollout(
        engine="vllm",
        overlap=overlap,
        seeded=seeded,
        max_rows=16,
        sidecar=Sidecar(
            **({"replicas": replicas, "request_timeout": 60.0, "refresh_timeout": 60.0} | sidecar)
        ),
    )
    servers = FakeServers(model_folder, root, replicas=replicas, delay=delay)
    engine = over(lambda: servers, model, settings, root)
    try:
        yield engine, servers
    finally:
        engine.close()


def over(start, model: ModelConfig, settings: Rollout, root: Path, *, dtype: str = "float32") -> VllmEngine:
    return VllmEngine(
        model,
        settings,
        start=start,
        publisher=Publisher(root, model, dtype=dtype, keep=settings.sidecar.keep_versions),
        logprobs=TrainerLogprobs(model, Compute(), make_mesh({})),
        probes=probes(model),
        dtype=dtype,
        noise=NOISE[dtype],
        say=lambda text: None,
    )


def fault(servers: FakeServers, index: int = 0, **faults) -> None:
    """What goes wrong from now on; no argument: nothing."""
    post(servers, "/_fault", faults, index)


def post(servers, path: str, body=None, index: int = 0) -> httpx.Response:
    return httpx.post(
        servers.urls[index] + path, json=body, headers={"Authorization": f"Bearer {servers.key}"}, timeout=60,
        trust_env=False,
    )  # fmt: skip


def served_count(servers: FakeServers, index: int = 0) -> int:
    headers = {"Authorization": f"Bearer {servers.key}"}
    return httpx.get(servers.urls[index] + "/_served", headers=headers, trust_env=False).json()["served"]

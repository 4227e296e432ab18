"""What the trainer publishes, the serving side takes: both halves of the format, one against the other."""

import dataclasses

import jax.numpy as jnp
import pytest

from selfemo_jax.model.hf_table import hf_slots
from selfemo_jax.rollout.publish import Publisher, config_digest, served_config, snapshot
from selfemo_jax.rollout.sidecar import manifest
from selfemo_jax.rollout.sidecar.arrays import digest
from selfemo_jax.rollout.sidecar.staging import Expected, stage, to_numpy
from tests.model.tiny import BIASED_LLAMA, TINY, weights

MODELS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "llama with biases": BIASED_LLAMA,
}


@pytest.mark.parametrize("transport", ["orbax", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_published_version_passes_the_checks_of_the_server(tmp_path, name, dtype, transport):
    model = MODELS[name]
    config = served_config(model, dtype=dtype)
    publisher = Publisher(tmp_path / "weights", model, dtype=dtype, transport=transport)
    published = publisher.publish(snapshot(weights(model), dtype=dtype), source_step=3)
    publisher.close()
    expected = Expected(
        architecture=config["architectures"][0],
        config_digest=manifest.config_digest(config),
        shapes={name: slot.shape for name, slot in hf_slots(model).items()},
        parts={},
    )
    folder = manifest.confined(str(published.folder), str(tmp_path / "weights"))
    staged = stage(folder, expected, transport=transport)
    assert staged.version == published.version
    assert {n: digest(to_numpy(tensor)) for n, tensor in staged.tensors.items()} == dict(published.digests)
    assert str(next(iter(staged.tensors.values())).dtype) == f"torch.{jnp.dtype(dtype).name}"


def test_both_sides_digest_a_configuration_alike():
    config = served_config(TINY, dtype="float32")
    assert manifest.config_digest(config) == config_digest(config)
    assert manifest.config_digest(config) != config_digest(config | {"rope_theta": 1.0})

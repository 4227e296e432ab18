"""A real vLLM server on the CPU: its key, its refreshes, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.rollout.sidecar.client import Client, probes
from tests.rollout.sidecar.published import (
    change_manifest,
    digest,
    hf_config,
    hf_tensors,
    largest_file,
    publish,
    random_weights,
)

pytestmark = [pytest.mark.vllm]
SPARE = 900_003
"""A version beyond those that others publish to the session's server."""


def assert_same(first, second):
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(first, second, strict=True):
        assert tokens == other_tokens
        assert logprobs == other_logprobs


def reference(config, arrays, answers) -> float:
    """The largest difference of the served log-probs from those of transformers on the same tokens."""
    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    state = {name: torch.from_numpy(values) for name, values in hf_tensors(arrays).items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    model.tie_weights()
    worst = 0.0
    for prompt, (tokens, logprobs) in zip(probes(), answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logits.argmax(-1).tolist() == tokens
        worst = max(worst, float(np.abs(expected.numpy() - np.array(logprobs)).max()))
    return worst


@pytest.fixture
def client(tied) -> Client:
    """The session's server, on version 1 as it started."""
    client = tied.client()
    if client.version() != "1":
        client.refresh(tied.root / "1")
    return client


def test_a_refreshed_tied_model_answers_as_a_freshly_started_one(tied, client):
    client.refresh(tied.root / "2")
    second = client.answers()
    assert client.version() == "2"
    assert all(tokens != fresh for (tokens, _), (fresh, _) in zip(second, tied.fresh, strict=True))
    assert reference(tied.config, tied.arrays[2], second) < 1e-4
    client.refresh(tied.root / "1")
    assert_same(client.answers(), tied.fresh)


def test_the_applied_digests_are_the_published_ones(tied, client):
    client.refresh(tied.root / "2")
    status, applied = client.rpc("applied_digest")
    assert status == 200
    assert applied["version"] == 2
    assert applied["digests"] == {n: digest(v) for n, v in hf_tensors(tied.arrays[2]).items()}
    assert applied["num_live"] >= 10, "the embedding and the norms are read back from the model itself"


def test_vllms_own_update_route_takes_a_version_too(tied, client):
    assert client.call("/start_weight_update", method="POST")[0] == 200
    body = {"update_info": {"path": str(tied.root / "2")}}
    assert client.call("/update_weights", body)[0] == 200
    assert client.call("/finish_weight_update", {"weight_version": "2"})[0] == 200
    client.call("/reset_prefix_cache", method="POST")
    assert client.version() == "2"
    assert reference(tied.config, tied.arrays[2], client.answers()) < 1e-4


def test_vllms_own_update_route_refuses_a_path_outside(tied, client, tmp_path):
    outside = publish(tmp_path, 3, tied.arrays[2], tied.config)
    client.call("/start_weight_update", method="POST")
    status, answer = client.call("/update_weights", {"update_info": {"path": str(outside)}})
    assert status == 500
    assert "refused" in json.dumps(answer)
    client.call("/reset_prefix_cache", method="POST")
    assert_same(client.answers(), tied.fresh)


ROUTES = [
    "/v1/models",
    "/v1/completions",
    "/inference/v1/generate",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/is_paused",
    "/weight_info",
    "/update_weights",
    "/update_weight_version",
    "/reset_prefix_cache",
    "/metrics",
    "/version",
    "/docs",
    "/openapi.json",
    "/tokenize",
]


def test_no_route_but_health_answers_without_the_key(client):
    for key in (None, "wrong"):
        other = Client(client.url, key)
        assert other.call("/health")[0] == 200
        for path in ROUTES:
            for method in ("GET", "POST"):
                assert other.call(path, method=method)[0] == 401, (method, path, key)
    assert client.call("/is_paused") == (200, {"is_paused": False})


def test_every_route_the_server_has_is_behind_the_key(client):
    status, schema = client.call("/openapi.json")
    assert status == 200
    paths = set(schema["paths"]) - {"/health"}
    assert len(paths) > 20
    for path in paths:
        assert Client(client.url, None).call(path, method="POST")[0] == 401, path


def truncated(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def one_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def missing_tensor(folder):
    change_manifest(folder, lambda m: m["tensors"].pop("model.layers.1.self_attn.k_proj.weight"))


def wrong_version(folder):
    change_manifest(folder, lambda m: m.update(version=4))


def other_settings(folder):
    change_manifest(folder, lambda m: m.update(config_digest="0" * 64))


def no_commit(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "truncated"),
        (one_bit, "damaged: params/d/"),
        (missing_tensor, "missing model.layers.1.self_attn.k_proj.weight"),
        (wrong_version, "its manifest says version 4"),
        (other_settings, "other settings"),
        (no_commit, "no manifest.json"),
    ],
)
def test_a_damaged_version_is_refused_and_the_answers_stay(tied, client, damage, words):
    folder = publish(tied.root, SPARE, tied.arrays[2], tied.config)
    try:
        damage(folder)
        status, reason = client.rpc("stage_weights", path=str(folder))
        assert status == 500
        assert words in reason
        # Nothing of it is left to be applied, and what was served before is served still.
        status, reason = client.rpc("apply_weights", version=SPARE)
        assert status == 500 and "nothing is staged" in reason
        client.call("/reset_prefix_cache", method="POST")
        assert_same(client.answers(), tied.fresh)
        assert client.version() == "1"
    finally:
        shutil.rmtree(folder)


def test_another_model_is_refused_and_the_answers_stay(tied, client):
    other = hf_config(tied=False)
    folder = publish(tied.root, SPARE, random_weights(2, tied=False), other)
    try:
        status, reason = client.rpc("stage_weights", path=str(folder))
        assert status == 500
        assert "unknown lm_head.weight" in reason
        assert_same(client.answers(), tied.fresh)
    finally:
        shutil.rmtree(folder)


def test_a_path_outside_the_published_folder_is_refused(tied, client, tmp_path):
    outside = publish(tmp_path, 3, tied.arrays[2], tied.config)
    (tied.root / str(SPARE)).symlink_to(outside)
    for path in (outside, tied.root / str(SPARE), tied.root / ".." / "weights", "/etc", tied.model):
        status, reason = client.rpc("stage_weights", path=str(path))
        assert status == 500
        assert "refused" in reason
    (tied.root / str(SPARE)).unlink()
    assert_same(client.answers(), tied.fresh)


def test_the_wrong_version_is_not_applied(tied, client):
    assert client.rpc("stage_weights", path=str(tied.root / "2"))[0] == 200
    status, reason = client.rpc("apply_weights", version=1)
    assert status == 500
    assert "version 2 is staged" in reason
    assert client.rpc("drop_staged")[0] == 200
    status, reason = client.rpc("apply_weights", version=2)
    assert status == 500
    assert_same(client.answers(), tied.fresh)


def test_staging_alone_changes_nothing(tied, client):
    assert client.rpc("stage_weights", path=str(tied.root / "2"))[0] == 200
    client.call("/reset_prefix_cache", method="POST")
    assert_same(client.answers(), tied.fresh)
    client.rpc("drop_staged")


def test_a_worker_method_that_no_refresh_needs_may_not_be_called(client):
    status, reason = client.rpc("save_sharded_state", path="/tmp/x")
    assert status == 403
    assert "may not be called" in reason

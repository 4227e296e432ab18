"""Two tensor-parallel workers of a real vLLM server, each with half of every layer."""

import numpy as np
import pytest

from tests.rollout.sidecar.conftest import World
from tests.rollout.sidecar.published import change_manifest, digest, hf_tensors
from tests.rollout.sidecar.test_served import reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def halves(tmp_path_factory, vllm_environment):
    world = World(tmp_path_factory.mktemp("halves"), vllm_environment, tied=True)
    try:
        world.fresh = world.start(tensor_parallel=2).answers()
        yield world
    finally:
        world.close()


def test_both_workers_take_their_pieces_and_answer_for_all_tensors_between_them(halves):
    client = halves.client()
    client.refresh(halves.root / "2")
    assert reference(halves.config, halves.arrays[2], client.answers()) < 1e-4
    status, answer = client.call("/collective_rpc", {"method": "applied_digest"})
    assert status == 200
    first, second = (result["digests"] for result in answer["results"])
    assert not first.keys() & second.keys()
    assert first | second == {n: digest(v) for n, v in hf_tensors(halves.arrays[2]).items()}
    client.refresh(halves.root / "1")
    for (tokens, logprobs), (fresh, fresh_logprobs) in zip(client.answers(), halves.fresh, strict=True):
        assert tokens == fresh
        # The sum over the workers may round differently.
        np.testing.assert_allclose(logprobs, fresh_logprobs, atol=1e-5)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_a_tensor_that_one_worker_refuses_is_applied_by_none(halves, tensor):
    client = halves.client()
    before = client.answers()
    folder = halves.root / "2"
    whole = (folder / "manifest.json").read_text()
    # Each of the two tensors is in another worker's share.
    change_manifest(folder, lambda m: m["tensors"][tensor].update(digest="0" * 32))
    try:
        status, reason = client.rpc("stage_weights", path=str(folder))
        assert status == 500 and tensor in reason
        assert client.rpc("apply_weights", version=2)[0] == 500
        # vLLM's own route would lose count of the workers' answers.
        assert client.call("/start_weight_update", method="POST")[0] == 403
    finally:
        (folder / "manifest.json").write_text(whole)
    client.call("/reset_prefix_cache", method="POST")
    after = client.answers()
    assert [tokens for tokens, _ in after] == [tokens for tokens, _ in before]
    assert client.refresh(folder)["applied"]["version"] == 2

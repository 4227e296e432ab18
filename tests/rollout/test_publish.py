"""Published versions: what a server reads is what the trainer had, and nothing half-written looks whole."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from selfemo_jax.model.hf_table import flatten, hf_slots, to_hf_layout
from selfemo_jax.model.safetensors_io import read_folder, read_rows
from selfemo_jax.model.sharding import make_mesh, param_shardings
from selfemo_jax.rollout import publish
from selfemo_jax.rollout.publish import Publisher, is_committed, served_config, snapshot, tensor_table
from tests.model.tiny import BIASED_LLAMA, TINY, weights

MODELS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "llama with biases": BIASED_LLAMA,
}


def read_as_a_server(folder) -> dict[str, np.ndarray]:
    """The tensors by the manifest alone: tensorstore, no module of ours."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert len(data) == entry["bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["digest"], name
    arrays, tensors = {}, {}
    for name, row in manifest["tensors"].items():
        path = row["array"]
        if path not in arrays:
            kvstore = {"driver": "file", "path": f"{folder}/params/{path}/"}
            spec = {"driver": manifest["zarr_driver"], "kvstore": kvstore}
            arrays[path] = ts.open(spec, open=True, read=True).result()
        values = arrays[path] if row["index"] is None else arrays[path][row["index"]]
        values = np.asarray(values.read().result())
        if row["transpose"] is not None:
            values = values.transpose(row["transpose"])
        values = np.ascontiguousarray(values.reshape(row["shape"]))
        assert values.dtype.name == row["dtype"] == manifest["dtype"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == row["digest"], name
        tensors[name] = values
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_alone_gives_every_tensor_to_the_last_bit(tmp_path, name, dtype):
    model = MODELS[name]
    params = weights(model)
    published = Publisher(tmp_path, model, dtype=dtype).publish(snapshot(params, dtype=dtype), source_step=7)
    found = read_as_a_server(published.folder)
    flat = {path: np.asarray(leaf.astype(dtype)) for path, leaf in flatten(params).items()}
    assert set(found) == set(hf_slots(model))
    assert ("lm_head.weight" in found) != model.tie_embeddings
    for tensor, slot in hf_slots(model).items():
        leaf = flat[slot.rule.path]
        expected = to_hf_layout(leaf if slot.layer is None else leaf[slot.layer], slot.rule)
        assert expected.tobytes() == found[tensor].tobytes(), tensor
    manifest = json.loads((published.folder / "manifest.json").read_text())
    assert (manifest["version"], manifest["source_step"], manifest["format"]) == (0, 7, publish.FORMAT)


def test_each_rule_of_the_table_is_a_transpose_and_a_reshape():
    rows = tensor_table(TINY)
    assert rows["model.layers.1.self_attn.q_proj.weight"] == {
        "array": "layers.q", "index": 1, "transpose": [1, 2, 0], "shape": [64, 32],
    }  # fmt: skip
    assert rows["model.layers.0.self_attn.o_proj.weight"]["transpose"] == [2, 0, 1]
    assert rows["model.embed_tokens.weight"]["transpose"] is None


def test_orbax_restores_what_is_published_and_a_chunk_is_a_layer(tmp_path):
    params = weights()
    folder = Publisher(tmp_path, TINY, dtype="float32").publish(params, source_step=0).folder
    restored = ocp.PyTreeCheckpointer().restore(folder / "params")
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, restored))
    kvstore = {"driver": "file", "path": f"{folder}/params/layers.gate/"}
    store = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    assert store.chunk_layout.read_chunk.shape == (1, TINY.embed_dim, TINY.mlp_dim)


def test_weights_split_over_a_mesh_are_published_as_whole_ones(tmp_path):
    model = dataclasses.replace(TINY, embed_dim=128, mlp_dim=256, vocab_size=96)
    params = weights(model)
    mesh = make_mesh({"fsdp": 4, "tp": 2})
    placed = jax.device_put(params, param_shardings(model, mesh))
    assert not placed["layers"]["gate"].sharding.is_fully_replicated
    copy = snapshot(placed, dtype="bfloat16")
    assert copy["layers"]["gate"].sharding == placed["layers"]["gate"].sharding
    split = Publisher(tmp_path / "split", model, dtype="bfloat16").publish(copy, source_step=0)
    whole = Publisher(tmp_path / "whole", model, dtype="bfloat16").publish(
        snapshot(params, dtype="bfloat16"), source_step=0
    )
    assert split.digests == whole.digests


def test_a_publication_under_way_does_not_see_the_trainers_next_update(tmp_path):
    params = weights()
    expected = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    publisher = Publisher(tmp_path, TINY, dtype="float32")
    pending = publisher.start(snapshot(params, dtype="float32"), source_step=0)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)
    jax.block_until_ready(step(params))
    found = read_as_a_server(pending.result().folder)
    assert np.array_equal(found["model.embed_tokens.weight"], expected["embed"])
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"], expected["layers.down"][1].T)


def test_old_versions_go_and_protected_ones_stay(tmp_path):
    publisher = Publisher(tmp_path, TINY, dtype="float32", keep=2)
    for step in range(4):
        publisher.publish(weights(), source_step=step)
    publisher.clean(protect=(0,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_a_version_of_an_earlier_process_is_never_written_again(tmp_path):
    first = Publisher(tmp_path, TINY, dtype="float32")
    first.publish(weights(), source_step=5)
    with pytest.raises(ValueError, match="another run publishes its weights there"):
        Publisher(tmp_path, TINY, dtype="float32")
    first.close()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "params").mkdir()
    (tmp_path / "3.partial-999999999").mkdir()
    second = Publisher(tmp_path, TINY, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"], "what was never committed is removed"
    assert second.publish(weights(), source_step=5).version == 8


def test_a_disk_without_room_commits_nothing(tmp_path, monkeypatch):
    publisher = Publisher(tmp_path, TINY, dtype="float32")
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage_of(free=1000))
    with pytest.raises(OSError, match="needs 0.00 GB and .* has 0.00 GB free"):
        publisher.publish(weights(), source_step=0)
    assert list(tmp_path.iterdir()) == [] and usage.f_bsize
    monkeypatch.undo()
    assert is_committed(publisher.publish(weights(), source_step=0).folder)


def usage_of(*, free: int):
    class Usage:
        pass

    found = Usage()
    found.free = free
    return found


def test_a_write_that_fails_in_the_middle_commits_nothing(tmp_path):
    # A limit on the size of files, in a process of its own, is a real failure of the write itself.
    script = f"""
    import resource, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.path.insert(0, {str(os.getcwd())!r})
    from pathlib import Path
    from tests.model.tiny import TINY, weights
    from selfemo_jax.rollout.publish import Publisher
    params = weights()
    publisher = Publisher(Path({str(tmp_path)!r}), TINY, dtype="float32")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    try:
        publisher.publish(params, source_step=0)
    except Exception as error:
        print("failed:", type(error).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert "failed:" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_second_transport_has_the_same_tensors_and_digests(tmp_path):
    model = MODELS["untied"]
    published = Publisher(tmp_path, model, dtype="bfloat16", transport="safetensors").publish(
        snapshot(weights(model), dtype="bfloat16"), source_step=0
    )
    tensors, problems = read_folder(published.folder)
    assert not problems and set(tensors) == set(published.digests)
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(read_rows(tensor, None))
        found = hashlib.sha256(values.view(np.uint8)).hexdigest()
        assert found == published.digests[name], name
    manifest = json.loads((published.folder / "manifest.json").read_text())
    assert {row["array"] for row in manifest["tensors"].values()} == {None}, "found by their own names"


def test_the_served_configuration_names_the_serving_type():
    config = served_config(TINY, dtype="bfloat16")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert publish.config_digest(config) == publish.config_digest(dict(reversed(config.items())))
    assert jnp.dtype("bfloat16").itemsize == 2

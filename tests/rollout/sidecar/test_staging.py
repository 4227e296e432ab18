"""Reading and checking published versions, without vLLM."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfemo_jax.rollout.sidecar.arrays import Part, digest, turned
from selfemo_jax.rollout.sidecar.manifest import config_digest, confined
from selfemo_jax.rollout.sidecar.slices import worker_parts
from selfemo_jax.rollout.sidecar.staging import Expected, finite, stage, to_numpy, to_torch
from tests.rollout.sidecar.published import (
    change_manifest,
    hf_config,
    hf_tensors,
    largest_file,
    publish,
    random_weights,
)

CONFIG = hf_config(tied=False)
ARRAYS = random_weights(0, tied=False)
TENSORS = hf_tensors(ARRAYS)


def expected(*, rank: int = 0, num_ranks: int = 1, **changes) -> Expected:
    shapes = {name: values.shape for name, values in TENSORS.items()}
    heads = SimpleNamespace(num_key_value_heads=CONFIG["num_key_value_heads"])
    fields = {
        "architecture": "Qwen3ForCausalLM",
        "config_digest": config_digest(CONFIG),
        "shapes": shapes,
        "parts": worker_parts(shapes, heads, rank=rank, num_ranks=num_ranks),
        "rank": rank,
        "num_ranks": num_ranks,
    }
    return Expected(**(fields | changes))


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_every_tensor_comes_as_hugging_face_has_it(tmp_path, driver, ocdbt):
    staged = stage(publish(tmp_path, 7, ARRAYS, CONFIG, driver=driver, ocdbt=ocdbt), expected())
    assert staged.version == 7
    assert list(staged.tensors) == list(TENSORS)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(staged.tensors[name].numpy(), values, err_msg=name)
    assert staged.checked == TENSORS.keys()


def test_the_second_transport_gives_the_same_tensors_by_the_same_digests(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG, safetensors=True)
    staged = stage(folder, expected(), transport="safetensors")
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(staged.tensors[name].numpy(), values, err_msg=name)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"digest .*damaged: model\.safetensors"):
        stage(folder, expected(), transport="safetensors")


def test_a_version_without_safetensors_is_refused_by_the_second_transport(tmp_path):
    with pytest.raises(ValueError, match="no safetensors file has model.embed_tokens.weight"):
        stage(publish(tmp_path, 7, ARRAYS, CONFIG), expected(), transport="safetensors")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"version 7: params/d/{path.name}: .* truncated"):
        stage(folder, expected())


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_refused_and_its_file_named(tmp_path, where):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"version 7: .*damaged: params/d/{path.name}"):
        stage(folder, expected())


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    refused = 0
    for path in sorted((folder / "params").rglob("*")):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
        try:
            staged = stage(folder, expected())
        except ValueError:
            refused += 1
        else:
            # A superseded file of the store, which nothing refers to.
            assert all(digest(to_numpy(t)) == digest(TENSORS[n]) for n, t in staged.tensors.items())
        path.write_bytes(whole)
    assert refused >= 14, "each array has a file of data, and there is the root of the store"


def test_a_missing_file_is_refused_by_name(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    path = largest_file(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: missing"):
        stage(folder, expected())


def drop(name):
    return lambda manifest: manifest["tensors"].pop(name)


def extra(manifest):
    manifest["tensors"]["model.layers.9.mlp.up_proj.weight"] = manifest["tensors"]["model.norm.weight"]


def reshaped(manifest):
    manifest["tensors"]["model.norm.weight"]["shape"] = [8, 8]


def other_rope(manifest):
    manifest["config_digest"] = config_digest(CONFIG | {"rope_theta": 1e6})


def swapped_layers(manifest):
    first, second = (manifest["tensors"][f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    first["index"], second["index"] = 1, 0


def wrong_transpose(manifest):
    manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["transpose"] = [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.layers.1.self_attn.k_proj.weight"), "missing model.layers.1.self_attn.k_proj.weight"),
        (drop("lm_head.weight"), "missing lm_head.weight"),
        (extra, "unknown model.layers.9"),
        (reshaped, r"model.norm.weight has shape \(8, 8\)"),
        (lambda m: m.update(architecture="LlamaForCausalLM"), "weights of a LlamaForCausalLM"),
        (other_rope, "other settings, as rope_theta"),
        (lambda m: m.update(version=8), "its manifest says version 8, its folder 7"),
        (lambda m: m.update(format="selfemo_jax.weights/2"), "expected 'selfemo_jax.weights/1'"),
        (lambda m: m.pop("files"), "KeyError 'files'"),
        (swapped_layers, "up_proj.weight: digest"),
        (wrong_transpose, "q_proj.weight: digest"),
    ],
)
def test_a_manifest_of_another_model_or_version_is_refused_in_words(tmp_path, change, words):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    change_manifest(folder, change)
    with pytest.raises(ValueError, match=words):
        stage(folder, expected())


def test_a_folder_without_a_manifest_is_no_version(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="version 7: no manifest.json"):
        stage(folder, expected())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    arrays = ARRAYS | {"final_norm": np.where(np.arange(64) == 5, np.inf, 1).astype(np.float32)}
    with pytest.raises(ValueError, match="model.norm.weight: has values that are not finite"):
        stage(publish(tmp_path, 7, arrays, CONFIG), expected())


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    change_manifest(folder, lambda m: m["files"].update({"../x": {"bytes": 1, "digest": ""}}))
    with pytest.raises(ValueError, match="outside the version's folder"):
        stage(folder, expected())
    folder = publish(tmp_path, 8, ARRAYS, CONFIG)
    path = largest_file(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the version's folder"):
        stage(folder, expected())


# ---- where a version may lie ----


@pytest.mark.parametrize(
    "path", ["{root}/../other/1", "{root}", "{root}/1/params", "/etc", "{root}/x", "{root}/01"]
)
def test_a_path_outside_the_published_folder_is_refused(tmp_path, path):
    root = tmp_path / "weights"
    for folder in (root / "1" / "params", root / "x", root / "01", tmp_path / "other" / "1"):
        folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="refused"):
        confined(path.format(root=root), str(root))
    assert confined(f"{root}/1", str(root)) == root / "1"


def test_a_link_out_of_the_published_folder_is_refused(tmp_path):
    (tmp_path / "other" / "1").mkdir(parents=True)
    root = tmp_path / "weights"
    root.mkdir()
    (root / "1").symlink_to(tmp_path / "other" / "1")
    with pytest.raises(ValueError, match="refused"):
        confined(f"{root}/1", str(root))


def test_a_linked_root_is_still_the_root(tmp_path):
    (tmp_path / "disk" / "1").mkdir(parents=True)
    (tmp_path / "weights").symlink_to(tmp_path / "disk")
    assert confined(f"{tmp_path}/weights/1", f"{tmp_path}/weights") == tmp_path / "disk" / "1"


def test_without_a_root_no_path_is_read(tmp_path):
    for root in (None, ""):
        with pytest.raises(ValueError, match="SELFEMO_WEIGHTS_ROOT is not set"):
            confined(str(tmp_path / "1"), root)


# ---- tensor parallelism ----


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_workers_read_their_own_pieces_and_check_all_tensors_between_them(tmp_path, num_ranks):
    folder = publish(tmp_path, 7, ARRAYS, CONFIG)
    checked: list[str] = []
    for rank in range(num_ranks):
        facts = expected(rank=rank, num_ranks=num_ranks)
        staged = stage(folder, facts)
        checked += staged.checked
        for name, tensor in staged.tensors.items():
            whole = torch.from_numpy(TENSORS[name])
            assert tensor.shape == whole.shape
            part = facts.parts.get(name)
            if part is not None:
                narrow = (part.dim, part.start, part.stop - part.start)
                tensor, whole = tensor.narrow(*narrow), whole.narrow(*narrow)
            assert torch.equal(tensor, whole), name
    assert sorted(checked) == sorted(TENSORS)


def test_the_pieces_are_those_of_vllm():
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.self_attn.q_proj.weight": (32, 8),
        "model.layers.0.self_attn.k_proj.weight": (8, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 32),
        "model.layers.0.self_attn.o_proj.bias": (8,),
        "model.layers.0.mlp.down_proj.weight": (8, 16),
        "model.norm.weight": (8,),
    }
    parts = worker_parts(shapes, SimpleNamespace(num_key_value_heads=2), rank=3, num_ranks=4)
    assert parts == {
        # Padded to 128 rows, 32 for each; the last worker has 4 real ones.
        "model.embed_tokens.weight": Part(dim=0, start=96, stop=100),
        "model.layers.0.self_attn.q_proj.weight": Part(dim=0, start=24, stop=32),
        # Two heads for four workers: the second two share head 1.
        "model.layers.0.self_attn.k_proj.weight": Part(dim=0, start=4, stop=8),
        "model.layers.0.self_attn.o_proj.weight": Part(dim=1, start=24, stop=32),
        "model.layers.0.mlp.down_proj.weight": Part(dim=1, start=12, stop=16),
    }
    assert worker_parts(shapes, SimpleNamespace(num_key_value_heads=2), rank=0, num_ranks=1) == {}


# ---- arrays ----


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_turning_in_tiles_is_a_transpose(order):
    values = np.arange(300 * 5 * 70, dtype=np.float32).reshape(300, 5, 70)
    result = turned(values, order)
    np.testing.assert_array_equal(result, values.transpose(order))
    assert result.flags.c_contiguous


def test_bfloat16_goes_to_torch_and_back_bit_for_bit():
    import ml_dtypes

    values = np.array([[1.5, -2.25], [3e38, 1e-30]], ml_dtypes.bfloat16)
    tensor = to_torch(values)
    assert tensor.dtype == torch.bfloat16
    assert tensor[0].tolist() == [1.5, -2.25]
    assert digest(to_numpy(tensor)) == digest(values)


def test_large_finite_values_are_not_taken_for_infinite_ones():
    assert finite(torch.full((4,), 3e38))
    assert not finite(torch.tensor([1.0, float("nan")]))
    assert not finite(torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16))


def test_the_writer_of_these_tests_follows_the_published_format(tmp_path):
    manifest = json.loads((publish(tmp_path, 7, ARRAYS, CONFIG) / "manifest.json").read_text())
    row = manifest["tensors"]["model.layers.1.self_attn.o_proj.weight"]
    values = ARRAYS["layers.o"][1].transpose(row["transpose"]).reshape(row["shape"])
    assert digest(values) == row["digest"]
    assert Path(next(iter(manifest["files"]))).parts[0] == "params"

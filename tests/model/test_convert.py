"""Conversion both ways, against files made by PyTorch and the safetensors library."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selfemo_jax.model import orbax_io
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import abstract_params
from selfemo_jax.model.hf_convert import load_params, open_model, save_hf, to_flax, to_hf, verify
from selfemo_jax.model.hf_table import flatten, param_shapes
from selfemo_jax.model.sharding import make_mesh, param_shardings
from tests.model.checkpoints import TOKENIZER_FILES, edit_tensors, hf_config, read_bits, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "hf"
    return save_checkpoint(folder, hf_config("qwen3"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def qwen3_flax(qwen3) -> Path:
    to_flax(qwen3, qwen3.parent / "flax")
    return qwen3.parent / "flax"


@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "shard"),
    [
        ("qwen3", {"tie_word_embeddings": True}, torch.bfloat16, "8KB"),
        ("qwen3", {"attention_bias": True}, torch.float16, "5GB"),
        ("llama", {"tie_word_embeddings": True}, torch.float32, "16KB"),
        ("llama", {"attention_bias": True}, torch.bfloat16, "5GB"),
    ],
)
def test_round_trip_keeps_every_bit_without_the_source(tmp_path, kind, changes, dtype, shard):
    src = save_checkpoint(tmp_path / "src", hf_config(kind, **changes), dtype=dtype, max_shard_size=shard)
    files = {name: (src / name).read_bytes() for name in ("config.json", *TOKENIZER_FILES)}
    bits = read_bits(src)
    assert (len(list(src.glob("*.safetensors"))) > 1) == (shard != "5GB")
    to_flax(src, tmp_path / "flax")
    shutil.rmtree(src)
    to_hf(tmp_path / "flax", tmp_path / "back", max_shard_bytes=10_000)
    assert read_bits(tmp_path / "back") == bits
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(bits)
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in bits.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "flax"]


def test_unusual_bits_survive(tmp_path):
    src = save_checkpoint(tmp_path / "src", hf_config("qwen3"), dtype=torch.bfloat16)

    def fill(tensors):
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        embed = tensors["model.embed_tokens.weight"]
        embed.copy_(every[-embed.numel() :].view(embed.shape))
        tensors["model.layers.1.mlp.up_proj.weight"].zero_()
        tensors["model.layers.2.mlp.up_proj.weight"].fill_(-0.0)
        tensors["lm_head.weight"].fill_(float("nan"))

    edit_tensors(src, fill)
    bits = read_bits(src)
    to_flax(src, tmp_path / "flax")
    to_hf(tmp_path / "flax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == bits


def test_large_tables_keep_their_order_when_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "_ROWS_BYTES", 1000)
    monkeypatch.setattr(orbax_io, "_MIN_CHUNK_BYTES", 64)
    src = save_checkpoint(tmp_path / "src", hf_config("qwen3", vocab_size=97), dtype=torch.float16)
    bits = read_bits(src)
    to_flax(src, tmp_path / "flax")
    assert len([p for p in (tmp_path / "flax" / "params" / "head" / "c").rglob("*") if p.is_file()]) > 4
    to_hf(tmp_path / "flax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == bits


def test_each_layout_is_the_one_of_the_contract(qwen3, qwen3_flax):
    hf = load_file(qwen3 / "model.safetensors")
    params = load_params(qwen3_flax, dtype="float32")
    theirs = {name: tensor.float().numpy() for name, tensor in hf.items()}
    attn, mlp = "model.layers.2.self_attn.", "model.layers.2.mlp."
    d, n, k, h = 5, 3, 1, 7
    layers = params["layers"]
    assert layers["q"][2, d, n, h] == theirs[attn + "q_proj.weight"][n * 16 + h, d]
    assert layers["k"][2, d, k, h] == theirs[attn + "k_proj.weight"][k * 16 + h, d]
    assert layers["v"][2, d, k, h] == theirs[attn + "v_proj.weight"][k * 16 + h, d]
    assert layers["o"][2, n, h, d] == theirs[attn + "o_proj.weight"][d, n * 16 + h]
    assert layers["gate"][2, d, 40] == theirs[mlp + "gate_proj.weight"][40, d]
    assert layers["up"][2, d, 40] == theirs[mlp + "up_proj.weight"][40, d]
    assert layers["down"][2, 40, d] == theirs[mlp + "down_proj.weight"][d, 40]
    assert layers["k_norm"][1, h] == theirs["model.layers.1.self_attn.k_norm.weight"][h]
    assert layers["mlp_norm"][0, d] == theirs["model.layers.0.post_attention_layernorm.weight"][d]
    assert params["head"][d, 90] == theirs["lm_head.weight"][90, d]
    assert params["embed"][90, d] == theirs["model.embed_tokens.weight"][90, d]


@pytest.mark.parametrize("restore", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_orbax_restores_what_was_written(qwen3_flax, restore):
    config, _ = open_model(qwen3_flax)
    tree = restore().restore(qwen3_flax / "params")
    shapes, _ = abstract_params(config, dtype="bfloat16")
    found = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), shapes)
    ours = load_params(qwen3_flax, dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, ours)


def test_orbax_restores_onto_a_mesh(qwen3_flax):
    config, _ = open_model(qwen3_flax)
    mesh = make_mesh({"fsdp": 4})
    shapes, _ = abstract_params(config, dtype="bfloat16")
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        shapes,
    )
    tree = ocp.StandardCheckpointer().restore(qwen3_flax / "params", target)
    assert tree["embed"].sharding.mesh.size == 4


@pytest.mark.parametrize("ocdbt", [True, False])
def test_parameters_that_orbax_wrote_are_read(qwen3_flax, tmp_path, ocdbt):
    params = load_params(qwen3_flax, dtype="float32")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=ocdbt)) as saver:
        saver.save(tmp_path / "phase" / "params", args=ocp.args.PyTreeSave(params))
    shutil.copy(qwen3_flax / "config.json", tmp_path / "phase")
    again = load_params(tmp_path / "phase", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_shapes_of_the_table_are_those_of_the_decoder():
    for kind, changes in [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
    ]:
        config = ModelConfig.from_hf(hf_config(kind, **changes).to_dict())
        shapes, _ = abstract_params(config)
        assert {path: leaf.shape for path, leaf in flatten(shapes).items()} == param_shapes(config)
        assert config.num_params == sum(np.prod(shape) for shape in param_shapes(config).values())


def test_a_repeated_head_of_a_tied_model_comes_back_and_an_absent_one_stays_away(tmp_path):
    src = save_checkpoint(
        tmp_path / "src", hf_config("qwen3", tie_word_embeddings=True), dtype=torch.bfloat16
    )
    assert "lm_head.weight" not in read_bits(src)
    assert to_flax(src, tmp_path / "absent")["lm_head"] == "absent"
    embed = "model.embed_tokens.weight"
    edit_tensors(src, lambda tensors: tensors.update({"lm_head.weight": tensors[embed].clone()}))
    bits = read_bits(src)
    assert to_flax(src, tmp_path / "repeated")["lm_head"] == "duplicate"
    to_hf(tmp_path / "repeated", tmp_path / "back")
    assert read_bits(tmp_path / "back") == bits
    edit_tensors(src, lambda tensors: tensors["lm_head.weight"][3, 3].add_(1))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        to_flax(src, tmp_path / "other")


@pytest.mark.parametrize("kind", ["hf", "flax"])
def test_weights_are_born_sharded_and_equal(qwen3, qwen3_flax, kind, monkeypatch):
    config, _ = open_model(qwen3)
    mesh = make_mesh({"fsdp": 4, "tp": 2})
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(*([None] * (leaf.ndim - 1)), "fsdp")),
        abstract_params(config)[0],
    )
    sizes = []
    real = orbax_io.read_array

    def counted(store, index=()):
        values = real(store, index)
        sizes.append(values.size / np.prod(store.shape))
        return values

    monkeypatch.setattr(orbax_io, "read_array", counted)
    sharded = load_params(qwen3 if kind == "hf" else qwen3_flax, dtype="float32", shardings=shardings)
    assert set(sizes) == (set() if kind == "hf" else {0.25})
    whole = load_params(qwen3_flax, dtype="float32")
    for (path, leaf), plain in zip(flatten(sharded).items(), flatten(whole).values(), strict=True):
        assert leaf.sharding.shard_shape(leaf.shape)[-1] * 4 == leaf.shape[-1], path
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(plain))


def test_the_trainers_own_shardings_fit(qwen3_flax):
    config, _ = open_model(qwen3_flax)
    shardings = param_shardings(config, make_mesh({"fsdp": 2, "tp": 2}))
    loaded = load_params(qwen3_flax, dtype="bfloat16", shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings


def test_back_in_hugging_face_the_model_loads_and_is_the_same(qwen3, qwen3_flax, tmp_path):
    to_hf(qwen3_flax, tmp_path / "back", max_shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(qwen3, dtype="auto")
    assert model.dtype == torch.bfloat16
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_trained_weights_are_exported_with_tokenizer_type_and_note(qwen3, qwen3_flax, tmp_path):
    src = shutil.copytree(qwen3_flax, tmp_path / "src")
    certificate = json.loads((src / "certificate.json").read_text()) | {"note": "4-bit quantised copy"}
    (src / "certificate.json").write_text(json.dumps(certificate))
    params = load_params(src, dtype="float32", shardings=None)
    params["layers"]["up"] = params["layers"]["up"].at[1].add(1.0)
    save_hf(params, src, tmp_path / "bf16", max_shard_bytes=20_000)
    save_hf(params, src, tmp_path / "f32", dtype="float32")
    expected = load_file(qwen3 / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float() + 1
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype="auto")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert torch.equal(full.model.layers[1].mlp.up_proj.weight, expected)
    assert torch.equal(half.model.layers[1].mlp.up_proj.weight, expected.bfloat16())
    assert open_model(tmp_path / "bf16")[1].note == "4-bit quantised copy"
    assert (tmp_path / "bf16" / "tokenizer.json").exists()
    # The type is told in the source's own spelling, which is that of transformers 5 here.
    assert json.loads((tmp_path / "f32" / "config.json").read_text())["dtype"] == "float32"
    assert verify(tmp_path / "bf16", tmp_path / "bf16" / "certificate.json") == []


def test_a_model_made_from_nothing_is_exported(tmp_path):
    from selfemo_jax.model.decoder import init_params

    config = ModelConfig.from_hf(hf_config("llama", tie_word_embeddings=True).to_dict())
    params = init_params(config, jax.random.key(0))
    save_hf(params, config, tmp_path / "hf", dtype="float32")
    again = load_params(tmp_path / "hf", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    del params["final_norm"]
    with pytest.raises(ValueError, match="final_norm: missing"):
        save_hf(params, config, tmp_path / "other")


def test_the_command_runs_both_ways_and_its_status_tells(qwen3, tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *map(str, args)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    assert run("to-flax", qwen3, tmp_path / "flax").returncode == 0
    assert run("to-hf", tmp_path / "flax", tmp_path / "back", "--max_shard_gb", "0.00002").returncode == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    equal = run("verify", qwen3, tmp_path / "back")
    assert (equal.returncode, equal.stdout) == (0, "equal, every bit\n")
    other = shutil.copytree(qwen3, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors["model.norm.weight"][0].add_(1))
    assert run("verify", other, tmp_path / "back").returncode == 1
    wrong = run("to-flax", qwen3, tmp_path / "flax")
    assert wrong.returncode == 2 and "already exists" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_converter_needs_no_jax():
    code = (
        "import sys; import selfemo_jax.model.hf_convert; print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr

"""What is wrong with a checkpoint, a destination or a disk is told, and nothing half-written is left."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfemo_jax.model import hf_convert, orbax_io
from selfemo_jax.model.hf_convert import load_params, to_flax, to_hf, verify
from tests.model.checkpoints import edit_tensors, hf_config, save_checkpoint
from tools import convert_hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "hf"
    return save_checkpoint(folder, hf_config("qwen3"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def qwen3_flax(qwen3) -> Path:
    to_flax(qwen3, qwen3.parent / "flax")
    return qwen3.parent / "flax"


def test_all_problems_of_a_checkpoint_come_in_one_message(qwen3, tmp_path):
    src = shutil.copytree(qwen3, tmp_path / "src")

    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
        tensors["model.layers.0.mlp.experts.0.weight"] = torch.zeros(2, dtype=torch.bfloat16)
        tensors["model.layers.2.mlp.gate_proj.weight"] = tensors["model.layers.2.mlp.gate_proj.weight"].half()
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)

    edit_tensors(src, spoil)
    with pytest.raises(ValueError) as caught:
        to_flax(src, tmp_path / "dst")
    message = str(caught.value)
    for part in (
        "model.layers.1.mlp.up_proj.weight: missing, expected [48, 32]",
        "model.layers.0.self_attn.q_proj.weight: shape [3, 3], expected [64, 32]",
        "model.layers.0.mlp.experts.0.weight: unknown",
        "model.layers.2.mlp.gate_proj.weight: type F16",
        "model.norm.weight: type I8",
    ):
        assert part in message
    assert not (tmp_path / "dst").exists()


def test_a_tensor_in_two_files_and_a_lying_index_are_found(tmp_path):
    src = save_checkpoint(tmp_path / "src", hf_config("qwen3"), dtype=torch.bfloat16, max_shard_size="16KB")
    first, second = sorted(src.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError) as caught:
        to_flax(src, tmp_path / "dst")
    assert f"duplicate, in {first.name} and in {second.name}" in str(caught.value)
    assert "but in no file" in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda src, dst: shutil.rmtree(src), "no such folder"),
        (lambda src, dst: (src / "config.json").unlink(), "no config.json"),
        (lambda src, dst: (src / "config.json").write_text("{"), "not JSON"),
        (lambda src, dst: (src / "certificate.json").write_text("{"), "certificate.json: not JSON"),
        (lambda src, dst: (src / "model.safetensors").unlink(), "neither"),
        (lambda src, dst: (src / "model.safetensors").write_bytes(b"abc"), "cut short"),
        (lambda src, dst: os.truncate(src / "model.safetensors", 20_000), "cut short"),
        (lambda src, dst: dst.mkdir(), "already exists"),
    ],
)
def test_mistakes_in_source_and_destination_are_explained_and_leave_nothing(
    qwen3, tmp_path, prepare, message
):
    src, dst = shutil.copytree(qwen3, tmp_path / "src"), tmp_path / "dst"
    prepare(src, dst)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        to_flax(src, dst)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_direction_is_explained(qwen3, qwen3_flax, tmp_path):
    with pytest.raises(ValueError, match="already a converted folder"):
        to_flax(qwen3_flax, tmp_path / "dst")
    with pytest.raises(ValueError, match="already a Hugging Face folder"):
        to_hf(qwen3, tmp_path / "dst")
    with pytest.raises(ValueError, match="does not exist"):
        to_flax(qwen3, tmp_path / "no" / "dst")


def test_a_full_disk_is_told_before_and_cleaned_up_after(qwen3, qwen3_flax, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(hf_convert.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(OSError, match="GB free") as caught:
            to_flax(qwen3, tmp_path / "dst")
        assert caught.value.errno == errno.ENOSPC
    # A limit on the size of files makes real writes fail half-way, as a disk that fills up does.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "sys.path.insert(0, sys.argv[4]); from selfemo_jax.model import hf_convert;"
        "getattr(hf_convert, sys.argv[1])(sys.argv[2], sys.argv[3])"
    )
    for command, src in (("to_flax", qwen3), ("to_hf", qwen3_flax)):
        done = subprocess.run(
            [sys.executable, "-c", code, command, src, tmp_path / "dst", ROOT], capture_output=True, text=True
        )
        assert done.returncode != 0 and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_names_what_differs_and_accepts_a_certificate(qwen3, qwen3_flax, tmp_path):
    assert verify(qwen3, qwen3_flax) == []
    assert verify(qwen3, qwen3_flax / "certificate.json") == []
    other = shutil.copytree(qwen3, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][1, 1].add_(1))
    (line,) = verify(other, qwen3_flax)
    assert line.startswith("model.layers.2.mlp.up_proj.weight: sha256")
    changed = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(changed))
    assert any(line.startswith("config.json") for line in verify(other, qwen3_flax))


def test_damage_after_the_conversion_is_found(qwen3_flax, tmp_path):
    spoilt = shutil.copytree(qwen3_flax, tmp_path / "spoilt")
    store = orbax_io.open_arrays(spoilt / "params")["final_norm"]
    import tensorstore as ts

    ts.open(store.spec(), open=True).result()[3].write(np.float32(9.0)).result()
    assert [line.split(":")[0] for line in verify(qwen3_flax, spoilt)] == ["model.norm.weight"] * 2
    with pytest.raises(ValueError, match="model.norm.weight: differs from the certificate"):
        to_hf(spoilt, tmp_path / "back")
    file = next(p for p in (spoilt / "params" / "layers.gate" / "c" / "1").rglob("*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_params(spoilt, dtype="float32")
    file.unlink()
    with pytest.raises(ValueError, match="damaged"):
        load_params(spoilt, dtype="float32")
    assert not (tmp_path / "back").exists()


def test_the_command_says_an_error_as_the_others_do(tmp_path, capsys):
    assert convert_hf.main(["to-flax", str(tmp_path / "none"), str(tmp_path / "dst")]) == 2
    assert capsys.readouterr().err.startswith("error: ")

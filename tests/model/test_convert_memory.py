"""A checkpoint larger than the memory that its conversion may use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.hf_table import hf_slots
from selfemo_jax.model.safetensors_io import TensorInfo, plan_shards, write_header, write_index

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# ru_maxrss of a process begins at its parent's size: the shell between keeps pytest's out of the number.
MEASURE = (
    "import resource, sys; from tools.convert_hf import main; status = main(sys.argv[1:]);"
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(status)"
)


def write_random_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    infos = {
        name: TensorInfo(dtype="BF16", shape=slot.shape)
        for name, slot in hf_slots(ModelConfig.from_hf(CONFIG)).items()
    }
    shards = plan_shards(infos, max_bytes=GIB)
    noise = os.urandom(2**24)
    folder.mkdir()
    for file_name, group in shards.items():
        with (folder / file_name).open("wb") as file:
            write_header(file, group)
            left = sum(info.nbytes for info in group.values())
            while left:
                left -= file.write(noise[:left])
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return infos


def peak_bytes(*command: str | Path) -> int:
    done = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[1])


@pytest.mark.slow
def test_conversion_both_ways_needs_little_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 16 * GIB:
        pytest.skip("needs 16 GiB of free disk")
    try:
        infos = write_random_checkpoint(tmp_path / "src")
        total = sum(info.nbytes for info in infos.values())
        assert total > 4 * GIB and len(list((tmp_path / "src").glob("*.safetensors"))) > 3
        bound = 2 * max(info.nbytes for info in infos.values()) + GIB
        assert bound < 2.2 * GIB
        peaks = {"to-flax": peak_bytes("to-flax", tmp_path / "src", tmp_path / "flax")}
        shutil.copy(tmp_path / "flax" / "certificate.json", tmp_path / "certificate.json")
        shutil.rmtree(tmp_path / "src")
        peaks["to-hf"] = peak_bytes("to-hf", tmp_path / "flax", tmp_path / "back")
        shutil.rmtree(tmp_path / "flax")
        peaks["verify"] = peak_bytes("verify", tmp_path / "back", tmp_path / "certificate.json")
        print({name: f"{peak / GIB:.2f} GiB" for name, peak in peaks.items()}, f"of {total / GIB:.2f} GiB")
        assert max(peaks.values()) < bound
    finally:
        for folder in ("src", "flax", "back"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

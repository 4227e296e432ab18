"""How long a refresh of a vLLM server takes, part by part, beside writing and reading the same bytes.

    python tools/bench_refresh.py [--environment .venv-vllm] [--rounds 4] [--root FOLDER] [--transport orbax]
                                   [--cpu_threads 1]

A tied Qwen3 of 107 M parameters in float32 (428 MB); each round moves every weight by 1e-4, publishes,
stages, applies and proves. The first round is left out of the medians: it compiles.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, init_params
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.rollout.proof import NOISE
from selfemo_jax.rollout.publish import Publisher, write_model_folder
from selfemo_jax.rollout.supervisor import start_sidecar
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.rollout.vllm_engine import VllmEngine
from selfemo_jax.serving import copy_tokenizer
from selfemo_jax.settings.rollout import Rollout, Sidecar

MODEL = ModelConfig(
    architecture="qwen3",
    vocab_size=32000,
    embed_dim=768,
    mlp_dim=2304,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    rope_theta=1e6,
    tie_embeddings=True,
    max_positions=1024,
)
BLOCK = 2**24


def raw_seconds(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Seconds to write and fsync as many bytes into one file, and to read them again."""
    block, path = os.urandom(BLOCK), folder / "raw"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - start])
        os.fsync(file.fileno())
    written = time.perf_counter()
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter()
    path.unlink()
    return written - began, read - written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", default=".venv-vllm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--root", type=Path, help="folder of the versions (default: a temporary one)")
    parser.add_argument("--cpu_threads", type=int, default=1, help="of the server (default %(default)s)")
    parser.add_argument("--transport", choices=("orbax", "safetensors"), default="orbax")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(args, Path(scratch)), indent=1))


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Medians over the rounds, in seconds."""
    root = args.root or scratch / "weights"
    folder = scratch / "model"
    write_model_folder(folder, MODEL, dtype="float32", tokenizer=bundled_tokenizer(), copy=copy_tokenizer)
    sidecar = Sidecar(
        environment=args.environment,
        dtype="float32",
        transport=args.transport,
        cpu_threads=args.cpu_threads,
        slope_rollouts=0,
    )
    rng = jax.random.split(jax.random.key(1), sidecar.probes)
    probes = [tuple(int(t) for t in jax.random.randint(key, (192,), 0, MODEL.vocab_size)) for key in rng]
    engine = VllmEngine(
        MODEL,
        Rollout(engine="vllm", sidecar=sidecar),
        start=lambda: start_sidecar(
            sidecar, model_folder=folder, run_dir=scratch, weights_root=root, max_model_len=1024
        ),
        publisher=Publisher(root, MODEL, dtype="float32", transport=args.transport),
        logprobs=TrainerLogprobs(MODEL, Compute(), make_mesh({})),
        probes=probes,
        dtype="float32",
        noise=NOISE["float32"],
    )
    rounds: list[dict[str, float]] = []
    try:
        params = init_params(MODEL, jax.random.key(0))
        for version in range(args.rounds + 1):
            began = time.perf_counter()
            engine.update_policy(params, version=version)
            took = time.perf_counter() - began
            found = engine.take_metrics()
            write, read = raw_seconds(root, 4 * MODEL.num_params)
            rounds.append(found | {"refresh_s": took, "raw_write_s": write, "raw_read_s": read})
            print({name: round(value, 4) for name, value in rounds[-1].items()}, flush=True)
            params = jax.tree.map(lambda leaf: leaf + 1e-4, params)
    finally:
        engine.close()
    names = [name for name in rounds[-1] if name.endswith("_s")]
    medians = {name: round(statistics.median(r[name] for r in rounds[1:]), 3) for name in names}
    moved = medians["sync/publish_s"] + medians["sync/stage_s"] + medians["sync/apply_s"]
    raw = medians["raw_write_s"] + medians["raw_read_s"]
    return {
        "parameters": MODEL.num_params,
        "megabytes": round(4 * MODEL.num_params / 1e6),
        "transport": args.transport,
        "medians": medians,
        "publish + stage + apply over raw write + read": round(moved / raw, 2),
    }


if __name__ == "__main__":
    main()

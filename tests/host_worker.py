"""One of several processes of a test: ``MODE INDEX NUMBER PORT OUT``; writes what it finds to
``OUT/INDEX.json``."""

import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from selfemo_jax import distributed
from selfemo_jax.devices import prepare
from selfemo_jax.distributed import (
    Launch,
    any_of,
    bytes_from_first,
    check_alike,
    from_first,
    is_first,
    joined,
)
from selfemo_jax.rollout.engine import Completion, Group, Request, Sampling

DEVICES = 2
"""Of one process."""
TIMEOUT = 5.0


class Together(Exception):
    """Raised by every process."""


class FirstEngine:
    """Answers with its version; drops the request named lost."""

    def update_policy(self, params, *, version):
        self.version = version
        self.sums = {name: float(np.asarray(leaf, np.float64).sum()) for name, leaf in flat(params).items()}
        leaves = jax.tree.leaves(params)
        self.local = all(leaf.is_fully_addressable for leaf in leaves)

    def generate(self, requests, sampling):
        for request in reversed(requests):
            if request.id != "lost":
                ids = tuple(token + self.version for token in request.token_ids)
                one = Completion(
                    token_ids=ids,
                    logprobs=(-0.1,) * len(ids),
                    finish_reason="stop",
                    policy_versions=(self.version,),
                )
                yield Group(request_id=request.id, completions=(one,) * request.num)

    def close(self):
        self.closed = True

    def take_metrics(self):
        return {"rollout/retries": 3.0}


def flat(params):
    found = {name: leaf for name, leaf in params.items() if name != "layers"}
    return found | {f"layers/{name}": leaf for name, leaf in params["layers"].items()}


def together(number: int) -> dict:
    """Everything that does not fail."""
    from selfemo_jax.data.batching import TrainSequence, pack
    from selfemo_jax.model.config import ModelConfig
    from selfemo_jax.rollout.first_process import FirstProcessEngine
    from selfemo_jax.train_step import born_sharded, device_batch

    mesh, words = prepare({"data": 1, "fsdp": number * DEVICES, "tp": 1}, platform="cpu")
    found: dict = {"words": words, "local": len(mesh.local_devices), "first": is_first()}
    calls = []
    found["from_first"] = [
        from_first(lambda n=n: calls.append(n) or {"n": n, "x": 0.1 + n}, channel="a") for n in range(3)
    ]
    found["num_calls"] = len(calls)
    long = bytes(range(256)) * 14000
    found["long"] = bytes_from_first(lambda: long, channel="b") == long
    found["nobody"] = any_of("", channel="c")
    found["somebody"] = any_of("" if is_first() else "SIGTERM", channel="c")
    check_alike("same", what="this")
    try:
        check_alike(f"{jax.process_index()}", what="the files")
    except ValueError as error:
        found["unlike"] = str(error)

    sequences = [
        TrainSequence(group=i, prompt_ids=(i + 1,) * 5, completion_ids=(9,) * 3, token_weight=1.0)
        for i in range(8)
    ]
    batch = pack(sequences, layout="separate", row_tokens=8, micro_rows=8).batch
    tokens = device_batch(batch, mesh)["tokens"]
    found["rows"] = sorted(
        int(row[0]) for shard in tokens.addressable_shards for row in np.asarray(shard.data)
    )
    found["sum"] = int(jax.jit(lambda x: x.sum())(tokens))

    model = ModelConfig(
        architecture="qwen3", vocab_size=256, embed_dim=128, mlp_dim=256, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=32, rope_theta=1e4, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    params = born_sharded(model, mesh, seed=0, dtype="float32")
    engine = FirstProcessEngine(FirstEngine, model, mesh, dtype="float32")
    engine.update_policy(params, version=7)
    requests = [
        Request(id=name, token_ids=(1, 2, i), num=2, seed=i) for i, name in enumerate(("a", "lost", "b"))
    ]
    groups = list(engine.generate(requests, Sampling(max_tokens=4, stop_ids=(0,))))
    found["groups"] = [
        [
            g.request_id,
            [[list(c.token_ids), list(c.logprobs), list(c.policy_versions)] for c in g.completions],
        ]
        for g in groups
    ]
    found["metrics"] = engine.take_metrics()
    whole = {name: float(jax.jit(lambda x: x.sum())(leaf)) for name, leaf in flat(params).items()}
    inner = engine._engine
    found["weights"] = None if inner is None else [inner.local, inner.sums]
    found["whole"] = whole
    engine.close()
    return found


def main() -> None:
    mode, index, number, port, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    launch = Launch(coordinator=f"127.0.0.1:{port}", num_processes=number, process_id=index, timeout=TIMEOUT)
    result = Path(out) / f"{index}.json"
    with joined(launch, together=(Together,)):
        if mode == "together":
            found = together(number)
        else:
            (Path(out) / f"{index}.joined").touch()
            if mode == "raise" and index == 1:
                raise ValueError("its data is gone")
            if mode == "wait" or mode == "raise":
                distributed.barrier("never") if index == 0 else time.sleep(120)
            found = {}
        result.write_text(json.dumps(found))
        if mode == "stop":
            raise Together


if __name__ == "__main__":
    try:
        main()
    except Together:
        sys.exit(75)

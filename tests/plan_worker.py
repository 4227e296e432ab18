"""What a real update takes of the memory that was planned for it, measured in a process of its own.

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 python -m tests.plan_worker CACHE '{"remat": "full"}' '{}'

CACHE is a folder for compiled programs; then settings of the model and of the batch. On a CPU these settings
of the C library's allocator make every large array a mapping of its own that goes back when it is freed, so
that the kernel's peak is that of the arrays. On a GPU the peak is the allocator's, since the process began.
Prints bytes as JSON.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from selfemo_jax.bench.light import without_jaxtyping

without_jaxtyping()

from selfemo_jax.config import Config  # noqa: E402
from selfemo_jax.data.batching import TrainSequence, pack  # noqa: E402
from selfemo_jax.model.config import ModelConfig  # noqa: E402
from selfemo_jax.model.sharding import make_mesh  # noqa: E402
from selfemo_jax.plan.compiled import compile_step, planned_steps  # noqa: E402
from selfemo_jax.settings.model import Freeze  # noqa: E402
from selfemo_jax.train_step import born_sharded, sequence_logprobs, update  # noqa: E402

MODEL = ModelConfig(
    architecture="qwen3", vocab_size=8192, embed_dim=256, mlp_dim=1024, num_layers=6, num_heads=8,
    num_kv_heads=4, head_dim=32, rope_theta=1e4, tie_embeddings=True, max_positions=256,
)  # fmt: skip
ROW = 256


def configured(model: dict, batch: dict) -> Config:
    """One update a step, on policy, held to a reference."""
    found = Config()
    freeze = Freeze(**model.pop("freeze", {}))
    return dataclasses.replace(
        found,
        model=dataclasses.replace(found.model, **model, freeze=freeze),
        batch=dataclasses.replace(found.batch, **batch, row_tokens=ROW),
        loss=dataclasses.replace(found.loss, kl_coef=0.1),
        rl=dataclasses.replace(found.rl, mini_prompts=found.rl.prompts_per_step, updates_per_batch=1),
    )


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: now, and at the most."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def main() -> None:
    """Measure, then plan."""
    cache, model, batch = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    # What the run compiled need not be compiled again for the plan.
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config, mesh = configured(model, batch), make_mesh({}, jax.devices()[:1])
    micro_rows, at_once = config.batch.micro_rows, config.batch.logprobs_at_once
    steps = planned_steps(MODEL, config, mesh)
    # Every position has a target, so that the head is at all of them, as planned.
    rng = np.random.default_rng(0)
    items = [
        TrainSequence(
            group=row, prompt_ids=(1,), completion_ids=tuple(rng.integers(1, MODEL.vocab_size, ROW).tolist()),
            token_weight=1e-3, advantage=1.0,
        )
        for row in range(micro_rows * max(2, at_once))
    ]  # fmt: skip
    rows = pack(items, layout="separate", row_tokens=ROW, micro_rows=micro_rows).batch

    def step(state):
        scores = sequence_logprobs(steps, state.params, rows, micro_rows=micro_rows, at_once=at_once)
        scored = dataclasses.replace(rows, ref_logprobs=scores)
        done, _ = update(steps, state, scored, kind="rl", micro_rows=micro_rows, rate=1e-3, where="step")
        return jax.block_until_ready(done)

    state = step(steps.init_state(born_sharded(MODEL, mesh, seed=0, dtype="float32")))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if (stats := jax.devices()[0].memory_stats()) and "peak_bytes_in_use" in stats:
        measured = stats["peak_bytes_in_use"]
    else:
        # Of several steps: what one function leaves may be freed while the next runs, or only after a step.
        grown = []
        for _ in range(3):
            time.sleep(0.2)
            # The peak begins anew, after what compiling took.
            Path("/proc/self/clear_refs").write_text("5")
            before, _ = resident()
            state = step(state)
            grown.append(resident()[1] - before)
        measured = held + statistics.median(grown)
    planned = compile_step(MODEL, config, mesh)
    peaks = planned.peaks()
    worst = max(peaks, key=peaks.__getitem__)
    found = {"planned": planned.peak(), "measured": measured, "held": held, "worst": worst}
    print(json.dumps(found | {"platform": jax.default_backend(), "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()

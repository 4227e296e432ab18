"""The update and the decode path on an NVIDIA GPU; run with `-s` to see the rates.

    python -m pytest --noconftest -m gpu -s tests/gpu

The suite's own settings put JAX on the CPU and need packages that a GPU machine may lack, hence
`--noconftest`; jax, flax, optax, orbax and pytest are enough.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.bench.light import without_jaxtyping

without_jaxtyping()

from selfemo_jax.config import Loss, Optim  # noqa: E402
from selfemo_jax.data.batching import gather  # noqa: E402
from selfemo_jax.model.config import ModelConfig  # noqa: E402
from selfemo_jax.model.decoder import Compute, init_params  # noqa: E402
from selfemo_jax.model.sharding import make_mesh  # noqa: E402
from selfemo_jax.rollout.engine import Request, Sampling  # noqa: E402
from selfemo_jax.rollout.jax_engine import JaxEngine  # noqa: E402
from selfemo_jax.train_step import born_sharded, make_steps, sequence_logprobs, update  # noqa: E402
from tests.model.tiny import arrays, logprobs_of, objective, packed, sequences  # noqa: E402

pytestmark = pytest.mark.gpu

SMALL = ModelConfig(
    architecture="qwen3",
    vocab_size=8192,
    embed_dim=512,
    mlp_dim=1536,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rope_theta=1e6,
    tie_embeddings=True,
    max_positions=4096,
)
QWEN3_06B = ModelConfig(
    architecture="qwen3",
    vocab_size=151_936,
    embed_dim=1024,
    mlp_dim=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    tie_embeddings=True,
    max_positions=40_960,
)
GROUPS = ((150, (60, 21, 1, 66)), (130, (97, 70)), (1, (30, 44)), (280, (90,)))
ROW_TOKENS = {"separate": 380, "packed": 700, "shared_prefix": 700}


@pytest.fixture(autouse=True)
def cuda_device() -> jax.Device:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {str(error).splitlines()[0]}")


@functools.cache
def random_weights():
    return init_params(SMALL, jax.random.key(0))


def rows_of(layout: str):
    items = sequences(GROUPS, vocab_size=SMALL.vocab_size)
    return packed(items, layout=layout, row_tokens=ROW_TOKENS[layout])


def run(layout: str, compute: Compute):
    """Loss, gradients and the log-probs of each sequence."""
    together = rows_of(layout)
    batch = jax.tree.map(jnp.asarray, arrays(together.batch))

    @jax.jit
    def both(params, batch):
        logprobs, _ = logprobs_of(params, batch, config=SMALL, compute=compute)
        run = functools.partial(objective, kind="rl", config=SMALL, compute=compute)
        return *jax.value_and_grad(run)(params, batch), logprobs

    loss, gradients, logprobs = both(random_weights(), batch)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
    return float(loss), flat, np.concatenate(gather(np.asarray(logprobs), together.places))


@pytest.mark.parametrize("attention", ["dense", "blocked", "pallas"])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_layouts_agree_in_bfloat16(layout, attention):
    loss, gradients, logprobs = run(layout, Compute(dtype="bfloat16", attention=attention))
    expected = run("separate", Compute(dtype="bfloat16", attention="dense"))
    # bfloat16 keeps 8 bits, 0.4 %, and sums over rows of another length round differently in each layer. The
    # same code on a CPU differs by 0.009 on average and 0.04 at most in log-probs of about -9, by 1e-5 in the
    # loss and by 0.0075 of the norm in the gradients.
    assert abs(loss - expected[0]) < 1e-3
    differences = np.abs(logprobs - expected[2])
    assert differences.mean() < 0.02 and differences.max() < 0.1
    assert np.linalg.norm(gradients - expected[1]) < 0.03 * np.linalg.norm(expected[1])


@pytest.mark.parametrize("attention", ["dense", "blocked", "pallas"])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_layouts_agree_in_float32(layout, attention):
    # The GPU's usual product of float32 numbers keeps 10 bits (TF32); this test asks for all of them.
    with jax.default_matmul_precision("highest"):
        loss, gradients, logprobs = run(layout, Compute(attention=attention))
        expected = run("separate", Compute(attention="dense"))
    assert abs(loss - expected[0]) < 1e-5
    np.testing.assert_allclose(logprobs, expected[2], rtol=0, atol=1e-4)
    np.testing.assert_allclose(gradients, expected[1], rtol=0, atol=1e-5 * np.abs(expected[1]).max())


@pytest.mark.parametrize(("dtype", "mean_bound"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_decoded_logprobs_are_the_trainer_s(dtype, mean_bound):
    compute = Compute(dtype=dtype)
    prompts = {item.group: item for item in sequences(GROUPS, vocab_size=SMALL.vocab_size)}
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        engine = JaxEngine(SMALL, compute)
        engine.update_policy(random_weights(), version=0)
        requests = [
            Request(id=str(group), token_ids=item.prompt_ids, num=4, seed=group)
            for group, item in prompts.items()
        ]
        done = list(engine.generate(requests, Sampling(max_tokens=48, temperature=0.8, stop_ids=())))
        engine.close()
        items = [
            dataclasses.replace(
                prompts[int(group.request_id)],
                completion_ids=completion.token_ids,
                rollout_logprobs=completion.logprobs,
            )
            for group in done
            for completion in group.completions
        ]
        together = packed(items, layout="shared_prefix", row_tokens=700, micro_rows=2)
        found = sequence_logprobs(
            steps_of(SMALL, compute, temperature=0.8), random_weights(), together.batch, micro_rows=2
        )
    differences = np.concatenate(
        [
            np.abs(values - np.array(item.rollout_logprobs))
            for values, item in zip(gather(found, together.places), items, strict=True)
        ]
    )
    assert len(items) == 16 and differences.size == 16 * 48
    assert differences.mean() < mean_bound and differences.max() < 10 * mean_bound


def steps_of(config: ModelConfig, compute: Compute, *, temperature: float = 1.0):
    return make_steps(
        config,
        compute,
        make_mesh({}, jax.devices("cuda")[:1]),
        optim=Optim(lr=1e-5),
        loss=Loss(),
        temperature=temperature,
        logits_budget_mib=1024,
    )


def test_update_of_a_qwen3_06b_shape_runs_and_lowers_its_loss(cuda_device):
    num_groups, group_size, prompt, completion = 8, 8, 400, 200
    items = sequences(((prompt, (completion,) * group_size),) * num_groups, vocab_size=QWEN3_06B.vocab_size)
    together = packed(
        items, layout="shared_prefix", row_tokens=prompt + group_size * completion, micro_rows=4
    )
    steps = steps_of(QWEN3_06B, Compute(dtype="bfloat16", remat="full"))
    state = steps.init_state(born_sharded(QWEN3_06B, steps.mesh, seed=0, dtype="float32"))
    losses, seconds = [], []
    for step in range(6):
        began = time.perf_counter()
        state, metrics = update(
            steps, state, together.batch, kind="sft", micro_rows=4, rate=1e-5, where=f"step {step}"
        )
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0] - 0.01
    assert abs(losses[0] - np.log(QWEN3_06B.vocab_size)) < 1.0
    took = float(np.median(seconds[2:]))
    as_rows = num_groups * group_size * (prompt + completion)
    peak = cuda_device.memory_stats()["peak_bytes_in_use"] / 2**30
    print(
        f"\n{cuda_device.device_kind}: {seconds[0]:.1f} s the first, then {took:.3f} s; "
        f"{together.num_tokens / took:.0f} packed tokens/s, {as_rows / took:.0f} tokens/s of the sequences; "
        f"peak memory {peak:.1f} GiB"
    )

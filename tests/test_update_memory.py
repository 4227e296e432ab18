"""Memory of the compiled update at the vocabulary of Qwen3: linear in tokens, no logits of all positions."""

import dataclasses

import jax
import jax.numpy as jnp

from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import PackedBatch
from selfemo_jax.model.decoder import Compute, abstract_params
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.train_step import make_steps
from tests.model.tiny import TINY

QWEN = dataclasses.replace(TINY, vocab_size=151_936, embed_dim=16, num_layers=1)
INTEGERS = ("tokens", "targets", "positions", "segment_ids", "prefix_ids")


def update_memory(num_tokens: int, *, width: int | None = None) -> tuple[int, str]:
    """Bytes beside arguments and results of an RL gradient of two rows, and its program."""
    steps = make_steps(
        QWEN,
        Compute(attention="blocked", remat="full"),
        make_mesh({}, jax.devices()[:1]),
        optim=Optim(),
        loss=Loss(entropy_coef=0.01),
        temperature=1.0,
        logits_budget_mib=16,
    )
    batch = {
        field.name: jax.ShapeDtypeStruct(
            (2, num_tokens), jnp.int32 if field.name in INTEGERS else jnp.float32
        )
        for field in dataclasses.fields(PackedBatch)
    }
    weights, _ = abstract_params(QWEN)
    accumulator = jax.eval_shape(steps.zeros["rl"])
    lowered = steps.rl_gradients.lower(
        jax.eval_shape(steps.parts, weights), accumulator, batch, on_policy=False, width=width
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes, lowered.as_text()


def test_memory_of_an_update_grows_linearly_and_holds_no_logits_of_all_positions():
    found = {num_tokens: update_memory(num_tokens)[0] for num_tokens in (500, 1000, 2000)}
    logits = {num_tokens: 2 * num_tokens * QWEN.vocab_size * 4 for num_tokens in found}
    assert found[2000] < 0.1 * logits[2000]
    # Twice the tokens never take more than twice the memory, and what they add is far below their logits.
    assert found[1000] < 2 * found[500] and found[2000] < 2 * found[1000]
    assert found[2000] - found[1000] < 0.02 * (logits[2000] - logits[1000])


def test_no_array_of_all_logits_stands_in_the_program():
    for width in (None, 250):
        _, text = update_memory(500, width=width)
        sizes = {f"{2 * n}x{QWEN.vocab_size}" for n in (500, 250)}
        sizes |= {f"2x{n}x{QWEN.vocab_size}" for n in (500, 250)}
        assert not [size for size in sizes if f"<{size}x" in text]
        assert f"x{QWEN.vocab_size}x" in text

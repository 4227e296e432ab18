"""A tiny decoder, groups of random sequences and the two objectives, for the tests of the model."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from selfemo_jax.algo.losses import policy_loss, sft_loss, token_weights
from selfemo_jax.data.batching import Packed, TrainSequence, pack, scatter
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, forward, init_params, token_logprobs

TINY = ModelConfig(
    architecture="qwen3",
    vocab_size=97,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    tie_embeddings=True,
    max_positions=4096,
)
BIASED_LLAMA = dataclasses.replace(
    TINY, architecture="llama", qk_norm=False, attention_bias=True, tie_embeddings=False
)
GROUPS = ((9, (4, 7, 1)), (1, (3, 5)), (6, (2, 8, 6)))
"""Prompt length and completion lengths of each group: unequal, with a prompt of one token and a completion of
one."""
LONG_GROUPS = ((150, (60, 21, 1, 66)), (130, (97, 70)), (280, (20,)))
"""For rows of 300 tokens: above two blocks and no multiple of a block."""
BUDGET = 2**30
KINDS = ("sft", "rl")


def weights(config: ModelConfig = TINY, *, seed: int = 0) -> Params:
    """Random weights whose norms and biases are random too, so that no weight could be left out unseen."""
    params = init_params(config, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def sequences(groups=GROUPS, *, vocab_size: int = TINY.vocab_size, seed: int = 0) -> list[TrainSequence]:
    """Random sequences of the given lengths, weighted as a token mean."""
    rng = np.random.default_rng(seed)

    def draw(length):
        return tuple(int(token) for token in rng.integers(0, vocab_size, length))

    lengths = np.array([length for _, completions in groups for length in completions])
    (weight,) = set(token_weights(lengths, "token-mean").tolist())
    out = []
    for group, (prompt_length, completions) in enumerate(groups):
        prompt = draw(prompt_length)
        for length in completions:
            out.append(
                TrainSequence(
                    group=group,
                    prompt_ids=prompt,
                    completion_ids=draw(length),
                    token_weight=weight,
                    advantage=float(rng.normal()),
                    rollout_logprobs=tuple(float(x) for x in rng.normal(-4.5, 0.3, length)),
                )
            )
    return out


def packed(
    items: Sequence[TrainSequence], *, layout: str, row_tokens: int, micro_rows: int = 1, seed: int = 5
) -> Packed:
    """The sequences in rows, with old and reference log-probs that belong to each sequence and not to its
    place."""
    together = pack(items, layout=layout, row_tokens=row_tokens, micro_rows=micro_rows)
    rng = np.random.default_rng(seed)
    old = [rng.normal(-4.5, 0.3, len(item.completion_ids)) for item in items]
    reference = [rng.normal(-4.5, 0.3, len(item.completion_ids)) for item in items]
    batch = dataclasses.replace(
        together.batch,
        old_logprobs=scatter(old, together, fill=0.0),
        ref_logprobs=scatter(reference, together, fill=0.0),
    )
    return dataclasses.replace(together, batch=batch)


def arrays(batch) -> dict[str, np.ndarray]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def logprobs_of(params, batch, *, config=TINY, compute=None, temperature=1.0, budget_bytes=BUDGET):
    """Log-probability and entropy of every position of a batch given as a dict of arrays."""
    compute = Compute() if compute is None else compute
    hidden = forward(
        params,
        config,
        compute,
        tokens=batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        prefix_ids=batch["prefix_ids"],
    )
    return token_logprobs(
        params, config, compute, hidden, batch["targets"], temperature=temperature, budget_bytes=budget_bytes
    )


def objective(params, batch, *, kind: str, config=TINY, compute=None):
    """The summed loss of a batch; an RL loss has a KL term large enough to be seen."""
    temperature = 1.0 if kind == "sft" else 0.9
    logprobs, entropy = logprobs_of(params, batch, config=config, compute=compute, temperature=temperature)
    if kind == "sft":
        return sft_loss(logprobs, batch["token_weights"])[0]
    return policy_loss(
        logprobs,
        batch["old_logprobs"],
        batch["ref_logprobs"],
        batch["advantages"],
        batch["token_weights"],
        kl_coef=0.1,
        entropy=entropy,
        entropy_coef=0.01,
        importance_weights=batch["importance_weights"],
    )[0]


# Most of the time of these tests is compilation.
@functools.partial(
    jax.jit,
    static_argnames=("kind", "config", "compute"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def value_and_grad(params, batch, *, kind: str, config=TINY, compute=None):
    return jax.value_and_grad(functools.partial(objective, kind=kind, config=config, compute=compute))(
        params, batch
    )


def assert_trees_close(found, expected, *, bound: float) -> None:
    """Every leaf within ``bound`` times the largest magnitude of its expected value."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape and np.isfinite(b).all(), name
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(), err_msg=name)

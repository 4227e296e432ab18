"""A tiny policy, requests of unequal length and the trainer's view of a completion."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from selfemo_jax.model.decoder import Compute, Params, forward, token_logprobs
from selfemo_jax.rollout.engine import Completion, Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine
from tests.model.tiny import TINY, weights

POLICY = dataclasses.replace(TINY, vocab_size=96, tie_embeddings=False)
"""Untied: a tied random model mostly repeats its input, which would hide a wrong cache."""
LENGTHS = (5, 70, 1, 33, 2, 18)
ROW_TOKENS = 100


def sharp_weights(*, seed: int = 0) -> Params:
    """Weights whose next-token distributions are far from uniform, so that a wrong context is seen."""
    params = weights(POLICY, seed=seed)
    return params | {"head": params["head"] * 2, "embed": params["embed"] * 2}


def prompts(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(token) for token in rng.integers(0, POLICY.vocab_size, length)) for length in lengths]


def make_requests(lengths: Sequence[int] = LENGTHS, *, num: int = 2, seed: int = 0) -> list[Request]:
    return [
        Request(id=f"r{i}", token_ids=ids, num=num, seed=100 + i + (i << 40))
        for i, ids in enumerate(prompts(lengths, seed=seed))
    ]


def make_engine(
    params: Params | None = None, *, mesh=None, compute: Compute | None = None, **options
) -> JaxEngine:
    engine = JaxEngine(POLICY, compute or Compute(), mesh, **({"max_rows": 32} | options))
    engine.update_policy(sharp_weights() if params is None else params, version=1)
    return engine


def run(engine: JaxEngine, requests: Sequence[Request], **sampling) -> dict[str, tuple[Completion, ...]]:
    """Completions by request id; every group must be whole."""
    settings = Sampling(**({"max_tokens": 24, "stop_ids": ()} | sampling))
    groups = {group.request_id: group for group in engine.generate(requests, settings)}
    assert sorted(groups) == sorted(request.id for request in requests)
    for request in requests:
        assert groups[request.id].error is None
        assert len(groups[request.id].completions) == request.num
    return {request.id: groups[request.id].completions for request in requests}


def tokens_of(completions: Mapping[str, tuple[Completion, ...]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [completion.token_ids for completion in group] for name, group in completions.items()}


@functools.partial(jax.jit, static_argnames="temperature")
def _logprobs(params, tokens, targets, segment_ids, *, temperature):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(
        params,
        POLICY,
        Compute(),
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        prefix_ids=jnp.full_like(tokens, -1),
    )
    return token_logprobs(
        params, POLICY, Compute(), hidden, targets, temperature=temperature, budget_bytes=2**30
    )[0]


def trainer_logprobs(
    params: Params, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float
) -> list[np.ndarray]:
    """Log-probs of each completion, of (prompt, completion), by the trainer's pass over whole sequences."""
    rows = np.zeros((len(pairs), ROW_TOKENS + 1), np.int32)
    segments = np.ones((len(pairs), ROW_TOKENS), np.int32)
    for row, (prompt, completion) in enumerate(pairs):
        ids = [*prompt, *completion]
        rows[row, : len(ids)], segments[row, : len(ids)] = ids, 0
    logprobs = np.asarray(_logprobs(params, rows[:, :-1], rows[:, 1:], segments, temperature=temperature))
    starts = [len(prompt) - 1 for prompt, _ in pairs]
    return [
        logprobs[row, start : start + len(completion)]
        for row, (start, (_, completion)) in enumerate(zip(starts, pairs, strict=True))
    ]


def pointers(tree) -> set[int]:
    """Addresses of all buffers of a tree of arrays."""
    return {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }

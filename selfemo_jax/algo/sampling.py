"""Sampling tokens from logits with two uniforms a row.

A float32 inverse CDF over a whole vocabulary of 151,936 is biased: its steps are finer than the uniforms and
the sums. Here one uniform picks a block of about 512 tokens by block sums and a second one the token inside
it, which keeps the total variation from softmax below 5e-5. The log-prob shares its exponentials with the
block sums, and no array of the size of the logits is written.

Shape legend: R rows, V vocabulary, N blocks, K entries of one block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512


def sample(
    logits: Float[Array, "R V"],
    uniforms: Float[Array, "R 2"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """One token a row from softmax(logits / temperature), and its log-prob there.

    `uniforms` lie in [0, 1). `temperature` 0 is greedy, with log-probs of softmax(logits). `top_k` (0 off),
    then `top_p` (1 off) restrict what can be drawn, for evaluation only: the log-prob stays that of the
    untruncated distribution. A token of probability 0 (logit -inf, or underflow) is never drawn.
    """
    if temperature < 0:
        raise ValueError(f"sample: temperature is {temperature}, expected 0 (greedy) or more")
    if top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"sample: top_k is {top_k} and top_p is {top_p}, expected top_k >= 0 and 0 < top_p <= 1"
        )
    if temperature == 0:
        return greedy(logits)
    scale = 1.0 / temperature
    highest_R1 = logits.max(axis=-1, keepdims=True).astype(jnp.float32)
    sums_RN = _block_sums(logits, highest_R1, scale)
    log_total_R = jnp.log(sums_RN.sum(axis=-1))
    if top_k > 0 or top_p < 1.0:
        kept_RV, index_RV = _filter(logits.astype(jnp.float32) * scale, top_k=top_k, top_p=top_p)
        place_R = _draw(kept_RV, kept_RV[:, :1], 1.0, _block_sums(kept_RV, kept_RV[:, :1], 1.0), uniforms)
        tokens_R = jnp.take_along_axis(index_RV, place_R[:, None], axis=-1)[:, 0]
    else:
        tokens_R = _draw(logits, highest_R1, scale, sums_RN, uniforms)
    logit_R = jnp.take_along_axis(logits, tokens_R[:, None], axis=-1)[:, 0].astype(jnp.float32)
    return tokens_R, (logit_R - highest_R1[:, 0]) * scale - log_total_R


def sample_penalised(
    logits: Float[Array, "R V"],
    uniforms: Float[Array, "R 2"],
    counts: Int[Array, "R V"],
    *,
    frequency_penalty: float,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """As `sample`, from logits less ``frequency_penalty`` times ``counts``, how often the row has each token
    (OpenAI's API reference); the log-prob stays that of the logits as they are."""
    less_RV = logits.astype(jnp.float32) - frequency_penalty * counts
    tokens_R, _ = sample(less_RV, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    scaled_RV = logits.astype(jnp.float32) / (temperature or 1.0)
    chosen_R = jnp.take_along_axis(scaled_RV, tokens_R[:, None], axis=-1)[:, 0]
    return tokens_R, chosen_R - jax.nn.logsumexp(scaled_RV, axis=-1)


def greedy(logits: Float[Array, "R V"]) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The likeliest token of each row, the first among equals, and its log-prob under softmax(logits)."""
    tokens_R = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logit_R = jnp.take_along_axis(logits, tokens_R[:, None], axis=-1)[:, 0].astype(jnp.float32)
    return tokens_R, logit_R - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def inverse_cdf(weights: Float[Array, "R N"], uniforms: Float[Array, " R"]) -> Int[Array, " R"]:
    """The entry whose interval of the cumulated weights holds uniforms x their sum; never one of weight 0.

    Where rounding points at an entry without weight, the next one with weight is taken, else the last one.
    """
    num = weights.shape[-1]
    cumulated_RN = jnp.cumsum(weights, axis=-1)
    # Uniforms are multiples of 2^-23 or 2^-24: their steps' middles halve the bias, and 0 falls on no tiny
    # first entry.
    middle_R = jnp.minimum(uniforms + 2.0**-24, 1.0 - 2.0**-24)
    target_R1 = middle_R[:, None] * cumulated_RN[:, -1:]
    place_R1 = (cumulated_RN <= target_R1).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    entry_RN = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32)[None, :], weights.shape)
    next_R = jnp.where((weights > 0) & (entry_RN >= place_R1), entry_RN, num).min(axis=-1)
    last_R = jnp.where(weights > 0, entry_RN, 0).max(axis=-1)
    return jnp.where(next_R < num, next_R, last_R)


def _block_sums(
    logits_RV: Float[Array, "R V"], highest_R1: Float[Array, "R 1"], scale: float
) -> Float[Array, "R N"]:
    rows, vocab = logits_RV.shape
    weights_RV = jnp.exp((logits_RV.astype(jnp.float32) - highest_R1) * scale)
    padded_RV = jnp.pad(weights_RV, ((0, 0), (0, -vocab % BLOCK)))
    return padded_RV.reshape(rows, -1, BLOCK).sum(axis=-1)


def _draw(
    logits_RV: Float[Array, "R V"],
    highest_R1: Float[Array, "R 1"],
    scale: float,
    sums_RN: Float[Array, "R N"],
    uniforms: Float[Array, "R 2"],
) -> Int[Array, " R"]:
    vocab = logits_RV.shape[-1]
    start_R1 = BLOCK * inverse_cdf(sums_RN, uniforms[:, 0])[:, None]
    index_RK = start_R1 + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    inside_RK = jnp.take_along_axis(logits_RV, jnp.minimum(index_RK, vocab - 1), axis=-1).astype(jnp.float32)
    weights_RK = jnp.where(index_RK < vocab, jnp.exp((inside_RK - highest_R1) * scale), 0.0)
    return start_R1[:, 0] + inverse_cdf(weights_RK, uniforms[:, 1])


def _filter(
    scaled_RV: Float[Array, "R V"], *, top_k: int, top_p: float
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The `top_k` highest logits, falling, and their tokens; -inf beyond the smallest set of mass `top_p`."""
    vocab = scaled_RV.shape[-1]
    values_RK, index_RK = jax.lax.top_k(scaled_RV, min(top_k, vocab) if top_k > 0 else vocab)
    probs_RK = jax.nn.softmax(values_RK, axis=-1)
    before_RK = jnp.cumsum(probs_RK, axis=-1) - probs_RK
    # The first is kept even where a tiny top_p meets rounding.
    kept_RK = (before_RK < top_p) | (jnp.arange(values_RK.shape[-1]) == 0)[None, :]
    return jnp.where(kept_RK, values_RK, -jnp.inf), index_RK

"""Policy and SFT losses as plain sums: micro-batches, rows and devices only add up.

Arrays of one call have one shape, [B, T] or any other, aligned to targets. `token_weights` is the weight of
each target in the whole mini-batch; 0 means no target, and whatever stands there (NaN and infinity too)
matters neither to the value nor to the gradient. Metrics are {name: (sum over targets, number of targets)}:
add both over micro-batches, then divide.

Semantics follow verl (method: equation 14): clamped ratios, asymmetric clip, dual clip, k1/k2/k3 penalties.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
KlKind = Literal["k1", "k2", "k3", "k1+", "k2+", "k3+"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "micro-token-mean"
]


def token_weights(
    lengths: Int[np.ndarray, "*S"],
    mode: Aggregation,
    *,
    norm_constant: float | None = None,
    micro_batches: Int[np.ndarray, "*S"] | None = None,
) -> Float[np.ndarray, "*S"]:
    """Weight of each target of every sequence of a whole mini-batch, decided once on the host (numpy).

    `lengths` counts the targets of each sequence; 0 marks an absent one, which gets weight 0 and is not
    counted in S. token-mean 1 / sum(len); seq-mean-token-mean 1 / (S len); seq-mean-token-sum 1 / S;
    seq-mean-token-sum-norm 1 / `norm_constant` (verl's loss_scale_factor); micro-token-mean 1 / (M tokens of
    its micro-batch), the mean of the means of M micro-batches named by `micro_batches`, as verl's older
    worker does it.
    """
    lengths = np.asarray(lengths)
    if (lengths < 0).any():
        raise ValueError(f"token_weights: a length is {lengths.min()}, expected 0 (absent) or more")
    present = lengths > 0
    num_sequences = max(int(present.sum()), 1)
    if mode == "token-mean":
        weights = np.full(lengths.shape, 1.0 / max(int(lengths.sum()), 1))
    elif mode == "seq-mean-token-mean":
        weights = 1.0 / (num_sequences * np.maximum(lengths, 1))
    elif mode == "seq-mean-token-sum":
        weights = np.full(lengths.shape, 1.0 / num_sequences)
    elif mode == "seq-mean-token-sum-norm":
        if norm_constant is None or norm_constant <= 0:
            raise ValueError(f"token_weights: {mode} needs norm_constant above 0, found {norm_constant}")
        weights = np.full(lengths.shape, 1.0 / norm_constant)
    elif mode == "micro-token-mean":
        if micro_batches is None or micro_batches.shape != lengths.shape:
            raise ValueError(f"token_weights: {mode} needs micro_batches, the micro-batch of each sequence")
        names, inverse = np.unique(micro_batches, return_inverse=True)
        inverse = inverse.reshape(lengths.shape)
        tokens = np.bincount(inverse.ravel(), weights=lengths.ravel(), minlength=len(names))
        weights = 1.0 / (max(int((tokens > 0).sum()), 1) * np.maximum(tokens, 1)[inverse])
    else:
        raise ValueError(
            f"token_weights: mode is {mode!r}, expected one of {', '.join(get_args(Aggregation))}"
        )
    return np.where(present, weights, 0.0).astype(np.float32)


def kl_penalty(
    logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"], *, kind: KlKind
) -> Float[Array, "*S"]:
    """Estimate of KL(policy || reference) at each sampled token (joschu.net/blog/kl-approx).

    k1 = log p - log ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1, with k1 clamped to +-20 and the result to
    +-10. A "+" keeps the value and takes the gradient of k2, whose expectation is the gradient of the KL.
    """
    gap = logprobs - ref_logprobs
    name = kind.removesuffix("+")
    if name == "k1":
        value = gap
    elif name == "k2":
        value = 0.5 * gap**2
    elif name == "k3":
        bounded = jnp.clip(-gap, -20.0, 20.0)
        value = jnp.clip(jnp.exp(bounded) - bounded - 1.0, -10.0, 10.0)
    else:
        raise ValueError(f"kl_penalty: kind is {kind!r}, expected k1, k2 or k3, each with or without '+'")
    if name == kind:
        return value
    square = 0.5 * gap**2
    return square - jax.lax.stop_gradient(square) + jax.lax.stop_gradient(value)


def policy_loss(
    logprobs: Float[Array, "*S"],
    old_logprobs: Float[Array, "*S"],
    ref_logprobs: Float[Array, "*S"] | None,
    advantages: Float[Array, "*S"],
    token_weights: Float[Array, "*S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = 3.0,
    kl_coef: float = 0.001,
    kl_kind: KlKind = "k3",
    entropy: Float[Array, "*S"] | None = None,
    entropy_coef: float = 0.0,
    importance_weights: Float[Array, "*S"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum of token_weights x (clipped surrogate + kl_coef KL - entropy_coef entropy), and metrics (eq. 14).

    `importance_weights` multiply the surrogate only. Gradients flow through `logprobs` and `entropy` alone.
    `clip_dual` bounds the loss of tokens with a negative advantage at -A clip_dual; None switches that off.
    `ref_logprobs` may be None when `kl_coef` is 0. Metrics: policy_loss, clip_fraction, clip_fraction_dual,
    ppo_kl, kl and entropy when given: each (sum over targets, number of targets).
    """
    if clip_dual is not None and clip_dual <= 1.0:
        raise ValueError(f"policy_loss: clip_dual is {clip_dual}, expected above 1, or None to switch it off")
    if ref_logprobs is None and kl_coef != 0.0:
        raise ValueError(
            f"policy_loss: kl_coef is {kl_coef} but there are no ref_logprobs; pass them or set it to 0"
        )
    if entropy is None and entropy_coef != 0.0:
        raise ValueError(
            f"policy_loss: entropy_coef is {entropy_coef} but there is no entropy; pass it or set it to 0"
        )
    mask = token_weights != 0
    current = _masked(logprobs, mask)
    fixed = jax.lax.stop_gradient
    advantage = fixed(_masked(advantages, mask))

    log_ratio = jnp.clip(current - fixed(_masked(old_logprobs, mask)), -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = jnp.maximum(plain, clipped)
    dual_clipped = jnp.zeros_like(mask)
    if clip_dual is not None:
        ceiling = -advantage * clip_dual
        dual_clipped = (advantage < 0) & (surrogate > ceiling)
        surrogate = jnp.where(advantage < 0, jnp.minimum(ceiling, surrogate), surrogate)
    if importance_weights is not None:
        surrogate = surrogate * fixed(_masked(importance_weights, mask))

    loss = surrogate
    per_token = {
        "policy_loss": surrogate,
        "clip_fraction": clipped > plain,
        "clip_fraction_dual": dual_clipped,
        "ppo_kl": -log_ratio,
    }
    if ref_logprobs is not None:
        kl = kl_penalty(current, fixed(_masked(ref_logprobs, mask)), kind=kl_kind)
        loss = loss + kl_coef * kl
        per_token["kl"] = kl
    if entropy is not None:
        safe_entropy = _masked(entropy, mask)
        loss = loss - entropy_coef * safe_entropy
        per_token["entropy"] = safe_entropy
    return _weighted_sum(loss, token_weights), _metrics(per_token, mask)


def sft_loss(
    logprobs: Float[Array, "*S"], token_weights: Float[Array, "*S"]
) -> tuple[Float[Array, ""], Metrics]:
    """Sum of token_weights x negative log-likelihood. Metrics: nll, (sum over targets, their number)."""
    mask = token_weights != 0
    nll = -_masked(logprobs, mask)
    return _weighted_sum(nll, token_weights), _metrics({"nll": nll}, mask)


def importance_weights(
    old_logprobs: Float[Array, "*S T"],
    rollout_logprobs: Float[Array, "*S T"],
    mask: Bool[Array, "*S T"],
    *,
    kind: Literal["off", "token", "sequence"],
    cap: float = 2.0,
    band: float | None = None,
) -> Float[Array, "*S T"]:
    """Importance weights min(exp(old - rollout), cap) that correct the sampler's log-probs, detached.

    token: each target on its own, in any layout. sequence: the summed log-ratio of a row, the same for all
    its targets; a row must be one whole sequence, so this is computed on padded [S, T] before packing.
    Log-ratios are clamped to +-20. 0 outside `mask`; off gives 1 inside. With `band` a row whose geometric
    mean of exp(old - rollout) lies outside [1 / (1 + band), 1 + band] gets 0 throughout, whatever the kind;
    this too needs whole sequences.
    """
    if cap <= 0:
        raise ValueError(f"importance_weights: cap is {cap}, expected above 0")
    if band is not None and band <= 0:
        raise ValueError(f"importance_weights: band is {band}, expected above 0, or None for no mask")
    gap = jnp.where(mask, _masked(old_logprobs, mask) - _masked(rollout_logprobs, mask), 0.0)
    kept = mask
    if band is not None:
        mean_gap = gap.sum(axis=-1, keepdims=True) / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
        kept = mask & (jnp.abs(mean_gap) <= jnp.log1p(band))
    if kind == "off":
        gap = jnp.zeros_like(gap)
    elif kind == "sequence":
        gap = jnp.broadcast_to(gap.sum(axis=-1, keepdims=True), gap.shape)
    elif kind != "token":
        raise ValueError(f"importance_weights: kind is {kind!r}, expected off, token or sequence")
    weights = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    if kind != "off":
        weights = jnp.minimum(weights, cap)
    return jax.lax.stop_gradient(jnp.where(kept, weights, 0.0))


def largest_gap(
    old_logprobs: Float[Array, "*S"], rollout_logprobs: Float[Array, "*S"], mask: Bool[Array, "*S"]
) -> Float[Array, ""]:
    """The largest |difference| of the sampler's log-probs from the trainer's; 0 without targets."""
    return jnp.max(jnp.abs(_masked(old_logprobs, mask) - _masked(rollout_logprobs, mask)), initial=0.0)


def rollout_gap(
    old_logprobs: Float[Array, "*S"], rollout_logprobs: Float[Array, "*S"], mask: Bool[Array, "*S"]
) -> Metrics:
    """How far the sampler's log-probs are from the trainer's on the same tokens, as (sum, number of targets).

    rollout_gap/mean: |difference of the probabilities|; rollout_gap/dlogp_mean: that of the log-probs;
    rollout_gap/k1 and /k3: estimates of KL(sampler || trainer).
    """
    old, rollout = _masked(old_logprobs, mask), _masked(rollout_logprobs, mask)
    per_token = {
        "rollout_gap/mean": jnp.abs(jnp.exp(old) - jnp.exp(rollout)),
        "rollout_gap/dlogp_mean": jnp.abs(old - rollout),
        "rollout_gap/k1": rollout - old,
        "rollout_gap/k3": kl_penalty(rollout, old, kind="k3"),
    }
    return _metrics(per_token, mask)


def _masked(values: Shaped[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, "*S"]:
    return jnp.where(mask, values, 0.0).astype(jnp.float32)


def _weighted_sum(values: Float[Array, "*S"], weights: Float[Array, "*S"]) -> Float[Array, ""]:
    return (values * weights.astype(jnp.float32)).sum()


def _metrics(per_token: dict[str, Array], mask: Bool[Array, "*S"]) -> Metrics:
    num = mask.sum().astype(jnp.float32)
    return {
        name: (jax.lax.stop_gradient(_masked(values, mask)).sum(), num) for name, values in per_token.items()
    }

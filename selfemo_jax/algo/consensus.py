"""The group's core emotions and the consensus reward (SELF-EMO, arXiv 2604.18003, equations 11 and 12).

Shape legend: P prompts, G rollouts per prompt, C emotion classes. `class_mask[P, C]` marks the labels of each
prompt's list; the last slot (unknown labels) is False there: its weight counts in the normalisation, never in
the core.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from selfemo_jax.algo.rewards import normalize_weights

Core = Literal["mean", "raw_mean", "count"]
# Labels whose shares differ by less are tied: float32 sums of the same numbers in another order differ in the
# last bits.
TIE_TOLERANCE = 1e-6


def _named(q_PGC: Float[Array, "P G C"], presence: float) -> Bool[Array, "P G C"]:
    """Labels that a rollout names: normalised weight of at least `presence`, or above 0 for presence 0."""
    # .05 / (.05 + .95) may fall one bit short of .05 in float32.
    return q_PGC >= presence - 1e-6 if presence > 0 else q_PGC > 0


def core_distribution(
    pred: Float[Array, "P G C"],
    valid: Bool[Array, "P G"],
    class_mask: Bool[Array, "P C"],
    *,
    core: Core = "mean",
    presence: float = 0.0,
) -> Float[Array, "P C"]:
    """What the valid rollouts of each prompt say about its labels (equation 11); only its order matters.

    mean: mean of the normalised weights; a row sums to 1 less the weight of unknown labels. raw_mean: mean of
    the weights as written, so that answers with large weights say more. count: share of the rollouts that
    name the label, as `presence` defines naming. Zero outside `class_mask` and without a valid rollout.
    """
    safe_PGC = jnp.where(valid[:, :, None], pred, 0.0).astype(jnp.float32)
    if core == "mean":
        said_PGC = normalize_weights(safe_PGC)
    elif core == "raw_mean":
        said_PGC = safe_PGC
    elif core == "count":
        said_PGC = _named(normalize_weights(safe_PGC), presence).astype(jnp.float32)
    else:
        raise ValueError(f"core_distribution: core is {core!r}, expected mean, raw_mean or count")
    mean_PC = said_PGC.sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)[:, None]
    return jnp.where(class_mask, mean_PC, 0.0)


def core_set(distribution: Float[Array, "P C"], *, top_k: int) -> Bool[Array, "P C"]:
    """The `top_k` labels of highest share above 0; ties go to the label that is earlier in the list."""
    if top_k < 1:
        raise ValueError(f"core_set: top_k is {top_k}, expected at least 1")
    num_classes = distribution.shape[-1]
    order_PC = jnp.argsort(-distribution, axis=-1, stable=True)
    sorted_PC = jnp.take_along_axis(distribution, order_PC, axis=-1)
    tier_PC = jnp.cumsum(sorted_PC[:, :-1] - sorted_PC[:, 1:] > TIE_TOLERANCE, axis=-1)
    tier_PC = jnp.pad(tier_PC, ((0, 0), (1, 0)))
    keys_PC = jnp.sort(tier_PC * num_classes + order_PC, axis=-1)
    chosen_PK = keys_PC[:, : min(top_k, num_classes)] % num_classes
    in_top_PC = (chosen_PK[:, :, None] == jnp.arange(num_classes)[None, None, :]).any(axis=1)
    return in_top_PC & (distribution > 0)


def consensus_reward(
    pred: Float[Array, "P G C"],
    valid: Bool[Array, "P G"],
    class_mask: Bool[Array, "P C"],
    *,
    top_k: int = 3,
    presence: float = 0.0,
    kind: Literal["count", "mass"] = "count",
    core: Core = "mean",
    divide: Literal["core", "top_k"] = "core",
) -> Float[Array, "P G"]:
    """r2 in [0, 1]: how much of the group's core each rollout names (equation 12); 0 where not valid.

    count: named core labels over the size of the core, or always over `top_k` by `divide`, which rewards a
    group less the more it agrees. A label is named when its normalised weight is at least `presence`;
    presence 0 is the literal reading, any listed weight above 0. mass: normalised weight on the core labels,
    which padding the list cannot raise. `core` is how the core is found (`core_distribution`).
    """
    if not 0.0 <= presence <= 1.0:
        raise ValueError(f"consensus_reward: presence is {presence}, expected 0 to 1")
    shares_PC = core_distribution(pred, valid, class_mask, core=core, presence=presence)
    core_PC = core_set(shares_PC, top_k=top_k)
    q_PGC = normalize_weights(jnp.where(valid[:, :, None], pred, 0.0))
    if kind == "mass":
        reward_PG = jnp.where(core_PC[:, None, :], q_PGC, 0.0).sum(axis=-1)
    elif kind == "count":
        hits_PG = (_named(q_PGC, presence) & core_PC[:, None, :]).sum(axis=-1)
        if divide == "core":
            reward_PG = hits_PG / jnp.maximum(core_PC.sum(axis=-1), 1)[:, None]
        elif divide == "top_k":
            reward_PG = hits_PG / top_k
        else:
            raise ValueError(f"consensus_reward: divide is {divide!r}, expected core or top_k")
    else:
        raise ValueError(f"consensus_reward: kind is {kind!r}, expected count or mass")
    return jnp.where(valid, reward_PG, 0.0).astype(jnp.float32)


def core_excludes_gold(core: Bool[Array, "P C"], gold: Float[Array, "P C"]) -> Bool[Array, " P"]:
    """True where the group agrees on something (a core exists) and no gold label is in it."""
    return core.any(axis=-1) & ~(core & (gold > 0)).any(axis=-1)


def collapse_entropy(distribution: Float[Array, "P C"]) -> Float[Array, ""]:
    """Entropy in nats of the mean core distribution of the prompts that have one; 0 when all say one label.

    Slots mean the labels of one list: call it on the prompts of one data set.
    """
    share_PC = normalize_weights(distribution)
    mean_C = share_PC.sum(axis=0) / jnp.maximum((distribution.sum(axis=-1) > 0).sum(), 1)
    return -jnp.where(mean_C > 0, mean_C * jnp.log(jnp.where(mean_C > 0, mean_C, 1.0)), 0.0).sum()


def reward_correlation(
    r1: Float[Array, "P G"], r2: Float[Array, "P G"], present: Bool[Array, "P G"]
) -> Float[Array, ""]:
    """Pearson correlation of r1 and r2 over the present rollouts; 0 where either does not vary."""
    num = jnp.maximum(present.sum(), 1)
    d1_PG, d2_PG = (
        jnp.where(present, r - jnp.where(present, r, 0.0).sum() / num, 0.0).astype(jnp.float32)
        for r in (r1, r2)
    )
    v1, v2 = (d1_PG**2).sum(), (d2_PG**2).sum()
    varies = (v1 > 1e-12) & (v2 > 1e-12)
    return jnp.where(varies, (d1_PG * d2_PG).sum() / jnp.sqrt(jnp.where(varies, v1 * v2, 1.0)), 0.0)

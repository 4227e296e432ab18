"""Group-relative advantages (GRPO, arXiv 2402.03300) and what they are made of.

Shape legend: P prompts, G rollouts per prompt. `present[P, G]` is False for rollouts of lost groups: they
enter no mean, get 0, and may hold NaN.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

# Rewards of one group closer than this are equal: the float32 residue of a mean would else be divided by
# itself.
EQUAL_REWARDS = 1e-6

Kind = Literal["std", "mean", "leave_one_out"]


def _spread(values_PG: Float[Array, "P G"], present: Bool[Array, "P G"]) -> Float[Array, " P"]:
    highest_P = jnp.where(present, values_PG, -jnp.inf).max(axis=1)
    lowest_P = jnp.where(present, values_PG, jnp.inf).min(axis=1)
    return jnp.where(present.any(axis=1), highest_P - lowest_P, 0.0)


def _center(values_PG: Float[Array, "P G"], present: Bool[Array, "P G"]) -> Float[Array, "P G"]:
    """Values less the group mean; a group of one keeps its value (mean 0), as in verl."""
    num_P1 = present.sum(axis=1, keepdims=True)
    safe_PG = jnp.where(present, values_PG, 0.0).astype(jnp.float32)
    mean_P1 = safe_PG.sum(axis=1, keepdims=True) / jnp.maximum(num_P1, 1)
    return jnp.where(present, safe_PG - jnp.where(num_P1 > 1, mean_P1, 0.0), 0.0)


def _std(values_PG: Float[Array, "P G"], present: Bool[Array, "P G"]) -> Float[Array, "P 1"]:
    """Unbiased standard deviation of each group; 1 for a group of one."""
    num_P1 = present.sum(axis=1, keepdims=True)
    variance_P1 = (_center(values_PG, present) ** 2).sum(axis=1, keepdims=True) / jnp.maximum(num_P1 - 1, 1)
    return jnp.where(num_P1 > 1, jnp.sqrt(variance_P1), 1.0)


def _flat(values_PG: Float[Array, "P G"], present: Bool[Array, "P G"]) -> Bool[Array, "P 1"]:
    """Groups of two or more whose values are all equal."""
    return ((_spread(values_PG, present) < EQUAL_REWARDS) & (present.sum(axis=1) > 1))[:, None]


def group_advantages(
    rewards: Float[Array, "P G"],
    present: Bool[Array, "P G"],
    *,
    kind: Kind = "std",
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Reward less the group mean, in units chosen by `kind` (equation 14).

    std: over (unbiased group std + eps), the paper's; mean: no division (Dr. GRPO, arXiv 2503.20783);
    leave_one_out: less the mean of the others, RLOO. A group of one has mean 0 and std 1; a group of equal
    rewards gets exactly 0.
    """
    centered_PG = _center(rewards, present)
    num_P1 = present.sum(axis=1, keepdims=True)
    if kind == "std":
        result_PG = centered_PG / (_std(rewards, present) + eps)
    elif kind == "mean":
        result_PG = centered_PG
    elif kind == "leave_one_out":
        result_PG = centered_PG * jnp.where(num_P1 > 1, num_P1 / jnp.maximum(num_P1 - 1, 1), 1.0)
    else:
        raise ValueError(f"group_advantages: kind is {kind!r}, expected std, mean or leave_one_out")
    return jnp.where(present & ~_flat(rewards, present), result_PG, 0.0)


def scaled_advantages(
    r1: Float[Array, "P G"],
    r2: Float[Array, "P G"],
    rewards: Float[Array, "P G"],
    weight: ScalarLike,
    present: Bool[Array, "P G"],
    *,
    scale: Literal["reward", "r1", "parts"] = "reward",
    kind: Kind = "std",
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Advantages of `rewards` = r1 + weight r2, by what they are scaled with (the ablation at equation 14).

    reward: the paper's, where the std divides the weight out of a group whose r1 are all equal. r1:
    deviations of the reward over the std of r1, 0 where r1 does not vary. parts: A(r1) + weight A(r2), each
    over its own std.
    """
    if scale == "reward":
        return group_advantages(rewards, present, kind=kind, eps=eps)
    if scale == "parts":
        first_PG = group_advantages(r1, present, kind=kind, eps=eps)
        return first_PG + weight * group_advantages(r2, present, kind=kind, eps=eps)
    if scale != "r1":
        raise ValueError(f"scaled_advantages: scale is {scale!r}, expected reward, r1 or parts")
    if kind != "std":
        raise ValueError(f"scaled_advantages: scale r1 divides by a std, but kind is {kind!r}; use kind std")
    return jnp.where(_flat(r1, present), 0.0, _center(rewards, present) / (_std(r1, present) + eps))


def share_r2_only(
    r1: Float[Array, "P G"],
    r2: Float[Array, "P G"],
    advantages: Float[Array, "P G"],
    present: Bool[Array, "P G"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Groups that learn from the consensus alone: r1 all equal, r2 not.

    Returns their share of the groups that have a present rollout, and their share of the sum of |advantages|.
    """
    only_P = (_spread(r1, present) < EQUAL_REWARDS) & (_spread(r2, present) >= EQUAL_REWARDS)
    size_P = jnp.where(present, jnp.abs(advantages), 0.0).sum(axis=1)
    total = size_P.sum()
    share_size = jnp.where(only_P, size_P, 0.0).sum() / jnp.where(total > 0, total, 1.0)
    return only_P.sum() / jnp.maximum(present.any(axis=1).sum(), 1), share_size


def share_flat(rewards: Float[Array, "P G"], present: Bool[Array, "P G"]) -> Float[Array, ""]:
    """Share of the groups with a present rollout whose rewards are all equal: there only the KL term acts."""
    return _flat(rewards, present).sum() / jnp.maximum(present.any(axis=1).sum(), 1)

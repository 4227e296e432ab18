"""Rewards of a group of rollouts and their combination (SELF-EMO, arXiv 2604.18003, section 3.3).

Shape legend: P prompts, G rollouts per prompt, C emotion classes. The last class slot holds the weight of all
labels outside the prompt's list: it takes part in the normalisation and in the union, and no gold weight ever
falls there.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

RewardFunction = Callable[..., Array]


@dataclass(frozen=True, kw_only=True)
class RewardPreset:
    """How the consensus reward r2 joins the primary reward r1."""

    name: str
    lambda_max: float
    """Weight of r2 at the last step; it grows linearly from lambda_max / T."""
    presence: float
    """Least normalised weight at which a label counts as named; 0 means any listed weight above 0."""
    form: Literal["additive", "convex"]
    """additive: r1 + lambda r2; convex: (1 - lambda) r1 + lambda r2."""


PAPER = RewardPreset(name="paper", lambda_max=1.0, presence=0.0, form="additive")
ROBUST = RewardPreset(name="robust", lambda_max=0.5, presence=0.05, form="additive")
CONVEX = RewardPreset(name="convex", lambda_max=0.5, presence=0.05, form="convex")
PRESETS = (PAPER, ROBUST, CONVEX)


def reward_preset(name: str) -> RewardPreset:
    """The preset called `name`; ValueError names the known ones."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    raise ValueError(f"reward preset: found {name!r}, expected one of {', '.join(p.name for p in PRESETS)}")


def normalize_weights(weights: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    """Weights over their sum (equation 9), as raw ones are independent. A row without weight stays 0."""
    weights = weights.astype(jnp.float32)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


def weighted_iou(
    pred: Float[Array, "P G C"],
    gold: Float[Array, "P C"],
    valid: Bool[Array, "P G"],
    *,
    smoothing: float = 0.0,
    class_mask: Bool[Array, "P C"] | None = None,
) -> Float[Array, "P G"]:
    """Weighted intersection over union of two emotion distributions, in [0, 1] (equation 10).

    `pred` and `gold` are raw weights, normalised here. A rollout that is not valid, or names nothing, gets 0.
    `smoothing` adds smoothing / |L| to each label of the prompt's list on both sides before the comparison,
    and then needs `class_mask`; a wholly wrong answer is then above 0.
    """
    if smoothing < 0:
        raise ValueError(f"weighted_iou: smoothing is {smoothing}, expected 0 (off) or more")
    q_PGC = normalize_weights(jnp.where(valid[:, :, None], pred, 0.0))
    g_PC = normalize_weights(gold)
    scored_PG = valid & (q_PGC.sum(axis=-1) > 0)
    if smoothing > 0:
        if class_mask is None:
            raise ValueError("weighted_iou: smoothing needs class_mask, the labels of each prompt's list")
        share_PC = class_mask * (smoothing / jnp.maximum(class_mask.sum(axis=-1, keepdims=True), 1))
        q_PGC = (q_PGC + share_PC[:, None, :]) / (1.0 + smoothing)
        g_PC = (g_PC + share_PC) / (1.0 + smoothing)
    overlap_PG = jnp.minimum(q_PGC, g_PC[:, None, :]).sum(axis=-1)
    union_PG = jnp.maximum(q_PGC, g_PC[:, None, :]).sum(axis=-1)
    return jnp.where(scored_PG & (union_PG > 0), overlap_PG / jnp.where(union_PG > 0, union_PG, 1.0), 0.0)


def similarity_reward(
    pred: Float[Array, "P G C"],
    gold: Float[Array, "P C"],
    valid: Bool[Array, "P G"],
    similarity: Float[Array, "P C C"],
) -> Float[Array, "P G"]:
    """Sum over labels e, f of q(e) similarity(e, f) g(f) of the normalised weights; 0 where not valid.

    In [0, 1] for similarities in [0, 1]. With the identity it is the overlap of two one-hot answers; close
    labels (happy and excited) then earn their similarity in place of nothing. Unlike `weighted_iou` it is not
    largest at the gold weights: all weight on the label most similar to the gold is best.
    """
    q_PGC = normalize_weights(jnp.where(valid[:, :, None], pred, 0.0))
    worth_PC = jnp.einsum("pef,pf->pe", similarity, normalize_weights(gold))
    return jnp.where(valid, jnp.einsum("pgc,pc->pg", q_PGC, worth_PC), 0.0)


def argmax_accuracy(
    pred: Float[Array, "P G C"], gold: Float[Array, "P C"], valid: Bool[Array, "P G"]
) -> Float[Array, "P G"]:
    """1 where the heaviest predicted label is a heaviest gold label and the rollout is valid, else 0.

    Equal predicted weights go to the first label of the list, because an array does not know the order in the
    text.
    """
    safe_PGC = jnp.where(valid[:, :, None], pred, 0.0)
    best_PG = jnp.argmax(safe_PGC, axis=-1)
    top_PC = (gold > 0) & (gold == gold.max(axis=-1, keepdims=True))
    right_PG = jnp.take_along_axis(top_PC, best_PG, axis=-1)
    return (right_PG & valid & (safe_PGC.max(axis=-1) > 0)).astype(jnp.float32)


def reward_weight(
    step: ScalarLike,
    total_steps: ScalarLike,
    *,
    lambda_max: float,
    schedule: Literal["linear", "constant"] = "linear",
) -> Float[Array, ""]:
    """lambda(t) = lambda_max t / T of equation 13, t counted from 1; lambda_max from the last step on.

    `schedule="constant"` gives lambda_max at every step (an ablation). `step` may be traced.
    """
    if isinstance(total_steps, int) and total_steps < 1:
        raise ValueError(f"reward_weight: total_steps is {total_steps}, expected at least 1")
    if schedule == "constant":
        return jnp.full((), lambda_max, jnp.float32)
    if schedule != "linear":
        raise ValueError(f"reward_weight: schedule is {schedule!r}, expected linear or constant")
    progress = jnp.asarray(step, jnp.float32) / jnp.asarray(total_steps, jnp.float32)
    return lambda_max * jnp.clip(progress, 0.0, 1.0)


def combine(
    r1: Float[Array, "P G"],
    r2: Float[Array, "P G"],
    *,
    step: ScalarLike,
    total_steps: ScalarLike,
    preset: str | RewardPreset = "paper",
    lambda_max: float | None = None,
    schedule: Literal["linear", "constant"] = "linear",
) -> Float[Array, "P G"]:
    """The reward R of equation 13 from r1 and r2, both in [0, 1]. `lambda_max` overrides the preset's."""
    preset = reward_preset(preset) if isinstance(preset, str) else preset
    top = preset.lambda_max if lambda_max is None else lambda_max
    weight = reward_weight(step, total_steps, lambda_max=top, schedule=schedule)
    if preset.form == "convex":
        return (1.0 - weight) * r1 + weight * r2
    return r1 + weight * r2


def load_reward(path: str) -> RewardFunction:
    """Import a user's primary reward from "package.module:function" and check it without running it.

    The function is called as fn(pred[P, G, C], gold[P, C], valid[P, G], class_mask[P, C]) inside jit and
    returns float32 [P, G]. ValueError says what is wrong with the path, the signature, or the result for two
    sets of shapes.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward function: found {path!r}, expected 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward function {path}: cannot import {module_name} ({error}); "
            "run from its folder or install it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward function {path}: {module_name} has no function {name}")
    for shape in ((2, 3, 8), (5, 1, 4)):
        _check_reward(function, path, *shape)
    return function


def _check_reward(function: RewardFunction, path: str, P: int, G: int, C: int) -> None:
    floats, bools = jnp.float32, jnp.bool_
    arguments = (
        jax.ShapeDtypeStruct((P, G, C), floats),
        jax.ShapeDtypeStruct((P, C), floats),
        jax.ShapeDtypeStruct((P, G), bools),
        jax.ShapeDtypeStruct((P, C), bools),
    )
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"reward function {path}: expected to be called as fn(pred, gold, valid, class_mask), but {error}"
        ) from error
    try:
        result = jax.eval_shape(function, *arguments)
    # A user's function may raise anything; the message says what.
    except Exception as error:
        raise ValueError(
            f"reward function {path}: tracing it with pred[{P},{G},{C}] failed "
            f"({type(error).__name__}: {error}); "
            "write it with jax.numpy and without Python branches on values"
        ) from error
    found = (getattr(result, "shape", None), getattr(result, "dtype", None))
    if found != ((P, G), jnp.dtype(floats)):
        raise ValueError(
            f"reward function {path}: for pred[{P},{G},{C}] it returns {result}, "
            f"expected float32 of shape ({P}, {G})"
        )

"""The method on plain dicts and lists, one rollout at a time, to check the kernels against.

A rollout is a dict of label to raw weight, or None when its answer was malformed. A label that is not in the
inventory is unknown. Nothing here uses arrays.
"""

import math

Weights = dict[str, float]


def normalize(weights: Weights) -> Weights:
    total = sum(weights.values())
    return {label: weight / total for label, weight in weights.items()} if total > 0 else {}


def weighted_iou(pred: Weights | None, gold: Weights) -> float:
    if not pred:
        return 0.0
    q, g = normalize(pred), normalize(gold)
    union = set(q) | set(g)
    overlap = sum(min(q.get(label, 0.0), g.get(label, 0.0)) for label in union)
    return overlap / sum(max(q.get(label, 0.0), g.get(label, 0.0)) for label in union)


def similarity(pred: Weights | None, gold: Weights, alike: dict[frozenset[str], float]) -> float:
    if not pred:
        return 0.0
    q, g = normalize(pred), normalize(gold)
    pairs = [(one, other) for one in q for other in g]
    return sum(
        q[one] * g[other] * (1.0 if one == other else alike.get(frozenset((one, other)), 0.0))
        for one, other in pairs
    )


def accuracy(pred: Weights | None, gold: Weights, inventory: list[str]) -> float:
    if not pred:
        return 0.0
    # The largest weight; the earlier label of the inventory among equals, unknown labels last.
    order = {label: place for place, label in enumerate(inventory)}
    best = min(pred, key=lambda label: (-pred[label], order.get(label, len(inventory))))
    return float(gold.get(best, 0.0) == max(gold.values()))


def named(rollout: Weights, label: str, presence: float) -> bool:
    q = normalize(rollout)
    return q.get(label, 0.0) > 0 and q[label] >= presence - 1e-9


def core_distribution(
    rollouts: list[Weights | None], inventory: list[str], core: str = "mean", presence: float = 0.0
) -> Weights:
    valid = [rollout for rollout in rollouts if rollout is not None]
    if core == "raw_mean":
        said = valid
    elif core == "count":
        said = [{label: float(named(rollout, label, presence)) for label in inventory} for rollout in valid]
    else:
        said = [normalize(rollout) for rollout in valid]
    return {label: sum(q.get(label, 0.0) for q in said) / max(len(said), 1) for label in inventory}


def core_set(
    rollouts: list[Weights | None],
    inventory: list[str],
    top_k: int,
    core: str = "mean",
    presence: float = 0.0,
) -> list[str]:
    shares = core_distribution(rollouts, inventory, core, presence)
    # Sums of the same numbers in another order may differ in the last bits; they are still ties.
    ranked = sorted(inventory, key=lambda label: (-round(shares[label], 9), inventory.index(label)))
    return [label for label in ranked if shares[label] > 0][:top_k]


def consensus(
    rollouts: list[Weights | None],
    inventory: list[str],
    *,
    top_k: int,
    presence: float,
    kind: str,
    core_kind: str = "mean",
    divide: str = "core",
) -> list[float]:
    core = core_set(rollouts, inventory, top_k, core_kind, presence)
    rewards = []
    for rollout in rollouts:
        if rollout is None:
            rewards.append(0.0)
            continue
        q = normalize(rollout)
        if kind == "mass":
            rewards.append(sum(q.get(label, 0.0) for label in core))
        else:
            hits = [label for label in core if named(rollout, label, presence)]
            rewards.append(len(hits) / (top_k if divide == "top_k" else max(1, len(core))))
    return rewards


def combine(r1: float, r2: float, step: int, total_steps: int, lambda_max: float, form: str) -> float:
    weight = lambda_max * step / total_steps
    return (1 - weight) * r1 + weight * r2 if form == "convex" else r1 + weight * r2


def advantages(rewards: list[float | None], kind: str, eps: float = 1e-6) -> list[float]:
    """None is a lost rollout."""
    known = [reward for reward in rewards if reward is not None]
    if len(known) > 1 and max(known) - min(known) < 1e-6:
        return [0.0] * len(rewards)
    result = []
    for reward in rewards:
        if reward is None:
            result.append(0.0)
        elif len(known) == 1:
            result.append(reward / (1 + eps) if kind == "std" else reward)
        elif kind == "leave_one_out":
            result.append(reward - (sum(known) - reward) / (len(known) - 1))
        else:
            mean = sum(known) / len(known)
            std = math.sqrt(sum((other - mean) ** 2 for other in known) / (len(known) - 1))
            result.append((reward - mean) / (std + eps) if kind == "std" else reward - mean)
    return result


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def token_policy_loss(
    logprob: float,
    old: float,
    ref: float,
    advantage: float,
    *,
    low: float,
    high: float,
    dual: float,
    beta: float,
    kl: str,
    importance: float = 1.0,
) -> dict[str, float]:
    """The loss of one token and what is logged about it."""
    gap = clamp(logprob - old, -20, 20)
    ratio = math.exp(gap)
    plain, clipped = -advantage * ratio, -advantage * clamp(ratio, 1 - low, 1 + high)
    surrogate = max(plain, clipped)
    dual_clipped = advantage < 0 and surrogate > -advantage * dual
    if advantage < 0:
        surrogate = min(-advantage * dual, surrogate)
    k1 = logprob - ref
    if kl == "k1":
        penalty = k1
    elif kl == "k2":
        penalty = k1 * k1 / 2
    else:
        bounded = clamp(-k1, -20, 20)
        penalty = clamp(math.exp(bounded) - bounded - 1, -10, 10)
    return {
        "loss": surrogate * importance + beta * penalty,
        "clip_fraction": float(clipped > plain),
        "clip_fraction_dual": float(dual_clipped),
        "ppo_kl": -gap,
        "kl": penalty,
    }


def aggregate(losses: list[list[float]], mode: str, constant: float = 1.0) -> float:
    """Per-token losses of each present sequence into one number."""
    if mode == "token-mean":
        tokens = [loss for sequence in losses for loss in sequence]
        return sum(tokens) / len(tokens)
    if mode == "seq-mean-token-mean":
        return sum(sum(sequence) / len(sequence) for sequence in losses) / len(losses)
    if mode == "seq-mean-token-sum":
        return sum(sum(sequence) for sequence in losses) / len(losses)
    return sum(sum(sequence) for sequence in losses) / constant

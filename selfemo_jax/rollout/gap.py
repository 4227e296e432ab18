"""How far the sampler's log-probs are from the trainer's on the tokens that are trained on.

Two correct implementations differ by rounding: about 1e-5 a token in float32 and a few hundredths in
bfloat16. More means other weights, another temperature or another tokenisation, and the update would be
biased without a sign of it in the loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from selfemo_jax.rollout.engine import RolloutError
from selfemo_jax.settings.rollout import Rollout

DECIDES = "rollout_gap/mean"
"""The metric that the thresholds are about: mean |difference of probabilities| per token."""


class GapError(RolloutError):
    """Sampler and trainer are too far apart for an update to mean anything."""


def sequence_gap(old: Sequence[np.ndarray], rollout: Sequence[np.ndarray]) -> dict[str, float]:
    """What only whole sequences show: how far the geometric mean of the ratio trainer / sampler strays, at
    its lowest and its highest.

    ``old[i]`` and ``rollout[i]`` are the log-probs of the tokens of sequence i by trainer and sampler.
    """
    gaps = [a.astype(np.float64) - b for a, b in zip(old, rollout, strict=True) if len(a)]
    if not gaps:
        return {}
    ratios = np.exp(np.clip([gap.mean() for gap in gaps], -20.0, 20.0))
    return {
        "rollout_gap/ratio_lowest": float(ratios.min()),
        "rollout_gap/ratio_highest": float(ratios.max()),
    }


def join_gaps(gaps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Those of the mini-batches of a step as one: the lowest, the highest, the mean of the rest."""
    joined = {}
    for name in sorted({name for gap in gaps for name in gap}):
        values = [gap[name] for gap in gaps if name in gap]
        extreme = {"lowest": min, "highest": max}.get(name.rpartition("_")[2])
        joined[name] = float(np.mean(values) if extreme is None else extreme(values))
    return joined


def batch_ratio(metrics: Mapping[str, float]) -> dict[str, float]:
    """The geometric mean of the ratio trainer / sampler over all tokens of a step, from their mean
    log-ratio."""
    if "rollout_gap/k1" not in metrics:
        return {}
    return {"rollout_gap/ratio": float(np.exp(np.clip(-metrics["rollout_gap/k1"], -20.0, 20.0)))}


def check_gap(metrics: Mapping[str, float], settings: Rollout, *, where: str) -> str | None:
    """A warning above `rollout.gap_warn`; GapError above `rollout.gap_stop` or where the gap is not a
    number."""
    if DECIDES not in metrics:
        return None
    gap = metrics[DECIDES]
    words = (
        f"{where}: the sampler's probabilities differ from the trainer's by {gap:.2g} on average "
        f"({metrics.get('rollout_gap/dlogp_mean', float('nan')):.2g} in log-probs, at most "
        f"{metrics.get('rollout_gap/dlogp_max', float('nan')):.2g})"
    )
    if settings.gap_stop is not None and not gap <= settings.gap_stop:
        raise GapError(
            f"{words}, above rollout.gap_stop {settings.gap_stop:g}; the step is not saved. Look for "
            "other weights, another temperature or type in the sampler; raise gap_stop where it is expected"
        )
    if settings.gap_warn is not None and gap > settings.gap_warn:
        return f"{words}, above rollout.gap_warn {settings.gap_warn:g}"
    return None

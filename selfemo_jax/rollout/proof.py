"""Is what a server serves version v, or still v-1? Answered from log-probs of the same tokens.

With d = logp(v) - logp(v-1), both by the trainer, and e = served - logp(v-1), the slope <d,e> / <d,d> is 1
where v is served and 0 where v-1 is. The numeric noise of the two implementations adds to e; its share in the
slope shrinks with the number of tokens. Where d itself is not above the noise, the slope abstains and digests
of what was applied decide. Whatever decides, what is
left of the log-probs after v must not exceed the noise that earlier refreshes of this model had, or a small
share of d: that shows weights of which only a part is new.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SLOPE_BOUND = 0.5
_SURE = 0.1
"""Standard error of the slope above which it abstains: five of them part 0 from the bound."""
_ABOVE_NOISE = 2.0
NOISE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Standard deviation of one token's log-prob between trainer and server, by the coarser of their types;
measured on a 100 M parameter model."""
_RESIDUAL, _OF_UPDATE = 5.0, 0.01
"""What may be left, as a multiple of the measured noise or of d, whichever is more."""
_AT_MOST = 20.0
"""What may be left in any case, as a multiple of the noise of the type; alone where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of one token's log-prob between trainer and server."""

    of_types: float
    measured: float | None = None
    """The residual that proven refreshes of this model had."""

    @property
    def scale(self) -> float:
        """The best estimate."""
        return self.of_types if self.measured is None else self.measured

    def limit(self, update: float) -> float:
        """The residual that is believed after an update which moves log-probs by ``update`` (root mean
        square)."""
        most = _AT_MOST * self.of_types
        if self.measured is None:
            return most
        return min(most, max(_RESIDUAL * self.measured, _OF_UPDATE * update))

    def after(self, residual: float) -> "Noise":
        """With a proven refresh more: up at once, down by halves."""
        before = 0.0 if self.measured is None else 0.5 * self.measured
        return replace(self, measured=max(residual, before, 1e-3 * self.of_types))


@dataclass(kw_only=True)
class Slope:
    """The two sums of the slope; adding over steps sharpens it."""

    de: float = 0.0
    dd: float = 0.0
    num_tokens: int = 0

    def add(self, served: np.ndarray, new: np.ndarray, old: np.ndarray) -> None:
        """Log-probs of the same tokens: as served, by the trainer under v, and under v-1."""
        d, e = new.astype(np.float64) - old, served.astype(np.float64) - old
        self.de += float(d @ e)
        self.dd += float(d @ d)
        self.num_tokens += len(d)

    @property
    def value(self) -> float:
        """<d,e> / <d,d>; NaN before any difference was seen."""
        return self.de / self.dd if self.dd > 0 else math.nan

    def stands_out(self, noise: float) -> bool:
        """Whether d is well above this noise of a token. Below it d is mostly the trainer's own rounding, of
        which e has a part too, and the slope goes to 0.5 whatever is served."""
        return self.dd >= (_ABOVE_NOISE * noise) ** 2 * self.num_tokens and self.num_tokens > 0

    def is_sure(self, noise: float) -> bool:
        """Whether the value tells 0 from 1 in spite of this noise of each token's log-prob."""
        return self.error(noise) <= _SURE

    def error(self, noise: float) -> float:
        """Standard deviation of the value when each token's log-prob has this noise."""
        return noise / math.sqrt(self.dd) if self.dd > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a refresh is proven, and by what."""

    proven: bool
    decided_by: str
    """slope or digests."""
    words: str
    slope: float = math.nan
    residual: float = math.nan
    """Root mean square of served - logp(v), per token."""
    num_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def judge(
    served: Sequence[np.ndarray],
    new: Sequence[np.ndarray],
    old: Sequence[np.ndarray] | None,
    *,
    noise: Noise,
    digests_agree: bool,
    generated: Sequence[tuple[float, float]] = (),
    old_head: Sequence[np.ndarray] | None = None,
) -> Verdict:
    """The verdict on probes: log-probs as served, by the trainer under v, and under v-1 (None at the first
    version). ``generated`` are (served, trainer) log-probs of tokens sampled after the probes: they come by
    the cache of prompts, which the scores of prompts do not use. ``old_head`` is the trainer's under v with
    the output head of v-1, which a backend that packs a tied head goes on using."""
    left = np.concatenate(served).astype(np.float64) - np.concatenate(new)
    decoded = np.array([a - b for a, b in generated])
    residual = float(np.sqrt(np.mean(left**2)))
    worst = float(np.abs(decoded).max()) if len(decoded) else 0.0
    slope = Slope()
    for index in range(len(served)) if old is not None else ():
        slope.add(served[index], new[index], old[index])
    error = slope.error(noise.scale)
    abstains = not (slope.is_sure(noise.scale) and slope.stands_out(noise.scale))
    limit = noise.limit(math.sqrt(slope.dd / slope.num_tokens) if slope.num_tokens else 0.0)
    problems = []
    if not abstains and not slope.value > SLOPE_BOUND:
        problems.append(
            f"the slope of the served log-probs towards the new version is {slope.value:.3f}, expected above "
            f"{SLOPE_BOUND} (1 is the new version, 0 the one before it)"
        )
    if not residual <= limit:
        problems.append(
            f"served log-probs differ from the trainer's by {residual:.2e} (root mean square), expected at "
            f"most {limit:.1e}"
        )
    if old_head is not None:
        share = Slope()
        for index in range(len(served)):
            share.add(served[index], old_head[index], new[index])
        if share.is_sure(noise.scale) and share.stands_out(noise.scale) and share.value > SLOPE_BOUND:
            problems.append(
                f"served log-probs are those of the output head before ({share.value:.3f}, expected 0): the "
                "tied head was not packed again"
            )
    # The largest of a few single tokens: a wider bound, yet far below what an old cache does.
    if not worst <= 4 * limit:
        problems.append(
            f"tokens sampled after a probe differ by up to {worst:.2e}, expected at most {4 * limit:.1e}: "
            "their prompts may have been read from a cache of other weights"
        )
    if not digests_agree:
        problems.append("the digests of what was applied are not those of what was published")
    by = "digests" if abstains else "slope"
    # An update below the noise must not look like a proof by log-probs.
    unsure = f"; the update moves them too little for the slope (its error would be {error:.2g})"
    words = "; ".join(problems) or f"proven by {by}{unsure if abstains and old is not None else ''}"
    return Verdict(
        proven=not problems,
        decided_by=by,
        words=words,
        slope=slope.value,
        residual=residual,
        num_tokens=len(left),
        metrics={
            "sync/canary_slope": slope.value,
            "sync/canary_error": error if math.isfinite(error) else math.nan,
            "sync/residual": residual,
            "sync/by_digests": float(abstains),
        },
    )

"""Whether the sides of a phase compute the same: asked before anything is timed."""

from collections.abc import Mapping
from typing import Any

from selfemo_jax.bench.settings import BenchSettings

GREEDY_SHARE = 0.98
"""Greedy tokens that must be equal in float32; a tie of two logits may fall either way."""


class Disagreement(RuntimeError):
    """The sides do not compute the same: the phase has no times."""


def check(phase: str, values: Mapping[str, Mapping[str, Any]], settings: BenchSettings) -> None:
    """Same losses, gradient norms, numbers of tokens and greedy tokens of each label's first run."""

    def of(name: str) -> dict[str, Any]:
        return {label: found[name] for label, found in values.items() if name in found}

    losses, norms, greedy = of("loss"), of("grad_norm"), of("greedy")
    if losses and max(losses.values()) - min(losses.values()) > settings.loss_tolerance:
        raise Disagreement(f"{phase}: losses differ by more than {settings.loss_tolerance}: {losses}")
    bound = 1e-3 if settings.dtype == "float32" else 5e-2
    if norms and max(norms.values()) > (1 + bound) * min(norms.values()):
        raise Disagreement(f"{phase}: gradient norms differ by more than {bound:.1%}: {norms}")
    expected = settings.groups * settings.group_size * settings.completion
    if set(of("tokens").values()) - {expected}:
        raise Disagreement(f"{phase}: {expected} tokens were to be sampled, found {of('tokens')}")
    if settings.dtype == "float32" and greedy:
        reference = next(iter(greedy.values()))
        for label, tokens in greedy.items():
            share = sum(a == b for a, b in zip(tokens, reference, strict=True)) / len(reference)
            if share < GREEDY_SHARE:
                raise Disagreement(f"{phase}: {label} has {share:.0%} of the greedy tokens of the first")

"""The slope of rollouts towards the version that they name, added up over steps: what one canary is too short
to tell, many rollouts show."""

import functools
import threading
from collections.abc import Sequence

import numpy as np

from selfemo_jax.model.adapters import is_adapted
from selfemo_jax.model.decoder import Params
from selfemo_jax.rollout.engine import Completion, Request, Sampling
from selfemo_jax.rollout.proof import SLOPE_BOUND, Slope
from selfemo_jax.rollout.publish import snapshot
from selfemo_jax.rollout.refresh import RefreshError
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs


class RolloutSlope:
    """Notes rollouts of the version that is served, and scores them before the next one is."""

    def __init__(self, logprobs: TrainerLogprobs, *, dtype: str, most: int):
        """``most`` rollouts of each version are scored; with 0 nothing is, and no weights are kept for it."""
        self._logprobs, self._dtype, self._most = logprobs, dtype, most
        self._lock = threading.Lock()
        self._recent: list[tuple[tuple[int, ...], Completion, float]] = []
        self._version: int | None = None
        self._serving: Params | None = None
        self._before: Params | None = None
        self.total = Slope()
        """Of all rollouts so far."""
        self._unjudged = Slope()
        """Of those since the last judgement: a long good past must not outweigh what is served now."""

    def follow(self, params: Params, before: Params | None, *, version: int) -> None:
        """From now on ``params`` are served as ``version``; ``before`` were until now (None: nothing was)."""
        with self._lock:
            self._version = version
            self._serving, self._before = (params, before) if self._most else (None, None)
            self._recent = []

    def note(
        self, request: Request, completions: Sequence[Completion], sampling: Sampling, *, version: int
    ) -> None:
        """Completions of ``version``; left out where another one is served by now."""
        with self._lock:
            room = self._most - len(self._recent) if version == self._version else 0
            if self._before is not None and sampling.temperature and room > 0:
                self._recent += [
                    (request.token_ids, found, sampling.temperature) for found in completions[:room]
                ]

    def settle(self, noise: float) -> None:
        """Score what was noted; RefreshError once it is sure that rollouts come from older weights than they
        say. ``noise`` is that of one token's log-prob."""
        with self._lock:
            recent, self._recent = self._recent, []
            serving, before = self._serving, self._before
        if not recent or serving is None or before is None:
            return
        score = functools.partial(
            self._logprobs,
            sequences=[(*prompt, *found.token_ids) for prompt, found, _ in recent],
            starts=[len(prompt) for prompt, _, _ in recent],
            temperature=recent[0][2],
        )
        # One after the other: merged policies are as large as the base.
        new, old = (score(self._plain(params)) for params in (serving, before))
        for (_, found, _), after, ahead in zip(recent, new, old, strict=True):
            for slope in (self.total, self._unjudged):
                slope.add(np.array(found.logprobs), after, ahead)
        if not (self._unjudged.is_sure(noise) and self._unjudged.stands_out(noise)):
            return
        judged, self._unjudged = self._unjudged, Slope()
        if not judged.value > SLOPE_BOUND:
            raise RefreshError(
                f"the slope of {judged.num_tokens} rollout tokens towards their own version is "
                f"{judged.value:.3f}, expected above {SLOPE_BOUND}: the servers sampled them from older "
                "weights than they say"
            )

    def _plain(self, params: Params) -> Params:
        return snapshot(params, dtype=self._dtype) if is_adapted(params) else params

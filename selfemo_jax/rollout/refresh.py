"""One refresh of all servers: stage, pause, apply, name, forget old prompts, resume, and prove it.

Staging reads and checks everything while the old version still serves; nothing has changed until apply. The
pause ends in `finally`. Requests are kept away by the caller from before the pause until the proof, so no
rollout meets a version that is not proven.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from selfemo_jax.rollout.engine import Request, RolloutError, Sampling
from selfemo_jax.rollout.proof import Noise, Verdict, judge
from selfemo_jax.rollout.publish import Published
from selfemo_jax.rollout.server_api import Refused, Rejected, Server, ServerError

Result = TypeVar("Result")
MIN_PROBES = 8
MIN_PROBE_TOKENS = 129
"""Above the block of the prefix cache on every back-end, so that a stale one is met."""


class RefreshError(RolloutError):
    """The servers could not be brought to a version, or it was not proven."""


class NotStagedError(RefreshError):
    """A server refused a version before anything changed."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Token sequences that both sides score, and the trainer's log-probs of them."""

    sequences: Sequence[tuple[int, ...]]
    new: Sequence[np.ndarray]
    """Under the version that is to be served; tokens 1, 2, ... of each sequence."""
    old: Sequence[np.ndarray] | None = None
    """Under the version before it; None where there was none."""
    old_head: Sequence[np.ndarray] | None = None
    """Under the new version with the output head before it; None where nothing is tied to it."""


@dataclass(kw_only=True)
class Refreshed:
    """What a refresh did."""

    verdict: Verdict
    seconds: dict[str, float] = field(default_factory=dict)


Continue = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[np.ndarray]]
"""(sequences, tokens sampled after each) -> the trainer's log-probs of those tokens under the new version."""


def stage_on(servers: Sequence[Server], published: Published) -> float:
    """Every server reads and checks a version while it serves the old one; the seconds it took.

    `NotStagedError` where one says no: all still serve what they did. `Unreachable` where one is gone.
    """
    began = time.perf_counter()
    try:
        each(servers, lambda server: server.stage(str(published.folder)))
    except Refused as error:
        each(servers, Server.drop_staged, quiet=True)
        raise NotStagedError(f"version {published.version} was refused: {error}") from error
    return time.perf_counter() - began


def apply_on(servers: Sequence[Server], published: Published) -> dict[str, float]:
    """Pause, apply the staged version, name it, forget old prompts, resume; the seconds of each part."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    try:
        timed(seconds, "pause", lambda: each(servers, Server.pause))
        timed(seconds, "apply", lambda: each(servers, lambda server: server.apply(published.version)))
        each(servers, lambda server: server.set_version(published.version))
        each(servers, Server.reset_prefix_cache)
    finally:
        # A server that stays paused would keep its next requests waiting for ever.
        each(servers, Server.resume, quiet=True)
        seconds["paused"] = time.perf_counter() - began
    for server in servers:
        found, paused = server.version(), server.paused()
        if found != str(published.version) or paused:
            raise RefreshError(
                f"{server.url}: after a refresh to version {published.version} it serves {found}"
                + (" and is paused" if paused else "")
            )
    return seconds


def prove(
    servers: Sequence[Server],
    published: Published,
    probes: Probes,
    *,
    noise: Noise,
    continued: Continue | None,
) -> Refreshed:
    """The verdict over all servers: the worst of them (`proof.judge`). ``continued`` scores tokens sampled
    after the probes; None leaves that part out."""
    began = time.perf_counter()
    verdicts = [_verdict(server, published, probes, noise=noise, continued=continued) for server in servers]
    worst = min(verdicts, key=lambda verdict: (verdict.proven, -verdict.residual))
    return Refreshed(verdict=worst, seconds={"canary": time.perf_counter() - began})


def _verdict(
    server: Server, published: Published, probes: Probes, *, noise: Noise, continued: Continue | None
) -> Verdict:
    try:
        served = [np.asarray(row) for row in each(list(probes.sequences), server.prompt_logprobs)]
        generated: list[tuple[float, float]] = []
        if continued is not None:
            sampled = each(list(enumerate(probes.sequences)), lambda probe: _next_tokens(server, *probe))
            expected = continued(probes.sequences, [ids for ids, _ in sampled])
            for (_, values), ours in zip(sampled, expected, strict=True):
                generated += list(zip(values, (float(value) for value in ours), strict=True))
    except Rejected as error:
        return Verdict(proven=False, decided_by="slope", words=str(error))
    weigh = functools.partial(
        judge, served, probes.new, probes.old, noise=noise, generated=generated, old_head=probes.old_head
    )
    verdict = weigh(digests_agree=True)
    if verdict.proven and verdict.decided_by == "digests" and not digests_agree(server, published):
        return weigh(digests_agree=False)
    return verdict


def digests_agree(server: Server, published: Published) -> bool:
    """Whether what the workers applied is the published version, tensor by tensor."""
    found: dict[str, str] = {}
    for answer in server.applied_digests():
        if int(answer["version"]) != published.version:
            return False
        found |= answer["digests"]
    return found == dict(published.digests)


def _next_tokens(server: Server, index: int, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    request = Request(id=f"probe {index}", token_ids=tuple(ids), num=1, seed=0)
    sampling = Sampling(max_tokens=2, temperature=0.0, stop_ids=())
    ((completion, _),) = server.generate(request, sampling, seeded=False)
    return completion.token_ids, completion.logprobs


def timed(seconds: dict[str, float], name: str, function: Callable[[], Result]) -> Result:
    """The function's result, its seconds noted under ``name``."""
    began = time.perf_counter()
    try:
        return function()
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def each(items: Sequence[Any], function: Callable[[Any], Result], *, quiet: bool = False) -> list[Result]:
    """The function of every item at once, in order; all are waited for before the first error is raised, or
    with ``quiet`` none is."""
    with ThreadPoolExecutor(max(1, min(16, len(items)))) as pool:
        futures = [pool.submit(function, item) for item in items]
    errors = [future.exception() for future in futures]
    failed = next((error for error in errors if error is not None), None)
    if failed is not None and not (quiet and isinstance(failed, ServerError)):
        raise failed
    return [future.result() for future, error in zip(futures, errors, strict=True) if error is None]

"""Rollouts from vLLM servers: token ids in, groups out, by the contract of `rollout/engine.py`.

`update_policy` publishes the weights, refreshes every server and proves it; until then no request is
admitted, and afterwards each completion must name the version that its request was admitted under. A server
that dies is started again, given the current version, and its requests are asked again: a lost server never
becomes a reward. Equal samples across engines are not claimed, only equal distributions.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import tenacity

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Params
from selfemo_jax.rollout.admission import Gate, check_versions
from selfemo_jax.rollout.engine import Completion, Group, Request, RolloutError, Sampling, check_requests
from selfemo_jax.rollout.fleet import Fleet, Processes, deal
from selfemo_jax.rollout.proof import Noise, Verdict
from selfemo_jax.rollout.publish import Published, Publisher, is_same, remembered, snapshot
from selfemo_jax.rollout.refresh import (
    Continue,
    NotStagedError,
    Probes,
    Refreshed,
    RefreshError,
    apply_on,
    prove,
    stage_on,
    timed,
)
from selfemo_jax.rollout.rollout_slope import RolloutSlope
from selfemo_jax.rollout.server_api import Refused, Rejected, Server, ServerError, Unreachable
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.settings.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the servers serve."""

    published: Published
    source_step: int
    """The trainer's name of it, which completions carry."""
    params: Params
    """In the serving type; of a policy with adapters those, beside the base that it shares with the
    trainer."""
    logprobs: tuple[np.ndarray, ...]
    """The trainer's, of the probes."""


@dataclass(frozen=True, kw_only=True)
class _Ticket:
    server: Server
    version: int
    source_step: int
    epoch: int


class VllmEngine:
    """See the module. Close it."""

    def __init__(
        self,
        model: ModelConfig,
        settings: Rollout,
        *,
        start: Callable[[], Processes],
        publisher: Publisher,
        logprobs: TrainerLogprobs,
        probes: Sequence[Sequence[int]],
        dtype: str,
        noise: float,
        say: Callable[[str], None] = print,
    ):
        """``start`` starts the servers; it runs beside whatever comes before the first refresh. ``dtype`` is
        the serving type, ``noise`` what to expect of one token's log-prob between trainer and server before
        the first refresh shows it."""
        self._model, self._settings, self._dtype, self._noise = model, settings, dtype, Noise(of_types=noise)
        self._publisher, self._logprobs, self._say = publisher, logprobs, say
        self._probes = tuple(tuple(ids) for ids in probes)
        self._fleet = Fleet(start, settings.sidecar, say=say)
        self._serving: Serving | None = None
        self._slope = RolloutSlope(logprobs, dtype=dtype, most=settings.sidecar.slope_rollouts)
        self._rolled_back, self._said_abstains = False, False
        self._control = threading.RLock()
        self._gate = Gate()
        self._turn = 0
        self._counts: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}
        self._closed = False

    # The contract

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """One group per request as they complete; ValueError for a request that cannot be served, before
        anything is sampled. RolloutError where the servers are lost for good."""
        self._check_open()
        if self._serving is None:
            raise ValueError("VllmEngine.generate: no policy yet; call update_policy first")
        if sampling.top_k or sampling.top_p != 1 or sampling.frequency_penalty:
            raise ValueError(
                f"VllmEngine: top_k {sampling.top_k}, top_p {sampling.top_p} and frequency_penalty "
                f"{sampling.frequency_penalty}: vLLM reports log-probs of the distribution that they change, "
                "which are not the policy's; set them to 0, 1 and 0"
            )
        check_requests(
            requests,
            sampling,
            vocab_size=self._model.vocab_size,
            max_positions=self._model.max_positions,
        )
        return self._generate(tuple(requests), sampling)

    def update_policy(self, params: Params, *, version: int) -> None:
        """Publish ``params`` and serve them from now on, proven. RefreshError where that fails, unless
        `rollout.sidecar.on_unproven` is rollback and the last proven version serves again."""
        self._check_open()
        self._fleet.wait()
        self._slope.settle(self._noise.scale)
        fresh = snapshot(params, dtype=self._dtype)
        kept = remembered(params, fresh)
        with self._control:
            if self._serving is not None and is_same(self._serving.params, kept):
                self._serving = replace(self._serving, source_step=version)
                return
            try:
                self._refresh(fresh, kept, version)
            except RolloutError as error:
                self._gate.fail(str(error))
                raise

    def close(self) -> None:
        """End the servers that are ours; running requests fail."""
        self._closed = True
        self._gate.fail("the engine was closed")
        self._fleet.close()
        self._publisher.close()

    def take_metrics(self) -> dict[str, float]:
        """Counters and times since the last call, and the slope of all rollouts so far."""
        with self._control:
            found = self._metrics | {f"rollout/{name}": float(n) for name, n in self._counts.items()}
            self._metrics, self._counts = {}, Counter()
        if (slope := self._slope.total).num_tokens:
            found |= {"sync/slope": slope.value, "sync/slope_error": slope.error(self._noise.scale)}
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("VllmEngine: the engine is closed; make a new one")

    # Requests

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        if not requests:
            return
        # The longest first, so that none of them is left over at the end.
        ordered = sorted(requests, key=lambda request: -len(request.token_ids))
        group = max(request.num for request in requests)
        at_once = max(1, -(-self._settings.max_rows // group)) * len(self._fleet.servers)
        pool = ThreadPoolExecutor(min(at_once, len(requests)), thread_name_prefix="rollout")
        try:
            futures = [pool.submit(self._ask, request, sampling) for request in ordered]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request, sampling: Sampling) -> Group:
        seen = 0

        def recover(state: tenacity.RetryCallState) -> None:
            self._count("retries")
            error = state.outcome.exception() if state.outcome else None
            self._recover(seen, str(error))

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self._settings.sidecar.retries),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            retry=tenacity.retry_if_exception_type(Unreachable),
            before_sleep=recover,
            reraise=True,
        )
        completions: tuple[Completion, ...] = ()
        try:
            for attempt in retrying:
                with attempt, self._ticket() as ticket:
                    seen = ticket.epoch
                    completions = self._answer(ticket, request, sampling)
                    self._slope.note(request, completions, sampling, version=ticket.version)
            return Group(request_id=request.id, completions=completions)
        except Rejected as error:
            self._count(error.kind)
            return Group(request_id=request.id, error=str(error))
        except ServerError as error:
            self._count("refused" if isinstance(error, Refused) else "unanswered")
            return Group(request_id=request.id, error=str(error))

    def _answer(self, ticket: _Ticket, request: Request, sampling: Sampling) -> tuple[Completion, ...]:
        try:
            answers = ticket.server.generate(request, sampling, seeded=self._settings.seeded)
        except Refused as error:
            if error.status >= 500 and self._fleet.is_dying(ticket.server):
                raise Unreachable(str(error)) from error
            raise
        try:
            for _, versions in answers:
                check_versions(versions, ticket.version, request.id)
        except Rejected as error:
            if self._fleet.serves(ticket.server, ticket.version):
                raise
            # Whoever runs an attached server started it again: it has to be given the weights.
            raise Unreachable(f"{ticket.server.url} no longer has its weights: {error}") from error
        return tuple(replace(found, policy_versions=(ticket.source_step,)) for found, _ in answers)

    @contextmanager
    def _ticket(self) -> Iterator[_Ticket]:
        limit = self._settings.sidecar.request_timeout + self._settings.sidecar.start_timeout
        with self._gate.admitted(limit):
            serving = self._serving
            assert serving is not None
            self._turn += 1
            yield _Ticket(
                server=deal(self._fleet.servers, self._turn),
                version=serving.published.version,
                source_step=serving.source_step,
                epoch=self._fleet.epoch,
            )

    def _recover(self, epoch: int, reason: str) -> None:
        """Bring the servers back after a request got no answer; one thread does it, the others wait."""
        with self._control:
            if self._closed or self._gate.failed:
                raise RolloutError(f"the servers of the rollouts are lost: {reason}")
            serving = self._serving
            assert serving is not None
            if self._fleet.epoch != epoch or self._fleet.all_serve(serving.published.version):
                return
            self._gate.close()
            began = time.perf_counter()
            try:
                self._bring_back(serving.published, reason)
                self._prove_again(serving)
            except RolloutError as error:
                self._gate.fail(str(error))
                raise
            self._metrics["rollout/recovery_s"] = time.perf_counter() - began
            self._gate.open()

    def _bring_back(self, published: Published, reason: str) -> None:
        self._count("restarts")
        self._fleet.bring_back(published, reason)

    def _count(self, name: str) -> None:
        with self._control:
            self._counts[name] += 1

    # Refresh

    def _refresh(self, fresh: Params, kept: Params, version: int) -> None:
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        pending = self._publisher.start(fresh, source_step=version)
        # While the files are written.
        earlier = self._serving
        new, old_head = timed(
            seconds,
            "score",
            lambda: self._logprobs.of_probes(fresh, earlier and earlier.params, self._probes),
        )
        try:
            published = pending.result()
        except OSError as error:
            raise RefreshError(
                f"the policy of step {version} could not be published, nothing of it is left: {error}"
            ) from error
        # Scoring went on beside it.
        seconds["publish"] = sum(published.seconds.values())
        seconds["publish_and_score"] = time.perf_counter() - began
        old = earlier.logprobs if earlier else None
        probes = Probes(sequences=self._probes, new=new, old=old, old_head=old_head)
        verdict = self._take(fresh, published, probes, seconds)
        self._metrics |= {f"sync/{name}_s": value for name, value in seconds.items()}
        self._metrics |= verdict.metrics | {"sync/version": float(published.version)}
        if not verdict.proven:
            self._unproven(version, verdict, earlier)
            return
        if earlier is None:
            words = f"{len(self._fleet.servers)} servers, {sum(map(len, self._probes))} probe tokens"
            self._say(f"rollout: first refresh of {words}: {verdict.words}, residual {verdict.residual:.1e}")
        elif verdict.decided_by == "digests" and not self._said_abstains:
            self._said_abstains = True
            self._say(f"rollout: policy of step {version}: {verdict.words} (sync/by_digests tells the rest)")
        self._noise = self._noise.after(verdict.residual)
        self._slope.follow(kept, earlier and earlier.params, version=published.version)
        self._serving = Serving(published=published, source_step=version, params=kept, logprobs=new)
        self._rolled_back = False
        self._publisher.clean(protect={one.published.version for one in (earlier, self._serving) if one})
        self._gate.open()

    def _take(
        self, fresh: Params, published: Published, probes: Probes, seconds: dict[str, float]
    ) -> Verdict:
        """Stage, apply and prove; a server that dies on the way is started again and given the version. The
        verdict is by ``stage`` where it was refused before any server changed, by ``restart`` where later."""

        def continued(sequences, sampled):
            whole = [(*ids, *more) for ids, more in zip(sequences, sampled, strict=True)]
            return self._logprobs(fresh, whole, starts=[len(ids) for ids in sequences])

        limit, changed = self._settings.sidecar.request_timeout, False
        try:
            try:
                seconds["stage"] = stage_on(self._fleet.servers, published)
                # Requests under way finish on the version that they were admitted under.
                timed(seconds, "drain", lambda: self._gate.drain(limit))
                changed = True
                seconds |= apply_on(self._fleet.servers, published)
            except ServerError as error:
                changed = True
                self._gate.close()
                self._bring_back(published, str(error))
            result = self._prove(published, probes, continued)
        except NotStagedError as error:
            by = "restart" if changed else "stage"
            return Verdict(proven=False, decided_by=by, words=str(error))
        seconds |= result.seconds
        return result.verdict

    def _prove(self, published: Published, probes: Probes, continued: Continue | None) -> Refreshed:
        """Ask all servers; one that dies meanwhile is started again, given the version and asked with the
        others. RefreshError where they cannot be asked."""
        reason = ""
        for _ in range(1 + self._settings.sidecar.max_restarts):
            try:
                return prove(self._fleet.servers, published, probes, noise=self._noise, continued=continued)
            except ServerError as error:
                if isinstance(error, Refused) and error.status < 500:
                    raise RefreshError(f"the servers refuse to be probed: {error}") from error
                reason = str(error)
                self._bring_back(published, reason)
        raise RefreshError(f"version {published.version} could not be proven, servers kept failing: {reason}")

    def _unproven(self, version: int, verdict: Verdict, earlier: Serving | None) -> None:
        words = f"the refresh of the servers to the policy of step {version} is not proven: {verdict.words}"
        if self._settings.sidecar.on_unproven == "stop" or earlier is None or self._rolled_back:
            again = "; the one before it was rolled back" if self._rolled_back else ""
            raise RefreshError(f"{words}{again}. No rollout was sampled from it")
        self._say(f"rollout: {words}; going back to the policy of step {earlier.source_step}")
        self._count("rollbacks")
        self._rolled_back = True
        if verdict.decided_by != "stage":
            try:
                stage_on(self._fleet.servers, earlier.published)
                apply_on(self._fleet.servers, earlier.published)
            except ServerError as error:
                self._bring_back(earlier.published, str(error))
            self._prove_again(earlier)
        self._gate.open()

    def _prove_again(self, serving: Serving) -> None:
        """A version that was proven before is served again: digests decide, and the residual."""
        probes = Probes(sequences=self._probes, new=serving.logprobs)
        result = self._prove(serving.published, probes, None)
        if not result.verdict.proven:
            raise RefreshError(
                f"version {serving.published.version} was given to the servers again and is not proven: "
                f"{result.verdict.words}"
            )

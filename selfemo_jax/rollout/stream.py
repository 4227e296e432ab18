"""The stream of steps that the page reads: a batch of inputs and its finished rollout groups."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.data.prompts import Prompt
from selfemo_jax.rollout.engine import Engine, Group, Request, RolloutError, Sampling


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """One step's inputs and the groups that answer them, in the same order."""

    batch: Batch
    requests: tuple[Request, ...]
    groups: tuple[Group, ...]
    sampling_seconds: float = 0.0
    """From the first request to the last group."""
    waited_seconds: float = 0.0
    """Of those, how long the trainer waited."""

    def metrics(self) -> dict[str, float]:
        """What sampling ahead of the trainer gained; empty where it did not."""
        hidden = self.sampling_seconds - self.waited_seconds
        if not self.sampling_seconds or hidden <= 0:
            return {}
        return {"rollout/sampling_s": self.sampling_seconds, "rollout/hidden_s": hidden}

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The inputs."""
        return tuple(sample for sample, _ in self.batch.items)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Their encoded prompts."""
        return tuple(prompt for _, prompt in self.batch.items)


TOLD_EVERY = 30.0
"""Seconds between two lines about the sampling of one step."""


class LostGroupsError(RolloutError):
    """More groups of a step were lost than `rollout.max_lost` allows."""


def sampling_seed(*parts: int | str) -> int:
    """A 32-bit seed that is a function of (seed, phase, step, prompt) alone."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def make_requests(
    batch: Batch, *, num: int, global_step: int, seed: int, phase: int, step: int
) -> tuple[Request, ...]:
    """A request per input. Its id begins with the global step, which is how a recorded run is found again."""
    return tuple(
        Request(
            id=f"{global_step}:{place}:{sample.id}",
            token_ids=prompt.token_ids,
            num=num,
            seed=sampling_seed(seed, phase, step, place, sample.id),
        )
        for place, (sample, prompt) in enumerate(batch.items)
    )


def generate_groups(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    tell: Callable[[str], None] | None = None,
) -> tuple[Group, ...]:
    """All groups in the order of their requests; one that never came is an error group. ``tell`` hears how
    far it is, every half minute."""
    answers = _told(engine.generate(requests, sampling), len(requests), tell)
    groups = {group.request_id: group for group in answers}
    lost = "the engine gave no answer"
    return tuple(groups.get(r.id, Group(request_id=r.id, error=lost)) for r in requests)


def _told(groups: Iterable[Group], total: int, tell: Callable[[str], None] | None) -> Iterator[Group]:
    began = last = time.perf_counter()
    num_tokens = 0
    for number, group in enumerate(groups, start=1):
        num_tokens += sum(len(completion.token_ids) for completion in group.completions)
        yield group
        now = time.perf_counter()
        if tell and now - last >= TOLD_EVERY and number < total:
            last = now
            tell(
                f"sampling: {number} of {total} groups, {num_tokens / (now - began):,.0f} tokens/s, eta "
                f"{(now - began) / number * (total - number):.0f} s"
            )


def rollout_stream(
    engine: Engine,
    batches: Iterator[Batch],
    requests_of: Callable[[int, Batch], tuple[Request, ...]],
    sampling: Sampling,
    *,
    first: int,
    last: int,
    ahead: int,
    max_lost: float,
    tell: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Rollouts]]:
    """Steps ``first`` to ``last`` (counted from 1).

    With ``ahead`` 0 each is sampled with the policy as it is then. Else the requests of the next ``ahead``
    steps are with the engine while a step is trained, so that a step is sampled by a policy up to ``ahead``
    updates older; an engine in this process shares the devices with the trainer, so there it is 0.
    LostGroupsError when more than ``max_lost`` of a step's groups are lost. Of a step that takes long,
    ``tell`` hears how far its sampling is.
    """
    steps = iter(range(first, last + 1))
    if ahead == 0:
        for step in steps:
            batch = next(batches)
            requests = requests_of(step, batch)
            groups = generate_groups(engine, requests, sampling, tell=tell)
            _check_lost(step, groups, max_lost)
            yield step, Rollouts(batch=batch, requests=requests, groups=groups)
        return
    sampler = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    waiting: deque[tuple[int, Batch, tuple[Request, ...], Future]] = deque()

    def ask(step: int) -> None:
        batch = next(batches)
        requests = requests_of(step, batch)
        waiting.append((step, batch, requests, sampler.submit(_timed_groups, engine, requests, sampling)))

    try:
        while True:
            while len(waiting) <= ahead and (step := next(steps, None)) is not None:
                # The step itself, on the first round, and those after it: one at a time, in order.
                ask(step)
            if not waiting:
                return
            step, batch, requests, pending = waiting.popleft()
            began = time.perf_counter()
            groups, seconds = pending.result()
            waited = time.perf_counter() - began
            _check_lost(step, groups, max_lost)
            yield (
                step,
                Rollouts(
                    batch=batch,
                    requests=requests,
                    groups=groups,
                    sampling_seconds=seconds,
                    waited_seconds=min(waited, seconds),
                ),
            )
    finally:
        sampler.shutdown(wait=False, cancel_futures=True)


def _timed_groups(
    engine: Engine, requests: Sequence[Request], sampling: Sampling
) -> tuple[tuple[Group, ...], float]:
    began = time.perf_counter()
    return generate_groups(engine, requests, sampling), time.perf_counter() - began


def _check_lost(step: int, groups: Sequence[Group], max_lost: float) -> None:
    lost = [group for group in groups if group.error is not None]
    if len(lost) > max_lost * len(groups):
        raise LostGroupsError(
            f"step {step}: {len(lost)} of {len(groups)} groups were lost, rollout.max_lost allows "
            f"{max_lost:.0%}; the first: {lost[0].error}"
        )

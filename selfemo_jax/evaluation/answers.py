"""Who answers the inputs of an evaluation: a policy in the rollout engine here, an endpoint elsewhere."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.inputs import Sample
from selfemo_jax.rollout.engine import Engine, Sampling
from selfemo_jax.rollout.stream import TOLD_EVERY, sampling_seed
from selfemo_jax.scores import Prediction, answers, greedy_answers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions in the order of the samples, as they are finished."""

    greedy: Callable[[Sequence[Sample]], Iterable[Prediction]]
    sampled: Callable[[Sequence[Sample], int], Iterable[Sequence[Prediction]]]
    """That many answers to each input."""
    config: Config
    """The settings that they are given under."""
    timed: Literal["batch", "request"] = "batch"
    """What `Prediction.seconds` began with: handing a batch over, in which an answer waits for its turn, or
    sending its own request."""


def policy_answers(
    engine: Engine,
    codec: TextCodec,
    config: Config,
    *,
    say: Callable[[str], None],
    between: Callable[[], None] = lambda: None,
) -> Answers:
    """Answers of the engine's policy; samples are drawn as `eval` says. ``say`` hears how far the greedy
    ones are, every half minute; ``between`` is called after each, and may raise to end them."""
    settings = {"engine": engine, "codec": codec, "config": config}
    return Answers(
        greedy=functools.partial(_greedy, **settings, say=say, between=between),
        sampled=functools.partial(_sampled, **settings),
        config=config,
    )


def _greedy(
    samples: Sequence[Sample],
    *,
    engine: Engine,
    codec: TextCodec,
    config: Config,
    say: Callable[[str], None],
    between: Callable[[], None],
) -> Iterable[Prediction]:
    started = told = time.perf_counter()
    finished = 0

    def after_each() -> None:
        nonlocal told, finished
        between()
        finished += 1
        now = time.perf_counter()
        if now - told >= TOLD_EVERY and finished < len(samples):
            told, rate = now, finished / (now - started)
            left = (len(samples) - finished) / rate
            say(f"answers: {finished} of {len(samples)}, {rate:.1f} a second, eta {left:.0f} s")

    yield from greedy_answers(engine, samples, codec, config, between=after_each)


def _sampled(
    samples: Sequence[Sample], num: int, *, engine: Engine, codec: TextCodec, config: Config
) -> Iterable[Sequence[Prediction]]:
    drawn = config.eval
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens, temperature=drawn.temperature, top_k=drawn.top_k,
        top_p=drawn.top_p, frequency_penalty=drawn.frequency_penalty, stop_ids=codec.stop_ids,
    )  # fmt: skip
    seeds = [sampling_seed(config.seed, "evaluate", sample.id) for sample in samples]
    yield from answers(engine, samples, codec, config, sampling=sampling, num=num, seeds=seeds)

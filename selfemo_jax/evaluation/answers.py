"""Who answers the inputs of an evaluation: a policy in the rollout engine here, an endpoint elsewhere."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.inputs import Sample
from selfemo_jax.rollout.engine import Engine, Sampling
from selfemo_jax.rollout.stream import sampling_seed
from selfemo_jax.scores import Prediction, answers, greedy_answers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions in the order of the samples, as they are finished."""

    greedy: Callable[[Sequence[Sample]], Iterable[Prediction]]
    sampled: Callable[[Sequence[Sample], int], Iterable[Sequence[Prediction]]]
    """That many answers to each input."""


def policy_answers(
    engine: Engine, codec: TextCodec, config: Config, *, between: Callable[[], None] = lambda: None
) -> Answers:
    """Answers of the engine's policy; samples are drawn as `eval` says. ``between`` is called after each
    greedy answer, and may raise to end it."""
    greedy = functools.partial(greedy_answers, engine, codec=codec, config=config, between=between)
    return Answers(
        greedy=greedy, sampled=functools.partial(_sampled, engine=engine, codec=codec, config=config)
    )


def _sampled(
    samples: Sequence[Sample], num: int, *, engine: Engine, codec: TextCodec, config: Config
) -> Iterable[Sequence[Prediction]]:
    drawn = config.eval
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens, temperature=drawn.temperature, top_k=drawn.top_k,
        top_p=drawn.top_p, stop_ids=codec.stop_ids,
    )  # fmt: skip
    seeds = [sampling_seed(config.seed, "evaluate", sample.id) for sample in samples]
    yield from answers(engine, samples, codec, config, sampling=sampling, num=num, seeds=seeds)

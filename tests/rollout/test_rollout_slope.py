"""The slope of rollouts: what is served now is judged by what was sampled now."""

import dataclasses

import numpy as np
import pytest

from selfemo_jax.rollout.engine import Completion, Request, Sampling
from selfemo_jax.rollout.refresh import RefreshError
from selfemo_jax.rollout.rollout_slope import RolloutSlope

REQUEST = Request(id="a", token_ids=(1, 2), num=1, seed=0)
SAMPLING = Sampling(max_tokens=8, temperature=1.0, stop_ids=())
NOISE = 1e-5


def scores(step: int) -> np.ndarray:
    """The trainer's log-probs of four tokens under the policy of a step."""
    return np.array([-1.0, -2.0, -0.5, -3.0]) + 1e-2 * step * np.array([1.0, -1.0, 0.5, 0.0])


def completion(values: np.ndarray) -> Completion:
    return Completion(
        token_ids=(3, 4, 5, 6), logprobs=tuple(values), finish_reason="length", policy_versions=(0,)
    )


def slope(*, most: int = 32) -> RolloutSlope:
    def trainer(params, sequences, *, starts, temperature):
        assert starts == [2] * len(sequences) and temperature == 1.0
        return [scores(params["step"]) for _ in sequences]

    return RolloutSlope(trainer, dtype="float32", most=most)


def sample(found: RolloutSlope, step: int, *, served: int) -> None:
    found.follow({"step": step}, {"step": step - 1}, version=step)
    found.note(REQUEST, [completion(scores(served))], SAMPLING, version=step)
    found.settle(NOISE)


def test_a_long_good_past_does_not_hide_old_weights_that_are_served_now():
    found = slope()
    for step in range(1, 101):
        sample(found, step, served=step)
    assert found.total.value == pytest.approx(1.0) and found.total.num_tokens == 400
    with pytest.raises(RefreshError, match="the slope of 4 rollout tokens.* is 0.000"):
        sample(found, 101, served=100)
    assert found.total.value > 0.9, "over all rollouts it still looks well"


def test_rollouts_of_another_version_greedy_ones_and_those_beyond_the_limit_are_left_out():
    found = slope(most=2)
    found.note(REQUEST, [completion(scores(0))], SAMPLING, version=0)
    found.follow({"step": 2}, {"step": 1}, version=2)
    found.note(REQUEST, [completion(scores(1))], SAMPLING, version=1)
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    found.note(REQUEST, [completion(scores(1))], greedy, version=2)
    found.note(REQUEST, [completion(scores(2))] * 3, SAMPLING, version=2)
    found.settle(NOISE)
    assert found.total.num_tokens == 8 and found.total.value == pytest.approx(1.0)
    none = slope(most=0)
    sample(none, 1, served=0)
    assert none.total.num_tokens == 0

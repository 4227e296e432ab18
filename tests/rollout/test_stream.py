"""Seeds, requests, and the order in which groups reach the trainer."""

import time

import pytest

from selfemo_jax.data.pipeline import Batch
from selfemo_jax.rollout import stream as stream_module
from selfemo_jax.rollout.engine import Completion, Group, Sampling
from selfemo_jax.rollout.stream import (
    LostGroupsError,
    generate_groups,
    make_requests,
    rollout_stream,
    sampling_seed,
)
from tests import fabricated

SAMPLING = Sampling(max_tokens=4, stop_ids=(2,))


def batch(num: int = 4, *, first: int = 0) -> Batch:
    samples = [fabricated.sample(first + n, gold={"joy": 1.0}) for n in range(num)]
    return Batch(
        items=tuple((s, fabricated.prompt(3 + n, of=s.id)) for n, s in enumerate(samples)), state={"n": first}
    )


def requests(*, seed=1, phase=2, step=3, global_step=30, items=None):
    return make_requests(items or batch(), num=2, global_step=global_step, seed=seed, phase=phase, step=step)


class Backwards:
    """Yields the newest request first; leaves out or fails those at the named places."""

    def __init__(self, *, silent=(), failing=()):
        self.silent, self.failing, self.seen = silent, failing, []

    def generate(self, asked, sampling):
        self.seen.append((tuple(asked), sampling))
        for place, request in reversed(list(enumerate(asked))):
            if place in self.failing:
                yield Group(request_id=request.id, error="out of memory")
            elif place not in self.silent:
                one = Completion(
                    token_ids=(place, 2), logprobs=(-1.0, -1.0), finish_reason="stop", policy_versions=(1,)
                )
                yield Group(request_id=request.id, completions=(one,) * request.num)


def test_a_seed_depends_on_its_parts_alone_and_on_each_of_them():
    # The value itself: a change would make every recorded run impossible to sample again.
    assert sampling_seed(0, 1, 2, "a") == 2676126646
    changed = [
        sampling_seed(*parts) for parts in ((1, 1, 2, "a"), (0, 2, 2, "a"), (0, 1, 3, "a"), (0, 1, 2, "b"))
    ]
    assert len({sampling_seed(0, 1, 2, "a"), *changed}) == 5
    assert sampling_seed(1, 23) != sampling_seed(12, 3)


def test_seeds_are_spread_over_32_bits():
    seeds = [sampling_seed(0, 1, step, "x") for step in range(2000)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < 2**32 for seed in seeds)
    assert abs(sum(seeds) / 2000 / 2**32 - 0.5) < 0.03


def test_requests_are_the_same_when_made_again_and_differ_between_steps_and_prompts():
    first = requests()
    assert requests() == first
    assert len({r.seed for r in first}) == 4
    for other in (requests(seed=2), requests(phase=3), requests(step=4)):
        assert {r.seed for r in first}.isdisjoint(r.seed for r in other)


def test_the_global_step_names_a_request_and_does_not_seed_it():
    moved = requests(global_step=77)
    assert [r.id for r in moved] == [f"77:{n}:meld/train/d1/{n}" for n in range(4)]
    assert [r.seed for r in moved] == [r.seed for r in requests()]


def test_an_input_that_a_batch_holds_twice_gets_two_seeds():
    one = batch(1)
    twice = Batch(items=one.items * 2, state={})
    a, b = requests(items=twice)
    assert a.token_ids == b.token_ids and a.seed != b.seed and a.id != b.id


def test_requests_carry_prompt_and_group_size():
    found = requests()
    assert [len(r.token_ids) for r in found] == [3, 4, 5, 6] and {r.num for r in found} == {2}


def test_groups_come_back_in_the_order_of_their_requests():
    asked = requests()
    groups = generate_groups(Backwards(), asked, SAMPLING)
    assert [g.request_id for g in groups] == [r.id for r in asked]
    assert [g.completions[0].token_ids[0] for g in groups] == [0, 1, 2, 3]


def test_a_group_that_never_came_is_an_error_in_its_place():
    asked = requests()
    groups = generate_groups(Backwards(silent=(1,)), asked, SAMPLING)
    assert groups[1] == Group(request_id=asked[1].id, error="the engine gave no answer")
    assert [g.error is None for g in groups] == [True, False, True, True]


def test_long_sampling_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(stream_module, "TOLD_EVERY", 0.0)
    said = []
    generate_groups(Backwards(), requests(), SAMPLING, tell=said.append)
    assert [line.split(",")[0] for line in said] == [f"sampling: {n} of 4 groups" for n in (1, 2, 3)]
    monkeypatch.setattr(stream_module, "TOLD_EVERY", 30.0)
    generate_groups(Backwards(), requests(), SAMPLING, tell=said.append)
    assert len(said) == 3


def stream(engine, *, max_lost=0.0, first=1, last=3):
    batches = iter([batch(first=10 * n) for n in range(first, last + 1)])
    return rollout_stream(
        engine,
        batches,
        lambda step, items: requests(step=step, items=items),
        SAMPLING,
        first=first,
        last=last,
        ahead=0,
        max_lost=max_lost,
    )


def test_the_stream_gives_each_step_its_own_batch_and_answers():
    engine = Backwards()
    steps = list(stream(engine, first=3, last=4))
    assert [step for step, _ in steps] == [3, 4]
    for step, rollouts in steps:
        assert rollouts.batch.state == {"n": 10 * step}
        assert [s.id for s in rollouts.samples] == [f"meld/train/d1/{10 * step + n}" for n in range(4)]
        assert [p.sample_id for p in rollouts.prompts] == [s.id for s in rollouts.samples]
        assert rollouts.requests == requests(step=step, items=rollouts.batch)
        assert [g.request_id for g in rollouts.groups] == [r.id for r in rollouts.requests]


def test_a_step_is_not_sampled_before_the_one_before_it_was_taken():
    engine = Backwards()
    steps = stream(engine)
    assert engine.seen == []
    next(steps)
    assert len(engine.seen) == 1
    next(steps)
    assert len(engine.seen) == 2


def test_lost_groups_up_to_max_lost_stay_in_the_step():
    (_, rollouts), *_ = stream(Backwards(silent=(0,), failing=(2,)), max_lost=0.5)
    assert [g.error for g in rollouts.groups] == ["the engine gave no answer", None, "out of memory", None]


def test_more_lost_groups_than_max_lost_stop_the_run():
    words = (
        "step 1: 2 of 4 groups were lost, rollout.max_lost allows 49%; the first: the engine gave no answer"
    )
    with pytest.raises(LostGroupsError, match=words):
        next(stream(Backwards(silent=(0,), failing=(2,)), max_lost=0.49))
    with pytest.raises(LostGroupsError):
        next(stream(Backwards(failing=(3,)), max_lost=0.0))


class Slow(Backwards):
    """An engine whose policy has a version, and that notes when each step was sampled and by which."""

    def __init__(self, seconds: float = 0.05):
        super().__init__()
        self.version, self.sampled, self.seconds = 0, {}, seconds

    def generate(self, asked, sampling):
        step = int(asked[0].id.split(":")[0])
        self.sampled[step] = self.version
        time.sleep(self.seconds)
        yield from super().generate(asked, sampling)


def ahead_stream(engine, *, last=4, ahead=1):
    return rollout_stream(
        engine,
        iter([batch(first=10 * n) for n in range(1, last + 1)]),
        lambda step, items: requests(step=step, items=items, global_step=step),
        SAMPLING,
        first=1,
        last=last,
        ahead=ahead,
        max_lost=0.0,
    )


def test_ahead_of_the_trainer_each_step_is_sampled_by_the_policy_one_update_older():
    engine = Slow()
    for step, rollouts in ahead_stream(engine):
        assert rollouts.batch.state == {"n": 10 * step}
        time.sleep(0.15)
        engine.version = step
    assert engine.sampled == {1: 0, 2: 0, 3: 1, 4: 2}


def test_sampling_ahead_hides_behind_training_and_says_how_much():
    engine = Slow(seconds=0.2)
    found = []
    for _, rollouts in ahead_stream(engine, last=3):
        found.append(rollouts)
        time.sleep(0.3)
    assert found[0].waited_seconds == pytest.approx(found[0].sampling_seconds, abs=0.1)
    for rollouts in found[1:]:
        assert rollouts.waited_seconds < 0.1 <= rollouts.metrics()["rollout/hidden_s"]
    assert next(stream(Backwards()))[1].metrics() == {}


def test_a_stream_that_is_left_asks_for_no_further_step():
    engine = Slow()
    steps = ahead_stream(engine)
    next(steps)
    steps.close()
    time.sleep(0.3)
    assert set(engine.sampled) <= {1, 2}


def test_an_error_of_a_step_sampled_ahead_is_raised_when_its_turn_comes():
    class Failing(Slow):
        def generate(self, asked, sampling):
            if asked[0].id.startswith("2:"):
                raise ValueError("no room")
            yield from super().generate(asked, sampling)

    steps = ahead_stream(Failing())
    assert next(steps)[0] == 1
    with pytest.raises(ValueError, match="no room"):
        next(steps)

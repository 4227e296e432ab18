"""Seeds, requests, and the order in which groups reach the trainer."""

import pytest

from selfemo_jax.data.pipeline import Batch
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

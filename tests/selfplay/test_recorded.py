"""Harvest from what RL sampled: which groups, in which steps, and what is refused."""

import functools
import json
from dataclasses import replace

import pytest

from selfemo_jax.phases import Phase, finish, last_steps
from selfemo_jax.rollout.engine import Group, Request
from selfemo_jax.rollout.records import save_groups
from selfemo_jax.run_inputs import encode_input
from selfemo_jax.scoring import make_scorer, score_groups
from selfemo_jax.selfplay.flywheel import harvest
from selfemo_jax.selfplay.hygiene import ReplyIndex
from selfemo_jax.selfplay.play import records_of
from selfemo_jax.selfplay.recorded import newest_answers
from tests import micro
from tests.fabricated import codec, completion, sample, settings, synthetic, text

CONFIG = settings()
ENCODE = functools.partial(encode_input, codec=codec(), config=CONFIG)


def inputs(number: int):
    return [sample(n, dialogue=f"d{n}", gold={"joy": 1.0}) for n in range(number)]


def recorded(run_dir, step: int, samples, *, reply="Hand me oar number") -> None:
    """Four answers to each of these inputs, the last a good one, by the policy of version ``step``."""
    requests = [
        Request(id=f"{step}:{place}:{s.id}", token_ids=ENCODE(s)[1].token_ids, num=4, seed=0)
        for place, s in enumerate(samples)
    ]
    said = text([("joy", 1.0)], [("fear", 0.4)], f"{reply} {step}.")
    groups = [
        Group(
            request_id=request.id,
            completions=tuple(completion(one, version=step) for one in ["no answer"] * 3 + [said]),
        )
        for request in requests
    ]
    save_groups(run_dir, step, requests, groups)


def newest(run_dir, steps, samples, *, max_depth=3, most=None, size=2):
    known = {s.id: s for s in samples}
    return newest_answers(run_dir, steps, known, max_depth=max_depth, most=most, size=size)


def test_of_each_input_the_newest_answers_count(tmp_path):
    one, two, three = samples = inputs(3)
    recorded(tmp_path, 4, [one, two])
    recorded(tmp_path, 5, [two, three])
    recorded(tmp_path, 6, [one])
    turn = newest(tmp_path, (4, 5, 6), samples)
    assert [s.id for s in turn.live] == [one.id, two.id, three.id]
    assert [request.id.split(":")[0] for request, _ in turn.answers] == ["6", "5", "5"]
    assert (turn.number, turn.first, turn.last, turn.most) == (1, 1, 2, 2)
    # Beyond the age nothing counts, nor beyond the number of inputs.
    assert [s.id for s in newest(tmp_path, (6,), samples).live] == [one.id]
    assert [s.id for s in newest(tmp_path, (4, 5, 6), samples, most=2).live] == [one.id, two.id]


def test_steps_hold_the_recorded_ids_and_go_on_where_a_harvest_was_killed(tmp_path):
    samples = inputs(3)
    recorded(tmp_path, 1, samples)
    turn = newest(tmp_path, (1,), samples)
    steps = list(turn.rollouts(ENCODE, after=0))
    assert [step for step, _ in steps] == [1, 2]
    assert [len(rollouts.groups) for _, rollouts in steps] == [2, 1]
    for _, rollouts in steps:
        for prompt, request, group in zip(rollouts.prompts, rollouts.requests, rollouts.groups, strict=True):
            assert prompt.token_ids == request.token_ids and group.request_id == request.id
    assert list(turn.rollouts(ENCODE, after=1)) == steps[1:] and list(turn.rollouts(ENCODE, after=2)) == []


def test_dialogues_at_their_depth_are_left_out(tmp_path):
    one, two = inputs(2)
    deep = synthetic(two, iteration=1, depth=3)
    recorded(tmp_path, 1, [one, deep])
    assert [s.id for s in newest(tmp_path, (1,), [one, deep]).live] == [one.id]


def test_what_is_missing_or_changed_is_refused(tmp_path):
    samples = inputs(2)
    recorded(tmp_path, 2, samples)
    with pytest.raises(ValueError, match=r"step_000001.npz is missing; .* set rollout.keep to all"):
        newest(tmp_path, (1, 2), samples)
    with pytest.raises(ValueError, match="answers meld/train/d1/1, which is no input of RL"):
        newest(tmp_path, (2,), samples[:1])
    changed = [replace(samples[0], history=(("Ada", "Something else."), ("Bo", "Yes."))), samples[1]]
    with pytest.raises(ValueError, match="the prompt of meld/train/d0/0 is not the recorded one"):
        list(newest(tmp_path, (2,), changed).rollouts(ENCODE, after=0))


def test_judged_they_become_inputs_with_the_version_that_wrote_them(tmp_path):
    samples = inputs(2)
    recorded(tmp_path, 8, samples[:1])
    recorded(tmp_path, 9, samples[1:], reply="Where is Bo and his boat")
    turn = newest(tmp_path, (8, 9), samples, size=4)
    ((_, rollouts),) = turn.rollouts(ENCODE, after=0)
    scored = score_groups(
        rollouts.samples, rollouts.prompts, rollouts.groups, codec(), make_scorer(CONFIG), CONFIG,
        num_classes=8, step=1, total_steps=1,
    )  # fmt: skip
    found = harvest(scored, CONFIG, ReplyIndex(), {}, iteration=2, policy_version=None, encode=ENCODE)
    assert [(c.reason, c.policy_version, c.reply) for c in found] == [
        ("accepted", 9, "Where is Bo and his boat 9."),
        ("accepted", 8, "Hand me oar number 8."),
    ]
    lines = records_of(found, turn, codec(), style="brief")
    assert [(line["turn"], line["depth"], line["sample"]["policy_version"]) for line in lines] == [
        (1, 1, 9),
        (1, 1, 8),
    ]


def test_the_last_steps_of_a_phase(tmp_path):
    phase = Phase(index=1, kind="rl", name="rl_1", iteration=1, init="cold", buffer=("original",))
    (tmp_path / "phases" / phase.folder).mkdir(parents=True)
    finish(tmp_path, phase, {"position": {"global_step": 50}, "steps": 30})
    assert list(last_steps(tmp_path, (phase,), "rl_1", most=3)) == [48, 49, 50]
    assert last_steps(tmp_path, (phase,), "rl_1", most=99) == range(21, 51)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rollout": {"keep": "last 49"}}, "set rollout.keep to all or to last 50"),
        ({"rollout": {"keep": "every 2"}}, "set rollout.keep to all or to last 50"),
        ({"flywheel": {"iterations": 2, "retrain": {"method": "sft", "init": "cold"}}}, "there is no RL"),
    ],
)
def test_settings_that_cannot_work_are_named(words, said):
    wheel = {"harvest": "replay", "retrain": {"init": "cold"}} | words.get("flywheel", {})
    with pytest.raises(ValueError, match=said):
        settings(**(words | {"flywheel": wheel}))
    settings(flywheel={"harvest": "replay", "retrain": {"init": "cold"}}, rollout={"keep": "last 50"})


# In a run.


@pytest.mark.slow
def test_a_run_harvests_what_rl_sampled_and_trains_on_it(tmp_path):
    words = micro.settings(flywheel__harvest="replay", flywheel__max_age=1, eval__every=0)
    with micro.stopped_at(7):
        assert micro.run(tmp_path, *words) == 75
    assert micro.run(tmp_path, "--resume") == 0
    plan = [(line["phase"], line["step"]) for line in micro.metrics(tmp_path)]
    rl = [step for phase, step in plan if phase == "rl_1"]
    harvested = [step for phase, step in plan if phase == "harvest_1"]
    lines = list(map(json.loads, (tmp_path / "flywheel.jsonl").read_text().splitlines()))
    texts = (tmp_path / "rollouts" / f"step_{rl[-1]:06d}.jsonl").read_text().splitlines()
    answered = dict.fromkeys(json.loads(line)["sample_id"] for line in texts)
    assert [line["parent_id"] for line in lines] == list(answered)
    assert len(harvested) == 2 and {line["turn"] for line in lines} == {1}
    # Nothing was sampled anew: a harvest leaves no rollouts of its own.
    assert not any((tmp_path / "rollouts" / f"step_{step:06d}.npz").exists() for step in harvested)
    accepted = [line for line in lines if line["accepted"]]
    assert accepted and {line["policy_version"] for line in accepted} == {rl[-1] - 1}
    assert "rl_final" in {phase for phase, _ in plan}

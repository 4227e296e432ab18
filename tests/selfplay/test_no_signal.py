"""Synthetic inputs that RL asked in vain are left out, and no others."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from selfemo_jax import phases
from selfemo_jax import run as runs
from selfemo_jax.rollout.records import step_file
from selfemo_jax.selfplay.no_signal import asked_in_vain, inputs_without_signal
from tests.fabricated import sample, settings, synthetic
from tests.test_phases import planned

PLAN = planned(iterations=2, init="cold")
RL_2, HARVEST_2, FINAL = PLAN[3], PLAN[4], PLAN[5]
INPUTS = [synthetic(sample(n, dialogue=f"d{n}", gold={"joy": 1.0}), iteration=1) for n in range(4)]


def write(run, step: int, groups: dict[str, list[float]]) -> None:
    lines = [
        {"sample_id": name, "idx": place, "r1": r1}
        for name, rewards in groups.items()
        for place, r1 in enumerate(rewards)
    ]
    path = step_file(run, step, "jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """Steps 1 and 2 are those of rl_1, step 3 is a harvest's, 4 and 5 are those of rl_2."""
    a, b, c, _ = (one.id for one in INPUTS)
    # The same id in another phase's steps, to be passed over.
    write(tmp_path, 3, {c: [0.0, 0.0]})
    write(tmp_path, 4, {a: [0.0, 0.1], b: [1.0, 1.0], "original": [0.0, 0.0]})
    write(tmp_path, 5, {a: [0.1, 0.0], c: [0.0, 0.6]})
    for phase, steps, end in ((PLAN[1], 2, 2), (RL_2, 2, 5)):
        phases.begin(tmp_path, phase)
        phases.finish(tmp_path, phase, {"steps": steps, "position": {"global_step": end}})
    for step in (1, 2):
        write(tmp_path, step, {"original": [0.5, 0.5]})
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "useless"),
    [
        ([[0.0, 0.19]], True),
        ([[0.0, 0.2]], False),
        ([[0.0, 0.0], [0.0, 0.5]], False),
        ([[1.0, 1.0], [1.0, 1.0]], True),
        ([[1.0, 1.0], [1.0, 0.9]], False),
        ([[0.0, 0.0], [1.0, 1.0]], False),
        ([], False),
    ],
)
def test_every_pass_must_have_been_in_vain(groups, useless):
    assert asked_in_vain({"a": groups}, {"a", "b"}, tau_low=0.1) == (["a"] if useless else [])


def test_what_rl_asked_in_vain_is_left_out_of_the_next_iteration_alone(run):
    def kept(phase, tau_low=0.1):
        found = inputs_without_signal(INPUTS, run, PLAN, phase, tau_low=tau_low)
        return [one for one in INPUTS if one.id not in found]

    # The harvest judges what its own RL phase was given.
    assert kept(RL_2) == kept(HARVEST_2) == INPUTS
    assert kept(FINAL) == INPUTS[2:]
    assert kept(FINAL, tau_low=0.4) == [INPUTS[3]]


def test_a_missing_record_is_named(run):
    step_file(run, 5, "jsonl").unlink()
    with pytest.raises(ValueError, match="step_000005.jsonl is missing; it needs the rollouts of every step"):
        inputs_without_signal(INPUTS, run, PLAN, FINAL, tau_low=0.1)


def test_settings_that_throw_records_away_are_refused():
    wheel = {"tau_low": 0.1, "retrain": {"init": "cold"}}
    assert settings(flywheel=wheel).flywheel.tau_low == 0.1
    with pytest.raises(ValueError, match=r"flywheel.tau_low is 0.1 and rollout.keep is last 3"):
        settings(flywheel=wheel, rollout={"keep": "last 3"})


def test_it_is_what_a_phase_is_given(run, monkeypatch):
    wheel = {"tau_low": 0.1, "retrain": {"init": "cold"}}
    monkeypatch.setattr(runs.run_inputs, "phase_inputs", lambda *given: {"meld": (), "synthetic": (*INPUTS,)})
    said: list[str] = []
    config = settings(flywheel=wheel)
    held = SimpleNamespace(
        dir=run, plan=PLAN, config=config, data=None, _records=list, log=SimpleNamespace(say=said.append)
    )
    assert runs.Run.inputs(held, FINAL)["synthetic"] == tuple(INPUTS[2:])
    assert said == ["rl_final: 2 synthetic inputs taught nothing before"]
    held.config = replace(config, flywheel=replace(config.flywheel, tau_low=None))
    assert runs.Run.inputs(held, FINAL)["synthetic"] == tuple(INPUTS)

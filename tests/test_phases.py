"""The plan of a run and the folders that its phases leave."""

import json

import pytest

from selfemo_jax import phases
from selfemo_jax.config import RL, ColdStart, Config, Flywheel, ModelSection
from selfemo_jax.phases import Phase, plan
from selfemo_jax.settings.selfplay import Retrain

RECORD = {"steps": 3, "logs": {"metrics.jsonl": [10, "ab"]}}


def planned(*, method="grpo", init="base", iterations=1, cold="human", steps=None, control="none"):
    config = Config(
        model=ModelSection(path="weights"),
        cold_start=ColdStart(source=cold),
        flywheel=Flywheel(iterations=iterations, control=control, retrain=Retrain(method=method, init=init)),
        rl=RL(steps=steps),
    )
    return plan(config)


def lines(found: tuple[Phase, ...]) -> list[tuple]:
    return [(p.name, p.kind, p.iteration, p.init, p.buffer) for p in found]


def test_default_plan_is_cold_start_then_rl_and_harvest_then_rl_from_the_base():
    original = ("original",)
    assert lines(planned()) == [
        ("cold", "sft", 0, "base", original),
        ("rl_1", "rl", 1, "cold", original),
        ("harvest_1", "harvest", 1, "rl_1", original),
        ("rl_final", "rl", 2, "base", ("original", "harvest_1")),
    ]


def test_indices_count_up_and_name_the_folders():
    found = planned(iterations=2)
    assert [p.index for p in found] == list(range(6))
    assert [p.folder for p in found][::5] == ["00_cold", "05_rl_final"]


def test_without_self_play_rl_follows_the_cold_start():
    assert lines(planned(iterations=0)) == [
        ("cold", "sft", 0, "base", ("original",)),
        ("rl_final", "rl", 1, "cold", ("original",)),
    ]


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("base", [("rl_final", "base")]),
        ("cold", [("cold", "base"), ("rl_final", "cold")]),
        # No RL came before it, so the current policy is the cold start's.
        ("current", [("cold", "base"), ("rl_final", "cold")]),
    ],
)
def test_the_arm_of_all_originals_starts_where_the_final_rl_of_the_method_starts(init, expected):
    assert [(p.name, p.init) for p in planned(control="all_original", init=init)] == expected
    cold = Config(
        model=ModelSection(path="weights"), phases="cold", flywheel=Flywheel(control="all_original")
    )
    assert [p.name for p in plan(cold)] == ["cold"]


def test_the_buffer_grows_by_every_harvest():
    found = {p.name: p.buffer for p in planned(iterations=2)}
    assert found == {
        "cold": ("original",),
        "rl_1": ("original",),
        "harvest_1": ("original",),
        "rl_2": ("original", "harvest_1"),
        "harvest_2": ("original", "harvest_1"),
        "rl_final": ("original", "harvest_1", "harvest_2"),
    }


@pytest.mark.parametrize(
    ("init", "second", "final"),
    [("base", "base", "base"), ("cold", "cold", "cold"), ("current", "rl_1", "rl_2")],
)
def test_retrain_init_names_the_weights_of_every_round_after_a_harvest(init, second, final):
    found = {p.name: p.init for p in planned(iterations=2, init=init)}
    assert (found["rl_1"], found["rl_2"], found["rl_final"]) == ("cold", second, final)
    assert (found["harvest_1"], found["harvest_2"]) == ("rl_1", "rl_2")


def test_sft_on_harvests_takes_the_place_of_the_rl_rounds():
    harvests = ("harvest_1", "harvest_2")
    assert lines(planned(iterations=2, method="sft")) == [
        ("cold", "sft", 0, "base", ("original",)),
        ("rl_1", "rl", 1, "cold", ("original",)),
        ("harvest_1", "harvest", 1, "rl_1", ("original",)),
        ("sft_2", "sft", 2, "base", harvests[:1]),
        ("harvest_2", "harvest", 2, "sft_2", ("original", "harvest_1")),
        ("sft_3", "sft", 3, "base", harvests),
    ]


def test_sft_then_grpo_starts_rl_from_the_sft_of_its_round():
    found = planned(iterations=2, method="sft_then_grpo", init="current")
    assert [(p.name, p.init) for p in found] == [
        ("cold", "base"),
        ("rl_1", "cold"),
        ("harvest_1", "rl_1"),
        ("sft_2", "rl_1"),
        ("rl_2", "sft_2"),
        ("harvest_2", "rl_2"),
        ("sft_3", "rl_2"),
        ("rl_final", "sft_3"),
    ]


def test_without_a_cold_start_everything_that_names_it_starts_from_the_base():
    for init in ("base", "cold"):
        found = planned(cold="none", init=init)
        assert [(p.name, p.init) for p in found] == [
            ("rl_1", "base"),
            ("harvest_1", "rl_1"),
            ("rl_final", "base"),
        ]


def test_configured_steps_belong_to_the_rl_phases_alone():
    found = planned(steps=7, method="sft_then_grpo")
    assert {p.kind: p.steps for p in found} == {"sft": None, "rl": 7, "harvest": None}
    assert {p.steps for p in planned()} == {None}


def test_a_phase_is_done_by_its_marker_alone(tmp_path):
    found = planned()
    assert phases.first_open(tmp_path, found) == 0
    folder = phases.begin(tmp_path, found[0])
    (folder / "phase.json").write_text(json.dumps(RECORD))
    assert not phases.is_done(tmp_path, found[0])
    phases.finish(tmp_path, found[0], RECORD)
    assert phases.is_done(tmp_path, found[0])
    assert phases.first_open(tmp_path, found) == 1
    assert phases.record_of(tmp_path, found[0]) == RECORD


def test_first_open_is_the_number_of_phases_when_all_are_done(tmp_path):
    found = planned()
    for phase in found:
        phases.begin(tmp_path, phase)
        phases.finish(tmp_path, phase, RECORD)
    assert phases.first_open(tmp_path, found) == len(found)
    (phases.phase_dir(tmp_path, found[2]) / phases.DONE).unlink()
    assert phases.first_open(tmp_path, found) == 2


def test_begin_removes_what_an_interrupted_attempt_left(tmp_path):
    phase = planned()[1]
    left = phases.begin(tmp_path, phase) / "weights" / "half"
    left.parent.mkdir()
    left.write_text("cut")
    assert list(phases.begin(tmp_path, phase).iterdir()) == []


def test_the_marker_is_written_after_the_record(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(phases, "atomic_write", lambda path, content: written.append(path.name))
    phases.finish(tmp_path, planned()[0], RECORD)
    assert written == ["phase.json", phases.DONE]

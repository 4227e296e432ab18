"""Settings of the benchmark: the bundled file, flags laid over it, words for what is wrong."""

import argparse
import dataclasses
import os

import pytest

from selfemo_jax.bench import process
from selfemo_jax.bench.driver import points
from selfemo_jax.bench.process import ALLOCATOR
from selfemo_jax.bench.settings import MODELS, BenchSettings, add_flags, flag_overrides, read_settings
from selfemo_jax.bench.worker import allocator_of
from selfemo_jax.config_io import config_folder


def flags(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return flag_overrides(parser.parse_args(words))


def test_the_bundled_file_holds_the_shapes_of_emotion_recognition():
    found = read_settings(config_folder() / "bench.yaml", {})
    assert (found.prompt, found.completion, found.group_size, found.dtype) == (400, 60, 8, "float32")
    assert "glibc.malloc.hugetlb=1" in found.env["GLIBC_TUNABLES"]


def test_flags_lie_over_the_file():
    given = flags(
        "--prompt", "32", "--phases", "rl_update,refresh", "--sweep", "groups=1,4", "--sweep", "prompt=8"
    )
    found = read_settings(config_folder() / "bench.yaml", given)
    assert (found.prompt, found.completion) == (32, 60)
    assert found.phases == ("rl_update", "refresh")
    assert found.sweep == {"groups": (1, 4), "prompt": (8,)}
    assert read_settings(None, flags("--sweep", "groups=16")).sweep == {"groups": (16,)}
    assert read_settings(None, flags("--micro_cuts", "1,2")).micro_cuts == (1, 2)


def test_a_sweep_changes_one_setting_at_a_time_and_measures_the_base_once():
    settings = BenchSettings(groups=4, prompt=16, sweep={"groups": (2, 4), "prompt": (8,)})
    found = [(point, one.groups, one.prompt) for point, one in points(settings)]
    assert found == [({}, 4, 16), ({"groups": 2}, 2, 16), ({"prompt": 8}, 4, 8)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grops": 2}, "unknown key grops"),
        ({"backend": "tf"}, "backend is 'tf'; expected any of jax, torch, both"),
        ({"phases": ["decode"]}, "phases is 'decode'; expected any of logprobs"),
        ({"sweep": {"layers": [1]}}, "sweep is 'layers'"),
        ({"sweep": {"groups": [2, 0]}}, "sweep of groups over 0: bench: groups is 0; expected at least 1"),
        ({"sweep": {"prompt": [1]}}, "sweep of prompt over 1: .* at least 2 tokens"),
        ({"sweep": {"groups": 4}}, "sweep of groups is 4; expected whole numbers"),
        ({"micro_cuts": [2, 0]}, "micro_cuts is .2, 0.; expected numbers of at least 1"),
        ({"micro_cuts": ["x"]}, "micro_cuts is .*'x'.*; expected whole numbers, as --micro_cuts 1,2"),
        ({"rounds": 1}, "a spread needs at least 2"),
        ({"completion": 1}, "at least 2 tokens"),
    ],
)
def test_what_cannot_be_run_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        read_settings(None, settings)


@pytest.mark.parametrize("text", ["groups=a", "groups", "groups=2,"])
def test_a_sweep_that_is_no_number_names_its_flag(text):
    with pytest.raises(ValueError, match=r"sweep of groups is .* as --sweep groups=2,4"):
        read_settings(None, flags("--sweep", text))


@pytest.mark.parametrize(
    ("outside", "env", "expected"),
    [
        ({}, {}, ALLOCATOR),
        ({"GLIBC_TUNABLES": "x=1"}, {}, {"GLIBC_TUNABLES": "x=1"}),
        ({}, {"MALLOC_ARENA_MAX": "4"}, {"MALLOC_ARENA_MAX": "4"}),
    ],
)
def test_every_side_gets_the_same_allocator(tmp_path, monkeypatch, outside, env, expected):
    for name in allocator_of(os.environ):
        monkeypatch.delenv(name)
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "SideProcess", lambda commands, envs, log: envs)
    settings = BenchSettings(platform="cpu", env=env, tunix_python="python")
    for side in ("jax", "torch", "trl", "tunix"):
        (found,) = process.start_side(side, settings, tmp_path, devices=1, tools=tmp_path)
        assert allocator_of(found) == expected, side


def test_every_flag_is_explained():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    actions = {action.dest: action.help for action in parser._actions if action.dest != "help"}
    assert set(actions) == {one.name for one in dataclasses.fields(BenchSettings)}
    assert all(actions.values())


def test_the_shapes_have_the_sizes_of_their_names():
    assert MODELS["qwen3_0.6b"].num_params == 596_049_920
    assert round(MODELS["qwen3_4b"].num_params / 1e9, 2) == 4.02
    assert round(MODELS["qwen3_8b"].num_params / 1e9, 2) == 8.19

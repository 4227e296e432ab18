"""The baselines: which keys set them apart, which phases they train, and that each runs."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from selfemo_jax import evaluate
from selfemo_jax.checkpoint import find_checkpoint
from selfemo_jax.config_io import config_folder, parse_config, read_config, to_yaml
from selfemo_jax.phases import plan
from selfemo_jax.study.arms import find_arms
from tests import micro

FOLDER = config_folder() / "baselines"
NAMES = ("bioserc", "prc_emo", "sft", "vanilla_grpo", "zero_shot")
SIZES = ("qwen3_4b", "smollm2_135m", "tiny")
# What a longer prompt asks for, besides what makes the baseline.
ROOM = {
    "data.max_prompt",
    "batch.row_tokens",
    "data.speaker_style",
    "output.prompt_style",
    "output.max_labels",
}
KEYS = {
    "zero_shot": {"phases"},
    "sft": {"phases"},
    "bioserc": {"phases", "output.biography"},
    "prc_emo": {"phases", "output.descriptions", "cold_start.order"},
    "vanilla_grpo": {"reward.consensus", "flywheel.iterations", "rl.steps", "cold_start.source"},
}


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("size", SIZES)
def test_baselines_differ_from_their_recipe_in_what_they_are_named_for(size):
    full, *others = find_arms(FOLDER / size)
    assert sorted(arm.name for arm in others) == sorted(NAMES)
    method = dict(flat(asdict(read_config(config_folder() / f"{size}.yaml"))))
    assert dict(flat(asdict(read_config(full.path)))) == method, "what they are compared with"
    for name in NAMES:
        settings = dict(flat(asdict(read_config(FOLDER / size / f"{name}.yaml"))))
        changed = {key for key in settings if settings[key] != method.get(key)}
        assert changed - ROOM <= KEYS[name], (size, name)
        assert changed & KEYS[name], (size, name)


@pytest.mark.parametrize("size", SIZES)
def test_baselines_train_the_phases_they_say(size):
    phases = {name: [p.kind for p in plan(read_config(FOLDER / size / f"{name}.yaml"))] for name in NAMES}
    # The paper's run starts again from the base model: so does the GRPO that it is compared with.
    before = [] if size == "qwen3_4b" else ["sft"]
    assert phases == {
        "zero_shot": [],
        "sft": ["sft"],
        "bioserc": ["sft"],
        "prc_emo": ["sft"],
        "vanilla_grpo": [*before, "rl"],
    }


@pytest.mark.parametrize("size", SIZES)
def test_grpo_has_as_many_updates_behind_it_as_the_policy_it_is_compared_with(size):
    """Otherwise the longer training would win, whatever its reward."""
    lengths = []
    for name in ("full", "vanilla_grpo"):
        config = read_config(FOLDER / size / f"{name}.yaml")
        phases = {phase.name: phase for phase in plan(config)}
        chain = [phases["rl_final"]]
        while chain[-1].init in phases:
            chain.append(phases[chain[-1].init])
        lengths.append([one.steps or config.rl.epochs for one in chain if one.kind == "rl"])
    assert sum(lengths[0]) == sum(lengths[1])


def test_settings_that_train_nothing_by_mistake_are_refused():
    small = {"flywheel": {"retrain": {"init": "cold"}}}
    with pytest.raises(ValueError, match="nothing to train; set cold_start.source"):
        parse_config(small | {"phases": "cold", "cold_start": {"source": "none"}})
    with pytest.raises(ValueError, match="speaker_style is index"):
        parse_config(small | {"output": {"biography": "train_lines"}, "data": {"speaker_style": "index"}})
    with pytest.raises(ValueError, match="nobody would write it"):
        parse_config(small | {"output": {"biography": "expert"}})


def test_zero_shot_scores_the_base_policy_and_trains_nothing(tmp_path):
    run = tmp_path / "run"
    assert micro.run(run, *micro.settings(phases="none")) == 0
    assert micro.metrics(run) == [] and not list(run.glob("phases/*"))
    final = json.loads((run / "eval" / "final.json").read_text())
    found = json.loads((run / "eval" / "dev.json").read_text())["sets"]
    assert final["global_step"] == 0 and found["sample_meld"]["num"] > 0
    assert micro.run(run, *micro.settings(phases="none"), "--resume") == 2, "there is nothing to go on with"
    written = (run / "eval" / "dev_predictions.jsonl").read_bytes()
    words = [f"--checkpoint={run}", "--split=dev", f"--out={tmp_path / 'again'}"]
    assert evaluate.main(words) == 0
    assert (tmp_path / "again" / "dev_predictions.jsonl").read_bytes() == written


def untrained(folder, phases="none", **model):
    """The folder of a run that ended without weights."""
    config = parse_config({"phases": phases, "model": model, "flywheel": {"retrain": {"init": "cold"}}})
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").touch()
    return folder


def test_a_run_that_trains_nothing_stands_for_its_base_model_and_tokenizer(tmp_path):
    found = find_checkpoint(untrained(tmp_path, path="some/base", tokenizer="some/tokenizer"))
    assert (found.weights, found.out) == (Path("some/base"), tmp_path / "eval")
    model = found.settings(read_config(found.config_file)).model
    assert (model.path, model.tokenizer) == ("some/base", "some/tokenizer")


def test_a_run_without_any_weights_says_why(tmp_path, capsys):
    assert evaluate.main([f"--checkpoint={untrained(tmp_path)}"]) == 2
    assert "trains nothing (phases none) and its base has random weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no finished phase with weights"):
        find_checkpoint(untrained(tmp_path, phases="all", path="some/base"))


def test_supervised_baselines_end_after_the_cold_start_and_choose_by_dev(tmp_path):
    run = tmp_path / "run"
    words = micro.settings(phases="cold", cold_start__order="curriculum", cold_start__num=16)
    assert micro.run(run, *words) == 0
    assert [path.name for path in run.glob("phases/*")] == ["00_cold"]
    assert json.loads((run / "eval" / "final.json").read_text())["best"]["phase"] == "cold"

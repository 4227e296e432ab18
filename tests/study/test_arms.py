"""Arms of an ablation: one key each, nothing trained twice, and a table that says what it is."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from selfemo_jax.config_io import config_folder, load_config, read_config, to_yaml
from selfemo_jax.phases import plan
from selfemo_jax.study import __main__ as study
from selfemo_jax.study import arms as arms_module
from selfemo_jax.study.arms import find_arms, markdown, outcome_of, part_rows, table_rows
from tests.study.invented import evaluated, predictions

FOLDERS = sorted(
    {path.parent for path in (config_folder() / "ablations").rglob("*.yaml")},
    key=lambda folder: folder.as_posix(),
)
TABLE_2 = {"full", "with_cold", "without_self_grpo", "without_self_emo"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(config_folder()).as_posix())
def test_every_arm_differs_from_the_full_method_in_one_key(folder):
    full, *others = find_arms(folder)
    assert full.name == "full" and full.changes == {}
    assert others
    for arm in others:
        assert len(arm.changes) == 1, f"{arm.path} changes {dict(arm.changes)}"
    changes = [json.dumps(dict(arm.changes)) for arm in others]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize("name", ["tiny", "qwen3_4b"])
def test_the_arms_of_table_2_are_there_and_mean_what_they_say(name):
    found = {arm.name: read_config(arm.path) for arm in find_arms(config_folder() / "ablations" / name)}
    assert found.keys() == TABLE_2
    kinds = {arm: [phase.kind for phase in plan(config)] for arm, config in found.items()}
    assert "harvest" in kinds["full"] and kinds["without_self_grpo"] == kinds["full"]
    assert kinds["without_self_emo"] == {"tiny": ["sft", "rl"], "qwen3_4b": ["rl"]}[name]
    assert found["without_self_grpo"].reward.consensus == "off"
    # An arm must not also start from other weights: the paper's reported policy starts from the base model.
    starts = {arm: plan(config)[-1].init for arm, config in found.items()}
    everywhere = {"tiny": "rl_1", "qwen3_4b": "base"}[name]
    assert (
        starts
        == dict.fromkeys(TABLE_2, everywhere)
        | {
            "tiny": {"without_self_emo": "cold"},
            "qwen3_4b": {"with_cold": "cold"},
        }[name]
    )


def result(accuracy: float, wf1: float = 0.5) -> dict:
    return {"accuracy": accuracy, "weighted_f1": wf1}


def finished(
    run_dir, sets: dict, *, synthetic=(), note="plumbing run, not a result", split="test", seconds=0.0
) -> None:
    """What a run leaves behind, as far as the table reads it."""
    (run_dir / "eval").mkdir(parents=True)
    for place, number in enumerate(synthetic):
        folder = run_dir / "phases" / f"{place:02d}_harvest_{place}"
        folder.mkdir(parents=True)
        (folder / "harvest.json").write_text(json.dumps({"training": number}))
    content = {"note": note, "splits": {split: {"sets": sets, "seconds": seconds}}}
    (run_dir / "eval" / "final.json").write_text(json.dumps(content))


def config_files(folder) -> None:
    (folder / "rewards").mkdir(parents=True)
    (folder / "full.yaml").write_text("flywheel: {retrain: {init: cold}}\n")
    (folder / "plain.yaml").write_text("base: full.yaml\nreward: {consensus: 'off'}\n")
    (folder / "rewards" / "mass.yaml").write_text("base: ../full.yaml\nreward: {consensus: mass}\n")


def fake_training(monkeypatch, scores) -> list[tuple[str, int]]:
    """Every arm scores at once what ``scores`` says; the runs in order."""
    trained = []

    def train(arm, seed, run_dir, further, *, compiled):
        trained.append((arm.name, seed))
        finished(run_dir, scores(arm.name, seed), synthetic=(20, 30), seconds=60.0 + seed)

    monkeypatch.setattr(arms_module, "train", train)
    return trained


def test_a_study_trains_what_is_missing_and_prints_its_table(tmp_path, monkeypatch, capsys):
    config_files(tmp_path / "configs")

    def scores(name, seed):
        plain = 0.1 if name == "plain" else 0.0
        return {"meld": result(0.6 - plain + 0.02 * seed), "iemocap": result(0.4 - plain)}

    trained = fake_training(monkeypatch, scores)
    words = ["arms", "--config-dir", str(tmp_path / "configs"), "--out", str(tmp_path / "runs"), "--seeds"]
    assert study.main([*words, "2"]) == 0
    assert trained == [("full", 0), ("plain", 0), ("full", 1), ("plain", 1)]
    assert study.main([*words, "3"]) == 0
    assert trained[4:] == [("full", 2), ("plain", 2)]
    rows = json.loads((tmp_path / "runs" / "configs" / "arms.json").read_text())["arms"]
    full, plain = rows
    assert (full["arm"], full["changes"], full["seeds"], full["synthetic"]) == ("full", "-", 3, 50)
    # 60, 62, 64: mean 62, standard deviation 2; with 40 the means over sets are 50, 51, 52.
    assert (full["meld"], full["meld sd"], full["iemocap"], full["iemocap sd"]) == (62.0, 2.0, 40.0, 0.0)
    assert (full["mean"], full["mean sd"], full["difference"], full["seconds a run"]) == (51.0, 1.0, 0.0, 61)
    assert (plain["changes"], plain["difference"]) == ("reward.consensus off", -10.0)
    printed = capsys.readouterr().out
    assert "plumbing run, not a result" in printed and "62.00 ± 2.00" in printed
    page = (tmp_path / "runs" / "configs" / "arms.md").read_text()
    assert "plumbing run, not a result" in page and "| plain | reward.consensus off | 3 | 50 |" in page


def test_a_finished_run_of_other_settings_is_not_taken_for_the_arm(tmp_path, monkeypatch, capsys):
    config_files(tmp_path / "configs")
    trained = fake_training(monkeypatch, lambda name, seed: {"meld": result(0.5)})
    out = ["--out", str(tmp_path / "runs"), "--seeds", "1", "--only", "full"]
    words = ["arms", "--config-dir", str(tmp_path / "configs"), *out]
    assert study.main(words) == 0
    run_dir = tmp_path / "runs" / "configs" / "full" / "seed_0"
    made, _ = load_config(["--config", str(tmp_path / "configs" / "full.yaml")], prog="train")
    (run_dir / "config.yaml").write_text(to_yaml(made))
    assert study.main(words) == 0
    assert study.main([*words, "--", "--rl.steps=7"]) == 2
    assert "rl.steps" in capsys.readouterr().err
    (run_dir / "config.yaml").write_text(to_yaml(replace(made, seed=5)))
    assert study.main(words) == 2
    assert "seed is 5" in capsys.readouterr().err
    assert trained == [("full", 0)]


def test_a_folder_below_uses_the_runs_of_the_reference_above(tmp_path, monkeypatch):
    config_files(tmp_path / "configs")
    trained = fake_training(monkeypatch, lambda name, seed: {"meld": result(0.5)})
    above, below = (["arms", "--config-dir", str(tmp_path / "configs" / part)] for part in ("", "rewards"))
    out = ["--out", str(tmp_path / "runs"), "--seeds", "1"]
    assert study.main([*above, *out, "--only", "full"]) == 0
    assert study.main([*below, *out]) == 0
    assert trained == [("full", 0), ("rewards/mass", 0)]
    made = tmp_path / "runs" / "configs"
    tables = [json.loads((made / name / "arms.json").read_text())["arms"] for name in ("", "rewards")]
    assert [[row["arm"] for row in rows] for rows in tables] == [["full"], ["full", "rewards/mass"]]


def test_a_training_that_fails_stops_the_study_and_names_its_log(tmp_path, monkeypatch, capsys):
    config_files(tmp_path / "configs")
    seen = []

    def run(command, **options):
        seen.append((command, options["env"]))
        options["stdout"].write("no room\n")
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    words = ["arms", "--config-dir", str(tmp_path / "configs"), "--out", str(tmp_path / "runs")]
    assert study.main([*words, "--seeds", "1", "--", "--rl.steps=3"]) == 2
    log = tmp_path / "runs" / "configs" / "full" / "seed_0" / "train.log"
    assert str(log) in capsys.readouterr().err and log.read_text() == "no room\n"
    (command, environment), *_ = seen
    assert command[:3] == [sys.executable, "-m", "selfemo_jax.train"]
    assert {"--seed=0", "--resume=auto", "--rl.steps=3", f"--run_dir={log.parent}"} <= set(command)
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "runs"))


def test_mistakes_are_named(tmp_path, capsys):
    config_files(tmp_path / "configs")
    assert study.main(["arms", "--config-dir", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert study.main(["arms", "--config-dir", str(tmp_path / "configs"), "--only", "plane"]) == 2
    assert "full, plain" in capsys.readouterr().err
    (tmp_path / "configs" / "full.yaml").unlink()
    assert study.main(["arms", "--config-dir", str(tmp_path / "configs")]) == 2
    assert "full.yaml" in capsys.readouterr().err


def test_baselines_are_arms_against_the_whole_method(tmp_path, monkeypatch, capsys):
    """Over seeds, in pairs, with Holm's correction, and apart from an ablation's runs of the same size."""
    monkeypatch.chdir(tmp_path)
    right = {"full": 8, "vanilla_grpo": 7, "sft": 6}

    def train(arm, seed, run_dir, further, *, compiled):
        number = right[arm.name] + seed
        turns = [("joy", "joy")] * number + [("joy", "fear")] * (10 - number)
        evaluated(run_dir, predictions("meld", {f"d{place}": turns for place in range(10)}))
        return 1.0

    monkeypatch.setattr(arms_module, "train", train)
    folder = config_folder() / "baselines" / "smollm2_135m"
    words = ["arms", "--config-dir", str(folder), "--seeds", "2", "--only", *right]
    assert study.main(words) == 0
    found = json.loads((tmp_path / "runs" / "baselines" / "smollm2_135m" / "arms.json").read_text())
    assert found["reference"] == str(folder / "full.yaml")
    assert str(folder / "full.yaml") in capsys.readouterr().out.replace("\n", "")
    rows = {row["arm"]: row for row in found["arms"]}
    assert list(rows) == ["full", "sft", "vanilla_grpo"]
    for name in ("sft", "vanilla_grpo"):
        assert rows[name]["difference ci"] == [rows[name]["difference"]] * 2
        assert rows[name]["p_bootstrap_holm"] == pytest.approx(2 * rows[name]["p_bootstrap"])


def test_settings_that_train_refuses_are_named_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    config_files(tmp_path / "configs")
    # The first arm would train for hours before this one is met.
    (tmp_path / "configs" / "wide.yaml").write_text(
        "base: full.yaml\nrl: {prompts_per_step: 48, mini_prompts: 24}\n"
    )
    trained = fake_training(monkeypatch, lambda name, seed: {"meld": result(0.5)})
    words = ["arms", "--config-dir", str(tmp_path / "configs"), "--out", str(tmp_path / "runs")]
    assert study.main([*words, "--", "--rl.stepz=3"]) == 2
    assert "rl.steps" in capsys.readouterr().err
    assert study.main([*words, "--", "--rl.mini_prompts=32"]) == 2
    assert "wide.yaml" in capsys.readouterr().err
    assert trained == [] and not (tmp_path / "runs").exists()


def test_a_run_without_the_split_is_an_error_and_an_unfinished_one_is_none(tmp_path):
    assert outcome_of(tmp_path, "test") is None
    finished(tmp_path, {"meld": result(0.5)}, split="dev")
    with pytest.raises(ValueError, match="scored on dev, not on test"):
        outcome_of(tmp_path, "test")


@pytest.mark.parametrize("text", ["{cut", "[]", '{"note": ""}', '{"note": "", "splits": {"test": {}}}'])
def test_damaged_scores_of_a_run_are_named_by_file(text, tmp_path):
    finished(tmp_path, {"meld": result(0.5)}, synthetic=(20,))
    final = tmp_path / "eval" / "final.json"
    kept = final.read_text()
    final.write_text(text)
    with pytest.raises(ValueError, match="it is damaged. Remove it") as caught:
        outcome_of(tmp_path, "test")
    assert str(caught.value).startswith(f"{final}: ")
    final.write_text(kept)
    harvest = tmp_path / "phases" / "00_harvest_0" / "harvest.json"
    harvest.write_text(text)
    with pytest.raises(ValueError, match=r"harvest\.json: not what a harvest writes"):
        outcome_of(tmp_path, "test")


def test_parts_of_a_set_have_rows_of_their_own(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        parts = {"shared": result(accuracy + 0.2) | {"num": 3}, "clean": result(accuracy) | {"num": 9}}
        finished(tmp_path / str(seed), {"one": result(accuracy) | {"parts": parts}, "two": result(0.4)})
    outcomes = [outcome_of(tmp_path / str(seed), "test") for seed in range(2)]
    shared, clean = part_rows({"full": outcomes, "plain": [None, None]})
    assert (shared["arm"], shared["set"], shared["n"], shared["accuracy"]) == ("full", "one, shared", 3, 80.0)
    assert (clean["accuracy"], clean["accuracy sd"], clean["seeds"]) == (60.0, 14.14, 2)


def test_the_seconds_of_a_run_count_what_stopped_attempts_did(tmp_path):
    finished(tmp_path, {"meld": result(0.5)}, seconds=4.0)
    aside = tmp_path / "orphaned" / "20261121T101112"
    aside.mkdir(parents=True)
    # Killed in its third step and gone on with from the first: the second was taken twice.
    (aside / "metrics.jsonl").write_text('{"step": 2, "time/step": 0.5}\n{"step": 3, "ti')
    steps = [{"step": step, "time/step": 10.0**step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert outcome_of(tmp_path, "test").seconds == 1110 + 0.5 + 4


def test_one_seed_has_no_deviation_and_an_arm_without_runs_no_row(tmp_path):
    config_files(tmp_path / "configs")
    arms = find_arms(tmp_path / "configs")
    finished(tmp_path / "run", {"meld": result(0.25)})
    rows = table_rows(arms, {"full": [outcome_of(tmp_path / "run", "test")], "plain": [None]})
    assert [row["arm"] for row in rows] == ["full"] and rows[0]["meld sd"] is None
    assert "| 25.00 |" in markdown("title", rows)

"""Runs of several seeds: made once, kept apart by their flags, aggregated; and tests between arms."""

import json
import subprocess

import pytest

from selfemo_jax.config_io import load_config, to_yaml
from selfemo_jax.study import seeds as seeds_module
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.arm_tests import with_tests
from selfemo_jax.study.arms import markdown
from selfemo_jax.study.reading import by_part, read_predictions
from selfemo_jax.study.same_settings import check_made_by
from tests.study.invented import NOTE, evaluated, predictions

RIGHT, WRONG = ("joy", "joy"), ("joy", "fear")


def answers(num_right: int, dialogues: int = 10) -> list[dict]:
    """Ten turns in each dialogue, of which the first ones are right."""
    turns = [RIGHT] * num_right + [WRONG] * (10 - num_right)
    return predictions("meld", {f"d{place}": turns for place in range(dialogues)})


@pytest.fixture
def trained(monkeypatch):
    """What the study asks to be trained; seed n gets 5 + n of ten turns right."""
    commands = []

    def run(command, **options):
        commands.append(command)
        flags = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
        folder = seeds_module.Path(flags["run_dir"])
        evaluated(folder, answers(5 + int(flags["seed"])))
        words = [word for word in command[3:] if not word.startswith("--resume")]
        (folder / "config.yaml").write_text(to_yaml(load_config(words, prog="train")[0]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(seeds_module.subprocess, "run", run)
    return commands


def test_missing_seeds_are_trained_with_the_given_flags_and_finished_ones_are_kept(tmp_path, trained, capsys):
    out = tmp_path / "seeds"
    words = ["seeds", "--out", str(out), "--samples", "300", "--rl.steps", "3", "--optim.lr=0.1"]
    assert main([*words, "--n", "2"]) == 0
    assert main([*words, "--n", "3"]) == 0
    assert [command[-3] for command in trained] == ["--seed=0", "--seed=1", "--seed=2"]
    assert all(command[3:6] == ["--rl.steps", "3", "--optim.lr=0.1"] for command in trained)
    found = json.loads((out / "seeds.json").read_text())
    row = next(row for row in found["scores"] if row["score"] == "accuracy")
    assert (row["seeds"], row["mean"], row["sd"]) == (3, pytest.approx(60.0), pytest.approx(10.0))
    # t(0.975, 2) sd / sqrt(3); all dialogues are alike, so that the bootstrap draws seeds alone.
    half = 4.30265 * 10 / 3**0.5
    assert row["t over seeds"] == [pytest.approx(60 - half, abs=1e-3), pytest.approx(60 + half, abs=1e-3)]
    assert row["seeds and dialogues"] == [pytest.approx(50.0), pytest.approx(70.0)]
    assert found["note"] == NOTE and NOTE in capsys.readouterr().out


def test_seeds_are_aggregated_by_part_where_all_tell_it(tmp_path):
    def lines(right):
        return [line | {"part": "clean" if "/d0/" in line["id"] else "shared"} for line in answers(right)]

    runs = [evaluated(tmp_path / str(n), lines(5 + n)) for n in range(2)]
    systems = [read_predictions(run, split="test", name=run.name) for run in runs]
    rows = seeds_module.seed_rows([by_part(one) for one in systems], num=100, mean=False)
    accuracy = {row["set"]: row["mean"] for row in rows if row["score"] == "accuracy"}
    assert accuracy == {"meld, shared": pytest.approx(55.0), "meld, clean": pytest.approx(55.0)}
    found = seeds_module.rows_of([*systems, read_predictions(
        evaluated(tmp_path / "old", answers(5)), split="test", name="old")], num=100)  # fmt: skip
    assert {row["set"] for row in found} == {"meld"}, "a run without parts leaves the others whole"
    assert {row["set"] for row in seeds_module.rows_of(systems, num=100)} == {"meld", *accuracy}


def test_other_flags_are_no_seeds_of_the_same_runs(tmp_path, trained, capsys):
    words = ["seeds", "--out", str(tmp_path / "seeds"), "--n", "1", "--samples", "100"]
    assert main([*words, "--rl.steps=3"]) == 0
    assert main([*words, "--rl.steps=4"]) == 2
    assert "--rl.steps=3" in capsys.readouterr().err
    config = tmp_path / "mine.yaml"
    config.write_text("note: one\nflywheel: {retrain: {init: cold}}\n")
    words[2] = str(tmp_path / "others")
    assert main([*words, "--config", str(config)]) == 0
    config.write_text("note: two\nflywheel: {retrain: {init: cold}}\n")
    assert main([*words, "--config", str(config)]) == 2
    assert "another config" in capsys.readouterr().err


def test_a_damaged_record_of_the_flags_is_told_and_nothing_is_trained(tmp_path, trained, capsys):
    words = ["seeds", "--out", str(tmp_path), "--n", "1", "--samples", "100", "--rl.steps=3"]
    assert main(words) == 0
    for content, message in [
        (b"{", "flags.json: not JSON"),
        (b"\xff", "flags.json: not JSON"),
        (b"[]", "with flags []"),
        (b"{}", "with flags None"),
    ]:
        (tmp_path / "flags.json").write_bytes(content)
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert len(trained) == 1


def test_a_mistake_before_the_first_run_is_told_at_once_and_ties_the_folder_to_nothing(
    tmp_path, trained, monkeypatch, capsys
):
    out = tmp_path / "seeds"
    words = ["seeds", "--out", str(out), "--n", "1", "--samples", "100"]
    assert main([*words, "--rl.stepz=3"]) == 2
    assert "rl.steps" in capsys.readouterr().err
    assert trained == [] and not out.exists()
    working = seeds_module.subprocess.run

    def fails(command, **options):
        return subprocess.CompletedProcess(command, 2)

    # As where the data is not found: the run has a log and no settings yet.
    monkeypatch.setattr(seeds_module.subprocess, "run", fails)
    assert main([*words, "--data.root=nowhere"]) == 2
    monkeypatch.setattr(seeds_module.subprocess, "run", working)
    assert main([*words, "--data.root=here"]) == 0
    assert main([*words, "--data.root=nowhere"]) == 2
    assert "Name another --out" in capsys.readouterr().err
    check_made_by(out / "seed_1", ["--host_timeout=5"])


def test_runs_whose_settings_came_from_a_changed_base_are_refused(tmp_path, trained, capsys):
    (tmp_path / "base.yaml").write_text("rl: {steps: 3}\nflywheel: {retrain: {init: cold}}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\n")
    words = ["seeds", "--out", str(tmp_path / "seeds"), "--n", "1", "--samples", "100"]
    words += ["--config", str(tmp_path / "mine.yaml")]
    assert main([*words]) == 0 and main([*words]) == 0
    (tmp_path / "base.yaml").write_text("rl: {steps: 4}\nflywheel: {retrain: {init: cold}}\n")
    assert main([*words]) == 2
    assert "rl.steps is 3, the command now gives 4" in capsys.readouterr().err
    assert len(trained) == 1


def test_runs_of_other_settings_are_not_aggregated_as_seeds(tmp_path, capsys):
    for seed, steps in enumerate((3, 4)):
        folder = evaluated(tmp_path / f"seed_{seed}", answers(5))
        flags = [f"--seed={seed}", f"--rl.steps={steps}", f"--run_dir={folder}"]
        (folder / "config.yaml").write_text(to_yaml(load_config(flags, prog="train")[0]))
    assert main(["seeds", "--out", str(tmp_path), "--n", "2", "--only-aggregate"]) == 2
    assert "rl.steps is 4" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, trained, capsys):
    assert main(["seeds", "--n", "0"]) == 2
    assert main(["seeds", "--out", str(tmp_path), "--seed=4"]) == 2
    assert "gives each run its seed" in capsys.readouterr().err
    assert main(["seeds", "--out", str(tmp_path), "--only-aggregate"]) == 2
    assert "none of the 3 runs is finished" in capsys.readouterr().err
    assert trained == []


def test_a_failed_training_names_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        seeds_module.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 2)
    )
    assert main(["seeds", "--out", str(tmp_path / "seeds"), "--n", "1"]) == 2
    assert str(tmp_path / "seeds" / "seed_0" / "train.log") in capsys.readouterr().err


def test_runs_on_different_inputs_are_refused(tmp_path, capsys):
    evaluated(tmp_path / "seed_0", answers(5))
    evaluated(tmp_path / "seed_1", answers(5, dialogues=9))
    assert main(["seeds", "--out", str(tmp_path), "--n", "2", "--only-aggregate"]) == 2
    assert "different inputs" in capsys.readouterr().err


def test_a_flag_that_no_other_study_knows_is_still_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), str(tmp_path), "--rl.steps=3"])


def test_arms_get_paired_tests_seed_by_seed_and_holm_over_the_arms(tmp_path):
    rights = {"full": (5, 6, 8), "worse": (3, 5, 6), "same": (5, 6, 8)}
    runs = {
        arm: {seed: evaluated(tmp_path / arm / str(seed), answers(n)) for seed, n in enumerate(numbers)}
        for arm, numbers in rights.items()
    }
    rows = [{"arm": arm, "mean": 10 * sum(numbers) / 3} for arm, numbers in rights.items()]
    (full, worse, same), words = with_tests(rows, runs, split="test", reference="full")
    assert full["p_bootstrap"] is full["p_t"] is None and list(full)[-3:] == list(worse)[-3:]
    assert full["mean ci"][0] < full["mean"] < full["mean ci"][1]
    # Seed by seed the arm lost 20, 10, 20 points; drawn in pairs it can only lose.
    assert worse["difference ci"] == [pytest.approx(-20.0), pytest.approx(-10.0)]
    assert worse["p_bootstrap"] == pytest.approx(2 / 5001)
    assert worse["p_bootstrap_holm"] == pytest.approx(2 * 2 / 5001)
    # t = (50 / 3) / (sqrt(33.33) / sqrt(3)) = 5, two degrees of freedom.
    assert worse["p_t"] == pytest.approx(0.0377, abs=1e-3)
    assert (same["difference ci"], same["p_bootstrap"], same["p_t"]) == ([0.0, 0.0], 1.0, None)
    assert "Holm" in words


def test_with_few_dialogues_seeds_and_arms_have_no_bootstrap_and_say_so(tmp_path, capsys):
    runs = {
        arm: {seed: evaluated(tmp_path / arm / f"seed_{seed}", answers(right + seed, 9)) for seed in range(2)}
        for arm, right in (("full", 6), ("worse", 3))
    }
    rows = [{"arm": "full", "mean": 65.0}, {"arm": "worse", "mean": 35.0, "difference": -30.0}]
    (full, worse), words = with_tests(rows, runs, split="test", reference="full")
    assert (
        full["mean ci"] is worse["difference ci"] is worse["p_bootstrap"] is worse["p_bootstrap_holm"] is None
    )
    assert "fewer than 10 dialogues" in words
    assert "| -30.00 [-] |" in markdown("title", [worse])
    assert main(["seeds", "--out", str(tmp_path / "full"), "--n", "2", "--only-aggregate"]) == 0
    found = json.loads((tmp_path / "full" / "seeds.json").read_text())
    assert all(row["seeds and dialogues"] is None and row["t over seeds"] for row in found["scores"])
    assert "fewer than 10 dialogues" in found["remark"] and found["remark"] in capsys.readouterr().out


def test_arms_without_predictions_keep_their_rows_and_say_so(tmp_path):
    rows = [{"arm": "full", "mean": 50.0}]
    kept, words = with_tests(rows, {"full": {0: tmp_path}}, split="test", reference="full")
    assert kept == rows and "no intervals" in words and "test_predictions.jsonl" in words


@pytest.mark.parametrize("swapped", [False, True])
def test_arms_that_answered_other_sets_keep_their_rows_and_say_so(swapped, tmp_path):
    """Neither is an interval over one set beside a mean of two, nor is the whole table lost."""
    lines = [answers(5), [*answers(5), *predictions("emo", {"d0": [RIGHT]})]]
    first, second = lines[::-1] if swapped else lines
    runs = {"full": {0: evaluated(tmp_path / "full", first)}, "arm": {0: evaluated(tmp_path / "arm", second)}}
    rows = [{"arm": arm, "mean": 50.0} for arm in runs]
    kept, words = with_tests(rows, runs, split="test", reference="full")
    assert kept == rows
    assert "no intervals: arm, seed 0 answered inputs of" in words and "emo, meld" in words
    seeds = {"full": {0: runs["full"][0], 1: runs["arm"][0]}}
    kept, words = with_tests(rows[:1], seeds, split="test", reference="full")
    assert kept == rows[:1] and "no intervals: full, seed 1" in words

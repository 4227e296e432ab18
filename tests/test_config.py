"""Settings: what is read, what is refused and in which words, and the numbers of the paper's runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.config import Config, Optim, Reward, parse_mesh
from selfemo_jax.config_check import parse_keep, parse_steps, validate
from selfemo_jax.config_io import Flag, config_folder, load_config, parse_config, to_yaml


def load(*argv: str, **options):
    return load_config(argv, prog="train", **options)


def refused(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*argv)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


VALID = {"flywheel": {"retrain": {"init": "cold"}}}


# ---- reading ----


def test_no_argument_reads_tiny_wherever_the_process_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, command = load()
    assert command.config_file == config_folder() / "tiny.yaml"
    assert config.note == "plumbing run, not a result"
    assert (config.run_dir, command.resume, command.dry_run) == (str(Path("runs/tiny")), None, False)


def test_a_bundled_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = load("--config", "configs/qwen3_4b.yaml")
    assert config.rl.prompts_per_step == 64
    assert config.run_dir == str(Path("runs/qwen3_4b"))


def test_the_command_line_lies_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = written(
        tmp_path,
        "rl: {steps: 7, group_size: 4}\nflywheel: {retrain: {init: cold}}\nloss:\noptim: {lr: 1e-5}\n"
        "data: {mixture: {kind: weights, weights: {meld: 2}}, sets: [meld, emorynlp]}\n",
    )
    config, _ = load(f"--config={path}", "--rl.group_size", "6", "--data.max_prompt=128", "--seed", "3")
    assert (config.rl.steps, config.rl.group_size, config.data.max_prompt, config.seed) == (7, 6, 128, 3)
    assert config.rl.epochs == Config().rl.epochs
    assert config.loss == Config().loss
    assert config.optim == replace(Optim(), lr=1e-5)
    assert config.data.mixture.weights == {"meld": 2.0}


def test_a_file_lies_over_the_file_that_it_names_as_its_base(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "rl: {steps: 7, group_size: 4}\nflywheel: {retrain: {init: cold}}\nnote: below\n"
        "data: {mixture: {kind: weights, weights: {meld: 2, emorynlp: 1}}, sets: [meld, emorynlp]}\n"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.yaml").write_text(
        "base: ../below.yaml\nrl: {group_size: 6}\ndata: {mixture: {weights: {meld: 1, emorynlp: 1}}}\n"
    )
    config, command = load("--config", str(tmp_path / "folder" / "mine.yaml"), "--seed", "3")
    assert (config.rl.steps, config.rl.group_size, config.note, config.seed) == (7, 6, "below", 3)
    assert config.data.mixture.weights == {"meld": 1.0, "emorynlp": 1.0}
    assert command.config_file.name == "mine.yaml" and config.run_dir == str(Path("runs/mine"))


def test_a_base_that_is_not_there_or_leads_back_is_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    assert "two.yaml" in refused("--config", str(tmp_path / "one.yaml"))
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    assert "leads back" in refused("--config", str(tmp_path / "one.yaml"))


def test_lists_nulls_booleans_and_mappings_are_read_from_the_command_line():
    config, _ = load(
        "--data.sets", "[meld,emorynlp]", "--rl.steps=null", "--loss.clip_dual", "null",
        "--data.decontaminate=true", "--data.mixture.weights", "{meld: 1, emorynlp: 2}",
        "--data.mixture.kind", "weights", "--mesh", "fsdp=4,tp=2", "--rollout.keep", "last 5",
    )  # fmt: skip
    assert config.data.sets == ["meld", "emorynlp"]
    assert config.rl.steps is None and config.loss.clip_dual is None
    assert config.data.decontaminate is True
    assert config.data.mixture.weights == {"meld": 1.0, "emorynlp": 2.0}
    assert (config.mesh, config.rollout.keep) == ("fsdp=4,tp=2", "last 5")


def test_a_bare_number_is_text_where_text_is_expected(tmp_path):
    config, _ = load("--config", written(tmp_path, "mesh: 8\nflywheel: {retrain: {init: cold}}\n"))
    assert config.mesh == "8"


def test_command_flags_are_returned_beside_the_settings():
    flags = {
        "checkpoint": Flag(help="a run", required=True),
        "split": Flag(help="which", default="test"),
        "quick": Flag(help="less", switch=True),
        "dialogues": Flag(help="JSONL", positional=True),
    }
    argv = ["in.jsonl", "--checkpoint", "runs/a", "--quick", "--dry_run", "--resume=auto"]
    _, command = load(*argv, flags=flags)
    assert dict(command.extra) == {
        "checkpoint": "runs/a", "split": "test", "quick": True, "dialogues": "in.jsonl"
    }  # fmt: skip
    assert (command.dry_run, command.resume) == (True, "auto")
    with pytest.raises(ValueError, match="checkpoint"):
        load(flags=flags)


def test_resuming_reads_the_run_folders_own_settings_unless_a_config_is_named(tmp_path):
    saved = replace(load()[0], run_dir=str(tmp_path), seed=41)
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    config, command = load("--run_dir", str(tmp_path), "--resume")
    assert (config, command.resume) == (saved, "latest")
    named, _ = load("--run_dir", str(tmp_path), "--resume", "auto", "--config", "configs/tiny.yaml")
    assert named.seed == 0
    fresh, _ = load("--run_dir", str(tmp_path))
    assert fresh.seed == 0


def test_a_command_may_choose_the_file_by_its_own_flags(tmp_path):
    path = written(tmp_path, "seed: 12\nflywheel: {retrain: {init: cold}}\n")
    flags = {"checkpoint": Flag(help="a run")}
    config, command = load(
        "--checkpoint", path, "--seed=13", flags=flags, base=lambda command: Path(command.extra["checkpoint"])
    )
    assert (config.seed, str(command.config_file)) == (13, path)


def test_the_settings_of_a_run_that_was_copied_are_those_of_the_copy(tmp_path):
    saved = tmp_path / "b" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(to_yaml(replace(load()[0], run_dir=str(tmp_path / "a"))))
    assert load(base=lambda command: saved)[0].run_dir == str(tmp_path / "b")
    assert load("--run_dir", "c", base=lambda command: saved)[0].run_dir == "c"
    # Settings of no run say nothing of a folder.
    bundled = config_folder() / "evaluate.yaml"
    assert load(base=lambda command: bundled)[0].run_dir == "runs/evaluate"


def test_help_says_what_each_field_is(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--rl.group_size" in text and "rollouts per prompt" in text and "--dry_run" in text
    assert "--rl CONFIG" not in text


# ---- saving ----


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(1e-12, 1.0),
    steps=st.none() | st.integers(1, 10**6),
    note=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30),
)
def test_any_value_survives_being_saved(lr, steps, note):
    config = parse_config(VALID | {"note": note, "optim": {"lr": lr}, "rl": {"steps": steps}})
    assert (config.optim.lr, config.rl.steps, config.note) == (lr, steps, note)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


# ---- refusing ----


def test_an_unknown_flag_is_named_with_its_nearest():
    assert refused("--rl.group_sise", "3") == (
        "command line: unknown key rl.group_sise; did you mean rl.group_size?"
    )
    assert "did you mean rl.group_size?" in refused("--group_size=3")
    assert "did you mean run_dir?" in refused("--run-dir=x")
    assert "did you mean dry_run?" in refused("--dryrun")
    assert "unknown key zzz" in refused("--zzz=1")


def test_an_unknown_key_of_a_file_is_named_with_the_file(tmp_path):
    path = written(tmp_path, "rl: {group_size: 4, promts_per_step: 3}\n")
    assert refused("--config", path) == (
        f"{path}: unknown key rl.promts_per_step; did you mean rl.prompts_per_step?"
    )
    path = written(tmp_path, "flywheel: {retrain: {inti: cold}}\n")
    assert "unknown key flywheel.retrain.inti; did you mean flywheel.retrain.init?" in refused(
        "--config", path
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rl.group_size", "eight", "rl.group_size is 'eight'; expected a whole number (int)"),
        ("rl.group_size", "1.5", "expected a whole number (int)"),
        ("rl.steps", "many", "rl.steps is 'many'; expected a whole number (int) or null"),
        ("optim.lr", "fast", "optim.lr is 'fast'; expected a number (float)"),
        ("data.decontaminate", "perhaps", "expected true or false (bool)"),
        ("data.sets", "meld", "expected a list of text (str), as [a, b]"),
        ("data.dev_split", "test", "expected one of dev"),
        ("eval.final_splits", "[dev, tset]", "expected a list of one of dev, test"),
        ("reward.preset", "robst", "expected one of paper, robust, convex; did you mean robust?"),
        ("data.mixture.weights", "{meld: heavy}", "expected a mapping of text (str) to a number (float)"),
    ],
)
def test_a_wrong_type_names_key_value_and_expected_type(key, value, words, tmp_path):
    text = refused(f"--{key}", value)
    assert text.startswith("command line: ") and words in text
    section, _, name = key.rpartition(".")
    nested = name + ": " + value
    for part in reversed(section.split(".")):
        nested = part + ": {" + nested + "}"
    path = written(tmp_path, nested + "\n")
    text = refused("--config", path)
    assert text.startswith(f"{path}: {key} is ") and words.split("expected")[1] in text


def test_files_that_are_no_settings_are_refused_in_words(tmp_path):
    assert "the file holds ['a']" in refused("--config", written(tmp_path, "- a\n"))
    assert "section rl holds 5" in refused("--config", written(tmp_path, "rl: 5\n"))
    assert "not valid YAML" in refused("--config", written(tmp_path, "rl: {\n"))
    assert "key seed stands twice" in refused("--config", written(tmp_path, "seed: 1\nseed: 2\n"))
    assert "no such file; did you mean configs/tiny.yaml?" in refused("--config", "configs/tyny.yaml")


def test_a_missing_or_superfluous_word_is_refused():
    assert "--rl.steps needs a value" in refused("--rl.steps")
    assert "--rl.steps needs a value" in refused("--rl.steps", "--seed", "3")
    assert "unrecognized arguments: extra" in refused("extra")
    assert "invalid choice: 'maybe'" in refused("--resume=maybe")
    assert "rl is a section; set its fields" in refused("--rl", "{group_size: 4}")


def problems(**sections) -> str:
    sections["flywheel"] = {"retrain": {"init": "cold"}} | sections.get("flywheel", {})
    with pytest.raises(ValueError) as caught:
        parse_config(sections)
    return str(caught.value)


def test_batch_arithmetic_is_explained_with_the_nearest_values():
    text = problems(rl={"prompts_per_step": 60, "mini_prompts": 32})
    assert "set rl.mini_prompts to 30 or 60, or rl.prompts_per_step to 32 or 64" in text
    text = problems(mesh="fsdp=3,tp=2", batch={"micro_rows": 8})
    assert "(6 devices)" in text and "set batch.micro_rows to 6 or 9" in text
    text = problems(batch={"row_tokens": 700}, data={"max_prompt": 500}, rollout={"max_tokens": 256})
    assert "500 + rollout.max_tokens 256 = 756; set batch.row_tokens to 756 or more" in text
    assert "does not fill a step" in problems(data={"max_items": 10})
    assert "set num_heads to 4 or 6" in problems(model={"shape": {"num_heads": 5}})
    parse_config(VALID | {"mesh": "fsdp=4,tp=3", "batch": {"micro_rows": 4}})


def test_training_samples_untruncated():
    assert "rollout.top_k is 20" in problems(rollout={"top_k": 20})
    assert "rollout.top_p is 0.9" in problems(rollout={"top_p": 0.9})
    assert "rollout.temperature is 0" in problems(rollout={"temperature": 0.0})


def test_a_frequency_penalty_is_refused_where_log_probs_would_not_be_the_policys():
    assert "eval.frequency_penalty is 2.5: expected from -2 to 2" in problems(eval={"frequency_penalty": 2.5})
    text = problems(eval={"frequency_penalty": 0.5}, rollout={"engine": "vllm"})
    assert "eval.frequency_penalty is 0.5" in text and "--rollout.engine jax" in text
    assert parse_config(VALID | {"eval": {"frequency_penalty": 0.5}}).eval.frequency_penalty == 0.5


def test_retraining_a_random_base_is_refused_and_a_pretrained_one_is_not():
    assert "cannot write the answer grammar" in problems(flywheel={"retrain": {"init": "base"}})
    parse_config({"model": {"path": "runs/x"}, "flywheel": {"retrain": {"init": "base"}}})
    assert "no cold start to begin from" in problems(cold_start={"source": "none"})


@pytest.mark.parametrize("control", ["original_only", "shuffled_labels", "verifier_labels"])
def test_arms_with_other_labels_are_refused_where_the_harvest_teaches_by_its_answers(control):
    for method in ("sft", "sft_then_grpo"):
        wheel = {"control": control, "retrain": {"init": "cold", "method": method}}
        with pytest.raises(ValueError, match=f"control is {control} and .*retrain.method is {method}, which"):
            parse_config({"flywheel": wheel})
    assert parse_config({"flywheel": {"control": control, "retrain": {"init": "cold"}}})


def test_answers_cut_at_their_label_need_rows_of_dialogues_and_some_whole_ones():
    assert "set cold_start.rows to dialogues" in problems(cold_start={"whole_answers": 0.5})
    assert "above 0" in problems(cold_start={"whole_answers": 0.0, "rows": "dialogues"})


def test_lines_without_an_answer_need_rows_of_dialogues():
    found = problems(cold_start={"lines": "all"})
    assert "cold_start.lines is all" in found and "set cold_start.rows to dialogues" in found


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rl.group_size", 0, "1 or more"),
        ("rl.group_size", 1, "compares the answers of a group"),
        ("optim.lr", -1e-6, "0 or more"),
        ("optim.lr", float("nan"), "0 or more"),
        ("optim.b2", 1.0, "from 0 to below 1"),
        ("optim.warmup", 1.5, "from 0 to 1"),
        ("loss.clip_dual", 1.0, "above 1, or null"),
        ("loss.clip_low", 0.0, "above 0 and at most 1"),
        ("loss.norm_constant", 100.0, "which has no constant"),
        ("reward", Reward(divide="top_k", consensus="mass"), "counts nothing"),
        ("reward", Reward(smoothing=0.1, primary="accuracy"), "it smooths wiou"),
        ("reward.similarity", {"joy/surprise": 0.5}, "set primary to similarity"),
        (
            "reward",
            Reward(primary="similarity", similarity={"joy": 0.5}),
            "two different lower-case labels as one/other",
        ),
        ("reward", Reward(primary="similarity", similarity={"joy/fear": 1.5}), "expected 0 to 1"),
        ("time_limit", 0.0, "above 0"),
        ("rollout.keep", "first 3", "expected all, last N or every N"),
        ("log.sinks", ["csv"], "expected any of tensorboard, wandb, mlflow"),
        ("log.profile_steps", "9:7", "expected FIRST or FIRST:LAST"),
        ("reward.function", "mine", "package.module:function"),
        ("data.sets", [], "data.sets is empty"),
        ("data.sets", ["meld", "meld"], "named twice"),
        ("data.mixture.weights", {"meld": 1.0}, "set kind to weights"),
        ("mesh", "fsdp=2,pp=2", "the axes are data, fsdp, tp"),
    ],
)
def test_values_out_of_range_are_named(key, value, words):
    def changed(node, names):
        inner = value if len(names) == 1 else changed(getattr(node, names[0]), names[1:])
        return replace(node, **{names[0]: inner})

    valid = parse_config(VALID)
    with pytest.raises(ValueError) as caught:
        validate(changed(valid, key.split(".")))
    assert key in str(caught.value) and words in str(caught.value)


def test_all_problems_are_told_at_once():
    text = refused("--rl.mini_prompts=5", "--rollout.top_k=5", "--optim.lr=-1")
    assert "3 problems" in text and len(text.splitlines()) == 4
    assert "tiny.yaml and the command line" in text


# ---- small texts ----


def test_mesh_text():
    assert parse_mesh("8") == {"data": 1, "fsdp": 8, "tp": 1}
    assert parse_mesh("data=2,fsdp=4,tp=2") == {"data": 2, "fsdp": 4, "tp": 2}
    assert list(parse_mesh(" tp = 2 , fsdp = 4 ")) == ["data", "fsdp", "tp"]
    assert parse_mesh("tp=2") == {"data": 1, "fsdp": 1, "tp": 2}
    for text in ("", "0", "-2", "4x2", "fsdp=0", "fsdp=2,fsdp=2", "dp=2", "fsdp=4;tp=2"):
        with pytest.raises(ValueError, match="mesh"):
            parse_mesh(text)


def test_keep_and_step_texts():
    assert parse_keep("all") == ("all", 1)
    assert parse_keep("last 5") == ("last", 5)
    assert parse_keep("every 10") == ("every", 10)
    assert parse_steps("5") == (5, 5)
    assert parse_steps("5-7") == (5, 7)
    for text in ("none", "last", "last 0", "every -1", "last 5 steps"):
        with pytest.raises(ValueError, match="last N or every N"):
            parse_keep(text)

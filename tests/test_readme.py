"""Every `python` command in the README's code blocks is one that the program accepts."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from selfemo_jax import browse, evaluate, predict, report, train
from selfemo_jax.selfplay import __main__ as selfplay
from selfemo_jax.study import __main__ as study
from selfemo_jax.study.arms import find_arms, folder_of
from tests import micro
from tools import bench_throughput, convert_hf, plan, vllm_sidecar

README = Path(__file__).resolve().parents[1] / "README.md"
MODULES = {
    "selfemo_jax.train": train,
    "selfemo_jax.evaluate": evaluate,
    "selfemo_jax.predict": predict,
    "selfemo_jax.selfplay": selfplay,
    "selfemo_jax.browse": browse,
    "selfemo_jax.report": report,
    "selfemo_jax.study": study,
}


def commands() -> list[str]:
    """Command lines of the bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def of_program(name: str) -> list[str]:
    """Commands that start the program, without what stands before them in the line."""
    found = [line[line.index(name) :] for line in commands() if name in line]
    assert found, f"the README shows no {name}"
    return [text.split("&&")[0].strip() for text in found]


def refuses_nothing_it_shows(page, words: list[str], capsys) -> None:
    """--help knows every flag among the words."""
    with pytest.raises(SystemExit) as stop:
        page.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        if word.startswith("--") and word != "--a.b":
            assert word.split("=")[0] in text, f"{word} is in the README and not in --help"


def test_every_python_command_is_covered():
    tools = ("tools/convert_hf.py", "tools/plan.py", "tools/bench_throughput.py", "tools/vllm_sidecar.py")
    # The last one is run by tests/rollout/sidecar/test_stock.py, in the environment of the sidecar.
    known = (*MODULES, *tools, "pytest", "venv", "vllm.entrypoints.openai.api_server")
    for line in commands():
        # Not the interpreter of an option's value.
        for found in re.findall(r"(?<!_python)(?:^|\s)(?:\S*/)?python3? (?:-m )?(\S+)", line):
            assert found in known, f"{found}: no test runs {line!r}"


def test_continuous_integration_runs_the_test_command_shown():
    (line,) = [line for line in commands() if "pytest" in line]
    assert line[line.index("python -m pytest") :] in (README.parent / ".ci" / "run").read_text(
        encoding="utf-8"
    )


def test_the_flags_shown_for_training_exist(capsys):
    words = [word.strip("[]") for line in of_program("selfemo_jax.train") for word in line.split()[1:]]
    refuses_nothing_it_shows(train, words, capsys)


def test_the_commands_for_training_plan_a_run(tmp_path, capsys):
    # Usage with its brackets is covered by the flags; what stands alone runs as it is, less the training.
    plain = [line for line in of_program("selfemo_jax.train") if "[" not in line]
    assert plain
    for line in plain:
        words = shlex.split(line)[1:]
        assert train.main([*words, "--dry_run", f"--run_dir={tmp_path / 'run'}"]) == 0
        assert "harvest_1" in capsys.readouterr().out


def test_the_studies_shown_are_there():
    for line in of_program("selfemo_jax.study"):
        args = study.make_parser().parse_args(shlex.split(line)[1:])
        if args.study == "arms":
            assert len(find_arms(README.parent / args.config_dir)) == 4


def test_the_report_shown_reads_what_commands_shown_make():
    (words,) = (line for line in of_program("selfemo_jax.study") if " seeds " in line)
    made = study.make_parser().parse_args(shlex.split(words)[1:])
    known = {Path("runs/tiny"), made.out / "seeds.json", *(made.out / f"seed_{n}" for n in range(made.n))}
    for line in of_program("selfemo_jax.report"):
        read = line.partition("--out")[0].split()[1:]
        assert {Path(word) for word in read if not word.startswith("--")} <= known


@pytest.mark.parametrize("part", ["rewards", "controls"])
def test_folders_of_arms_below_are_compared_with_the_same_reference(part):
    folder = README.parent / "configs" / "ablations" / "tiny"
    assert f"--config-dir configs/ablations/tiny/{part}" in README.read_text(encoding="utf-8")
    full, *others = find_arms(folder / part)
    assert full.path.resolve() == folder / "full.yaml" and others
    assert folder_of(full.path, None) == Path("runs/ablations/tiny")


def test_evaluate_as_shown(tmp_path):
    for line in of_program("selfemo_jax.evaluate"):
        words = [str(micro.base_run()) if word == "runs/tiny" else word for word in shlex.split(line)[1:]]
        assert evaluate.main([*words, f"--out={tmp_path}"]) == 0
        assert (tmp_path / "test.json").is_file()


def test_self_play_and_browsing_as_shown(tmp_path, capsys):
    for name, page, printed, more in (
        ("selfemo_jax.selfplay", selfplay, "20 dialogues", [f"--out={tmp_path / 'played.jsonl'}"]),
        ("selfemo_jax.browse", browse, "inside the grammar", []),
    ):
        for line in of_program(name):
            words = [str(micro.base_run()) if word == "runs/tiny" else word for word in shlex.split(line)[1:]]
            assert page.main([*words, *more]) == 0
            assert printed in capsys.readouterr().out
    assert len((tmp_path / "played.jsonl").read_text().splitlines()) == 20


def test_predict_as_shown(capsys, monkeypatch):
    (line,) = (line for line in commands() if "selfemo_jax.predict" in line)
    said, command = (shlex.split(part) for part in line.split(" | "))
    monkeypatch.setattr(sys, "stdin", io.StringIO(said[1]))
    start = command.index("selfemo_jax.predict") + 1
    words = [str(micro.base_run()) if word == "runs/tiny" else word for word in command[start:]]
    capsys.readouterr()
    assert predict.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["dialogue_id"], answer["speaker"]) == ("d1", "Ben")


def test_conversions_as_shown(tmp_path, capsys):
    shown = [shlex.split(line)[1:] for line in of_program("tools/convert_hf.py")]
    assert {words[0] for words in shown} >= {"to-flax", "to-hf", "verify"}
    ours, hf, back = micro.base_policy(), tmp_path / "hf", tmp_path / "back"
    places = {"to-hf": (ours, hf), "to-flax": (hf, back), "verify": (hf, back)}
    for words in sorted(shown, key=lambda words: [*places, "from-gguf"].index(words[0])):
        assert len(words) == 3
        if words[0] == "from-gguf":
            with pytest.raises(SystemExit) as stop:
                convert_hf.main(["from-gguf", "--help"])
            assert stop.value.code == 0
            continue
        assert convert_hf.main([words[0], *map(str, places[words[0]])]) == 0
    micro.assert_same_weights(ours, back)


def test_the_commands_of_the_sidecar_parse():
    parser = vllm_sidecar._parser()
    shown = [parser.parse_args(shlex.split(line)[1:]).command for line in of_program("tools/vllm_sidecar.py")]
    assert shown == ["setup", "serve"]


def test_the_plan_shown_is_made(capsys):
    for line in of_program("tools/plan.py"):
        assert plan.main([*shlex.split(line)[1:], "--no_compile"]) == 0
        assert "largest micro-batch" in capsys.readouterr().out


def test_the_flags_shown_for_the_benchmark_exist(capsys):
    words = [word for line in of_program("tools/bench_throughput.py") for word in line.split()[1:]]
    refuses_nothing_it_shows(bench_throughput, words, capsys)

"""The run folder: what is written survives, what was cut off is mended, what was changed is refused."""

import hashlib
import io
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from selfemo_jax.config import Config, Log
from selfemo_jax.config_io import load_config, read_config
from selfemo_jax.runlog import AppendLog, RunLog, atomic_write
from selfemo_jax.sinks import open_sink


def config_in(folder: Path) -> Config:
    return load_config(["--run_dir", str(folder)], prog="train")[0]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def quiet() -> Console:
    return Console(file=io.StringIO(), highlight=False, width=400)


# ---- append-only files ----


def test_length_and_digest_are_those_of_the_file_before_and_after_reopening(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    with AppendLog(path) as log:
        assert log.length_and_digest() == (0, sha(b""))
        log.append({"a": 1, "text": "naïve"})
        log.append([2])
        content = path.read_bytes()
        assert content == '{"a": 1, "text": "naïve"}\n[2]\n'.encode()
        assert log.length_and_digest() == (len(content), sha(content))
    with AppendLog(path) as log:
        assert log.length_and_digest() == (len(content), sha(content))
        log.append(3)
        assert log.length_and_digest() == (len(content) + 2, sha(content + b"3\n"))
    log.close()


def test_what_lies_beyond_the_recorded_length_is_moved_aside_and_counted(tmp_path):
    path, orphans = tmp_path / "log.jsonl", tmp_path / "orphaned" / "now"
    with AppendLog(path) as log:
        log.append({"step": 1})
        length, digest = log.length_and_digest()
        log.append({"step": 2})
        log.append({"step": 3})
    with AppendLog(path) as log:
        assert log.truncate_to(length, digest, orphans) == 2 * len('{"step": 2}\n')
        assert log.length_and_digest() == (length, digest)
        log.append({"step": 4})
        assert log.length_and_digest() == (path.stat().st_size, sha(path.read_bytes()))
    assert lines(path) == [{"step": 1}, {"step": 4}]
    assert lines(orphans / "log.jsonl") == [{"step": 2}, {"step": 3}]


def test_nothing_is_moved_when_nothing_lies_beyond(tmp_path):
    with AppendLog(tmp_path / "log.jsonl") as log:
        log.append(1)
        assert log.truncate_to(*log.length_and_digest(), tmp_path / "orphaned") == 0
    assert not (tmp_path / "orphaned").exists()


def test_a_line_cut_off_by_a_crash_must_be_mended_before_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"step": 1})
        recorded = log.length_and_digest()
    with path.open("ab") as file:
        file.write(b'{"step": ')
    with AppendLog(path) as log:
        with pytest.raises(ValueError, match="cut off"):
            log.append({"step": 2})
        log.truncate_to(*recorded, tmp_path / "orphaned")
        log.append({"step": 2})
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_shorter_or_changed_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"step": 1})
        length, digest = log.length_and_digest()
        log.append({"step": 2})
        with pytest.raises(ValueError, match="24 bytes, but the checkpoint recorded 99"):
            log.truncate_to(99, digest, tmp_path / "orphaned")
    content = path.read_bytes().replace(b"1", b"7")
    path.write_bytes(content)
    with AppendLog(path) as log, pytest.raises(ValueError, match="the file was changed"):
        log.truncate_to(length, digest, tmp_path / "orphaned")
    assert path.read_bytes() == content and not (tmp_path / "orphaned").exists()


def test_nan_does_not_enter_a_json_file(tmp_path):
    with AppendLog(tmp_path / "log.jsonl") as log:
        with pytest.raises(ValueError):
            log.append({"loss": float("nan")})
        assert log.length_and_digest()[0] == (tmp_path / "log.jsonl").stat().st_size == 0


@settings(max_examples=30, deadline=None)
@given(before=st.lists(st.integers()), beyond=st.lists(st.integers()))
def test_going_back_gives_what_was_recorded(before, beyond, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    with AppendLog(folder / "log.jsonl") as log:
        for number in before:
            log.append(number)
        recorded = log.length_and_digest()
        for number in beyond:
            log.append(number)
        log.truncate_to(*recorded, folder / "orphaned")
        assert lines(folder / "log.jsonl") == before
        assert log.length_and_digest() == recorded


# ---- whole files ----


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "state.json"
    atomic_write(path, "grün")
    assert path.read_bytes() == "grün".encode()
    atomic_write(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"

    def disk_is_full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"three")
    assert path.read_bytes() == b"\x00two"
    assert [p.name for p in path.parent.iterdir()] == ["state.json"]


# ---- the run folder ----


def test_a_run_folder_holds_settings_environment_and_a_line_a_step(tmp_path):
    config, console = config_in(tmp_path / "run"), quiet()
    with RunLog(config, data_hashes={"sample": "abc"}, console=console) as log, log.phase("rl", total=2):
        with log.timer("rollout"), log.timer("inner"):
            pass
        with log.timer("rollout"):
            pass
        log.step(1, {"loss": 0.5, "perf/tokens_per_s": 1234.4}, phase="rl")
        log.step(2, {"loss": float("nan")}, phase="rl")
    assert read_config(tmp_path / "run" / "config.yaml") == config
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["data"] == {"sample": "abc"} and env["versions"]["jax"] and len(env["devices"]) >= 1
    assert {"commit", "dirty", "python", "platform", "command"} <= env.keys()
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert (first["step"], first["phase"], first["loss"]) == (1, "rl", 0.5)
    assert first["time/rollout"] >= first["time/inner"] > 0
    assert second == {"step": 2, "phase": "rl", "loss": None}
    text = printed(console).splitlines()
    assert (
        text[0].startswith("rl step 1, 1/2, eta 0:00:")
        and "loss 0.5" in text[0]
        and "1,234 tokens/s" in text[0]
    )
    assert text[1].startswith("rl step 2, 2/2, eta 0:00:00")


def test_a_terminal_gets_a_progress_bar_and_lines_above_it(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RunLog(config_in(tmp_path / "run"), console=console) as log, log.phase("rl", total=3, done=1):
        log.step(2, {"loss": 0.5, "perf/tokens_per_s": 9.0}, phase="rl")
        log.say("a dialogue [with brackets]")
    assert "2/3" in printed(console) and "9 tokens/s" in printed(console)
    assert "a dialogue [with brackets]" in printed(console)


def test_seconds_are_counted_also_when_the_block_fails(tmp_path):
    with RunLog(config_in(tmp_path / "run"), console=quiet()) as log:
        with pytest.raises(RuntimeError), log.timer("update"):
            raise RuntimeError
        log.step(1, {}, phase="rl")
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["time/update"] > 0


def test_a_second_run_does_not_write_into_the_first(tmp_path):
    config = config_in(tmp_path / "run")
    with RunLog(config, console=quiet()) as log:
        log.step(1, {}, phase="rl")
    with pytest.raises(ValueError, match="--resume"):
        RunLog(config, console=quiet())
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_zero_shot_run_is_not_written_over(tmp_path):
    config = config_in(tmp_path / "run")
    with RunLog(config, console=quiet()):
        atomic_write(tmp_path / "run" / "eval" / "final.json", "{}")
    with pytest.raises(ValueError, match="--resume"):
        RunLog(config, console=quiet())


def test_a_start_that_failed_before_its_first_step_does_not_keep_the_folder(tmp_path):
    config = config_in(tmp_path / "run")
    with RunLog(config, console=quiet()):
        pass
    with RunLog(replace(config, seed=5), console=quiet()) as log:
        log.step(1, {}, phase="rl")
    assert read_config(tmp_path / "run" / "config.yaml").seed == 5
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_resuming_keeps_the_lines_the_first_environment_and_changed_settings(tmp_path):
    run_dir, console = tmp_path / "run", quiet()
    config = config_in(run_dir)
    with RunLog(config, data_hashes={"sample": "abc"}, console=quiet()) as log:
        log.step(1, {}, phase="rl")
    changed = replace(config, seed=5, log=Log(profile_steps="3"))
    with RunLog(changed, resume=True, console=console) as log:
        log.step(2, {}, phase="rl")
        old = log.orphan_dir / "config.yaml"
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == [1, 2]
    assert (read_config(old), read_config(run_dir / "config.yaml")) == (config, changed)
    assert "settings changed since the run began: log.profile_steps, seed;" in printed(console)
    env = json.loads((run_dir / "env.json").read_text())
    assert env["data"] == {"sample": "abc"} and len(env["resumed"]) == 1


def test_other_processes_write_nothing(tmp_path):
    console = quiet()
    with RunLog(config_in(tmp_path / "run"), primary=False, console=console) as log, log.phase("rl", total=1):
        log.step(1, {"loss": 1.0}, phase="rl")
        log.flush()
    assert not (tmp_path / "run").exists() and printed(console) == ""


# ---- sinks ----


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("tensorboard", "tensorboardX", "tensorboardX"), ("wandb",) * 3, ("mlflow",) * 3],
)
def test_a_missing_library_is_named_with_its_pip_command(name, module, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        open_sink(name, tmp_path, {})


def test_tensorboard_gets_the_finite_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    config = replace(config_in(tmp_path / "run"), log=Log(sinks=["tensorboard"]))
    with RunLog(config, console=quiet()) as log:
        log.step(3, {"reward/r1": 0.25, "kl": float("inf")}, phase="rl")
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    content, found = path.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    assert found == [(3, "reward/r1", 0.25)]


def run_into(sink: str, module, folder: Path, monkeypatch) -> None:
    """Two steps of a run whose library is a stand-in."""
    monkeypatch.setitem(sys.modules, sink, module)
    config = replace(config_in(folder / "run"), seed=3, log=Log(sinks=[sink]))
    with RunLog(config, console=quiet()) as log:
        log.step(3, {"reward/r1": 0.25, "kl": float("inf")}, phase="rl")
        log.step(4, {"reward/r1": 0.5}, phase="rl")


def test_wandb_gets_settings_and_the_finite_numbers_of_each_step(tmp_path, monkeypatch):
    library = MagicMock()
    run_into("wandb", library, tmp_path, monkeypatch)
    asked = library.init.call_args.kwargs
    assert (asked["name"], asked["dir"]) == ("run", str(tmp_path / "run"))
    assert asked["config"]["seed"] == 3 and asked["config"]["rl"]["group_size"] == 8
    run = library.init.return_value
    assert [call.kwargs for call in run.log.call_args_list] == [{"step": 3}, {"step": 4}]
    assert [call.args[0] for call in run.log.call_args_list] == [{"reward/r1": 0.25}, {"reward/r1": 0.5}]
    run.finish.assert_called_once_with()


def test_mlflow_gets_settings_and_the_finite_numbers_of_each_step(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    library = MagicMock()
    run_into("mlflow", library, tmp_path, monkeypatch)
    library.set_tracking_uri.assert_called_once_with(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (settings_,) = library.log_params.call_args.args
    assert (settings_["seed"], settings_["rl.group_size"], settings_["optim.lr"]) == (3, 8, 3e-4)
    assert [call.args[0] for call in library.log_metrics.call_args_list] == [
        {"reward/r1": 0.25}, {"reward/r1": 0.5}
    ]  # fmt: skip
    assert [call.kwargs for call in library.log_metrics.call_args_list] == [{"step": 3}, {"step": 4}]
    library.end_run.assert_called_once_with()

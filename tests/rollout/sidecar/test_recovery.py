"""A real vLLM server that dies, and the one that comes after it; an untied model."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.rollout.sidecar.client import Client
from tests.rollout.sidecar.conftest import MAX_LEN, ROOT, World
from tests.rollout.sidecar.published import digest, hf_tensors
from tests.rollout.sidecar.test_served import assert_same, reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def untied(tmp_path_factory, vllm_environment):
    world = World(tmp_path_factory.mktemp("untied"), vllm_environment, tied=False)
    try:
        world.fresh = world.start().answers()
        yield world
    finally:
        world.close()


def session_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[3])


def processes(words: str) -> dict[int, str]:
    """Processes whose command line has these words."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if words in command and state != "Z":
                found[int(entry.name)] = command
    return found


def session_members(session: int) -> list[int]:
    found = []
    for pid in processes(""):
        try:
            if session_of(pid) == session:
                found.append(pid)
        except OSError:
            continue
    return found


def server_of(keeper: int) -> int:
    """The vLLM process below a keeper."""
    (server,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal()
        and (entry / "stat").exists()
        and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(keeper)
    )
    return server


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_a_refreshed_untied_model_answers_as_a_freshly_started_one(untied):
    client = untied.client()
    client.refresh(untied.root / "2")
    assert reference(untied.config, untied.arrays[2], client.answers()) < 1e-4
    status, applied = client.rpc("applied_digest")
    assert status == 200
    assert applied["digests"] == {n: digest(v) for n, v in hf_tensors(untied.arrays[2]).items()}
    client.refresh(untied.root / "1")
    assert_same(client.answers(), untied.fresh)


def test_a_killed_engine_is_a_crash_and_the_restarted_server_takes_the_weights_again(untied):
    client, sidecar = untied.client(), untied.sidecar
    client.refresh(untied.root / "2")
    before = client.answers()
    server = server_of(sidecar.replicas[0].process.pid)
    (engine,) = (pid for pid in session_members(server) if "EngineCore" in processes("")[pid])
    failures = []

    def generate():
        try:
            client.answer([7] * 20, max_tokens=MAX_LEN - 30)
        except Exception as error:
            failures.append(error)

    asking = threading.Thread(target=generate)
    asking.start()
    time.sleep(0.3)
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    asking.join(30)
    assert failures, "a rollout of a dead engine must not look like an answer"
    assert wait_for(lambda: not sidecar.alive(), 30)
    assert "ended with status 70, though nobody asked it to" in sidecar.exit_reason()
    assert session_members(server) == []
    assert sidecar.restart() == (0,)
    print(f"engine killed: serving again after {time.monotonic() - killed:.1f} s")
    again = untied.client()
    assert again.version() == "default", "a restarted server must not claim the version of the one before"
    again.refresh(untied.root / "2")
    assert_same(again.answers(), before)


def test_a_killed_trainer_leaves_no_vllm_process_also_after_a_refresh_by_safetensors(untied, tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from selfemo_jax.rollout.supervisor import start_sidecar\n"
        "from selfemo_jax.settings.rollout import Sidecar\n"
        f"s = start_sidecar(Sidecar(environment={untied.environment!r}, transport='safetensors'), "
        f"model_folder=Path({str(untied.model)!r}), run_dir=Path({str(tmp_path)!r}), "
        f"weights_root=Path({str(untied.root)!r}), max_model_len={MAX_LEN})\n"
        "print(s.replicas[0].process.pid, s.urls[0], s.key, flush=True)\ntime.sleep(600)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        keeper, url, key = trainer.stdout.readline().split()
        server = server_of(int(keeper))
        assert len(session_members(server)) >= 2
        client = Client(url, key)
        client.refresh(untied.root / "2")
        assert reference(untied.config, untied.arrays[2], client.answers()) < 1e-4
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    left = wait_for(lambda: not [*session_members(server), *session_members(int(keeper))], 10)
    assert left, f"still running: {session_members(server)}"

"""A real vLLM server that dies, and the one that comes after it; an untied model."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selfemo_jax.rollout.engine import Sampling
from tests.rollout.common import make_requests, run
from tests.rollout.sidecar.client import Client
from tests.rollout.sidecar.conftest import MAX_LEN, ROOT, World
from tests.rollout.sidecar.engines import engine_over, gap, params_of
from tests.rollout.sidecar.published import digest, hf_tensors
from tests.rollout.sidecar.test_served import assert_same, reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def untied(tmp_path_factory, vllm_environment):
    world = World(tmp_path_factory.mktemp("untied"), vllm_environment, tied=False)
    try:
        world.fresh = world.start(max_restarts=100).answers()
        yield world
    finally:
        world.close()


@pytest.fixture(autouse=True)
def first_restart(untied):
    """Restarts of the tests before must not lengthen the wait before this one's."""
    untied.sidecar._restarts = 0


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


def engine_process(server: int) -> int:
    (engine,) = (pid for pid in session_members(server) if "EngineCore" in processes("")[pid])
    return engine


def stop_for_a_minute(server: int) -> None:
    """Every process of the server hangs; who comes back after a minute finds another in its place."""
    members = session_members(server)
    for pid in members:
        os.kill(pid, signal.SIGSTOP)

    def go_on():
        for pid in members:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if session_of(pid) == server:
                    os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(60.0, go_on)
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda server: os.kill(engine_process(server), signal.SIGKILL), id="engine killed"),
        pytest.param(lambda server: os.kill(server, signal.SIGKILL), id="server killed"),
        pytest.param(stop_for_a_minute, id="server hangs for 60 s"),
    ],
)
def test_rollouts_under_way_are_asked_again_and_come_from_the_recorded_weights(untied, fault, request):
    params = params_of(untied, 2)
    # Long enough for an answer of a busy machine, and well below the minute that the server hangs.
    engine = engine_over(untied, request_timeout=30.0, health_timeout=10.0, retries=8, refresh_timeout=200.0)
    try:
        engine.update_policy(params_of(untied, 1), version=6)
        engine.update_policy(params, version=7)
        requests = make_requests((5, 140, 33, 9), num=4)
        greedy = make_requests((5, 140), num=1)
        expected = run(engine, greedy, temperature=0.0, max_tokens=40)
        engine.take_metrics()
        sampling = Sampling(max_tokens=300, temperature=1.0, stop_ids=())
        found = {}

        def ask():
            found.update({group.request_id: group for group in engine.generate(requests, sampling)})

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        began = time.monotonic()
        fault(server_of(untied.sidecar.replicas[0].process.pid))
        asking.join(600)
        took = time.monotonic() - began
        assert len(found) == len(requests) and all(group.error is None for group in found.values())
        groups = {name: group.completions for name, group in found.items()}
        assert {c.policy_versions for group in groups.values() for c in group} == {(7,)}
        assert gap(untied, params, requests, groups) < 1e-4
        metrics = engine.take_metrics()
        assert metrics["rollout/restarts"] == 1 and metrics["rollout/recovery_s"] > 0
        recovery = metrics["rollout/recovery_s"]
        print(
            f"{request.node.callspec.id}: serving again {recovery:.1f} s after it was noticed, the last "
            f"rollout {took:.1f} s after the fault"
        )
        assert run(engine, greedy, temperature=0.0, max_tokens=40) == expected
    finally:
        engine.close()


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
    killed = time.monotonic()
    gone = wait_for(lambda: not [*session_members(server), *session_members(int(keeper))], 10)
    assert gone, f"still running: {session_members(server)}"
    print(f"trainer killed: nothing of its server is left after {time.monotonic() - killed:.1f} s")

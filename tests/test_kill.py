"""A run that is killed again and again, at any moment, ends as the one that was left alone.

SELFEMO_NUM_KILLS asks for more kills than the nine chosen ones; the others fall at random inside the first
SELF-GRPO phase, which is made longer for them.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests import micro

pytestmark = pytest.mark.slow


def start(run_dir, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "selfemo_jax.train", f"--run_dir={run_dir}", *words]
    return subprocess.Popen(
        command, env=micro.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_after(process: subprocess.Popen, words: str, wait: float) -> list[str]:
    """Kill at the moment; the lines until then. A process that ends before it was not killed."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    process.wait()
    return seen


def test_a_run_killed_at_any_moment_ends_as_if_it_was_not(tmp_path):
    rng = random.Random(0)
    extra = max(0, int(os.environ.get("SELFEMO_NUM_KILLS", "0")) - 9)
    words = micro.settings(cold_start__epochs=4, rl__steps=4 + 3 * extra)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole, *words)
    text = reference.stdout.read()
    assert reference.wait() == 0, text
    last = {line["phase"]: line["step"] for line in micro.metrics(whole)}
    # Part of a line of the run, and seconds to wait after it.
    moments = [
        ("cold step 1", 0.0),  # the state of the first step is being written
        ("cold: ", rng.uniform(0.0, 0.1)),  # supervised steps
        (f"cold step {last['cold']}", rng.uniform(0.0, 0.2)),  # the change of phase
        *(("rl_1: ", rng.uniform(0.0, 0.5)) for _ in range(1 + extra)),  # sampling, update or saving
        ("harvest_1 step", 0.0),  # a record of the flywheel's store
        ("synthetic inputs", 0.0),  # between phases
        ("rl_final: ", rng.uniform(0.0, 0.2)),  # as the first best policy is new
        (f"rl_final step {last['rl_final']}", 0.5),  # the last weights, or the final scores
        ("dev split", 0.0),  # between the scores and the mark of the end
    ]
    for place, (said, wait) in enumerate(moments):
        process = start(killed, "--resume=auto", *words)
        seen = kill_after(process, said, wait)
        assert process.returncode == -signal.SIGKILL, (place, said, process.returncode, "".join(seen))
    if not (killed / "eval" / "final.json").exists():
        process = start(killed, "--resume=auto", *words)
        text = process.stdout.read()
        assert process.wait() == 0, text
    micro.assert_same_runs(whole, killed)

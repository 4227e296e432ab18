"""The table of XLA flags: every flag exists, and none is set that was not measured."""

import os
import subprocess
import sys

from selfemo_jax.xla_flags import TABLE, lines, with_applied


def accepted(flags: str) -> bool:
    """Whether this jaxlib starts with them: it ends the process at a flag it does not know."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0


def test_every_flag_of_the_table_is_known_to_this_jaxlib():
    assert accepted(" ".join(flag for row in TABLE for flag in row.flags))
    assert not accepted("--xla_gpu_enable_haste=true")


def test_only_measured_flags_are_set():
    assert all(row.measured for row in TABLE)
    assert not any(row.applied for row in TABLE if row.measured.startswith("not measured"))


def test_what_the_user_set_is_kept():
    mine = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=7"
    found = with_applied(mine).split()
    assert found[0] == mine and len(found) == 2
    assert with_applied(with_applied("")) == with_applied("")


def test_the_table_is_printed_with_its_measurements():
    text = "\n".join(lines())
    assert "not measured" in text and "(set)" in text

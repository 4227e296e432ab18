"""The table of XLA flags: every flag exists, and none is set that was not measured."""

import os
import subprocess
import sys

import pytest

from selfemo_jax import xla_flags
from selfemo_jax.xla_flags import TABLE, FlagRow, lines, with_applied


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
    found = with_applied(mine, platform="cpu", several=True).split()
    assert found[0] == mine and len(found) == 2
    once = with_applied("", platform="cpu", several=False)
    assert with_applied(once, platform="cpu", several=False) == once


def test_a_row_is_set_on_its_own_platform_and_mesh_alone():
    table = tuple(
        FlagRow(
            platform=on, several=several, flags=(f"--{on}_{several}",), purpose="", measured="", applied=True
        )
        for on in ("cpu", "gpu")
        for several in (None, False, True)
    )
    for platform in ("cpu", "gpu"):
        for several in (False, True):
            found = with_applied("--mine", platform=platform, several=several, table=table).split()
            assert found == ["--mine", f"--{platform}_None", f"--{platform}_{several}"]
    # What stands in the table today says nothing to a GPU.
    assert with_applied("", platform="gpu", several=True) == ""


def test_rows_to_try_are_listed_without_those_that_are_set(capsys):
    xla_flags.main(["--list", "gpu", "several"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [
        "--xla_gpu_enable_latency_hiding_scheduler=true", "--xla_gpu_threshold_for_windowed_einsum_mib=0",
    ]  # fmt: skip
    xla_flags.main(["--list", "cpu", "one"])
    assert capsys.readouterr().out == "--xla_cpu_enable_fast_math=true\n"
    with pytest.raises(SystemExit):
        xla_flags.main(["--list", "tpu", "one"])


def test_the_table_is_printed_with_its_measurements():
    text = "\n".join(lines())
    assert "not measured" in text and "(set)" in text

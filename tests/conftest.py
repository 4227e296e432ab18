"""Settings of all tests: eight simulated CPU devices, shape checks of the kernels, the optional real data."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA ends the process when one simulated device is a minute late, which happens on a loaded machine.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
        os.environ.get("XLA_FLAGS", ""),
    )
)

# As selfemo_jax/devices.py does for a run, which would be too late here.
os.environ.setdefault("NPROC", "32")

# pytest's own processes, and those that tests start, compile a function once for all of them and train the
# runs of tests/micro.py once.
if "SELFEMO_TEST_RUNS" not in os.environ:
    shared = Path(tempfile.mkdtemp(prefix="selfemo_tests"))
    atexit.register(shutil.rmtree, shared, ignore_errors=True)
    (shared / "runs").mkdir()
    os.environ["SELFEMO_TEST_RUNS"] = str(shared / "runs")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# From here on the eight are there: commands under test ask for what they need where nobody did before.
jax.devices()
# Kept for the whole session: modules imported from here on check the shapes and types of their annotations.
SHAPE_CHECKS = install_import_hook(
    ["selfemo_jax.algo", "selfemo_jax.model", "selfemo_jax.train_step"], "beartype.beartype"
)

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    # Helpers beside the tests are imported as tests.<area>.<name>.
    sys.path.insert(0, ROOT)

MAPPINGS = 20_000
"""Linux allows a process 65,530; a compiled function holds a few, and the compiler crashes without them."""

NO_DATA = (
    "SELFEMO_DATA is not set to a folder with meld/ and emorynlp/; "
    "`python tools/data.py fetch --root DIR` gets the files"
)


@pytest.fixture(scope="session")
def selfemo_data() -> Path:
    """The folder of the real corpora, from SELFEMO_DATA; skips the test without it."""
    folder = os.environ.get("SELFEMO_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{NO_DATA} (found {folder!r})")
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def few_compiled_functions() -> Iterator[None]:
    """Forgets what the tests of a file compiled where much has come together."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    lacking = sorted(r.nodeid for r in skipped if "SELFEMO_DATA" in str(r.longrepr))
    if lacking:
        terminalreporter.section("skipped for missing data")
        terminalreporter.write_line(f"{len(lacking)} tests skipped: {NO_DATA}")
        for nodeid in lacking:
            terminalreporter.write_line(f"  {nodeid}")

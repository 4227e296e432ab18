"""Temporaries of a compiled step must not be given back to the kernel after each call."""

import json
import subprocess
import sys

import pytest

from tests import micro

FAULTS = """
import json, resource, sys
done = False
if sys.argv[1] == "kept":
    from selfemo_jax.keep_memory import KEPT as done
import jax, jax.numpy as jnp
x = jnp.ones((4096, 8192))  # 128 MiB, and as much for each temporary
step = jax.jit(lambda x: jnp.sort(jnp.sin(x) @ jnp.ones((8192, 8)), axis=0).sum())
taken = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step(x).block_until_ready()
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([done, min(taken)]))
"""


def faults(word: str, **more: str) -> tuple[bool, int]:
    """Whether memory is kept, and the fewest page faults of eight calls in a row: on a busy machine a call
    may begin before the last one's memory is free, so that the heap grows a few times."""
    text = subprocess.run(
        [sys.executable, "-c", FAULTS, word],
        env=micro.environment() | more,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(json.loads(text.splitlines()[-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_step_pays_for_its_memory_once():
    _, returned = faults("returned")
    done, kept = faults("kept")
    assert done
    assert returned > 8 * 32768 // 2  # each call maps its 128 MiB of temporaries again
    assert kept < returned / 8


def test_an_allocator_that_the_user_set_is_left_alone():
    done, _ = faults("kept", MALLOC_ARENA_MAX="2")
    assert not done


VARYING = """
import json, sys
from pathlib import Path
from selfemo_jax import allocator
from selfemo_jax.keep_memory import KEPT
import numpy as np
held = []
for size in range(40):
    block, small = np.ones((size + 1) << 20), np.ones(1 << 16)
    held.append(small)
    del block
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
gave = allocator.limit_freed_memory(above=1 << 28)
after = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
print(json.dumps([KEPT, before, gave, after, allocator.limit_freed_memory(above=1 << 28)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_kept_in_holes_is_given_back_above_a_limit():
    found = subprocess.run(
        [sys.executable, "-c", VARYING], env=micro.environment(), capture_output=True, text=True, check=True
    )
    kept, before, gave, after, again = json.loads(found.stdout)
    assert kept and gave and not again
    assert after < 1 << 28 < before

"""Real vLLM on a CPU behind the trainer's engine: what is not the new version is found and never serves."""

import contextlib
import threading
import time

import jax
import numpy as np
import pytest

from selfemo_jax.rollout.engine import Sampling
from tests.rollout.common import make_requests, run
from tests.rollout.served import nudged
from tests.rollout.sidecar.engines import engine_over, gap, params_of
from tests.rollout.sidecar.published import largest_file

pytestmark = [pytest.mark.vllm]
LR = 1e-6
"""What one step of Adam moves each weight by at this learning rate."""


@pytest.fixture(scope="module")
def engine(tied):
    found = engine_over(tied, on_unproven="rollback", refresh_timeout=120.0)
    found.update_policy(params_of(tied, 1), version=0)
    yield found
    found.close()


@contextlib.contextmanager
def published_instead(engine, change):
    """Versions inside hold what ``change`` makes of the policy, with digests that fit: a server that applies
    them to the letter serves something else than the trainer believes."""
    publisher = engine._publisher
    start = publisher.start
    publisher.start = lambda params, *, source_step: start(change(params), source_step=source_step)
    try:
        yield
    finally:
        publisher.start = start


@contextlib.contextmanager
def damaged_on_disk(engine, damage):
    """Versions inside are damaged after they were committed and before they are read."""
    publisher = engine._publisher
    start = publisher.start

    def damaging(params, *, source_step):
        pending = start(params, source_step=source_step)
        damage(pending.result().folder)
        return pending

    publisher.start = damaging
    try:
        yield
    finally:
        publisher.start = start


@contextlib.contextmanager
def head_not_packed_again(world):
    world.no_repack.touch()
    try:
        yield
    finally:
        world.no_repack.unlink()


def with_old_layer(old, index):
    def change(params):
        layers = {name: np.asarray(leaf).copy() for name, leaf in jax.device_get(params["layers"]).items()}
        for name, leaf in layers.items():
            leaf[index] = np.asarray(old["layers"][name])[index]
        return params | {"layers": layers}

    return change


def faults(tied, engine, old):
    return {
        "stale tied head": lambda: head_not_packed_again(tied),
        "stale layer 0": lambda: published_instead(engine, with_old_layer(old, 0)),
        "v-1 served as v": lambda: published_instead(engine, lambda params: old),
        "truncated shard": lambda: damaged_on_disk(engine, truncate),
        "one flipped bit": lambda: damaged_on_disk(engine, flip),
        "shard gone": lambda: damaged_on_disk(engine, lambda folder: largest_file(folder).unlink()),
    }


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def flip(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("stale tied head", 1e-3, "the tied head was not packed again"),
        ("stale tied head", LR, "the tied head was not packed again"),
        ("stale layer 0", 1e-3, "differ from the trainer's"),
        ("stale layer 0", LR, "differ from the trainer's"),
        ("v-1 served as v", LR, "the slope of the served log-probs"),
        ("truncated shard", 1e-3, "truncated or replaced"),
        ("one flipped bit", 1e-3, "damaged: params/"),
        ("shard gone", 1e-3, "missing"),
    ],
)
def test_what_is_not_the_new_version_never_serves_and_the_one_before_does(tied, engine, name, size, words):
    old = params_of(tied, 1)
    said = []
    engine._say = said.append
    engine.update_policy(old, version=0)
    requests = make_requests((5, 140), num=1)
    before = run(engine, requests, temperature=0.0)
    engine.take_metrics()
    newer = nudged(old, size=size)
    began = time.monotonic()
    with faults(tied, engine, old)[name]():
        # What follows is the last proven version: a rollback, or nothing that changed.
        engine.update_policy(newer, version=1)
    took = time.monotonic() - began
    metrics = engine.take_metrics()
    print(
        f"{name}, update of {size:g}: found and serving the version before again after {took:.2f} s; "
        f"residual {metrics.get('sync/residual', 0):.1e}, of a proven refresh {engine._noise.measured:.1e}; "
        f"slope {metrics.get('sync/canary_slope', 0):.3f}"
    )
    assert metrics["rollout/rollbacks"] == 1
    assert any(words in line for line in said), said
    after = run(engine, requests, temperature=0.0)
    assert after == before and after["r0"][0].policy_versions == (0,)
    # The same update without the fault is proven, so that it was the fault that was seen.
    engine.update_policy(newer, version=1)
    metrics = engine.take_metrics()
    assert "rollout/rollbacks" not in metrics
    assert metrics["sync/by_digests"] == 0.0 and metrics["sync/canary_slope"] == pytest.approx(1.0, abs=0.1)
    assert gap(tied, newer, requests, run(engine, requests)) < 1e-4


def test_a_version_published_while_rollouts_are_sampled_mixes_with_none_of_them(tied, engine):
    old, newer = params_of(tied, 1), params_of(tied, 2)
    engine.update_policy(old, version=0)
    requests = make_requests((5, 140, 9, 33, 20, 60), num=4)
    sampling = Sampling(max_tokens=120, temperature=1.0, stop_ids=())
    found = {}

    def ask():
        found.update({group.request_id: group for group in engine.generate(requests, sampling)})

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    began = time.monotonic()
    engine.update_policy(newer, version=1)
    took = time.monotonic() - began
    asking.join(120)
    metrics = engine.take_metrics()
    print(
        f"published while sampling: served after {took:.2f} s, of it drained {metrics['sync/drain_s']:.2f} s"
    )
    assert all(group.error is None for group in found.values()) and len(found) == len(requests)
    for version, weights in ((0, old), (1, newer)):
        under = {
            name: group.completions
            for name, group in found.items()
            if {c.policy_versions for c in group.completions} == {(version,)}
        }
        chosen = [request for request in requests if request.id in under]
        assert version == 1 or chosen, "some were under way before the refresh"
        # What is recorded is what sampled: scores under those weights are the served ones.
        assert not chosen or gap(tied, weights, chosen, under) < 1e-4
        found = {name: group for name, group in found.items() if name not in under}
    assert not found, "each group is of one version"

"""The client of the servers, against a real HTTP server in another process that goes wrong on demand."""

import dataclasses
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.model.adapters import adapted, init_adapters
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.rollout import fleet, vllm_engine
from selfemo_jax.rollout.engine import Request, RolloutError, Sampling
from selfemo_jax.rollout.server_api import Unreachable
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.settings.rollout import Rollout, Sidecar
from tests.rollout.common import make_requests, run
from tests.rollout.served import SERVED, fake_engine, fault, nudged, over, post, served_count, sharp

SAMPLING = Sampling(max_tokens=12, temperature=1.0, stop_ids=(3,))


@pytest.fixture(scope="module")
def params():
    return sharp(SERVED)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, params):
    """One server for the tests that leave it as it was."""
    with fake_engine(tmp_path_factory.mktemp("served"), retries=2, health_timeout=60.0) as (engine, servers):
        engine.update_policy(params, version=4)
        yield engine, servers
    assert engine is not None


@pytest.fixture
def served(shared):
    engine, servers = shared
    engine.take_metrics()
    yield engine, servers
    fault(servers)


def ask(engine, requests=None, sampling=SAMPLING):
    requests = make_requests((5, 20, 9), num=2) if requests is None else requests
    return {group.request_id: group for group in engine.generate(requests, sampling)}


def test_rollouts_carry_the_trainers_step_and_the_trainers_logprobs(served, params):
    engine, _ = served
    requests = make_requests((5, 140, 9), num=3)
    groups = ask(engine, requests)
    score = TrainerLogprobs(SERVED, Compute(), make_mesh({}))
    for request in requests:
        for found in groups[request.id].completions:
            assert found.policy_versions == (4,)
            (expected,) = score(
                params, [(*request.token_ids, *found.token_ids)], starts=[len(request.token_ids)]
            )
            np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-4)


def test_the_seed_of_a_request_decides_its_samples_unless_seeds_are_off(served):
    engine, _ = served
    again = [ask(engine)["r1"].completions for _ in range(2)]
    assert again[0] == again[1]
    other = [
        Request(id="r1", token_ids=r.token_ids, num=2, seed=r.seed + 1) for r in make_requests((5, 20))[1:2]
    ]
    assert ask(engine, other)["r1"].completions != again[0]


def test_a_seed_beyond_what_the_server_takes_is_folded(served):
    engine, _ = served
    request = Request(id="a", token_ids=(1, 2, 3), num=1, seed=2**64 - 1)
    assert ask(engine, [request])["a"].error is None


@pytest.mark.parametrize(
    ("faults", "counter", "words"),
    [
        ({"abort": 1}, "abort", "cut off"),
        ({"nan": 1}, "nonfinite", "not a finite number"),
        ({"short": 1}, "length", "tokens with"),
        ({"error": 1}, "refused", "EngineCore encountered an issue"),
        ({"versions": ["default"]}, "unversioned", "sampled by version default"),
        ({"versions": []}, "unversioned", "sampled by version none"),
        ({"versions": ["0", "1"]}, "mixed", "sampled by version 0, 1"),
        ({"versions": ["7"]}, "future", "sampled by version 7 of the weights, admitted under 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_believed_is_an_error_group_and_is_counted(served, faults, counter, words):
    engine, servers = served
    fault(servers, **faults)
    before = served_count(servers)
    (request,) = make_requests((6,), num=2)
    group = ask(engine, [request])[request.id]
    assert group.completions == () and words in group.error
    metrics = engine.take_metrics()
    assert metrics[f"rollout/{counter}"] == 1
    assert "rollout/retries" not in metrics, "an answer that came is not asked for again"
    assert served_count(servers) - before <= 1


def test_an_answer_that_is_cut_off_is_asked_for_again(served):
    engine, servers = served
    fault(servers, cut=1)
    (request,) = make_requests((6,), num=2)
    assert ask(engine, [request])[request.id].error is None
    assert engine.take_metrics()["rollout/retries"] == 1


def test_a_server_that_hangs_meets_the_deadline_and_says_who_waits_for_whom(served, monkeypatch):
    engine, servers = served
    (request,) = make_requests((6,), num=1)
    ask(engine, [request])
    began = time.monotonic()
    ask(engine, [request])
    # By what an answer takes on this machine now, so that only a hang can miss the deadline.
    deadline = round(max(1.0, 10 * (time.monotonic() - began)), 1)
    (server,) = engine._fleet.servers
    monkeypatch.setattr(server, "_request_timeout", deadline)
    fault(servers, hang=3, hang_seconds=3 * deadline)
    began = time.monotonic()
    group = ask(engine, [request])[request.id]
    took = time.monotonic() - began
    assert 3 * deadline <= took < 6 * deadline + 30, "three attempts, their waits between, no more"
    assert group.error.startswith(f"the trainer waited {deadline:g} s for http://127.0.0.1:")
    assert engine.take_metrics()["rollout/retries"] == 2


@pytest.mark.parametrize("field", [{"top_p": 0.9}, {"top_k": 5}, {"frequency_penalty": 0.5}])
def test_sampling_that_changes_the_distribution_is_refused_with_the_reason(served, field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name} {value}.*log-probs of the distribution that they change"):
        served[0].generate(make_requests((5,)), Sampling(max_tokens=4, stop_ids=(), **field))


def test_unchanged_weights_are_not_sent_again(served, params):
    engine, _ = served
    engine.update_policy(params, version=11)
    assert "sync/publish_s" not in engine.take_metrics()
    assert run(engine, make_requests((5,)))["r0"][0].policy_versions == (11,)
    engine.update_policy(params, version=4)


@pytest.fixture
def attached(served, monkeypatch):
    """The shared server as one that someone else runs: it is given weights and never restarted."""
    engine, servers = served
    elsewhere = dataclasses.replace(engine._fleet._settings, attach=["elsewhere"])
    monkeypatch.setattr(engine._fleet, "_settings", elsewhere)
    return engine, servers


def test_a_server_that_someone_else_started_again_is_given_its_weights_and_asked_again(attached):
    engine, servers = attached
    expected = ask(engine)
    post(servers, "/update_weight_version", {"new_version": "default"})
    assert ask(engine) == expected
    metrics = engine.take_metrics()
    assert metrics["rollout/restarts"] == 1 and "rollout/unversioned" not in metrics
    assert servers.restarts == 0


def test_a_server_that_dies_while_it_is_proven_again_is_brought_back_once_more(attached, monkeypatch):
    engine, servers = attached
    expected = ask(engine)
    deaths = [Unreachable("gone"), Unreachable("gone again")]
    real = vllm_engine.prove

    def dying(*args, **kwargs):
        if deaths:
            raise deaths.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(vllm_engine, "prove", dying)
    post(servers, "/update_weight_version", {"new_version": "default"})
    assert ask(engine) == expected
    assert engine.take_metrics()["rollout/restarts"] == 3


def test_servers_that_answer_and_never_take_the_weights_are_given_up(monkeypatch, tmp_path):
    asked = []

    class Elsewhere:
        urls, key = ("http://127.0.0.1:9",), "key"

        def exit_reason(self):
            return None

        def close(self):
            pass

    def stage(servers, published):
        asked.append(published)
        raise Unreachable("no answer in time")

    monkeypatch.setattr(fleet, "stage_on", stage)
    found = fleet.Fleet(Elsewhere, Sidecar(attach=["x"], max_restarts=2), say=lambda text: None)
    monkeypatch.setattr(found, "sick", tuple)
    found.wait()
    with pytest.raises(RolloutError, match="cannot be refreshed: no answer in time"):
        found.bring_back(None, "lost")
    assert len(asked) == 3
    found.close()


@pytest.mark.slow
def test_a_server_that_dies_while_it_samples_is_brought_back_and_asked_again(tmp_path, params):
    with fake_engine(tmp_path, replicas=2) as (engine, servers):
        engine.update_policy(params, version=1)
        newer = nudged(params, size=1e-2)
        engine.update_policy(newer, version=2)
        engine.take_metrics()
        expected = ask(engine)
        fault(servers, 1, die_on_generate=1)
        requests = make_requests((5, 20, 9), num=2)
        found = ask(engine, requests)
        assert servers.restarts == 1
        for name, group in found.items():
            assert group.error is None and {c.policy_versions for c in group.completions} == {(2,)}
            # The restarted server came up on other weights: it was given version 2 before it was asked.
            assert group.completions == expected[name].completions
        metrics = engine.take_metrics()
        assert metrics["rollout/restarts"] == 1 and metrics["rollout/recovery_s"] > 0


@pytest.mark.slow
def test_a_server_killed_between_steps_is_brought_back_by_the_next_refresh(tmp_path, params):
    with fake_engine(tmp_path) as (engine, servers):
        engine.update_policy(params, version=1)
        servers.kill()
        engine.update_policy(nudged(params, size=1e-2), version=2)
        assert run(engine, make_requests((5,)))["r0"][0].policy_versions == (2,)
        fault(servers, die_on_apply=1)
        engine.update_policy(params, version=3)
        assert run(engine, make_requests((5,)))["r0"][0].policy_versions == (3,)
        assert engine.take_metrics()["rollout/restarts"] == 2


@pytest.mark.slow
def test_servers_that_cannot_be_brought_back_stop_the_run(tmp_path, params):
    with fake_engine(tmp_path) as (engine, servers):
        engine.update_policy(params, version=1)
        servers.max_restarts = 0
        fault(servers, die_on_generate=1)
        with pytest.raises(RolloutError, match="the servers of the rollouts are lost: restarted 0 times"):
            ask(engine)
        with pytest.raises(RolloutError, match="lost"):
            ask(engine)


@pytest.mark.slow
def test_a_refresh_waits_for_rollouts_under_way_and_none_is_mixed(tmp_path, params):
    with fake_engine(tmp_path, delay=0.3) as (engine, _):
        engine.update_policy(params, version=1)
        requests = make_requests((5, 20, 9, 4, 7, 11), num=2)
        found = {}
        sampling = threading.Thread(target=lambda: found.update(ask(engine, requests)))
        sampling.start()
        time.sleep(0.4)
        engine.update_policy(nudged(params, size=1e-2), version=2)
        sampling.join()
        versions = {c.policy_versions for group in found.values() for c in group.completions}
        assert all(group.error is None for group in found.values())
        assert versions <= {(1,), (2,)} and (1,) in versions
        assert engine.take_metrics()["sync/drain_s"] > 0


def test_a_closed_engine_and_one_without_a_policy_say_so(tmp_path):
    with fake_engine(tmp_path) as (engine, _), pytest.raises(ValueError, match="no policy yet"):
        engine.generate(make_requests((5,)), SAMPLING)
    with pytest.raises(ValueError, match="closed"):
        engine.generate(make_requests((5,)), SAMPLING)


def test_an_error_of_the_start_is_raised_where_the_servers_are_first_needed(tmp_path, params):
    def start():
        raise RuntimeError("vLLM server 1 of 1 ended with status 70")

    engine = over(start, SERVED, Rollout(engine="vllm"), tmp_path)
    with pytest.raises(RuntimeError, match="ended with status 70"):
        engine.update_policy(params, version=0)
    engine.close()


@pytest.mark.slow
def test_a_policy_with_adapters_is_merged_for_the_servers_and_refreshed_after_each_update(tmp_path, params):
    adapters = init_adapters(SERVED, jax.random.key(0), rank=2, targets=("q", "down"))
    policy = adapted(params, adapters, scale=jnp.float32(4.0))
    score = TrainerLogprobs(SERVED, Compute(), make_mesh({}))
    requests = make_requests((5, 140), num=2)
    with fake_engine(tmp_path) as (engine, _):
        engine.update_policy(policy, version=0)
        before = run(engine, requests)
        moved = adapted(params, nudged(adapters, size=1e-2), scale=policy["lora_scale"])
        engine.update_policy(moved, version=1)
        # What the engine remembers is its own: the next update of a trainer takes its arrays away.
        for leaf in jax.tree.leaves(moved["lora"]):
            leaf.delete()
        after = run(engine, requests)
        moved = adapted(params, nudged(adapters, size=1e-2), scale=policy["lora_scale"])
        for request in requests:
            for found in after[request.id]:
                whole = (*request.token_ids, *found.token_ids)
                (expected,) = score(moved, [whole], starts=[len(request.token_ids)])
                np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-4)
        assert after != before
        engine.take_metrics()
        engine.update_policy(moved, version=2)
        assert "sync/publish_s" not in engine.take_metrics(), "the same adapters are not sent again"
        engine.update_policy(adapted(params, nudged(adapters, size=2e-2), scale=jnp.float32(4.0)), version=3)
        assert engine.take_metrics()["sync/slope"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_weights_before_are_untouched(tmp_path, params, monkeypatch):
    with fake_engine(tmp_path) as (engine, _):
        engine.update_policy(params, version=1)
        published = engine._serving.published.folder
        content = {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(RolloutError, match="step 2 could not be published, nothing of it is left.* free"):
            engine.update_policy(nudged(params, size=1e-2), version=2)
        assert list(published.parent.iterdir()) == [published]
        assert all(path.read_bytes() == data for path, data in content.items())
        with pytest.raises(RolloutError, match="could not be published"):
            ask(engine)

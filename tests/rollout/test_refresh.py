"""A refresh is believed when it is proven: each way of serving something else is found."""

import dataclasses
import math

import numpy as np
import pytest

from selfemo_jax.rollout import vllm_engine
from selfemo_jax.rollout.proof import NOISE, Noise, Slope, judge
from selfemo_jax.rollout.refresh import RefreshError
from selfemo_jax.rollout.server_api import Unreachable
from tests.rollout.common import make_requests, run
from tests.rollout.served import SERVED, TIED, fake_engine, fault, nudged, post, sharp

F32 = Noise(of_types=NOISE["float32"], measured=1e-5)
BF16 = Noise(of_types=NOISE["bfloat16"], measured=2e-2)


def rows(*values):
    return [np.array(value, np.float32) for value in values]


# The arithmetic, by hand


def test_the_slope_is_one_for_the_new_version_and_zero_for_the_old():
    old, new = rows([-1.0, -2.0], [-3.0]), rows([-1.3, -1.6], [-3.1])
    # d = (-0.3, 0.4, -0.1), <d,d> = 0.26
    for served, expected in ((new, 1.0), (old, 0.0), (rows([-1.3, -2.0], [-3.0]), 0.09 / 0.26)):
        slope = Slope()
        for index in range(2):
            slope.add(served[index], new[index], old[index])
        assert slope.value == pytest.approx(expected, abs=1e-6)
        assert (slope.num_tokens, slope.dd) == (3, pytest.approx(0.26, abs=1e-6))
    assert slope.error(0.051) == pytest.approx(0.1, abs=1e-3)
    assert math.isnan(Slope().value) and Slope().error(1.0) == math.inf


def test_sums_over_steps_tell_what_one_step_cannot():
    rng = np.random.default_rng(0)
    noise, size = 1e-5, 2e-6
    one, all_steps, stale = Slope(), Slope(), Slope()
    for step in range(400):
        old = rng.normal(-3, 1, 100)
        new = old + rng.normal(0, size, 100)
        served = new + rng.normal(0, noise, 100)
        all_steps.add(served, new, old)
        stale.add(old + rng.normal(0, noise, 100), new, old)
        if step == 0:
            one.add(served, new, old)
    assert not one.is_sure(noise)
    assert all_steps.is_sure(noise) and all_steps.value > 0.8
    assert stale.is_sure(noise) and stale.value < 0.2


def test_an_update_below_the_noise_is_left_to_the_digests_and_says_so():
    old = rows(np.linspace(-4, -1, 200))
    new = [old[0] + 1e-8]
    agree = judge(new, new, old, noise=F32, digests_agree=True)
    assert agree.proven and agree.decided_by == "digests" and "too little for the slope" in agree.words
    differ = judge(new, new, old, noise=F32, digests_agree=False)
    assert not differ.proven and "digests" in differ.words


def test_bfloat16_noise_makes_the_slope_abstain_where_float32_decides():
    rng = np.random.default_rng(1)
    old = [rng.normal(-3, 1, 1000)]
    new = [old[0] + rng.normal(0, 1e-3, 1000)]
    assert judge(old, new, old, noise=F32, digests_agree=True).decided_by == "slope"
    assert not judge(old, new, old, noise=F32, digests_agree=True).proven
    assert judge(old, new, old, noise=BF16, digests_agree=True).decided_by == "digests"


def test_a_partly_new_model_is_found_by_what_is_left_even_where_its_slope_is_high():
    rng = np.random.default_rng(2)
    old = [rng.normal(-3, 1, 1000)]
    d = rng.normal(0, 1e-2, 1000)
    verdict = judge([old[0] + 0.9 * d], [old[0] + d], old, noise=F32, digests_agree=True)
    assert verdict.slope == pytest.approx(0.9) and not verdict.proven
    assert "differ from the trainer's by" in verdict.words


def test_where_rounding_is_most_of_the_update_nothing_is_claimed_of_it():
    # Both of the trainer's scores carry its own rounding: the slope is near 0.5, whatever is served.
    rng = np.random.default_rng(4)
    exact, noise = rng.normal(-3, 1, 1500), Noise(of_types=2e-2, measured=1e-2)
    old, new, served = ([exact + rng.normal(0, 7e-3, 1500)] for _ in range(3))
    slope = Slope()
    slope.add(served[0], new[0], old[0])
    assert slope.value == pytest.approx(0.5, abs=0.1) and slope.is_sure(noise.scale)
    verdict = judge(served, new, old, noise=noise, digests_agree=True, old_head=old)
    assert verdict.proven and verdict.decided_by == "digests"


def test_a_head_left_as_it_was_is_found_where_it_hardly_moves_anything():
    rng = np.random.default_rng(3)
    old, noise = [rng.normal(-3, 1, 1200)], Noise(of_types=1e-5, measured=3.5e-6)
    new = [old[0] + rng.normal(0, 1e-4, 1200)]
    old_head = [new[0] + rng.normal(0, 9e-6, 1200)]
    rounding = rng.normal(0, 3.5e-6, 1200)
    right = judge([new[0] + rounding], new, old, noise=noise, digests_agree=True, old_head=old_head)
    assert right.proven and right.decided_by == "slope"
    stale = [old_head[0] + rounding]
    unseen = judge(stale, new, old, noise=noise, digests_agree=True)
    assert unseen.proven, "what is left, and the slope, are within what is believed"
    found = judge(stale, new, old, noise=noise, digests_agree=True, old_head=old_head)
    assert not found.proven and "the tied head was not packed again" in found.words
    # Where the head hardly changed, nothing can be told and nothing is claimed.
    same = [new[0] + rng.normal(0, 1e-9, 1200)]
    assert judge([new[0] + rounding], new, old, noise=noise, digests_agree=True, old_head=same).proven


def test_the_first_refresh_is_held_to_the_types_and_later_ones_to_what_was_measured():
    first = Noise(of_types=1e-5)
    assert first.limit(0.0) == pytest.approx(2e-4)
    later = first.after(1e-6)
    assert (later.scale, later.limit(0.0)) == (1e-6, pytest.approx(5e-6))
    # A large update may leave a hundredth of itself, never more than the types allow.
    assert later.limit(1e-3) == pytest.approx(1e-5) and later.limit(1.0) == pytest.approx(2e-4)
    assert later.after(1e-7).measured == pytest.approx(5e-7), "down by halves"
    assert later.after(3e-6).measured == pytest.approx(3e-6)


def test_a_sampled_token_off_by_an_old_cache_is_found():
    same = rows([-1.0, -2.0])
    assert judge(same, same, None, noise=F32, digests_agree=True, generated=[(-1.0, -1.00001)]).proven
    verdict = judge(same, same, None, noise=F32, digests_agree=True, generated=[(-1.0, -1.02)])
    assert not verdict.proven and "cache of other weights" in verdict.words


def test_log_probs_that_are_not_numbers_prove_nothing():
    old, new = rows([-1.0, -2.0]), rows([-1.5, -2.0])
    assert not judge(rows([math.nan, -2.0]), new, old, noise=F32, digests_agree=True).proven
    assert not judge(rows([math.nan, -2.0]), new, None, noise=F32, digests_agree=True).proven


# The protocol, over HTTP

LR = 1e-6


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    with fake_engine(tmp_path_factory.mktemp("tied"), TIED, on_unproven="rollback") as (engine, servers):
        engine.update_policy(sharp(TIED), version=0)
        yield engine, servers


@pytest.mark.parametrize(
    ("faults", "size"),
    [
        ({"stale_head": True}, 1e-3),
        ({"stale_layer": 0}, 1e-3),
        ({"stale_head": True}, LR),
        ({"stale_layer": 0}, LR),
        ({"skip_apply": True}, 1e-3),
        ({"skip_apply": True}, LR),
        ({"keep_cache": True}, 1e-2),
        ({"refuse_stage": True}, 1e-3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else f"{value:g}",
)
def test_what_is_not_the_new_version_never_serves(tied, faults, size):
    engine, servers = tied
    params = sharp(TIED)
    engine.update_policy(params, version=0)
    requests = make_requests((5, 140), num=1)
    before = run(engine, requests)
    fault(servers, **faults)
    # What follows is a refusal, and the version before it serves on.
    engine.update_policy(nudged(params, size=size), version=1)
    fault(servers)
    metrics = engine.take_metrics()
    assert metrics["rollout/rollbacks"] == 1
    after = run(engine, requests)
    assert after == before and after["r0"][0].policy_versions == (0,)
    # The same update without the fault is proven, so that it was the fault that was seen.
    engine.update_policy(nudged(params, size=size), version=1)
    metrics = engine.take_metrics()
    assert "rollout/rollbacks" not in metrics
    assert metrics["sync/canary_slope"] == pytest.approx(1.0, abs=0.1)
    assert metrics["sync/by_digests"] == 0.0 and metrics["sync/residual"] < 2e-5


def test_a_version_that_is_refused_after_some_server_took_it_is_taken_back_from_all(tied, monkeypatch):
    engine, servers = tied
    params = sharp(TIED)
    engine.update_policy(params, version=0)
    requests = make_requests((5, 140), num=1)
    before = run(engine, requests)
    engine.take_metrics()
    apply_on, stage_on = vllm_engine.apply_on, vllm_engine.stage_on

    def applied_and_gone(all_servers, published):
        monkeypatch.setattr(vllm_engine, "apply_on", apply_on)
        apply_on(all_servers, published)
        fault(servers, refuse_stage=True)
        monkeypatch.setattr(vllm_engine, "stage_on", well_again)
        raise Unreachable("gone after it was applied")

    def well_again(all_servers, published):
        fault(servers)
        return stage_on(all_servers, published)

    elsewhere = dataclasses.replace(engine._fleet._settings, attach=["elsewhere"])
    monkeypatch.setattr(engine._fleet, "_settings", elsewhere)
    monkeypatch.setattr(vllm_engine, "apply_on", applied_and_gone)
    engine.update_policy(nudged(params, size=1e-2), version=1)
    assert engine.take_metrics()["rollout/rollbacks"] == 1
    after = run(engine, requests)
    assert after == before and after["r0"][0].policy_versions == (0,)


@pytest.mark.slow
def test_two_refreshes_in_a_row_that_are_not_proven_stop_the_run(tmp_path):
    params = sharp(TIED)
    with fake_engine(tmp_path, TIED, on_unproven="rollback") as (engine, servers):
        engine.update_policy(params, version=0)
        fault(servers, skip_apply=True)
        engine.update_policy(nudged(params, size=1e-3), version=1)
        with pytest.raises(RefreshError, match="step 2 is not proven.*one before it was rolled back"):
            engine.update_policy(nudged(params, size=2e-3), version=2)
        with pytest.raises(RuntimeError, match="not proven"):
            run(engine, make_requests((5,)))


@pytest.mark.slow
def test_stop_means_stop_and_the_server_is_not_left_paused(tmp_path):
    params = sharp(SERVED)
    with fake_engine(tmp_path, replicas=2) as (engine, servers):
        engine.update_policy(params, version=0)
        for _ in range(2):
            # Replicas answer alike: both were refreshed.
            assert run(engine, make_requests((5,)))["r0"][0].policy_versions == (0,)
        fault(servers, 1, stale_layer=1)
        with pytest.raises(RefreshError, match="slope|differ from the trainer's"):
            engine.update_policy(nudged(params, size=1e-2), version=1)
        for index in range(2):
            answer = post(servers, "/inference/v1/generate", {"token_ids": [1], "sampling_params": {
                "n": 1, "max_tokens": 1, "temperature": 0.0, "stop_token_ids": []}}, index)  # fmt: skip
            assert answer.status_code == 200


@pytest.mark.slow
def test_the_first_refresh_is_proven_by_digests_and_a_wrong_first_one_is_refused(tmp_path):
    with fake_engine(tmp_path / "right") as (engine, servers):
        engine.update_policy(sharp(SERVED), version=0)
        metrics = engine.take_metrics()
        assert metrics["sync/by_digests"] == 1.0
        for name in ("publish", "stage", "pause", "apply", "paused", "canary"):
            assert metrics[f"sync/{name}_s"] >= 0
        fault(servers)
    with fake_engine(tmp_path / "wrong") as (engine, servers):
        fault(servers, skip_apply=True)
        with pytest.raises(RefreshError, match="step 0 is not proven: served log-probs differ"):
            engine.update_policy(sharp(SERVED), version=0)


@pytest.mark.slow
def test_rollouts_sharpen_the_slope_and_old_weights_behind_a_new_name_stop_the_run(tmp_path):
    params = sharp(SERVED)
    with fake_engine(tmp_path) as (engine, servers):
        for version in range(3):
            engine.update_policy(nudged(params, size=1e-3 * version), version=version)
            run(engine, make_requests((5, 20), num=4), temperature=1.0)
        metrics = engine.take_metrics()
        assert metrics["sync/slope"] == pytest.approx(1.0, abs=0.05)
        assert metrics["sync/slope_error"] < 0.1
        # From now on prompts and rollouts come from the version before, though nothing says so.
        serving = engine._serving
        newer = nudged(params, size=8e-3)
        engine._slope.follow(newer, serving.params, version=serving.published.version)
        run(engine, make_requests((5, 20, 30), num=8), temperature=1.0)
        with pytest.raises(RefreshError, match="rollout tokens towards their own version"):
            engine.update_policy(nudged(params, size=9e-3), version=4)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from selfemo_jax.algo import losses
from tests.algo import oracle

# Two sequences of three and one targets, padded to three.
LENGTHS = np.array([3, 1])
MASK = np.array([[True, True, True], [True, False, False]])
LOGPROBS = np.array([[-1.0, -0.4, -2.0], [-0.7, 0.0, 0.0]], np.float32)
OLD = np.array([[-1.1, -0.9, -1.6], [-2.3, 0.0, 0.0]], np.float32)
REF = np.array([[-1.3, -0.2, -2.1], [-0.1, 0.0, 0.0]], np.float32)
ADVANTAGES = np.array([[1.2, 1.2, 1.2], [-0.8, 0.0, 0.0]], np.float32)
SETTINGS = dict(clip_low=0.2, clip_high=0.3, clip_dual=3.0, kl_coef=0.1, kl_kind="k3")
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def spread(per_sequence):
    return jnp.asarray(np.where(MASK, per_sequence[:, None], 0.0).astype(np.float32))


def weights_of(mode, **settings):
    return spread(losses.token_weights(LENGTHS, mode, **settings))


def arrays():
    return tuple(map(jnp.asarray, (LOGPROBS, OLD, REF, ADVANTAGES)))


def oracle_tokens(importance=1.0):
    return [
        [
            oracle.token_policy_loss(
                *(float(x[row, i]) for x in (LOGPROBS, OLD, REF, ADVANTAGES)),
                low=0.2,
                high=0.3,
                dual=3.0,
                beta=0.1,
                kl="k3",
                importance=importance,
            )
            for i in range(length)
        ]
        for row, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize(
    ("mode", "settings", "expected"),
    [
        ("token-mean", {}, [1 / 4, 1 / 4]),
        ("seq-mean-token-mean", {}, [1 / 6, 1 / 2]),
        ("seq-mean-token-sum", {}, [1 / 2, 1 / 2]),
        ("seq-mean-token-sum-norm", {"norm_constant": 8.0}, [1 / 8, 1 / 8]),
        ("micro-token-mean", {"micro_batches": np.array([0, 1])}, [1 / 6, 1 / 2]),
        ("micro-token-mean", {"micro_batches": np.array([5, 5])}, [1 / 4, 1 / 4]),
    ],
)
def test_weights_of_two_sequences_by_hand(mode, settings, expected):
    np.testing.assert_allclose(losses.token_weights(LENGTHS, mode, **settings), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_absent_sequence_changes_no_other_weight(mode):
    settings = {"norm_constant": 8.0} if mode.endswith("norm") else {}
    found = losses.token_weights(np.array([[3, 0], [1, 0]]), mode, **settings)
    np.testing.assert_array_equal(found[:, 0], losses.token_weights(LENGTHS, mode, **settings))
    np.testing.assert_array_equal(found[:, 1], 0)


def test_weights_of_nothing_are_zero_and_wrong_settings_are_refused():
    np.testing.assert_array_equal(losses.token_weights(np.zeros(3, int), "seq-mean-token-mean"), 0)
    with pytest.raises(ValueError, match="norm_constant"):
        losses.token_weights(LENGTHS, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="micro_batches"):
        losses.token_weights(LENGTHS, "micro-token-mean")
    with pytest.raises(ValueError, match="-1"):
        losses.token_weights(np.array([-1]), "token-mean")


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_of_two_sequences_equals_the_oracle_in_each_aggregation(mode):
    settings = {"norm_constant": 8.0} if mode.endswith("norm") else {}
    found, _ = losses.policy_loss(*arrays(), weights_of(mode, **settings), **SETTINGS)
    tokens = [[token["loss"] for token in sequence] for sequence in oracle_tokens()]
    assert float(found) == pytest.approx(oracle.aggregate(tokens, mode, 8.0), abs=1e-6)


def test_metrics_are_sums_over_targets_with_their_number():
    _, metrics = losses.policy_loss(*arrays(), weights_of("seq-mean-token-mean"), **SETTINGS)
    tokens = [token for sequence in oracle_tokens() for token in sequence]
    # Token 2 of the first sequence clips at 1.3; the second sequence has ratio e^1.6 above the dual bound of
    # 3.
    assert sum(t["clip_fraction"] for t in tokens) == 1 and sum(t["clip_fraction_dual"] for t in tokens) == 1
    for name in ("clip_fraction", "clip_fraction_dual", "ppo_kl", "kl"):
        total, number = metrics[name]
        assert float(number) == 4
        assert float(total) == pytest.approx(sum(token[name] for token in tokens), abs=1e-6)


NUMBER = st.floats(-4, 0, width=32)


@settings(max_examples=60, deadline=None)
@given(NUMBER, NUMBER, NUMBER, st.floats(-2, 2, width=32), st.sampled_from(["k1", "k2", "k3"]))
def test_one_token_equals_the_oracle(logprob, old, ref, advantage, kind):
    found, metrics = losses.policy_loss(
        *(jnp.array([x], jnp.float32) for x in (logprob, old, ref, advantage, 1.0)),
        **SETTINGS | {"kl_kind": kind},
    )
    expected = oracle.token_policy_loss(
        logprob, old, ref, advantage, low=0.2, high=0.3, dual=3.0, beta=0.1, kl=kind
    )
    assert float(found) == pytest.approx(expected["loss"], rel=2e-5, abs=1e-5)
    assert float(metrics["kl"][0]) == pytest.approx(expected["kl"], rel=2e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("logprob", "old", "advantage", "expected", "gradient"),
    [
        (-0.5, -0.5, 1.5, -1.5, -1.5),  # on policy: the gradient is -A
        (-0.5, -1.5, 1.5, -1.5 * 1.3, 0.0),  # above the upper clip with A > 0
        (-1.5, -0.5, 1.5, -1.5 * np.exp(-1), -1.5 * np.exp(-1)),  # below with A > 0: not clipped
        (-1.5, -0.5, -1.5, 1.5 * 0.8, 0.0),  # below the lower clip with A < 0
        (-0.5, -1.5, -1.5, 1.5 * np.exp(1), 1.5 * np.exp(1)),  # above with A < 0: not clipped
        (-0.5, -2.5, -1.5, 1.5 * 3.0, 0.0),  # dual clip: e^2 > 3
        (0.0, -50.0, 1.0, -1.3, 0.0),
    ],
)
def test_clipping_by_hand(logprob, old, advantage, expected, gradient):
    def loss(x):
        old_, A = jnp.array([old]), jnp.array([advantage])
        return losses.policy_loss(x, old_, None, A, jnp.ones(1), **SETTINGS | {"kl_coef": 0.0})[0]

    value, grad = jax.value_and_grad(loss)(jnp.array([logprob]))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(grad[0]) == pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_the_ratio_is_bounded_at_e_to_the_20():
    def loss(x, dual):
        ones = jnp.ones(1)
        return losses.policy_loss(x, x * 0 - 90.0, None, -ones, ones, kl_coef=0.0, clip_dual=dual)[0]

    assert float(loss(jnp.zeros(1), None)) == pytest.approx(np.exp(20), rel=1e-5)
    assert float(loss(jnp.zeros(1), 3.0)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("kind", "gap", "value", "gradient"),
    [
        ("k1", 0.5, 0.5, 1.0),
        ("k2", 0.5, 0.125, 0.5),
        ("k3", 0.5, np.exp(-0.5) - 0.5, 1 - np.exp(-0.5)),
        ("k1+", 0.5, 0.5, 0.5),
        ("k2+", 0.5, 0.125, 0.5),
        ("k3+", 0.5, np.exp(-0.5) - 0.5, 0.5),
        ("k3", -5.0, 10.0, 0.0),
        ("k3+", -5.0, 10.0, -5.0),
        ("k3", -300.0, 10.0, 0.0),
    ],
)
def test_kl_values_and_gradients_by_hand(kind, gap, value, gradient):
    found, grad = jax.value_and_grad(lambda x: losses.kl_penalty(x, jnp.full(1, -1.0), kind=kind).sum())(
        jnp.array([gap - 1.0])
    )
    assert float(found) == pytest.approx(value, rel=1e-5)
    assert float(grad[0]) == pytest.approx(gradient, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_positions_do_not_matter_even_if_not_finite(poison):
    def loss(logprobs, entropy, *fixed):
        return losses.policy_loss(
            logprobs,
            *fixed[:3],
            weights_of("token-mean"),
            entropy=entropy,
            entropy_coef=0.01,
            importance_weights=fixed[3],
            **SETTINGS,
        )

    entropy = jnp.full((2, 3), 0.9)
    fixed = (*arrays()[1:], jnp.full((2, 3), 1.5))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    clean = run(arrays()[0], entropy, *fixed)
    dirty = run(*(jnp.where(MASK, x, poison) for x in (arrays()[0], entropy, *fixed)))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(dirty[1][0][~MASK], 0)
    sft = jax.value_and_grad(lambda x: losses.sft_loss(x, weights_of("token-mean"))[0])
    jax.tree.map(np.testing.assert_array_equal, sft(arrays()[0]), sft(jnp.where(MASK, arrays()[0], poison)))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradients_are_those_of_the_loss(kind):
    # Ratios away from the kinks of the clip and the bound.
    entropy = jnp.full((2, 3), 0.9)

    @jax.jit
    def loss(logprobs, entropy):
        settings = SETTINGS | {"kl_kind": kind, "kl_coef": 0.5}
        _, old, ref, A = arrays()
        weights = weights_of("seq-mean-token-mean")
        return losses.policy_loss(
            logprobs, old, ref, A, weights, entropy=entropy, entropy_coef=0.1, **settings
        )[0]

    check_grads(loss, (arrays()[0], entropy), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-3)
    sft = jax.jit(lambda x: losses.sft_loss(x, weights_of("token-mean"))[0])
    check_grads(sft, (arrays()[0],), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-3)


def test_only_the_policy_and_the_entropy_get_gradients():
    def loss(logprobs, old, ref, A, importance):
        return losses.policy_loss(
            logprobs, old, ref, A, weights_of("token-mean"), importance_weights=importance, **SETTINGS
        )[0]

    grads = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays(), jnp.ones((2, 3)))
    assert np.abs(grads[0]).sum() > 0
    assert all(np.abs(grad).sum() == 0 for grad in grads[1:])


@pytest.mark.parametrize("cut", [[[0], [1]], [[0, 1]], [[1], [0]]])
def test_micro_batches_only_add(cut):
    whole_weights = np.asarray(weights_of("token-mean"))
    parts = [
        losses.policy_loss(*(x[np.array(rows)] for x in (*arrays(), jnp.asarray(whole_weights))), **SETTINGS)
        for rows in cut
    ]
    whole = losses.policy_loss(*arrays(), jnp.asarray(whole_weights), **SETTINGS)
    total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), total, whole)


def test_the_layout_does_not_matter():
    weights = weights_of("seq-mean-token-mean")
    rows = losses.policy_loss(*arrays(), weights, **SETTINGS)
    packed = losses.policy_loss(*(x[MASK][None, :] for x in (*arrays(), weights)), **SETTINGS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), rows, packed)


def test_entropy_bonus_lowers_the_loss_by_its_weighted_sum():
    entropy = jnp.asarray(np.where(MASK, [[0.5, 1.0, 1.5], [2.0, 0, 0]], 0.0).astype(np.float32))
    weights = weights_of("token-mean")
    plain, _ = losses.policy_loss(*arrays(), weights, **SETTINGS)
    bonus, metrics = losses.policy_loss(*arrays(), weights, entropy=entropy, entropy_coef=0.1, **SETTINGS)
    assert float(plain - bonus) == pytest.approx(0.1 * 5.0 / 4, rel=1e-4)
    assert float(metrics["entropy"][0]) == pytest.approx(5.0)


def test_importance_weights_scale_the_surrogate_and_not_the_kl():
    weights = weights_of("token-mean")
    found, _ = losses.policy_loss(*arrays(), weights, importance_weights=jnp.full((2, 3), 0.5), **SETTINGS)
    tokens = [[token["loss"] for token in sequence] for sequence in oracle_tokens(importance=0.5)]
    assert float(found) == pytest.approx(oracle.aggregate(tokens, "token-mean"), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("off", [[1, 1, 1], [1, 0, 0]]),
        ("token", [[np.exp(0.1), np.exp(0.5), np.exp(-0.4)], [2.0, 0, 0]]),
        ("sequence", [[np.exp(0.2)] * 3, [2.0, 0, 0]]),
    ],
)
def test_importance_weights_by_hand(kind, expected):
    old, rollout = (jnp.where(MASK, x, jnp.nan) for x in (LOGPROBS, OLD))
    found = losses.importance_weights(old, rollout, jnp.asarray(MASK), kind=kind, cap=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_importance_weights_are_detached_and_bounded(kind):
    def total(old):
        return losses.importance_weights(
            old, old * 0 - 90.0, jnp.ones((1, 2), bool), kind=kind, cap=1e30
        ).sum()

    value, grad = jax.value_and_grad(total)(jnp.zeros((1, 2)))
    assert float(value) == pytest.approx(2 * np.exp(20), rel=1e-5)
    np.testing.assert_array_equal(grad, 0)


def test_rollout_gap_by_hand():
    found = losses.rollout_gap(
        jnp.where(MASK, jnp.asarray(LOGPROBS), jnp.nan),
        jnp.where(MASK, jnp.asarray(OLD), 3.0),
        jnp.asarray(MASK),
    )
    new, old = LOGPROBS[MASK].astype(float), OLD[MASK].astype(float)
    gap = new - old
    expected = {
        "rollout_gap/mean": np.abs(np.exp(new) - np.exp(old)).sum(),
        "rollout_gap/dlogp_mean": np.abs(gap).sum(),
        "rollout_gap/k1": -gap.sum(),
        "rollout_gap/k3": (np.exp(gap) - gap - 1).sum(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name][0]) == pytest.approx(value, rel=1e-5) and float(found[name][1]) == 4
    equal = losses.rollout_gap(*[jnp.asarray(OLD)] * 2, jnp.asarray(MASK))
    assert all(float(total) == 0 for total, _ in equal.values())


def test_sft_loss_by_hand():
    loss, metrics = losses.sft_loss(jnp.asarray(LOGPROBS), weights_of("seq-mean-token-mean"))
    assert float(loss) == pytest.approx((3.4 / 3 + 0.7) / 2, rel=1e-6)
    assert [float(x) for x in metrics["nll"]] == pytest.approx([4.1, 4.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_dual": 1.0}, "clip_dual"),
        ({"entropy_coef": 0.1}, "no entropy"),
        ({"ref": None}, "no ref_logprobs"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    logprobs, old, ref, A = arrays()
    ref = settings.pop("ref", ref)
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(logprobs, old, ref, A, weights_of("token-mean"), **SETTINGS | settings)


def test_bfloat16_logprobs_are_computed_in_float32():
    half = [x.astype(jnp.bfloat16) for x in arrays()]
    found, _ = losses.policy_loss(*half, weights_of("token-mean"), **SETTINGS)
    wide, _ = losses.policy_loss(*(x.astype(jnp.float32) for x in half), weights_of("token-mean"), **SETTINGS)
    assert found.dtype == jnp.float32 and float(found) == float(wide)

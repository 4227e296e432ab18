import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from selfemo_jax.algo import metrics

confusion = jax.jit(metrics.confusion, static_argnames="num_classes")
NUM = 4


def test_scores_by_hand():
    # Class 0: 2 hits of 3 gold, 3 predicted; class 1: 1 of 2, 1 predicted; class 2: no gold, predicted once.
    gold, pred = np.array([0, 0, 0, 1, 1, 2, -1]), np.array([0, 0, 2, 1, 0, -1, 0])
    counts = confusion(gold, pred, num_classes=3)
    np.testing.assert_array_equal(counts, [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    assert float(metrics.accuracy(counts)) == pytest.approx(3 / 6)
    np.testing.assert_allclose(metrics.class_f1(counts), [4 / 6, 2 / 3, 0], rtol=1e-6)
    assert metrics.support(counts).tolist() == [3, 2, 1]
    assert float(metrics.weighted_f1(counts)) == pytest.approx(10 / 18)
    assert float(metrics.macro_f1(counts)) == pytest.approx(4 / 9)


PAIRS = st.lists(st.tuples(st.integers(0, NUM - 1), st.integers(-1, NUM)), min_size=12, max_size=12)


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_scores_equal_those_of_scikit_learn(pairs):
    gold, pred = (np.array(column) for column in zip(*pairs, strict=True))
    counts = confusion(gold, pred, num_classes=NUM)
    pred = np.where((pred < 0) | (pred >= NUM), NUM, pred)
    labels = list(range(NUM))
    expected = sklearn_metrics.precision_recall_fscore_support(gold, pred, labels=labels, zero_division=0)
    np.testing.assert_allclose(metrics.class_f1(counts), expected[2], atol=1e-6)
    np.testing.assert_array_equal(metrics.support(counts), expected[3])
    assert float(metrics.accuracy(counts)) == pytest.approx(sklearn_metrics.accuracy_score(gold, pred))
    for name, score in (("weighted", metrics.weighted_f1), ("macro", metrics.macro_f1)):
        reference = sklearn_metrics.f1_score(gold, pred, labels=labels, average=name, zero_division=0)
        assert float(score(counts)) == pytest.approx(reference, abs=1e-6)
    full = sklearn_metrics.confusion_matrix(gold, pred, labels=list(range(NUM + 1)))
    np.testing.assert_array_equal(counts, full[:NUM])


def test_scores_of_nothing_are_zero():
    counts = metrics.confusion(jnp.zeros(0, int), jnp.zeros(0, int), num_classes=NUM)
    assert [float(f(counts)) for f in (metrics.accuracy, metrics.weighted_f1, metrics.macro_f1)] == [0, 0, 0]


def test_counts_of_batches_add():
    gold, pred = np.array([0, 3, 2, 1, 1]), np.array([0, 2, 2, -1, 1])
    parts = confusion(gold[:2], pred[:2], num_classes=NUM) + confusion(gold[2:], pred[2:], num_classes=NUM)
    np.testing.assert_array_equal(parts, confusion(gold, pred, num_classes=NUM))

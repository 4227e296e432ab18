"""Learning rates by hand; AdamW itself is held against torch in test_train_step.py."""

import pytest

from selfemo_jax.config import Optim
from selfemo_jax.optimizer import learning_rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", 0.0, [4.0, 3.2, 2.4, 1.6, 0.8]),
        # cos(pi / 5) = 0.809017, cos(2 pi / 5) = 0.309017.
        ("cosine", 0.0, [4.0, 3.618034, 2.618034, 1.381966, 0.381966]),
        # Two steps of five rise: 1/3 and 2/3 of the peak, which the third reaches.
        ("constant", 0.4, [4 / 3, 8 / 3, 4.0, 4.0, 4.0]),
        ("linear", 0.4, [4 / 3, 8 / 3, 4.0, 8 / 3, 4 / 3]),
        ("cosine", 0.4, [4 / 3, 8 / 3, 4.0, 3.0, 1.0]),
        ("linear", 1.0, [4 / 6, 8 / 6, 12 / 6, 16 / 6, 20 / 6]),
    ],
)
def test_learning_rates_by_hand(schedule, warmup, expected):
    optim = Optim(lr=4.0, schedule=schedule, warmup=warmup)
    found = [learning_rate(optim, step=step, total_steps=5) for step in range(5)]
    assert found == pytest.approx(expected, abs=1e-6)

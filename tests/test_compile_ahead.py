"""Rows of any length find their program compiled."""

import functools

import jax
import numpy as np
import pytest

from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import TrainSequence, pack, target_width, target_widths
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.parts import build_parts, compile_steps
from selfemo_jax.train_step import Steps, TrainState, make_steps, sequence_logprobs, update
from tests.fabricated import settings
from tests.model.tiny import TINY, weights
from tests.test_train_step import compilations

ROW = 3
AT_ONCE = 2


def batch(num_targets: int, num_rows: int):
    """Rows with so many targets each."""
    items = [
        TrainSequence(
            group=row, prompt_ids=(5,), completion_ids=tuple(range(10, 10 + num_targets)),
            token_weight=1.0 / (num_rows * num_targets), advantage=1.0 - row,
        )
        for row in range(num_rows)
    ]  # fmt: skip
    return pack(items, layout="separate", row_tokens=ROW, micro_rows=1).batch


def make(*, compile_ahead: bool) -> Steps:
    mesh = make_mesh({}, jax.devices()[:1])
    return make_steps(
        TINY, Compute(), mesh, optim=Optim(lr=1e-2), loss=Loss(), temperature=1.0, logits_budget_mib=8,
        compile_ahead=compile_ahead,
    )  # fmt: skip


def fresh(steps: Steps) -> TrainState:
    return steps.init_state(jax.device_put(weights(), steps.param_shardings))


def step(steps: Steps, state: TrainState, rows, *, kind: str = "rl") -> TrainState:
    if kind == "rl":
        sequence_logprobs(steps, state.params, rows, micro_rows=1, at_once=AT_ONCE)
    return update(steps, state, rows, kind=kind, micro_rows=1, rate=1e-2, where="step")[0]


def test_a_width_is_one_of_those_that_may_come():
    assert target_widths(16) == (2, 4, 8, 12, None)
    assert target_widths(1) == (None,) and target_widths(ROW) == (1, 2, None)
    assert [target_width(batch(n, 1)) for n in (1, 2, 3)] == list(target_widths(ROW))


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_after_the_first_batch_no_length_and_no_number_of_rows_compiles(kind):
    steps = make(compile_ahead=True)
    # Fewer rows than a wide pass for log-probs takes.
    state = step(steps, fresh(steps), batch(1, 1), kind=kind)
    # Three rows: a pass of two, and one of one.
    various = [(num, rows) for num in (2, 3, 1) for rows in (3, 1)]
    with compilations() as seen:
        for num_targets, num_rows in various:
            state = step(steps, state, batch(num_targets, num_rows), kind=kind)
    assert seen == []


def test_without_it_each_length_compiles_once_and_gives_the_same_numbers():
    lazy, ahead = make(compile_ahead=False), make(compile_ahead=True)
    run = functools.partial(step, lazy)
    state, expected = run(fresh(lazy), batch(1, 1)), step(ahead, fresh(ahead), batch(1, 1))
    counts = []
    for num_targets in (1, 2, 1, 2):
        with compilations() as seen:
            state = run(state, batch(num_targets, 1))
        counts.append(len(seen))
        expected = step(ahead, expected, batch(num_targets, 1))
    # The update and the log-probs, for the width that was new.
    assert counts == [0, 2, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_compiles_ahead_where_its_settings_ask_for_it(asked):
    config = settings(batch={"compile_ahead": asked})
    assert compile_steps(build_parts(config), config.optim).at_width.on == asked

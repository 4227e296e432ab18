"""The rule of the engine's shapes, by hand."""

import pytest

from selfemo_jax.rollout.slots import (
    SHRINK,
    Layout,
    batches,
    choose_layout,
    completion_columns,
    prompt_columns,
    widths,
    worth_stopping_at,
)


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        ([8] * 8, (8, 8)),
        ([8], (1, 8)),
        ([1] * 8, (8, 1)),
        # Sixteen slots of one row hold 15 rows; eight of eight would pay for 64.
        ([8, 1, 1, 1, 1, 1, 1, 1], (16, 1)),
        ([2, 2, 2, 1], (4, 2)),
        ([8, 8, 3], (4, 8)),
    ],
)
def test_the_layout_has_the_fewest_rows_then_the_fewest_slots(live, expected):
    layout = choose_layout(live, widths(8), multiple=1, max_rows=64)
    assert (layout.slots, layout.width) == expected


def test_slots_are_a_multiple_of_the_data_axes_and_never_more_rows_than_allowed():
    assert choose_layout([8], widths(8), multiple=8, max_rows=64) == Layout(slots=8, width=1)
    assert choose_layout([6] * 8, widths(6), multiple=1, max_rows=48) == Layout(slots=8, width=6)
    assert choose_layout([8] * 9, widths(8), multiple=1, max_rows=64) is None


def test_leaving_a_chunk_early_always_leads_to_a_smaller_layout():
    for multiple in (1, 2, 3, 8):
        for slots in range(multiple, 40 * multiple, multiple):
            for width in (1, 2, 6, 8):
                old = Layout(slots=slots, width=width)
                stop_at = worth_stopping_at(old, multiple=multiple)
                for live in {1, stop_at // 2, stop_at} - {0}:
                    if not stop_at:
                        continue
                    new = choose_layout([1] * live, widths(8), multiple=multiple, max_rows=320 * multiple)
                    assert new.rows <= SHRINK * old.rows


def test_columns_fall_into_few_buckets():
    assert [prompt_columns(n, multiple=64, known=()) for n in (0, 1, 64, 65, 512, 513, 1025)] == [
        64, 64, 64, 128, 512, 1024, 2048,
    ]  # fmt: skip
    assert prompt_columns(385, multiple=64, known={512, 1024}) == 512
    assert prompt_columns(100, multiple=64, known={512}) == 128
    assert [completion_columns(n, smallest=32, max_tokens=100) for n in (1, 32, 33, 65, 100)] == [
        32, 32, 64, 128, 128,
    ]  # fmt: skip
    assert completion_columns(1, smallest=32, max_tokens=8) == 32


def test_prefills_hold_every_prompt_once_within_the_budget():
    cuts = batches([5] * 11, columns=64, budget=256, multiple=1)
    assert [list(which) for which, _ in cuts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [size for _, size in cuts] == [4, 4, 4]
    assert batches([5], columns=8192, budget=4096, multiple=2) == [(range(0, 1), 2)]

"""Rows worked out by hand, and what must hold for any sequences."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.data.batching import (
    NO_PREFIX,
    PAD_SEGMENT,
    PackedBatch,
    TrainSequence,
    gather,
    micro_batches,
    pack,
    scatter,
    target_width,
)

LAYOUTS = ("shared_prefix", "packed", "separate")


def sequence(group, prompt, completion, *, weight=0.25, advantage=0.0, rollout=None):
    return TrainSequence(
        group=group,
        prompt_ids=prompt,
        completion_ids=completion,
        token_weight=weight,
        advantage=advantage,
        rollout_logprobs=rollout,
    )


# Two groups of unequal length; the first has completions of two and one token, the second one of three.
TWO_GROUPS = (
    sequence(7, (11, 12, 13), (21, 22), weight=0.5, advantage=1.5, rollout=(-0.1, -0.2)),
    sequence(7, (11, 12, 13), (31,), weight=0.5, advantage=-1.5, rollout=(-0.3,)),
    sequence(8, (14, 15), (41, 42, 43), weight=0.125, advantage=2.0, rollout=(-0.4, -0.5, -0.6)),
)


def test_shared_prefix_rows_by_hand():
    packed = pack(TWO_GROUPS, layout="shared_prefix", row_tokens=6, micro_rows=1)
    batch = packed.batch
    # Group 7: prefix 11 12, then 13 21 -> 21 22 and 13 -> 31. Group 8: prefix 14, then 15 41 42 -> 41 42 43.
    expected = {
        "tokens": [[11, 12, 13, 21, 13, 0], [14, 15, 41, 42, 0, 0]],
        "targets": [[0, 0, 21, 22, 31, 0], [0, 41, 42, 43, 0, 0]],
        "positions": [[0, 1, 2, 3, 2, 0], [0, 1, 2, 3, 0, 0]],
        "segment_ids": [[1, 1, 2, 2, 3, 0], [1, 2, 2, 2, 0, 0]],
        "prefix_ids": [[-1, -1, 1, 1, 1, -1], [-1, 1, 1, 1, -1, -1]],
        "token_weights": [[0, 0, 0.5, 0.5, 0.5, 0], [0, 0.125, 0.125, 0.125, 0, 0]],
        "advantages": [[0, 0, 1.5, 1.5, -1.5, 0], [0, 2, 2, 2, 0, 0]],
        "rollout_logprobs": [[0, 0, -0.1, -0.2, -0.3, 0], [0, -0.4, -0.5, -0.6, 0, 0]],
        "old_logprobs": [[0] * 6] * 2,
        "ref_logprobs": [[0] * 6] * 2,
        "importance_weights": [[1] * 6] * 2,
    }
    assert set(expected) == {field.name for field in dataclasses.fields(PackedBatch)}
    for name, rows in expected.items():
        np.testing.assert_allclose(getattr(batch, name), rows, rtol=1e-6, err_msg=name)
    assert [(place.row, place.start, place.length) for place in packed.places] == [
        (0, 2, 2),
        (0, 4, 1),
        (1, 1, 3),
    ]
    assert packed.num_tokens == 9 and packed.padding_share == pytest.approx(3 / 12)


def test_two_groups_share_a_row_when_both_fit():
    batch = pack(TWO_GROUPS, layout="shared_prefix", row_tokens=10, micro_rows=1).batch
    # The longer group first; the second one's segments count on.
    np.testing.assert_array_equal(batch.tokens, [[11, 12, 13, 21, 13, 14, 15, 41, 42, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 2, 2, 3, 4, 5, 5, 5, 0]])
    np.testing.assert_array_equal(batch.prefix_ids, [[-1, -1, 1, 1, 1, -1, 4, 4, 4, -1]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 2, 0, 1, 2, 3, 0]])


def test_packed_rows_by_hand():
    packed = pack(TWO_GROUPS, layout="packed", row_tokens=8, micro_rows=1)
    batch = packed.batch
    # Lengths 4, 3, 4: the two of four fill the first row.
    np.testing.assert_array_equal(
        batch.tokens, [[11, 12, 13, 21, 14, 15, 41, 42], [11, 12, 13, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.targets, [[0, 0, 21, 22, 0, 41, 42, 43], [0, 0, 31, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]])
    assert (batch.prefix_ids == NO_PREFIX).all()
    assert [(place.row, place.start) for place in packed.places] == [(0, 2), (1, 2), (0, 5)]


def test_separate_rows_hold_one_sequence_each():
    packed = pack(TWO_GROUPS, layout="separate", row_tokens=20, micro_rows=1)
    assert sorted(place.row for place in packed.places) == [0, 1, 2]
    assert packed.batch.segment_ids.max() == 1
    assert packed.num_tokens == 11 and packed.padding_share == pytest.approx(1 - 11 / 60)


def test_prompt_of_one_token_has_no_prefix():
    items = (sequence(0, (5,), (6, 7)), sequence(0, (5,), (8,)))
    batch = pack(items, layout="shared_prefix", row_tokens=4, micro_rows=1).batch
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 5, 0]])
    np.testing.assert_array_equal(batch.targets, [[6, 7, 8, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 0]])
    assert (batch.prefix_ids == NO_PREFIX).all()
    assert len(set(batch.segment_ids[0])) == 3


def test_group_longer_than_a_row_is_cut_into_parts_with_their_own_prompt():
    items = tuple(sequence(0, (1, 2, 3), (10 + index, 20 + index)) for index in range(3))
    packed = pack(items, layout="shared_prefix", row_tokens=6, micro_rows=1)
    np.testing.assert_array_equal(packed.batch.tokens, [[1, 2, 3, 10, 3, 11], [1, 2, 3, 12, 0, 0]])
    np.testing.assert_array_equal(packed.batch.targets, [[0, 0, 10, 20, 11, 21], [0, 0, 12, 22, 0, 0]])
    assert [place.row for place in packed.places] == [0, 0, 1]


def test_sequence_that_fits_a_row_exactly_is_taken_and_one_more_token_is_not():
    for layout in LAYOUTS:
        pack((sequence(0, (1, 2, 3), (4, 5)),), layout=layout, row_tokens=4, micro_rows=1)
        with pytest.raises(ValueError) as error:
            pack(
                (sequence(0, (1,), (2,)), sequence(1, (1, 2, 3), (4, 5, 6))),
                layout=layout,
                row_tokens=4,
                micro_rows=1,
            )
        assert str(error.value) == (
            "sequence 1: a prompt of 3 and a completion of 3 tokens need 5 positions, a row has 4; "
            "raise batch.row_tokens or lower data.max_prompt or rollout.max_tokens"
        )


@pytest.mark.parametrize(("prompt", "completion"), [((), (1,)), ((1,), ())])
def test_empty_prompt_or_completion_is_an_error(prompt, completion):
    with pytest.raises(ValueError, match="sequence 0: a prompt and a completion of at least one token"):
        pack((sequence(0, prompt, completion),), layout="packed", row_tokens=4, micro_rows=1)


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_empty_rows_fill_up_to_whole_micro_batches(micro_rows):
    packed = pack(TWO_GROUPS, layout="separate", row_tokens=6, micro_rows=micro_rows)
    rows = {1: 3, 2: 4, 4: 4}[micro_rows]
    batch = packed.batch
    assert batch.tokens.shape == (rows, 6)
    assert (batch.segment_ids[3:] == PAD_SEGMENT).all() and (batch.token_weights[3:] == 0).all()
    parts = list(micro_batches(batch, micro_rows=micro_rows))
    assert [part.tokens.shape for part in parts] == [(micro_rows, 6)] * (rows // micro_rows)
    for field in dataclasses.fields(PackedBatch):
        joined = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(batch, field.name))


def test_nothing_to_pack_is_one_empty_micro_batch():
    packed = pack((), layout="shared_prefix", row_tokens=4, micro_rows=2)
    assert packed.batch.tokens.shape == (2, 4) and packed.padding_share == 1.0 and packed.places == ()


def test_element_types():
    batch = pack(TWO_GROUPS, layout="packed", row_tokens=8, micro_rows=1).batch
    types = [getattr(batch, field.name).dtype for field in dataclasses.fields(PackedBatch)]
    assert types == [np.int32] * 5 + [np.float32] * 6


@st.composite
def many_sequences(draw):
    """Up to five groups, interleaved, and a row length that each sequence fits; every token is its own."""
    row_tokens = draw(st.integers(4, 20))
    groups = []
    for group in range(draw(st.integers(1, 5))):
        prompt_length = draw(st.integers(1, row_tokens - 1))
        lengths = draw(st.lists(st.integers(1, row_tokens - prompt_length + 1), min_size=1, max_size=4))
        groups += [(group, prompt_length, length) for length in lengths]
    items, token = [], 1000
    prompts: dict[int, tuple[int, ...]] = {}
    for group, prompt_length, length in draw(st.permutations(groups)):
        if group not in prompts:
            prompts[group] = tuple(range(token, token + prompt_length))
            token += prompt_length
        completion = tuple(range(token, token + length))
        token += length
        rollout = tuple(-float(x) for x in completion)
        items.append(
            sequence(
                group,
                prompts[group],
                completion,
                weight=1.0 + len(items),
                advantage=-1.0 - len(items),
                rollout=rollout,
            )
        )
    return row_tokens, items


def seen_by(batch, row, column):
    """The tokens at the positions that a position sees, ordered by their position in the text."""
    visible = [
        j
        for j in range(column + 1)
        if batch.segment_ids[row, j] in (batch.segment_ids[row, column], batch.prefix_ids[row, column])
    ]
    return [int(batch.tokens[row, j]) for j in visible], [int(batch.positions[row, j]) for j in visible]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=many_sequences(), micro_rows=st.integers(1, 3))
def test_every_target_stands_once_and_sees_exactly_its_own_past(layout, data, micro_rows):
    row_tokens, items = data
    packed = pack(items, layout=layout, row_tokens=row_tokens, micro_rows=micro_rows)
    batch = packed.batch
    assert batch.tokens.shape[1] == row_tokens and batch.tokens.shape[0] % micro_rows == 0
    assert packed.num_tokens == (batch.segment_ids != PAD_SEGMENT).sum()

    targets = batch.targets[batch.token_weights != 0].tolist()
    assert sorted(targets) == sorted(token for item in items for token in item.completion_ids)
    for item, place in zip(items, packed.places, strict=True):
        assert place.length == len(item.completion_ids)
        text = (*item.prompt_ids, *item.completion_ids)
        for index in range(place.length):
            row, column = place.row, place.start + index
            past = len(item.prompt_ids) + index
            tokens, positions = seen_by(batch, row, column)
            assert tuple(tokens) == text[:past] and positions == list(range(past))
            assert batch.targets[row, column] == text[past]
            assert batch.token_weights[row, column] == item.token_weight
            assert batch.advantages[row, column] == item.advantage
            assert batch.rollout_logprobs[row, column] == -text[past]

    rows = gather(batch.targets, packed.places)
    assert [tuple(row) for row in rows] == [item.completion_ids for item in items]
    values = [np.arange(len(row), dtype=np.float32) + 10 * index for index, row in enumerate(rows)]
    spread = scatter(values, packed, fill=-7.0)
    assert spread.dtype == np.float32 and ((spread == -7.0) == (batch.token_weights == 0)).all()
    for value, back in zip(values, gather(spread, packed.places), strict=True):
        np.testing.assert_array_equal(value, back)

    again = pack(list(items), layout=layout, row_tokens=row_tokens, micro_rows=micro_rows)
    assert again.places == packed.places
    for field in dataclasses.fields(PackedBatch):
        np.testing.assert_array_equal(getattr(again.batch, field.name), getattr(batch, field.name))


@settings(max_examples=60, deadline=None)
@given(data=many_sequences())
def test_shared_prefixes_never_need_more_positions_than_packed_rows(data):
    row_tokens, items = data
    used = [
        pack(items, layout=layout, row_tokens=row_tokens, micro_rows=1).num_tokens
        for layout in ("shared_prefix", "packed", "separate")
    ]
    assert used[0] <= used[1] == used[2]


def test_growing_prompts_branch_off_one_trunk_by_hand():
    # A dialogue 1 2 | 3 | 4, asked after each line: by 9 8, 9 8, 7 8.
    items = (
        sequence(0, (1, 2, 3, 9, 8), (21,)),
        sequence(0, (1, 2, 3, 4, 7, 8), (31,), weight=0.5),
        sequence(0, (1, 2, 9, 8), (11, 12), weight=(0.25, 0.75)),
    )
    packed = pack(items, layout="shared_prefix", row_tokens=12, micro_rows=1)
    expected = {
        "tokens": [[1, 2, 9, 8, 11, 3, 9, 8, 4, 7, 8, 0]],
        "targets": [[0, 0, 0, 11, 12, 0, 0, 21, 0, 0, 31, 0]],
        "positions": [[0, 1, 2, 3, 4, 2, 3, 4, 3, 4, 5, 0]],
        "segment_ids": [[1, 1, 2, 2, 2, 1, 3, 3, 4, 4, 4, 0]],
        "prefix_ids": [[-1, -1, 1, 1, 1, -1, 1, 1, 1, 1, 1, -1]],
        "token_weights": [[0, 0, 0, 0.25, 0.75, 0, 0, 0.25, 0, 0, 0.5, 0]],
    }
    for name, rows in expected.items():
        np.testing.assert_allclose(getattr(packed.batch, name), rows, err_msg=name)
    assert [(place.start, place.length) for place in packed.places] == [(7, 1), (10, 1), (3, 2)]
    assert packed.num_tokens == 11


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    tails=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    row_tokens=st.integers(40, 60),
)
@settings(max_examples=60, deadline=None)
def test_each_branch_sees_exactly_its_own_prompt(lengths, tails, row_tokens):
    line = iter(range(100, 200))
    history: tuple[int, ...] = (1,)
    items = []
    for index, length in enumerate(lengths):
        history = (*history, *(next(line) for _ in range(length)))
        tail = tuple(range(50, 50 + tails[index]))
        items.append(sequence(0, (*history, *tail), (200 + index, 300 + index)))
    packed = pack(items, layout="shared_prefix", row_tokens=row_tokens, micro_rows=1)
    batch = packed.batch
    for item, place in zip(items, packed.places, strict=True):
        row, last = place.row, place.start + place.length - 1
        segments = batch.segment_ids[row]
        seen = [
            j for j in range(last + 1)
            if segments[j] in (segments[last], batch.prefix_ids[row, last])
        ]  # fmt: skip
        assert tuple(batch.tokens[row, seen]) == (*item.prompt_ids, *item.completion_ids[:-1])
        np.testing.assert_array_equal(batch.positions[row, seen], np.arange(len(seen)))


@settings(max_examples=40, deadline=None)
@given(data=many_sequences(), micro_rows=st.integers(1, 3))
def test_balanced_rows_hold_the_same_sequences_in_as_many_rows(data, micro_rows):
    row_tokens, items = data
    sizes = {"layout": "shared_prefix", "row_tokens": row_tokens, "micro_rows": micro_rows}
    plain, even = pack(items, **sizes), pack(items, balance=True, **sizes)
    assert even.batch.tokens.shape == plain.batch.tokens.shape and even.num_tokens == plain.num_tokens
    for item, place in zip(items, even.places, strict=True):
        tokens, positions = seen_by(even.batch, place.row, place.start + place.length - 1)
        assert tuple(tokens) == (*item.prompt_ids, *item.completion_ids[:-1])
        assert positions == list(range(len(tokens)))


def pairs_by_row(batch):
    """Pairs of a position and one that it sees, counted one by one; padding sees nothing that counts."""
    return [
        sum(
            len(seen_by(batch, row, column)[0])
            for column in range(batch.tokens.shape[1])
            if batch.segment_ids[row, column] != PAD_SEGMENT
        )
        for row in range(len(batch.tokens))
    ]


def test_balanced_rows_share_the_work_where_first_fit_leaves_rows_empty():
    # Sequences of 8, 6, 4, 4 and 2 positions in rows of 12; one of n positions sees n (n + 1) / 2 pairs.
    items = [sequence(index, (1,), tuple(range(5, 5 + n))) for index, n in enumerate((8, 6, 4, 4, 2))]
    sizes = {"layout": "packed", "row_tokens": 12, "micro_rows": 4}
    assert pairs_by_row(pack(items, **sizes).batch) == [36 + 10, 21 + 10 + 3, 0, 0]
    assert pairs_by_row(pack(items, balance=True, **sizes).batch) == [36, 21, 10 + 3, 10]


def test_balanced_rows_fall_back_where_they_would_not_fit():
    # 5 + 5 and 4 + 3 + 3 fill the rows exactly; by work the two 5 go apart, and the last 3 fits nowhere.
    items = [sequence(index, (1,), tuple(range(5, 5 + n))) for index, n in enumerate((5, 5, 4, 3, 3))]
    sizes = {"layout": "packed", "row_tokens": 10, "micro_rows": 2}
    plain, even = pack(items, **sizes), pack(items, balance=True, **sizes)
    assert sorted(pairs_by_row(even.batch)) == sorted(pairs_by_row(plain.batch)) == [22, 30]


def test_width_of_the_head_by_hand():
    def width(*num_targets, row_tokens=16):
        items = [sequence(i, (1, 2), tuple(range(5, 5 + n))) for i, n in enumerate(num_targets)]
        return target_width(pack(items, layout="separate", row_tokens=row_tokens, micro_rows=1).batch)

    # Eighths of 16: 2, 4, 8 and 12, by the row with the most.
    assert [width(n) for n in (1, 2, 3, 5, 9, 12, 13)] == [2, 2, 4, 8, 12, 12, None]
    assert width(1, 7, 2) == 8
    assert width(1, row_tokens=17) == 3


def test_micro_batches_at_once_come_in_two_sizes_and_in_order():
    items = [sequence(index, (1,), (5 + index,)) for index in range(10)]
    batch = pack(items, layout="separate", row_tokens=4, micro_rows=2).batch
    parts = list(micro_batches(batch, micro_rows=2, at_once=2))
    assert [len(part.tokens) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), batch.targets)

"""Difficulty by hand, and the order of a pass."""

import pytest

from selfemo_jax.data.curriculum import NUM_STAGES, difficulties, difficulty, root_of
from selfemo_jax.data.dialogues import MELD, Dialogue, Turn
from selfemo_jax.data.inputs import build_inputs
from selfemo_jax.data.pipeline import input_stream


def test_difficulty_of_four_turns_by_hand():
    # Neighbours: joy-joy no, joy-anger yes, anger-joy yes: 2 of 3.
    # The same speaker, double: Ada from joy to anger yes, Bo from joy to joy no: 2 of 4.
    turns = [("Ada", "joy"), ("Bo", "joy"), ("Ada", "anger"), ("Bo", "joy")]
    assert difficulty(turns) == pytest.approx((2 + 2) / (3 + 4))
    assert difficulty([("Ada", "joy"), ("Bo", "joy"), ("Ada", "joy")]) == 0
    assert difficulty([("Ada", "joy"), ("Ada", "anger")]) == 1
    assert difficulty([("Ada", "joy")]) == difficulty([]) == 0


def test_a_shift_of_one_speaker_counts_twice_a_change_between_speakers():
    between = difficulty([("Ada", "joy"), ("Bo", "anger"), ("Ada", "joy"), ("Bo", "anger")])
    inside = difficulty([("Ada", "joy"), ("Bo", "joy"), ("Ada", "anger"), ("Bo", "anger")])
    assert between == pytest.approx(3 / 7) and inside == pytest.approx((1 + 4) / 7)


def test_unlabelled_turns_are_passed_over_and_items_find_their_dialogue():
    turns = [("Ada", "joy"), ("Bo", None), ("Ada", "anger")]
    made = tuple(Turn(speaker=s, text="x", labels={label: 1.0} if label else None) for s, label in turns)
    dialogue = Dialogue(dataset="meld", split="train", dialogue_id="0", turns=made)
    assert difficulties({"meld/train/0": dialogue}) == {"meld/train/0": 1.0}
    (sample, *_) = build_inputs([dialogue], MELD, rule="all")
    for item in (sample, (sample, None), ((sample, (1, 2)), (sample, None)), (sample, sample)):
        assert root_of(item) == "meld/train/0"


def passes(number: int, **options) -> list[list[int]]:
    items = list(range(20))
    stream = input_stream({"a": items}, {"a": 1.0}, lambda item: item, batch_size=20, seed=3, **options)
    return [list(next(stream).items) for _ in range(number)]


def test_each_pass_goes_from_easy_to_hard_in_random_order_inside_a_part():
    hard = {item: (item * 7) % 20 for item in range(20)}
    ranked = sorted(hard, key=hard.get)
    size = 20 // NUM_STAGES
    first, second = passes(2, difficulty=hard.get)
    for one in (first, second):
        assert [set(one[i : i + size]) for i in range(0, 20, size)] == [
            set(ranked[i : i + size]) for i in range(0, 20, size)
        ]
    assert first != ranked and first != second, "another order inside the parts in every pass"


def test_without_a_difficulty_the_order_is_what_it_was():
    plain, again = passes(1)[0], passes(1, difficulty=None)[0]
    assert plain == again and sorted(plain) == list(range(20))


def test_a_curriculum_goes_on_from_its_state():
    def stream(state=None):
        return input_stream(
            {"a": list(range(11))}, {"a": 1.0}, lambda item: item, batch_size=3, seed=0, state=state,
            difficulty=lambda item: -item,
        )  # fmt: skip

    whole = stream()
    batches = [next(whole) for _ in range(9)]
    resumed = stream(batches[4].state)
    assert [next(resumed).items for _ in range(4)] == [batch.items for batch in batches[5:]]

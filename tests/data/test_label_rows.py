"""Questions, their table and their weights, worked out by hand."""

import numpy as np
import pytest

from selfemo_jax.data.batching import pack
from selfemo_jax.data.dialogues import MELD
from selfemo_jax.data.label_rows import (
    Answered,
    Question,
    answer_sequences,
    class_weights,
    dialogues_of,
    label_sequences,
    label_table,
    questions,
    without_tokens,
)
from selfemo_jax.data.prompts import build_prompt, completion_ids
from tests.fabricated import LABEL_SETS, codec, sample

INVENTORIES = {name: labels.labels for name, labels in LABEL_SETS.items()}


def question(window, label, *, prompt=(1, 2, 3), weight=1.0):
    return Question(dataset="meld", prompt_ids=prompt, label=label, window=window, weight=weight)


def test_every_label_is_the_token_behind_the_opening_of_its_answer():
    table = label_table(INVENTORIES, codec(), thinking=False)
    assert len(table.names) == sum(map(len, INVENTORIES.values())) == len(set(table.names))
    assert set(table.sets) == {0, 1, 2}
    for dataset, labels in INVENTORIES.items():
        opening = table.opening(dataset)
        assert codec().decode(opening) == "<emotion>"
        tokens = []
        for label in labels:
            answer = completion_ids({label: 0.7}, {labels[0]: 1.0}, "Well.", codec(), think=None)
            tokens.append(table.token_ids[table.index(dataset, label)])
            assert tuple(answer[: len(opening) + 1]) == (*opening, tokens[-1])
        assert len(set(tokens)) == len(labels)
        assert len({table.sets[table.index(dataset, label)] for label in labels}) == 1


def test_labels_that_begin_with_the_same_token_are_named():
    with pytest.raises(ValueError, match=r"the labels zqa, zqb of mine begin with the same token"):
        label_table({"mine": ("zqa", "zqb", "joy")}, codec(), thinking=False)


def test_dialogues_keep_the_order_of_their_lines():
    chosen = [
        sample(number, dialogue=name, gold={"joy": 1.0}) for name, number in (("b", 1), ("a", 1), ("b", 2))
    ]
    assert [[s.id for s in group] for group in dialogues_of(chosen)] == [
        ["meld/train/b/1", "meld/train/b/2"],
        ["meld/train/a/1"],
    ]


def test_a_rare_label_weighs_more_and_the_mean_stays_one():
    chosen = [sample(n, gold={"joy": 0.9, "fear": 0.1}) for n in range(3)] + [sample(3, gold={"fear": 1.0})]
    assert class_weights(chosen, power=0.0) == {("meld", "joy"): 1.0, ("meld", "fear"): 1.0}
    found = class_weights(chosen, power=1.0)
    # 1/3 and 1 over their mean over the four samples, 1/2.
    assert found == pytest.approx({("meld", "joy"): 2 / 3, ("meld", "fear"): 2.0})


def test_a_question_is_the_prompt_and_the_opening_and_its_target_the_heaviest_label():
    table = label_table(INVENTORIES, codec(), thinking=False)

    def encode(s):
        return build_prompt(s, codec(), max_labels=1, max_tokens=128, thinking=False, style="dialogue")

    chosen = sample(1, gold={"joy": 0.2, "anger": 0.8})
    (found,) = questions((chosen,), table, encode, {("meld", "anger"): 1.5})
    assert found.prompt_ids == (*encode(chosen).token_ids, *table.opening("meld"))
    assert table.names[found.label] == ("meld", "anger")
    assert found.weight == 1.5 and found.window == ("meld/train/d1", 0)


def test_question_weights_add_up_to_one_and_windows_are_groups():
    asked = [question(("d", 0), 4, weight=3.0), question(("d", 5), 2), question(("d", 0), 1)]
    rows = label_sequences(asked)
    assert [row.token_weight for row in rows] == pytest.approx([0.6, 0.2, 0.2])
    assert [row.group for row in rows] == [0, 1, 0]
    assert [row.completion_ids for row in rows] == [(4,), (2,), (1,)]


def test_the_label_token_of_an_answer_counts_more_than_the_others():
    answers = [
        Answered(prompt_ids=(1, 2), completion_ids=(7, 8, 9), window=("d", 0), label_at=1),
        Answered(prompt_ids=(1, 3), completion_ids=(7, 8), window=("d", 0), label_at=None),
    ]
    first, second = answer_sequences(answers, label_weight=6.0)
    assert first.token_weight == pytest.approx((0.1, 0.6, 0.1))
    assert second.token_weight == pytest.approx((0.1, 0.1))
    assert first.group == second.group


def test_the_label_of_one_answer_counts_more_than_that_of_another_and_its_form_does_not():
    ids = {"prompt_ids": (1, 2), "completion_ids": (7, 8), "window": ("d", 0), "label_at": 1}
    rare, common = answer_sequences([Answered(**ids, weight=3.0), Answered(**ids)], label_weight=2.0)
    # 1 + 2 x 3 and 1 + 2 make 10.
    assert rare.token_weight == pytest.approx((0.1, 0.6))
    assert common.token_weight == pytest.approx((0.1, 0.2))


def test_dropout_blanks_the_trunk_alone_and_the_same_tokens_for_a_seed():
    asked = [question(("d", 0), n, prompt=(*range(10, 30 + n), 5, 6)) for n in range(3)]
    batch = pack(label_sequences(asked), layout="shared_prefix", row_tokens=64, micro_rows=1).batch
    blanked = without_tokens(batch, share=0.5, blank=0, seed=(1, 2))
    np.testing.assert_array_equal(
        blanked.tokens, without_tokens(batch, share=0.5, blank=0, seed=(1, 2)).tokens
    )
    changed = blanked.tokens != batch.tokens
    assert 0 < changed.sum() < (batch.segment_ids == 1).sum()
    assert (batch.segment_ids[changed] == 1).all() and (blanked.tokens[changed] == 0).all()
    np.testing.assert_array_equal(without_tokens(batch, share=0.0, blank=0, seed=(1, 2)).tokens, batch.tokens)


def test_meld_prompts_of_one_dialogue_share_all_but_their_tails():
    history = (("Ada", "The ferry left."), ("Bo", "Then we row."), ("Ada", "In this rain?"), ("Bo", "Yes."))
    chosen = [
        sample(n, gold={MELD.labels[n]: 1.0}, history=history[:n], responder=("Ada", "Bo")[n % 2])
        for n in range(1, 5)
    ]
    table = label_table({"meld": MELD.labels}, codec(), thinking=False)

    def encode(s):
        return build_prompt(s, codec(), max_labels=1, max_tokens=128, thinking=False, style="dialogue")

    asked = questions(chosen, table, encode, {})
    packed = pack(label_sequences(asked), layout="shared_prefix", row_tokens=256, micro_rows=1)
    separate = sum(len(q.prompt_ids) for q in asked)
    assert packed.num_tokens < separate / 2

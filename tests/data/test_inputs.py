import json

import pytest

from selfemo_jax.data.dialogues import EMORYNLP, MELD, Dialogue, Turn, load_corpus
from selfemo_jax.data.inputs import Reference, Sample, build_inputs, shuffle_gold


def dialogue(*turns, dialogue_id="7", **fields):
    """Turns as (speaker, label or None); the text is the turn's number."""
    made = tuple(
        Turn(speaker=speaker, text=f"line {i}", labels=label and {label: 1.0})
        for i, (speaker, label) in enumerate(turns)
    )
    return Dialogue(dataset="meld", split="train", dialogue_id=dialogue_id, turns=made, **fields)


TALK = dialogue(
    ("Ada", "joy"), ("Ada", "anger"), ("Bo", None), ("Cy", "fear"), ("Ada", "joy"), ("Ada", "sadness"),
    personas={"Bo": "Bo is shy.", "Cy": "Cy is loud."}, theme="a lost key",
)  # fmt: skip


def responders(rule, *dialogues):
    samples = build_inputs(dialogues, MELD, rule=rule)
    return {int(sample.id.rsplit("/")[-1]): sample.responder for sample in samples}


def test_context_and_responder_needs_context_label_and_another_next_speaker():
    # 0 has no context, 2 no label, 4 the same next speaker, 5 no next turn.
    assert responders("context_and_responder", TALK) == {1: "Bo", 3: "Ada"}


def test_any_responder_falls_back_to_the_most_recent_other_speaker():
    # 0: nobody spoke before, so the first other speaker after; 4 and 5: Cy spoke last.
    assert responders("any_responder", TALK) == {0: "Bo", 1: "Bo", 3: "Ada", 4: "Cy", 5: "Cy"}


def test_monologue_is_kept_by_all_only_with_a_listener():
    alone = dialogue(("Ada", "joy"), ("Ada", "fear"))
    assert responders("context_and_responder", alone) == {}
    assert responders("any_responder", alone) == {}
    assert responders("all", alone) == {0: "Listener", 1: "Listener"}
    assert responders("all", TALK) == responders("any_responder", TALK)


def test_sample_holds_the_turns_up_to_its_own_and_the_responders_persona():
    sample = build_inputs([TALK], MELD, rule="context_and_responder")[0]
    assert sample == Sample(
        id="meld/train/7/1",
        root_id="meld/train/7",
        dataset="meld",
        split="train",
        history=(("Ada", "line 0"), ("Ada", "line 1")),
        target_speaker="Ada",
        responder="Bo",
        persona="Bo is shy.",
        theme="a lost key",
        inventory=MELD.labels,
        gold={"anger": 1.0},
        reference=Reference(speaker="Bo", text="line 2", labels=None),
    )
    other = build_inputs([TALK], MELD, rule="all")
    assert [s.reference is not None for s in other] == [False, True, True, False, False]
    assert [s.persona for s in other] == ["Bo is shy.", "Bo is shy.", None, "Cy is loud.", "Cy is loud."]


def test_weighted_gold_is_kept():
    turn = Turn(speaker="Ada", text="Well.", labels={"joy": 0.7, "fear": 0.3})
    one = Dialogue(dataset="meld", split="test", dialogue_id="1", turns=(turn,))
    assert build_inputs([one], MELD, rule="all")[0].gold == {"joy": 0.7, "fear": 0.3}


def test_unknown_rule_names_the_three():
    with pytest.raises(
        ValueError, match="data.rule is 'any'; expected one of context_and_responder, any_responder, all"
    ):
        build_inputs([TALK], MELD, rule="any")


def test_json_round_trip_is_equal_through_text():
    for sample in build_inputs([TALK], MELD, rule="all"):
        assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histroy": []}, "unknown histroy"),
        ({"gold": None}, "gold is None; expected dict"),
        ({"depth": "1"}, "depth is '1'; expected int"),
        ({"depth": True}, "depth is True; expected int"),
        ({"history": []}, "history must be a non-empty list"),
        ({"history": [["Ada"]]}, "history must be a non-empty list of"),
        ({"history": [["Ada", 3]]}, "history must be a non-empty list of"),
        ({"history": ["ab"]}, "history must be a non-empty list of"),
        ({"history": [7]}, "history must be a non-empty list of"),
        ({"inventory": [1]}, "inventory must be a list of strings"),
        ({"gold": {"joy": 2}}, "label 'joy' has weight 2; expected a number above 0 and at most 1"),
        ({"gold": {"joy": float("nan")}}, "label 'joy' has weight nan"),
        ({"reference": {"speaker": "Bo"}}, "reference: missing labels, text"),
        ({"persona": 3}, "persona is 3; expected str"),
    ],
)
def test_json_that_is_no_sample_says_what_is_wrong(change, message):
    record = build_inputs([TALK], MELD, rule="all")[0].to_json()
    with pytest.raises(ValueError) as caught:
        Sample.from_json({**record, **change})
    assert str(caught.value).startswith("sample 'meld/train/7/0'") and message in str(caught.value)
    with pytest.raises(ValueError, match="missing gold, split"):
        Sample.from_json({k: v for k, v in record.items() if k not in ("gold", "split")})


def test_shuffled_gold_is_a_permutation_inside_each_data_set():
    labels = MELD.labels * 6
    meld = [dialogue(("Ada", label), ("Bo", None), dialogue_id=str(i)) for i, label in enumerate(labels)]
    other = Dialogue(
        dataset="emorynlp", split="train", dialogue_id="x",
        turns=tuple(Turn(speaker=s, text="x", labels={"mad": 1.0}) for s in ("Ada", "Bo")),
    )  # fmt: skip
    samples = build_inputs([*meld, other], MELD, rule="all")
    shuffled = shuffle_gold(samples, seed=3)
    assert shuffled == shuffle_gold(samples, seed=3) != shuffle_gold(samples, seed=4)
    assert [s.id for s in shuffled] == [s.id for s in samples]
    golds = [s.gold for s in samples if s.dataset == "meld"]
    moved = [s.gold for s in shuffled if s.dataset == "meld"]
    assert golds != moved and sorted(map(str, golds)) == sorted(map(str, moved))
    assert [s.gold for s in shuffled if s.dataset == "emorynlp"] == [{"mad": 1.0}] * 2


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [("meld", MELD, (6126, 9766, 9989)), ("emorynlp", EMORYNLP, (5684, 7521, 7551))],
)
def test_real_training_inputs_have_exactly_the_papers_counts(selfemo_data, name, labels, expected):
    train = load_corpus(name, selfemo_data).splits["train"]
    rules = ("context_and_responder", "any_responder", "all")
    assert tuple(len(build_inputs(train, labels, rule=rule)) for rule in rules) == expected
    samples = build_inputs(train, labels, rule="context_and_responder")
    assert len({sample.id for sample in samples}) == expected[0]
    assert all(len(s.history) > 1 and s.reference.speaker == s.responder != s.target_speaker for s in samples)

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfemo_jax.data.grammar import (
    CODE_TABLE,
    CODES,
    acceptable,
    answers_to_arrays,
    class_mask,
    gold_to_array,
    parse,
    parse_lenient,
    predicted_label,
    serialise,
)
from selfemo_jax.data.lenient import lenient_label, resolve_label

MELD = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
EMORY = ("joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared")
IEMOCAP = ("happy", "sad", "neutral", "angry", "excited", "frustrated")


def answer(emotion="joy:0.80", self_emotion="fear:0.30", response="So am I!", between="\n"):
    return (
        f"<emotion>{emotion}</emotion>{between}<self_emotion>{self_emotion}</self_emotion>{between}"
        f"<response>{response}</response>"
    )


def codes(text, **options):
    return parse(text, inventory=MELD, **options).codes


# (completion, options, codes): a completion written for each code, and neighbours that must not have it.
CASES = [
    (answer(), {}, ()),
    (answer(), {"finished": False}, ("E_LENGTH",)),
    ("<emotion>joy:0.8</emo", {"finished": False}, ("E_LENGTH", "E_NO_EMOTION", "E_NO_SELF", "E_NO_REPLY")),
    (answer(), {"thinking": True}, ("E_NO_THINK",)),
    ("<think>She laughs.</think>\n" + answer(), {"thinking": True}, ()),
    ("<think>\n\n</think>\n\n" + answer(), {"thinking": False}, ()),
    ("She laughs.</think>" + answer(), {"thinking": True, "think_open_in_prompt": True}, ()),
    ("<think>She laughs.</think>" + answer(), {"thinking": True, "think_open_in_prompt": True}, ()),
    ("<think>a tag <emotion> in a thought</think>" + answer(), {"thinking": True}, ()),
    ("<think>She laughs. " + answer(), {"thinking": True}, ("E_NO_THINK_END",)),
    (
        "She laughs. " + answer(),
        {"thinking": True, "think_open_in_prompt": True},
        ("E_NO_THINK_END", "E_TRAILING"),
    ),
    ("<think>a</think><think>b</think>" + answer(), {}, ("E_MULTI_THINK",)),
    ("<think>a<think>b</think>" + answer(), {}, ("E_MULTI_THINK",)),
    ("Sure.</think>" + answer(), {}, ("E_MULTI_THINK",)),
    ("x <think>a</think>" + answer(), {"think_open_in_prompt": True}, ("E_MULTI_THINK",)),
    ("Well: <think>a</think>" + answer(), {}, ("E_TRAILING",)),
    (answer().replace("<emotion>joy:0.80</emotion>\n", ""), {}, ("E_NO_EMOTION",)),
    (answer().replace("</emotion>", "", 1), {}, ("E_NO_EMOTION",)),
    (answer().replace("emotion>", "EMOTION>"), {}, ("E_NO_EMOTION", "E_NO_SELF", "E_TRAILING")),
    (answer().replace("<self_emotion>fear:0.30</self_emotion>\n", ""), {}, ("E_NO_SELF",)),
    (answer(self_emotion=" "), {}, ("E_NO_SELF", "E_EMPTY_PAIRS")),
    (answer().replace("<response>So am I!</response>", ""), {}, ("E_NO_REPLY",)),
    (answer(response=" \n"), {}, ("E_NO_REPLY",)),
    (answer() + "\n<emotion>joy:0.8</emotion>", {}, ("E_DUP_BLOCK",)),
    (answer(response="a <response> b"), {}, ("E_DUP_BLOCK", "E_REPLY_TAG")),
    (
        "<self_emotion>joy:0.8</self_emotion><emotion>joy:0.8</emotion><response>Ha.</response>",
        {},
        ("E_ORDER",),
    ),
    (
        "</emotion>joy:0.8<emotion><self_emotion>joy:0.8</self_emotion><response>Ha.</response>",
        {},
        ("E_ORDER", "E_TRAILING"),
    ),
    (
        "<emotion>joy:0.8<self_emotion>joy:0.8</self_emotion></emotion><response>Ha.</response>",
        {},
        ("E_ORDER", "E_PAIR"),
    ),
    (answer(emotion=""), {}, ("E_EMPTY_PAIRS",)),
    (answer(emotion="joy:0, fear:0.00"), {}, ("E_EMPTY_PAIRS",)),
    (answer(emotion="joy:0.80, :0.20"), {}, ("E_PAIR",)),
    (answer(emotion="joy:0.80,"), {}, ("E_PAIR",)),
    (answer(emotion="<b>:0.80"), {}, ("E_PAIR",)),
    *(
        (answer(emotion=f"joy{w}"), {}, ("E_WEIGHT",))
        for w in ("", ":", ":high", ":-0.5", ":1.2", ":nan", ":80%")
    ),
    *((answer(emotion=f"joy:{w}"), {}, ("E_WEIGHT",)) for w in (".5", "1.", "0.12345", "1e-1", "0x1", "٠.٥")),
    (answer(emotion="joy:0.80, fear:0"), {}, ("E_WEIGHT",)),
    *((answer(emotion=f"joy:{w}"), {}, ()) for w in ("1", "1.0", "1.0000", "0.5", "0.0001")),
    (answer(emotion="joy:0.4, fear:0.3, anger:0.2, sadness:0.1"), {}, ("E_TOO_MANY",)),
    (answer(emotion="joy:0.4, fear:0.3"), {"max_labels": 1}, ("E_TOO_MANY",)),
    (answer(emotion="joy:0.4, fear:0.3, anger:0.2"), {}, ()),
    (answer(emotion="joy:0.4, joy:0.3"), {}, ("E_DUP_LABEL",)),
    (answer(emotion="joy:0.4, Joy:0.3"), {}, ("E_DUP_LABEL", "W_CASE")),
    (answer() + " Done.", {}, ("E_TRAILING",)),
    ("Here: " + answer(), {}, ("E_TRAILING",)),
    (answer(between=" and "), {}, ("E_TRAILING",)),
    ("<think>a</think> so " + answer(), {}, ("E_TRAILING",)),
    (answer(response="I am < Emotion > al"), {}, ("E_REPLY_TAG",)),
    (answer(response="Is 3 < 4 or 4 <thinking> 3?"), {}, ("W_MARKUP",)),
    (answer(self_emotion="bliss:0.30"), {}, ("E_UNK_LABEL",)),
    (answer(emotion="bliss:0.30"), {}, ("W_UNK_LABEL",)),
    (answer(emotion="joyful:0.30"), {}, ("W_UNK_LABEL", "W_ALIAS")),
    (answer(self_emotion="joyful:0.30"), {}, ("E_UNK_LABEL", "W_ALIAS")),
    (answer(emotion="Joy:0.80"), {}, ("W_CASE",)),
    (answer(emotion=" joy : 0.80 ,fear:0.2"), {}, ("W_SPACE",)),
    (answer(between="\t"), {}, ("W_SPACE",)),
    (answer(between="  \n"), {}, ()),
    (answer(response="joy: 0.8, you know"), {}, ("W_LEAK",)),
    (answer(response="My anger:.9!"), {}, ("W_LEAK",)),
    (answer(response="Joyful:1"), {}, ("W_LEAK",)),
    (answer(response="At 7:30, with joy: always."), {}, ()),
    (answer(response="<|im_end|> Hi <b>you</b>"), {}, ("W_MARKUP",)),
    (answer(response="I <3 you, a<b and c>d"), {}, ()),
    (answer(response="caf\ufffd"), {}, ("W_BYTES",)),
]


@pytest.mark.parametrize(("text", "options", "expected"), CASES)
def test_each_completion_has_exactly_these_codes(text, options, expected):
    parsed = parse(text, inventory=MELD, **options)
    assert parsed.codes == tuple(sorted(expected, key=CODES.index))
    assert parsed.valid == all(code.startswith("W_") or code == "E_UNK_LABEL" for code in expected)


def test_every_code_of_the_table_has_a_completion():
    assert {code for _, _, expected in CASES for code in expected} == set(CODES) == set(CODE_TABLE)


def test_the_parts_of_a_valid_answer_are_read_as_written():
    text = "<think>\nShe keeps asking.\n</think>\n\n" + answer(
        "disgust:0.85, sadness:0.4", "Neutral:1", " Two\nlines. "
    )
    parsed = parse(text, inventory=MELD, thinking=True)
    assert parsed.emotion == (("disgust", 0.85), ("sadness", 0.4))
    assert parsed.self_emotion == (("neutral", 1.0),)
    assert (parsed.response, parsed.think) == ("Two\nlines.", "She keeps asking.")


def test_an_invalid_answer_still_shows_what_could_be_read():
    parsed = parse("<emotion>joy:0.80, fear:x</emotion> <response>Hm.</response>", inventory=MELD)
    assert not parsed.valid
    assert parsed.emotion == (("joy", 0.8),)
    assert (parsed.self_emotion, parsed.response) == ((), "Hm.")


def test_labels_follow_the_inventory_of_the_prompt():
    assert parse(answer("joyful:0.8", "mad:0.2"), inventory=EMORY).codes == ()
    assert parse(answer("Joyful:0.8", "mad:0.2"), inventory=["Joyful", "Mad"]).codes == ("W_CASE",)


# Property: what the serialiser writes, the parser reads.

grid = st.integers(1, 100).map(lambda cents: cents / 100)


@st.composite
def pair_lists(draw):
    labels = draw(st.lists(st.sampled_from(MELD), min_size=1, max_size=3, unique=True))
    pairs = [(label, draw(grid)) for label in labels]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


replies = (
    st.text(st.characters(exclude_characters="<", exclude_categories=("Cs", "Cc")), min_size=1)
    .map(str.strip)
    .filter(bool)
)


@settings(max_examples=400, deadline=None)
@given(pair_lists(), pair_lists(), replies, st.one_of(st.none(), replies))
def test_parse_gives_back_what_was_serialised(emotion, self_emotion, response, think):
    parsed = parse(
        serialise(emotion, self_emotion, response, think=think), inventory=MELD, thinking=think is not None
    )
    assert parsed.valid, parsed.codes
    assert (parsed.emotion, parsed.self_emotion) == (emotion, self_emotion)
    assert (parsed.response, parsed.think) == (response, think or "")
    assert not set(parsed.codes) - {"W_LEAK", "W_BYTES"}


def test_the_canonical_text_has_falling_weights_with_two_decimals():
    text = serialise({"fear": 0.3, "joy": 0.85, "anger": 0.3}, [("neutral", 1)], "Yes.", think="hm")
    assert text == (
        "<think>\nhm\n</think>\n\n<emotion>joy:0.85, fear:0.30, anger:0.30</emotion>\n"
        "<self_emotion>neutral:1.00</self_emotion>\n<response>Yes.</response>"
    )
    assert "joy:0.01" in serialise({"joy": 0.001}, {"joy": 1.0}, "Yes.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {"joy": 1.0}, "Hi."), "emotion has no label"),
        (({"joy": 1.0}, {"joy": 0.0}, "Hi."), "above 0, at most 1"),
        (({"joy": math.nan}, {"joy": 1.0}, "Hi."), "above 0, at most 1"),
        (({"joy:1,fear": 1.0}, {"joy": 1.0}, "Hi."), "lower-case word"),
        (([("joy", 0.5), ("joy", 0.4)], {"joy": 1.0}, "Hi."), "twice"),
        (({"joy": 1.0}, {"joy": 1.0}, " "), "empty"),
        (({"joy": 1.0}, {"joy": 1.0}, "a </response> b"), "tag"),
        (({"joy": 1.0}, {"joy": 1.0}, "a < /Emotion> b"), "tag"),
    ],
)
def test_the_serialiser_refuses_what_the_parser_would(arguments, message):
    with pytest.raises(ValueError, match=message):
        serialise(*arguments)


# The class that is scored, and what may become a new input.


def test_the_largest_weight_wins_and_the_first_listed_among_equals():
    def predict(emotion):
        return predicted_label(parse(answer(emotion), inventory=MELD))

    assert predict("fear:0.20, joy:0.70") == "joy"
    assert predict("fear:0.50, joy:0.50") == "fear"
    assert predict("bliss:0.90, joy:0.10") is None
    assert predict("bliss:0.10, joy:0.90") == "joy"
    assert predict("joy:2") is None


def test_only_clean_answers_are_acceptable():
    def accept(**parts):
        return acceptable(parse(answer(**parts), inventory=MELD))

    assert accept() and accept(emotion=" JOY :0.8")
    assert not accept(emotion="bliss:0.1, joy:0.8")
    assert not accept(self_emotion="bliss:0.1, joy:0.8")
    assert not accept(response="fear: 0.3")
    assert not accept(response="<b>fear</b>")
    assert not accept(response="\ufffd")
    assert not accept(emotion="joy:2")


# Arrays.


def test_weights_land_in_the_slot_of_their_label_and_unknown_ones_in_the_last():
    groups = [
        [
            parse(answer("anger:0.50, neutral:0.25"), inventory=MELD),
            parse(answer("bliss:0.25, awe:0.50, joy:0.75"), inventory=MELD),
        ],
        [
            parse(answer("sad:0.5"), inventory=IEMOCAP),
            parse(answer("happy:7"), inventory=IEMOCAP),
            parse(answer("angry:1", "bliss:1"), inventory=IEMOCAP),
        ],
    ]
    weights, valid = answers_to_arrays(groups, [MELD, IEMOCAP], num_classes=8)
    expected = np.zeros((2, 3, 8), np.float32)
    expected[0, 0, [0, 6]] = 0.25, 0.5
    expected[0, 1, [4, 7]] = 0.75, 0.75
    expected[1, 0, 1] = 0.5
    expected[1, 2, 3] = 1.0
    np.testing.assert_array_equal(weights, expected)
    assert weights.dtype == np.float32
    assert valid.tolist() == [[True, True, False], [True, False, True]]


def test_gold_and_mask_use_the_same_slots():
    gold = gold_to_array([{"anger": 0.85, "joy": 0.4}, {"sad": 1.0}], [MELD, IEMOCAP], num_classes=8)
    assert gold[0].tolist() == pytest.approx([0, 0, 0, 0, 0.4, 0, 0.85, 0])
    assert gold[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert class_mask([MELD, IEMOCAP], num_classes=8).astype(int).tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
    ]


def test_arrays_refuse_labels_and_inventories_that_do_not_fit():
    with pytest.raises(ValueError, match="'bliss' is not in the inventory"):
        gold_to_array([{"bliss": 1.0}], [MELD], num_classes=8)
    with pytest.raises(ValueError, match="do not fit 7 classes"):
        class_mask([MELD], num_classes=7)
    with pytest.raises(ValueError, match="twice"):
        class_mask([("joy", "Joy")], num_classes=7)


# Lenient reading.


def lenient(text, dataset="meld", inventory=MELD, **options):
    return parse_lenient(text, dataset=dataset, inventory=inventory, **options)


def test_lenient_forgives_the_form_of_the_emotion_field():
    assert lenient(answer("sad:0.30, Happy:0.70")) == (("joy", 0.7), ("sadness", 0.3))
    assert lenient(answer("joy:80%")) == (("joy", 1.0),)
    assert lenient(answer("**Joy**")) == (("joy", 1.0),)
    assert lenient(answer("joy:0.4, happy:0.4, fear:0.6")) == (("joy", 0.8), ("fear", 0.6))
    assert lenient(answer("joy:0.4, fear:0.3, anger:0.2, sadness:0.9"), max_labels=2) == (
        ("sadness", 0.9),
        ("joy", 0.4),
    )
    assert lenient("Well: <emotion>joy:0.4</emotion> and") == (("joy", 0.4),)


def test_lenient_does_not_forgive_a_missing_field_or_an_unfinished_thought():
    assert lenient("joy") == ()
    assert lenient(answer(""), finished=True) == ()
    assert lenient(answer("joy:0, fear:0.0")) == ()
    assert lenient(answer(), finished=False) == ()
    assert lenient("<think>hm " + answer()) == ()
    assert lenient("hm " + answer(), think_open_in_prompt=True) == ()
    assert lenient("hm </think>" + answer(), think_open_in_prompt=True) == (("joy", 0.8),)
    assert lenient("hm </think>" + answer()) == ()
    assert lenient(answer() + answer()) == ()
    assert lenient("<response>a</response>" + "<emotion>joy:0.4</emotion>") == ()


def test_a_label_that_cannot_be_mapped_makes_the_answer_wrong_if_it_is_the_largest():
    pairs = lenient(answer("peaceful:0.9, joy:0.1"))
    assert pairs == (("peaceful", 0.9), ("joy", 0.1))
    assert lenient_label(pairs, MELD) is None
    assert lenient_label(lenient(answer("peaceful:0.1, glad:0.9")), MELD) == "joy"
    assert lenient_label((), MELD) is None


@pytest.mark.parametrize(
    ("text", "dataset", "inventory", "expected"),
    [
        ("“Joy”", "meld", MELD, ("joy", "exact")),
        ("Ｊｏｙ.", "meld", MELD, ("joy", "exact")),
        ("unhappy", "iemocap", IEMOCAP, ("sad", "synonym")),
        ("grossed out", "meld", MELD, ("disgust", "synonym")),
        ("frustrated", "meld", MELD, ("anger", "synonym")),
        ("frustrated", "iemocap", IEMOCAP, ("frustrated", "exact")),
        ("frustrated", "emorynlp", EMORY, ("mad", "synonym")),
        ("calm", "meld", MELD, ("neutral", "synonym")),
        ("calm", "emorynlp", EMORY, ("peaceful", "synonym")),
        ("anxious", "iemocap", IEMOCAP, (None, "none")),
        ("a rather angry tone", "iemocap", IEMOCAP, ("angry", "search")),
        ("not sad but angry", "iemocap", IEMOCAP, ("angry", "search")),
        ("he isn’t sad", "iemocap", IEMOCAP, (None, "none")),
        ("sad and angry", "iemocap", IEMOCAP, (None, "ambiguous")),
        ("joyfully", "emorynlp", EMORY, (None, "none")),
        ("surprised", "emorynlp", EMORY, (None, "out_of_set")),
        ("glad", "my_own", ("glad", "low"), ("glad", "exact")),
        ("happy", "my_own", ("glad", "low"), (None, "none")),
        ("", "iemocap", IEMOCAP, (None, "none")),
    ],
)
def test_words_are_mapped_per_dataset_without_substrings(text, dataset, inventory, expected):
    assert resolve_label(text, dataset=dataset, inventory=inventory) == expected


@pytest.mark.parametrize(
    ("text", "dataset", "inventory", "expected"),
    [
        ("unhappy", "iemocap", IEMOCAP, "happy"),
        ("not sad but angry", "iemocap", IEMOCAP, "sad"),
        ("", "iemocap", IEMOCAP, "sad"),
        ("joy", "emorynlp", EMORY, "mad"),
        ("joyful", "meld", MELD, "joy"),
        ("angry", "meld", MELD, "anger"),
        (answer("angry:0.9", "sad:0.3", "fear"), "meld", MELD, "anger"),
    ],
)
def test_instructerc_scoring_never_leaves_an_answer_invalid(text, dataset, inventory, expected):
    assert parse_lenient(text, dataset=dataset, inventory=inventory, scoring="instructerc") == (
        (expected, 1.0),
    )


def test_instructerc_scoring_knows_the_labels_as_our_prompt_asks_for_them():
    for dataset, inventory in (("meld", MELD), ("emorynlp", EMORY), ("iemocap", IEMOCAP)):
        for label in inventory:
            assert _instructerc(answer(f"{label}:1.00"), dataset, inventory) == label
            for other in set(inventory) - {label}:
                found = _instructerc(answer(f"{label}:0.70, {other}:0.20"), dataset, inventory)
                assert found == label, (dataset, label, other)


def _instructerc(text, dataset, inventory):
    ((label, _),) = parse_lenient(text, dataset=dataset, inventory=inventory, scoring="instructerc")
    return label

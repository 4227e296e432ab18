"""Rules for the text of a reply: near-duplicates, copies, length, language, labels inside the text."""

import random
from dataclasses import replace

import pytest

from selfemo_jax.selfplay import hygiene
from selfemo_jax.selfplay.hygiene import (
    ReplyIndex,
    is_foreign,
    jaccard,
    repeats,
    text_problem,
    trigrams,
)
from selfemo_jax.settings.selfplay import Hygiene
from tests.fabricated import sample

WORDS = [
    "ferry",
    "oar",
    "tide",
    "rope",
    "sail",
    "wind",
    "north",
    "left",
    "row",
    "far",
    "home",
    "calm",
    "rain",
    "deck",
    "crew",
    "map",
]
PARENT = sample(gold={"joy": 1.0})


def test_near_duplicates_share_four_fifths_of_their_three_word_runs():
    base = "one two three four five six seven eight nine ten eleven twelve"  # ten runs of three words
    index = ReplyIndex(["nothing in common here", base])
    assert index.near(base.upper().replace(" ", ", "))
    assert index.near(base + " thirteen")  # 10 of 11 runs
    assert index.near(base + " thirteen fourteen")  # 10 of 12: .83
    assert not index.near(base + " thirteen fourteen fifteen")  # 10 of 13: .77
    assert not index.near("twelve eleven ten")


def test_short_replies_are_duplicates_when_their_words_are_the_same():
    index = ReplyIndex(["Oh, really?"])
    assert index.near("oh really!") and not index.near("oh") and not index.near("oh really now")


def random_replies(number: int, seed: int) -> list[str]:
    """Replies of 3 to 14 words; half are an earlier one with up to three words changed."""
    rng, found = random.Random(seed), []
    for _ in range(number):
        line = [rng.choice(WORDS) for _ in range(rng.randint(3, 14))]
        if found and rng.random() < 0.5:
            line = rng.choice(found).split()
            for _ in range(rng.randint(0, 3)):
                line[rng.randrange(len(line))] = rng.choice(WORDS)
        found.append(" ".join(line))
    return found


@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.8, 1.0])
def test_the_index_finds_what_an_exact_comparison_with_every_reply_finds(threshold):
    index, grams = ReplyIndex(threshold=threshold), []
    agreed = 0
    for reply in random_replies(400, seed=5):
        exact = any(jaccard(trigrams(reply), other) >= threshold for other in grams)
        assert index.near(reply) == exact
        index.add(reply)
        grams.append(trigrams(reply))
        agreed += exact
    assert 20 < agreed < 380


def test_replies_that_repeat_are_seen_by_another_measure_than_that_of_acceptance():
    told = "I do not know what you mean."
    replies = [told, "Then we row home.", "I do not know what you want.", "No.", "NO!", "Oh no."]
    # Runs of five letters: 23 and 23, of which the 19 up to "you " are common: 19 of 27.
    assert repeats(replies) == [False, False, True, False, True, False]
    assert not ReplyIndex(replies[:2]).near(replies[2])
    assert repeats([told, "Do you know what I mean?"]) == [False, False] and repeats([]) == []


def test_repetitions_are_seen_across_blocks_of_comparison(monkeypatch):
    replies = random_replies(300, seed=2)
    whole = repeats(replies)
    monkeypatch.setattr(hygiene, "BLOCK", 7)
    assert repeats(replies) == whole and 20 < sum(whole) < 280
    slow = [hygiene._letters(reply) for reply in replies]
    expected = [
        any(len(one & other) / len(one | other) >= hygiene.ALIKE - 1e-6 for other in slow[:place])
        for place, one in enumerate(slow)
    ]
    assert whole == expected


def problem(reply: str, declared=("fear",), **rules) -> str | None:
    return text_problem(reply, PARENT, declared, replace(Hygiene(), **rules))


def test_length_is_in_words_and_both_ends_are_allowed():
    assert problem("row") is None and problem("") == "length"
    assert problem("row far", min_words=3) == "length" and problem("row far left", min_words=3) is None
    assert problem("row far left", max_words=2) == "length"


@pytest.mark.parametrize(
    ("reply", "declared", "any_label"),
    [
        ("I am in fear of it", "label_word", "label_word"),
        ("FEAR? Never.", "label_word", "label_word"),
        ("What a surprise", None, "label_word"),
        ("Fearless as ever", None, None),
    ],
)
def test_a_reply_may_not_name_the_emotion_that_it_declares(reply, declared, any_label):
    assert problem(reply) == declared
    assert problem(reply, label_words="any") == any_label
    assert problem(reply, label_words="keep") is None


@pytest.mark.parametrize(
    "reply",
    [
        "Das ist mir ganz egal, ich gehe jetzt.",
        "Je ne sais pas quoi te dire.",
        "No tengo la menor idea de eso.",
        "我 不 知道 你 在 说 什么",
    ],
)
def test_a_reply_in_another_language_is_rejected(reply):
    assert problem(reply) == "language" and problem(reply, language=None) is None


def test_short_and_odd_english_is_not_foreign():
    for reply in ("Hm, ja.", "Nein! Never!", "Well, I guess so then.", "the the the the the"):
        assert not is_foreign(reply, "english")
    assert not is_foreign("Das ist mir ganz egal, ich gehe jetzt.", "german")


def test_an_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="klingon.*english"):
        is_foreign("one two three four", "klingon")

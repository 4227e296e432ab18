"""Biographies: what is counted, and that nothing of the input's own dialogue or of an evaluation split is
told."""

from collections import Counter

import pytest

from selfemo_jax.data.biographies import (
    LINES_READ,
    MIN_LINES,
    Lines,
    count_lines,
    describe,
    expert_messages,
    kept_words,
    lines_to_read,
)
from selfemo_jax.data.dialogues import MELD, Dialogue, Turn
from selfemo_jax.data.inputs import Sample, build_inputs


def dialogue(name: str, *turns: tuple[str, str, str | None], split: str = "train") -> Dialogue:
    made = tuple(
        Turn(speaker=speaker, text=text, labels={label: 1.0} if label else None)
        for speaker, text, label in turns
    )
    return Dialogue(dataset="meld", split=split, dialogue_id=name, turns=made)


def many(
    number: int, label: str = "joy", text: str = "what lovely weather", name: str = "d"
) -> dict[str, Dialogue]:
    """Dialogues in which Ada speaks ``number`` lines in all, ten a dialogue, and Bo says something else."""
    found = {}
    for start in range(0, number, 10):
        lines = [("Ada", text, label), ("Bo", "nonsense about boats", "anger")] * min(10, number - start)
        found[f"meld/train/{name}{start}"] = dialogue(f"{name}{start}", *lines)
    return found


def asked(dialogue: Dialogue, speaker: str) -> Sample:
    samples = build_inputs([dialogue], MELD, rule="all")
    return next(s for s in samples if s.target_speaker == speaker)


def test_a_biography_says_how_one_feels_and_what_one_says_more_than_others():
    lines = Lines(
        num=40,
        num_words=120,
        labels=Counter(joy=21, anger=16, fear=2, neutral=1),
        words=Counter(weather=12, boats=2),
    )
    common = {"weather": 0.01, "boats": 0.001}
    # 21 of 40 is 52.5 %, told as 50; 2 of 40 rounds to nothing; boats was said too rarely.
    assert describe("Ada", lines, common) == "Ada: 3 words a line; joy 50%, anger 40%; says weather"


def test_speakers_with_few_lines_have_none():
    train = many(MIN_LINES - 1)
    assert count_lines(train).about(asked(dialogue("e", ("Ada", "Hm.", "joy"), split="test"), "Ada")) is None
    train = many(MIN_LINES)
    biographies = count_lines(train)
    assert biographies.about(asked(dialogue("e", ("Ada", "Hm.", "joy"), split="test"), "Ada")).startswith(
        "Ada: "
    )
    assert biographies.about(asked(dialogue("e", ("Zoe", "Hm.", "joy"), split="test"), "Zoe")) is None


def test_a_training_input_is_told_nothing_of_its_own_dialogue():
    train = many(50) | {"meld/train/own": dialogue("own", *[("Ada", "terrible thunder", "sadness")] * 30)}
    biographies = count_lines(train)
    own = biographies.about(asked(train["meld/train/own"], "Ada"))
    assert "joy 100%" in own and "sadness" not in own and "thunder" not in own
    elsewhere = biographies.about(asked(train["meld/train/d0"], "Ada"))
    assert "sadness 40%" in elsewhere and "thunder" in elsewhere
    # Without its own dialogue Ada has too few lines left to be described.
    few = many(20) | {"meld/train/own": dialogue("own", *[("Ada", "terrible thunder", "sadness")] * 15)}
    assert count_lines(few).about(asked(few["meld/train/own"], "Ada")) is None


def test_the_label_of_a_line_does_not_change_what_its_own_prompt_says():
    for label in ("joy", "fear"):
        train = many(50) | {
            "meld/train/own": dialogue("own", ("Ada", "Well, well.", label), ("Bo", "Hm.", "joy"))
        }
        told = count_lines(train).told([asked(train["meld/train/own"], "Ada")])[0].about
        assert told == "Ada: 3 words a line; joy 100%; says lovely, weather, what"


def test_other_splits_are_refused_as_a_source():
    held = {"meld/test/e": dialogue("e", ("Ada", "Hm.", "joy"), split="test")}
    with pytest.raises(ValueError, match="training dialogues alone; found meld/test/e"):
        count_lines(many(30) | held)


def test_experts_read_lines_without_labels_of_known_speakers():
    read = lines_to_read(many(60, label="disgust"), seed=0)
    assert set(read) == {("meld", "Ada"), ("meld", "Bo")}
    assert len(read["meld", "Ada"]) == LINES_READ
    assert lines_to_read(many(60), seed=0) == lines_to_read(many(60), seed=0)
    _, user = expert_messages("Ada", read["meld", "Ada"])
    assert "what lovely weather" in user and "disgust" not in user
    assert kept_words("<think>Hm.</think> Ada is\ncalm. ") == "Ada is calm."
    assert kept_words(" \n") is None
    assert len(kept_words("word " * 500).split()) == 60


def test_samples_without_a_biography_are_stored_as_before():
    one = asked(dialogue("e", ("Ada", "Hm.", "joy")), "Ada")
    assert "about" not in one.to_json() and Sample.from_json(one.to_json()) == one
    told = count_lines(many(30)).told([one])[0]
    assert told.to_json()["about"] == told.about and Sample.from_json(told.to_json()) == told

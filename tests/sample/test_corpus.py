"""The bundled corpus keeps what its users count on: labels, balance, no leakage, a fair level of ease."""

import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from selfemo_jax import sample

LABELS = {
    "meld": ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"],
    "emorynlp": ["joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared"],
    "iemocap": ["happy", "sad", "neutral", "angry", "excited", "frustrated"],
}

# Every label of the three lists with its inflections, and words that hold one.
LABEL_WORDS = re.compile(
    r"\b(?:(?:re|en|over)?joy\w*|sad|sad(?:ness|den\w*|der|dest|ly)|ang(?:er\w*|ry|rily|rier|riest)"
    r"|mad|mad(?:ly|ness|der|dest|den\w*)|fear\w*|afraid|surpris\w*|disgust\w*|neutral\w*|peace\w*|power\w*"
    r"|scar(?:e|ed|es|y|ing|ier|iest)|(?:un)?happ(?:y|ier|iest|ily|iness)|excit\w*|frustrat\w*)\b",
    re.IGNORECASE,
)


def dialogues(name: str, split: str) -> list[dict]:
    text = (sample.dataset(name) / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def turns(name: str, split: str) -> list[dict]:
    return [turn for dialogue in dialogues(name, split) for turn in dialogue["turns"]]


def all_dialogues() -> Iterator[tuple[str, str, dict]]:
    for name in sample.NAMES:
        for split in sample.SPLITS:
            for dialogue in dialogues(name, split):
                yield name, split, dialogue


def texts(dialogue: dict) -> list[str]:
    return [dialogue["theme"], *dialogue["personas"].values(), *(turn["text"] for turn in dialogue["turns"])]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def test_corpus_holds_enough_dialogues_utterances_and_crowds():
    found = [dialogue for _, _, dialogue in all_dialogues()]
    assert len(found) >= 120
    assert sum(len(dialogue["turns"]) for dialogue in found) >= 1000
    assert sum(len({turn["speaker"] for turn in dialogue["turns"]}) >= 3 for dialogue in found) >= 20
    assert all(6 <= len(dialogue["turns"]) <= 12 for dialogue in found)


def test_dialogue_ids_are_unique_and_splits_keep_their_shares():
    ids = [dialogue["dialogue_id"] for _, _, dialogue in all_dialogues()]
    assert len(set(ids)) == len(ids)
    for name in sample.NAMES:
        sizes = [len(dialogues(name, split)) for split in sample.SPLITS]
        for size, share in zip(sizes, (0.60, 0.15, 0.25), strict=True):
            assert abs(size / sum(sizes) - share) < 0.03


def test_every_speaker_has_a_persona_and_nobody_else_has():
    for _, _, dialogue in all_dialogues():
        assert set(dialogue) == {"dialogue_id", "theme", "personas", "turns"}
        assert dialogue["theme"].strip()
        assert set(dialogue["personas"]) == {turn["speaker"] for turn in dialogue["turns"]}
        assert all(30 <= len(persona) <= 600 for persona in dialogue["personas"].values())


@pytest.mark.parametrize("name", sample.NAMES)
def test_labels_are_the_sets_own_and_near_balance(name):
    described = json.loads((sample.dataset(name) / "dataset.json").read_text(encoding="utf-8"))
    assert described == {"name": f"sample_{name}", "labels": LABELS[name]}
    counts = {split: Counter(turn["label"] for turn in turns(name, split)) for split in sample.SPLITS}
    for split in sample.SPLITS:
        assert set(counts[split]) == set(LABELS[name])
    total = sum(counts.values(), Counter())
    shares = {label: count / total.total() for label, count in total.items()}
    assert max(shares.values()) <= 0.25, shares
    assert min(shares.values()) >= 0.08, shares


@pytest.mark.parametrize(
    "word", ["joyfully", "sadder", "Mad", "fearing", "surprised", "peaceful", "powers", "scary", "unhappy"]
)
def test_label_words_are_recognised_in_any_form(word):
    assert LABEL_WORDS.search(f"so {word}, yes")


def test_no_text_names_a_label():
    assert not LABEL_WORDS.search("it made us scarce, as anglers happen to say, madam of the saddle")
    for _, _, dialogue in all_dialogues():
        for text in (*texts(dialogue), *dialogue["personas"]):
            assert not LABEL_WORDS.search(text), (dialogue["dialogue_id"], text)


def test_utterances_are_short_and_distinct_within_a_dialogue():
    for _, _, dialogue in all_dialogues():
        spoken = [turn["text"] for turn in dialogue["turns"]]
        assert len(set(spoken)) == len(spoken)
        for text in spoken:
            assert text == text.strip() and 4 <= len(words(text)) <= 16, (dialogue["dialogue_id"], text)


def test_no_six_words_in_a_row_stand_in_two_dialogues():
    seen: dict[tuple[str, ...], str] = {}
    for _, _, dialogue in all_dialogues():
        for text in texts(dialogue):
            spoken = words(text)
            for gram in zip(*(spoken[i:] for i in range(6)), strict=False):
                first = seen.setdefault(gram, dialogue["dialogue_id"])
                assert first == dialogue["dialogue_id"], (first, dialogue["dialogue_id"], " ".join(gram))


def test_bag_of_words_learns_something_of_each_set_but_not_all():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    hits, total, majority_hits = 0.0, 0, 0
    for name in sample.NAMES:
        train, test = turns(name, "train"), turns(name, "test")
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=1.0, max_iter=1000))
        model.fit([turn["text"] for turn in train], [turn["label"] for turn in train])
        gold = [turn["label"] for turn in test]
        accuracy = model.score([turn["text"] for turn in test], gold)
        majority = Counter(turn["label"] for turn in train).most_common(1)[0][0]
        assert gold.count(majority) / len(gold) < 0.30
        # A chance level of 1/7 and a ceiling that a model can only pass with more than words.
        assert 0.45 <= accuracy <= 0.70, (name, accuracy)
        hits += accuracy * len(gold)
        majority_hits += gold.count(majority)
        total += len(gold)
    assert majority_hits / total < hits / total <= 0.70


def test_an_unknown_part_is_refused_by_name():
    with pytest.raises(ValueError, match="sample/other does not exist.*meld, emorynlp, iemocap"):
        sample.dataset("other")

"""What a score is measured against: the most frequent label, a random draw, and a linear model of the words.

All learn from the training dialogues of the run, after decontamination where that is on, and answer every
input of the split. The linear model reads the utterance alone: words and pairs of words with `?` and `!`,
TF-IDF, logistic regression with scikit-learn's defaults (C = 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from selfemo_jax.data.dialogues import LabelSet, heaviest_label
from selfemo_jax.data.inputs import Sample
from selfemo_jax.reporting.scores import accuracy, macro_f1, weighted_f1
from selfemo_jax.run_data import RunData
from selfemo_jax.scores import gold_label

NAMES = ("majority", "stratified random", "TF-IDF + LR")
DRAWS = 20
"""Random draws that the stratified score is the mean of."""
SCORES = {"accuracy": accuracy, "weighted_f1": weighted_f1, "macro_f1": macro_f1}
TFIDF = {"token_pattern": r"[a-z']+|[?!]", "ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What training utterances teach without the dialogue around them."""

    labels: LabelSet
    answers: tuple[str, ...]
    """The training labels themselves."""
    words: tuple[TfidfVectorizer, LogisticRegression] | None
    """None where the training labels are all the same."""


def yardsticks(data: RunData, splits: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, Scores]]:
    """Split -> data set -> yardstick -> accuracy, weighted F1, macro F1, and the same by ``parts``.

    Learned once for all splits: about a second for each of the paper's sets.
    """
    found: dict[str, dict[str, Scores]] = {split: {} for split in splits}
    for name, labels in data.label_sets.items():
        turns = [
            turn
            for root, dialogue in sorted(data.dialogues.items())
            if dialogue.dataset == name
            for turn in dialogue.turns
            if turn.labels
        ]
        texts, answers = [turn.text for turn in turns], [heaviest_label(turn.labels) for turn in turns]
        learned = learn(texts, answers, labels)
        for split in splits:
            if samples := data.evaluation.get(split, {}).get(name):
                found[split][name] = of_set(learned, samples, data.parts, seed=seed)
    return found


def learn(texts: Sequence[str], answers: Sequence[str], labels: LabelSet) -> Learned:
    """The yardsticks of a set from its training utterances and their labels."""
    words = None
    if len(set(answers)) > 1:
        # A small corpus would lose all its words to min_df.
        least = TFIDF["min_df"] if len(texts) >= 1000 else 1
        vectors = TfidfVectorizer(**(TFIDF | {"min_df": least}))
        # Several threads wait for one another on vectors as short as these.
        with threadpool_limits(1):
            model = LogisticRegression(C=1.0, max_iter=2000).fit(vectors.fit_transform(texts), answers)
        words = (vectors, model)
    return Learned(labels=labels, answers=tuple(answers), words=words)


def of_set(learned: Learned, samples: Sequence[Sample], parts: Mapping[str, str], *, seed: int) -> Scores:
    """Scores of the yardsticks of one set on inputs of it."""
    order = {label: place for place, label in enumerate(learned.labels.labels)}
    gold = np.array([order[gold_label(sample)] for sample in samples])
    where = np.array([parts.get(sample.root_id, "") for sample in samples])
    names = sorted(set(where) - {""}, reverse=True)
    found: Scores = {}
    for name, predicted in _predictions(learned, samples, seed).items():
        places = np.array([[order[label] for label in one] for one in predicted])
        found[name] = _scores(gold, places, len(order)) | {"parts": {}}
        if len(names) > 1:
            found[name]["parts"] = {
                part: _scores(gold[where == part], places[:, where == part], len(order)) for part in names
            }
    return found


def _scores(
    gold: Int[np.ndarray, " N"], predicted: Int[np.ndarray, "S N"], num_classes: int
) -> dict[str, float]:
    """Mean scores of S predictions of the same inputs."""
    confusions = np.zeros((len(predicted), num_classes, num_classes + 1))
    for confusion, one in zip(confusions, predicted, strict=True):
        np.add.at(confusion, (gold, one), 1)
    return {name: float(score(confusions).mean()) for name, score in SCORES.items()}


def _predictions(learned: Learned, samples: Sequence[Sample], seed: int) -> dict[str, list[Sequence[str]]]:
    """Yardstick -> one or more predictions of all inputs."""
    labels, answers, blank = learned.labels.labels, learned.answers, np.zeros((len(samples), 1))
    most = min(labels, key=lambda label: (-answers.count(label), labels.index(label)))
    random = DummyClassifier(strategy="stratified", random_state=np.random.RandomState(seed))
    random.fit(np.zeros((len(answers), 1)), answers)
    found: dict[str, list[Sequence[str]]] = {
        "majority": [[most] * len(samples)],
        "stratified random": [random.predict(blank).tolist() for _ in range(DRAWS)],
    }
    if learned.words:
        vectors, model = learned.words
        asked = vectors.transform([sample.history[-1][1] for sample in samples])
        found["TF-IDF + LR"] = [model.predict(asked).tolist()]
    return found

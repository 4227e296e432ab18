"""What a score is measured against: the most frequent label, a random draw, and a linear model of the words.

All learn from the training dialogues of the run, after decontamination where that is on, and answer every
input of the split. The linear model reads the utterance alone: words and pairs of words with `?` and `!`,
TF-IDF, logistic regression with scikit-learn's defaults (C = 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from selfemo_jax.data.dialogues import LabelSet, heaviest_label
from selfemo_jax.data.inputs import Sample
from selfemo_jax.run_data import RunData
from selfemo_jax.scores import gold_label, label_scores

NAMES = ("majority", "stratified random", "TF-IDF + LR")
DRAWS = 20
"""Random draws that the stratified score is the mean of."""
SCORES = ("accuracy", "weighted_f1", "macro_f1")
TFIDF = {"token_pattern": r"[a-z']+|[?!]", "ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}

Scores = dict[str, dict[str, Any]]


def yardsticks(data: RunData, split: str, *, seed: int = 0) -> dict[str, Scores]:
    """Data set -> yardstick -> accuracy, weighted F1, macro F1, and the same by ``parts`` of the split."""
    results = {}
    for name, samples in data.evaluation[split].items():
        turns = [
            turn
            for root, dialogue in sorted(data.dialogues.items())
            if dialogue.dataset == name
            for turn in dialogue.turns
            if turn.labels
        ]
        learned = ([turn.text for turn in turns], [heaviest_label(turn.labels) for turn in turns])
        results[name] = of_set(learned, samples, data.label_sets[name], data.parts, seed=seed)
    return results


def of_set(
    learned: tuple[Sequence[str], Sequence[str]],
    samples: Sequence[Sample],
    labels: LabelSet,
    parts: Mapping[str, str],
    *,
    seed: int,
) -> Scores:
    """The yardsticks of one set; ``learned`` are training utterances and their labels."""
    texts, answers = learned
    asked, gold = [sample.history[-1][1] for sample in samples], [gold_label(sample) for sample in samples]
    where = np.array([parts.get(sample.root_id, "") for sample in samples])

    def scores(predictions: Sequence[Sequence[str]], chosen: np.ndarray) -> dict[str, float]:
        wanted = [label for label, kept in zip(gold, chosen, strict=True) if kept]
        single = [
            label_scores(
                wanted, [label for label, kept in zip(predicted, chosen, strict=True) if kept], labels.labels
            )
            for predicted in predictions
        ]
        return {name: float(np.mean([s[name] for s in single])) for name in SCORES}

    found: Scores = {}
    for name, predictions in _predictions(texts, answers, asked, labels.labels, seed).items():
        found[name] = scores(predictions, np.ones(len(gold), bool))
        names = sorted(set(where) - {""}, reverse=True)
        found[name]["parts"] = (
            {part: scores(predictions, where == part) for part in names} if len(names) > 1 else {}
        )
    return found


def _predictions(
    texts: Sequence[str], answers: Sequence[str], asked: Sequence[str], labels: Sequence[str], seed: int
) -> dict[str, list[Sequence[str]]]:
    most = min(labels, key=lambda label: (-answers.count(label), labels.index(label)))
    random = DummyClassifier(strategy="stratified", random_state=np.random.RandomState(seed)).fit(
        np.zeros((len(answers), 1)), answers
    )
    blank = np.zeros((len(asked), 1))
    found: dict[str, list[Sequence[str]]] = {
        "majority": [[most] * len(asked)],
        "stratified random": [random.predict(blank).tolist() for _ in range(DRAWS)],
    }
    if len(set(answers)) > 1:
        # A small corpus would lose all its words to min_df.
        least = TFIDF["min_df"] if len(texts) >= 1000 else 1
        words = TfidfVectorizer(**(TFIDF | {"min_df": least}))
        model = LogisticRegression(C=1.0, max_iter=2000).fit(words.fit_transform(texts), answers)
        found["TF-IDF + LR"] = [model.predict(words.transform(asked)).tolist()]
    return found

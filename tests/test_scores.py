"""Scores of greedy answers, against counts by hand and against scikit-learn."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from selfemo_jax.data.dialogues import IEMOCAP, MELD
from selfemo_jax.data.grammar import parse, predicted_label
from selfemo_jax.data.lenient import lenient_label, parse_lenient
from selfemo_jax.rollout.engine import Group
from selfemo_jax.scores import Prediction, gold_label, greedy_answers, mean_wf1, score
from tests.fabricated import codec, completion, sample, settings, text

SETS = {"meld": MELD, "iemocap": IEMOCAP}
MAJORITY = {"meld": "neutral", "iemocap": "happy"}


def prediction(gold: str, said: str, *, labels=MELD, num_tokens=10) -> Prediction:
    one = sample(labels=labels, gold={gold: 1.0})
    answer = parse(said, inventory=labels.labels)
    pairs = parse_lenient(said, dataset=labels.name, inventory=labels.labels)
    return Prediction(
        sample=one,
        text=said,
        answer=answer,
        label=predicted_label(answer),
        lenient=lenient_label(pairs, labels.labels),
        num_prompt_tokens=5,
        num_tokens=num_tokens,
    )


def says(label: str, weight: float = 1.0) -> str:
    return text([(label, weight)])


HALF = text([("anger", 0.5), ("joy", 0.5)])
SIX = (
    ("joy", says("joy")),
    ("joy", HALF),
    ("joy", says("glee")),
    ("neutral", says("joy")),
    ("neutral", says("neutral")),
    ("anger", "<emotion>Anger</emotion> that is all"),
)
"""Right; half (the first of equals is wrong); outside the list; wrong; right; invalid, but readable."""


@pytest.fixture(scope="module")
def six() -> dict:
    predictions = [prediction(gold, said, num_tokens=n) for n, (gold, said) in enumerate(SIX, start=5)]
    return score(predictions, SETS, MAJORITY)["meld"]


def test_strict_scores_of_six_answers(six):
    # joy: 1 hit, 3 gold, 2 predicted: F1 2/5; neutral: 1, 2, 1: 2/3; anger: 0 hits.
    assert six["num"] == 6
    assert six["accuracy"] == pytest.approx(2 / 6)
    assert six["weighted_f1"] == pytest.approx((3 * 0.4 + 2 * 2 / 3) / 6)
    assert six["macro_f1"] == pytest.approx((0.4 + 2 / 3) / 7)
    assert six["invalid_rate"] == pytest.approx(2 / 6)
    assert six["per_class"]["joy"] == {"f1": pytest.approx(0.4), "support": 3}
    assert six["per_class"]["fear"] == {"f1": 0.0, "support": 0}
    assert six["num_labels_predicted"] == 3


def test_the_confusion_counts_the_invalid_in_its_last_column(six):
    order = MELD.labels.index
    expected = np.zeros((7, 8), int)
    expected[order("joy"), [order("joy"), order("anger"), 7]] = 1
    expected[order("neutral"), [order("joy"), order("neutral")]] = 1
    expected[order("anger"), 7] = 1
    assert six["confusion"] == expected.tolist()


def test_lenient_scores_read_what_the_grammar_refuses(six):
    # The invalid answer names anger: joy F1 2/5, neutral 2/3, anger 1 hit, 1 gold, 2 predicted: 2/3.
    assert six["lenient"] == {
        "accuracy": pytest.approx(3 / 6),
        "weighted_f1": pytest.approx((3 * 0.4 + 2 * 2 / 3 + 2 / 3) / 6),
        "macro_f1": pytest.approx((0.4 + 2 / 3 + 2 / 3) / 7),
        "invalid_rate": pytest.approx(1 / 6),
    }


def test_calibration_is_right_where_the_strict_score_is():
    said = text([("joy", 0.5), ("neutral", 0.5)])
    # The list of the set begins with neutral; the answer names joy first.
    for gold in ("joy", "neutral"):
        found = score([prediction(gold, said)], SETS, MAJORITY)["meld"]
        assert found["calibration"]["accuracy"] == found["accuracy"] == (gold == "joy")


def test_the_majority_baseline_says_one_label_always(six):
    assert six["majority"] == {
        "label": "neutral",
        "accuracy": pytest.approx(2 / 6),
        "weighted_f1": pytest.approx(2 / 6 * 0.5),
        "macro_f1": pytest.approx(0.5 / 7),
    }


def test_r1_codes_and_lengths_are_means_over_all_answers(six):
    assert six["r1"] == pytest.approx((1 + 0.5 / 1.5 + 0 + 0 + 1 + 0) / 6)
    assert six["mean_tokens"] == 7.5
    assert six["codes"] == {
        code: pytest.approx(1 / 6)
        for code in ("E_NO_REPLY", "E_NO_SELF", "E_TRAILING", "E_WEIGHT", "W_CASE", "W_UNK_LABEL")
    }


def test_scores_equal_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    answers = (*MELD.labels, "glee")
    drawn = [(MELD.labels[g], answers[p]) for g, p in rng.integers(0, (5, 8), (60, 2))]
    # Two labels never occur as gold, and one answer is in no list.
    found = score([prediction(gold, says(said)) for gold, said in drawn], SETS, MAJORITY)["meld"]
    gold, said = zip(*drawn, strict=True)
    options = {"labels": list(MELD.labels), "zero_division": 0.0}
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(gold, said))
    for name in ("weighted", "macro"):
        expected = sklearn_metrics.f1_score(gold, said, average=name, **options)
        assert found[f"{name}_f1"] == pytest.approx(expected, abs=1e-6)
    each = sklearn_metrics.f1_score(gold, said, average=None, **options)
    assert [found["per_class"][label]["f1"] for label in MELD.labels] == pytest.approx(each, abs=1e-6)
    matrix = sklearn_metrics.confusion_matrix(gold, said, labels=list(MELD.labels))
    assert np.array_equal(np.array(found["confusion"])[:, :-1], matrix)


def test_data_sets_are_scored_apart_over_their_own_labels():
    predictions = [prediction(gold, said) for gold, said in SIX]
    predictions += [prediction("sad", says("sad"), labels=IEMOCAP)]
    found = score(predictions, SETS, MAJORITY)
    assert list(found) == ["iemocap", "meld"]
    assert found["iemocap"]["weighted_f1"] == 1.0 and found["iemocap"]["macro_f1"] == pytest.approx(1 / 6)
    assert list(found["iemocap"]["per_class"]) == list(IEMOCAP.labels)
    assert mean_wf1(found) == pytest.approx((1 + (3 * 0.4 + 2 * 2 / 3) / 6) / 2)


def test_parts_of_a_set_are_scored_apart_and_beside_the_whole():
    predictions = [prediction(gold, said) for gold, said in SIX]
    roots = [f"meld/test/{number}" for number in (1, 2, 1, 1, 2, 2)]
    moved = [
        replace(p, sample=replace(p.sample, root_id=root)) for p, root in zip(predictions, roots, strict=True)
    ]
    parts = {"meld/test/1": "clean", "meld/test/2": "shared", "meld/test/3": "clean"}
    found = score(moved, SETS, MAJORITY, parts)["meld"]
    assert list(found["parts"]) == ["shared", "clean"]
    # Shared holds the second, fifth and sixth answer: joy wrong, neutral right, anger invalid.
    shared = found["parts"]["shared"]
    assert (shared["num"], shared["accuracy"]) == (3, pytest.approx(1 / 3))
    assert shared["weighted_f1"] == pytest.approx(1 / 3)
    assert shared["majority"]["accuracy"] == pytest.approx(1 / 3)
    clean = found["parts"]["clean"]
    # joy right, joy outside the list, neutral taken for joy: F1 of joy 2/4, of neutral 0.
    assert (clean["num"], clean["weighted_f1"]) == (3, pytest.approx(2 * 0.5 / 3))
    assert "confusion" not in clean
    whole = score(moved, SETS, MAJORITY)["meld"]
    assert {name: value for name, value in found.items() if name != "parts"} == whole


def test_the_mean_over_sets_leaves_out_empty_ones_and_is_never_nan():
    assert mean_wf1({}) == 0.0
    assert mean_wf1({"a": {"num": 0, "weighted_f1": float("nan")}}) == 0.0
    results = {"a": {"num": 4, "weighted_f1": 0.5}, "b": {"num": 0, "weighted_f1": float("nan")}}
    assert mean_wf1(results) == 0.5


def test_a_label_of_another_list_is_wrong():
    found = score([prediction("happy", says("joy"), labels=IEMOCAP)], SETS, MAJORITY)["iemocap"]
    assert (found["accuracy"], found["invalid_rate"]) == (0.0, 1.0)


def test_the_gold_label_is_the_heaviest_and_the_first_of_equals():
    assert gold_label(sample(gold={"fear": 0.2, "joy": 0.7, "anger": 0.7})) == "joy"


def test_results_and_predictions_are_json(six):
    assert json.loads(json.dumps(six)) == six
    line = prediction(*SIX[1]).to_json()
    assert json.loads(json.dumps(line)) == line
    assert (line["gold"], line["prediction"], line["lenient"]) == ("joy", "anger", "anger")
    assert line["emotion"] == {"anger": 0.5, "joy": 0.5}
    assert "part" not in line and prediction(*SIX[1]).to_json("shared")["part"] == "shared"


class Canned:
    """Answers each request with the next prepared completion, the last request first."""

    def __init__(self, answers):
        self.answers, self.calls = list(answers), []

    def generate(self, requests, sampling):
        self.calls.append((len(requests), sampling))
        assert all(request.num == 1 for request in requests)
        given = [self.answers.pop(0) for _ in requests]
        for request, one in reversed(list(zip(requests, given, strict=True))):
            if one is None:
                yield Group(request_id=request.id, error="lost")
            else:
                yield Group(request_id=request.id, completions=(one,))


def test_greedy_answers_come_in_the_order_of_the_inputs_and_in_parts():
    config = settings(eval={"batch_rows": 1})
    samples = [sample(n, gold={"joy": 1.0}) for n in range(6)]
    engine = Canned([completion(said) for _, said in SIX])
    found = list(greedy_answers(engine, samples, codec(), config))
    assert [p.sample.id for p in found] == [s.id for s in samples]
    assert [p.text for p in found] == [said for _, said in SIX]
    assert [p.label for p in found] == ["joy", "anger", None, "joy", "neutral", None]
    assert found[5].lenient == "anger"
    assert [size for size, _ in engine.calls] == [4, 2]
    assert {sampling.temperature for _, sampling in engine.calls} == {0.0}
    assert found[0].num_tokens == len(completion(SIX[0][1]).token_ids)


def test_an_answer_without_an_end_is_wrong_however_it_is_read():
    engine = Canned([completion(says("joy"), finish="length")])
    (found,) = greedy_answers(engine, [sample(gold={"joy": 1.0})], codec(), settings())
    assert (found.label, found.lenient, found.answer.codes) == (None, None, ("E_LENGTH",))


@pytest.mark.parametrize(("setting", "told"), [("given", True), ("none", False)])
def test_evaluation_tells_the_persona_by_its_own_setting(setting, told):
    one = sample(gold={"joy": 1.0}, persona="Cy doubts everything and everyone around here.")
    plain = sample(gold={"joy": 1.0})
    config = settings(eval={"persona": setting})
    engine = Canned([completion(says("joy"))] * 2)
    with_persona, without = greedy_answers(engine, [one, plain], codec(), config)
    assert (with_persona.num_prompt_tokens > without.num_prompt_tokens) == told


def test_a_lost_answer_stops_the_evaluation():
    with pytest.raises(RuntimeError, match="the engine lost meld/train/d1/0: lost"):
        list(greedy_answers(Canned([None]), [sample(gold={"joy": 1.0})], codec(), settings()))


def test_an_answer_after_which_the_scoring_is_to_end_is_the_last():
    config, calls = settings(eval={"batch_rows": 1}), []

    def between() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    inputs = [sample(n, gold={"joy": 1.0}) for n in range(6)]
    with pytest.raises(InterruptedError):
        engine = Canned([completion(says("joy"))] * 6)
        list(greedy_answers(engine, inputs, codec(), config, between=between))
    assert len(calls) == 2

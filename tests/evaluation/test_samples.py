"""Votes and means over several answers to an input, by hand."""

import pytest

from selfemo_jax.data.dialogues import MELD
from selfemo_jax.data.grammar import parse
from selfemo_jax.evaluation.answers import policy_answers
from selfemo_jax.evaluation.samples import score_samples, vote
from selfemo_jax.rollout.engine import Group
from selfemo_jax.scores import prediction_of
from tests.fabricated import codec, completion, sample, settings, text


def predictions(gold: str, *labels: str | None, dialogue: str = "d1"):
    """One prediction of each label; None is an answer outside the grammar."""
    one, config = sample(gold={gold: 1.0}, dialogue=dialogue), settings()
    found = []
    for label in labels:
        said = text([(label, 1.0)]) if label else "nothing"
        answer = parse(said, inventory=MELD.labels)
        found.append(
            prediction_of(
                one, said, answer, config, finished=True, num_prompt_tokens=3, num_tokens=4, seconds=None
            )
        )
    return tuple(found)


def test_the_vote_is_for_the_most_frequent_label_and_of_equals_for_the_first():
    assert vote(["joy", "fear", "fear"]) == "fear"
    assert vote(["joy", "fear", None]) == "joy"
    assert vote(["fear", "joy", "joy", "fear"]) == "fear"
    assert vote([None, None, "joy"]) == "joy", "what is invalid has no vote"
    assert vote([None, None]) is None


def test_scores_of_three_answers_to_each_of_three_inputs():
    groups = [
        predictions("joy", "joy", "fear", "joy"),
        predictions("fear", "joy", "joy", "fear"),
        predictions("anger", None, None, None),
    ]
    found = score_samples(groups, {"meld": MELD})["meld"]
    # Right by sample: joy; none; joy and fear.
    assert found["mean"]["accuracy"] == pytest.approx((1 / 3 + 0 + 2 / 3) / 3)
    # 1/3, 0, 2/3 about 1/3: squares 0, 1/9, 1/9 over n - 1 = 2.
    assert found["sd"]["accuracy"] == pytest.approx(1 / 3)
    assert found["maj"]["accuracy"] == pytest.approx(1 / 3)
    assert found["maj"]["invalid_rate"] == pytest.approx(1 / 3)
    assert found["any"] == pytest.approx(2 / 3)
    assert (found["n"], found["num"]) == (3, 3)
    # Votes: joy 2 of 3 and right; joy 2 of 3 and wrong; the third input has none.
    assert found["votes"]["share"] == pytest.approx(2 / 3)
    assert found["votes"]["ece"] == pytest.approx(abs(1 / 2 - 2 / 3))


def test_a_tied_vote_is_right_where_its_winner_is():
    found = score_samples([predictions("joy", "joy", "neutral")], {"meld": MELD})["meld"]
    # MELD's list begins with neutral, but joy was named first and wins the vote.
    assert found["maj"]["accuracy"] == found["votes"]["accuracy"] == 1.0


def test_the_parts_of_a_set_have_votes_and_means_of_their_own():
    groups = [
        predictions("joy", "joy", "fear", "joy", dialogue="here"),
        predictions("fear", "joy", "joy", "fear", dialogue="there"),
        predictions("anger", None, None, None, dialogue="there"),
    ]
    parts = {"meld/train/here": "clean", "meld/train/there": "shared"}
    found = score_samples(groups, {"meld": MELD}, parts)["meld"]
    assert list(found["parts"]) == ["shared", "clean"] and found["num"] == 3
    shared, clean = found["parts"]["shared"], found["parts"]["clean"]
    assert (shared["n"], shared["num"], clean["num"]) == (3, 2, 1)
    # Shared: fear is right in the third sample alone, of two inputs; its vote is joy.
    assert shared["mean"]["accuracy"] == pytest.approx(1 / 6)
    assert (shared["maj"]["accuracy"], shared["any"], shared["mean"]["invalid_rate"]) == (0.0, 0.5, 0.5)
    # Clean: joy in two samples of three and in the vote.
    assert clean["mean"]["accuracy"] == pytest.approx(2 / 3)
    assert (clean["maj"]["accuracy"], clean["votes"]["share"]) == (1.0, 1.0)
    assert "parts" not in score_samples(groups, {"meld": MELD})["meld"]


def test_one_sample_has_no_spread():
    found = score_samples([predictions("joy", "joy")], {"meld": MELD})["meld"]
    assert (found["mean"]["accuracy"], found["sd"]["accuracy"]) == (1.0, None)


class Drawing:
    """An engine that answers each request with its own index's label, ``num`` times."""

    def __init__(self):
        self.requests, self.sampling = [], None

    def generate(self, requests, sampling):
        self.requests += requests
        self.sampling = sampling
        for request in reversed(requests):
            said = [text([(MELD.labels[i], 1.0)]) for i in range(request.num)]
            yield Group(request_id=request.id, completions=tuple(completion(one) for one in said))


def test_samples_are_drawn_as_the_settings_say_and_come_input_by_input():
    config = settings(eval={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "batch_rows": 1})
    engine = Drawing()
    inputs = [sample(n, gold={"joy": 1.0}) for n in range(3)]
    groups = list(policy_answers(engine, codec(), config, say=print).sampled(inputs, 2))
    assert [[p.sample.id for p in group] for group in groups] == [[s.id] * 2 for s in inputs]
    assert [[p.label for p in group] for group in groups] == [["neutral", "surprise"]] * 3
    drawn = engine.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.95, 20)
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == 3, "inputs must not share their draws"
    again = Drawing()
    list(policy_answers(again, codec(), config, say=print).sampled(inputs[1:], 2))
    assert [request.seed for request in again.requests] == seeds[1:], "a draw depends on its input alone"


def test_a_long_scoring_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr("selfemo_jax.evaluation.answers.TOLD_EVERY", 0.0)
    engine, told = Drawing(), []
    inputs = [sample(n, gold={"joy": 1.0}) for n in range(3)]
    assert len(list(policy_answers(engine, codec(), settings(), say=told.append).greedy(inputs))) == 3
    assert [words.split(",")[0] for words in told] == ["answers: 1 of 3", "answers: 2 of 3"]

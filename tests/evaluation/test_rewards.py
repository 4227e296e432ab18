"""Rewards of answers of an evaluation, by hand, and the lines they are written to."""

import json

import pytest

from selfemo_jax.data.dialogues import MELD
from selfemo_jax.data.grammar import parse
from selfemo_jax.evaluation.rewards import SINGLE, group_rewards, group_words, single_reward, write_groups
from selfemo_jax.scores import Prediction, prediction_of
from tests.fabricated import sample, settings, text

JOY, BOTH, BROKEN = text([("joy", 0.8)]), text([("joy", 0.5), ("anger", 0.5)]), "no tags"


def prediction(said: str, *, number: int = 0, gold: str = "joy") -> Prediction:
    one = sample(number, gold={gold: 1.0})
    answer = parse(said, inventory=MELD.labels)
    return prediction_of(
        one, said, answer, settings(), finished=True, num_prompt_tokens=3, num_tokens=4, seconds=None
    )  # fmt: skip


def test_r1_of_an_answer_is_its_weighted_iou():
    # (1/2, 1/2) against (1, 0): the smaller parts sum to 1/2, the larger to 3/2.
    assert single_reward(prediction(JOY)) == 1.0
    assert single_reward(prediction(BOTH)) == pytest.approx(1 / 3)
    assert single_reward(prediction(BOTH, gold="fear")) == single_reward(prediction(BROKEN)) == 0.0


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        # The core is joy (mean 3/4) and anger (1/4): the first answer names one of two, the second both.
        ({"preset": "robust"}, (1 + 0.5 * 0.5, 1 / 3 + 0.5 * 1)),
        ({"preset": "paper"}, (1 + 0.5, 1 / 3 + 1)),
        ({"preset": "convex"}, (0.5 * 1 + 0.5 * 0.5, 0.5 / 3 + 0.5 * 1)),
        ({"consensus": "off"}, (1, 1 / 3)),
    ],
)
def test_a_group_has_the_whole_reward_of_the_last_step(reward, expected):
    found = group_rewards([[prediction(JOY), prediction(BOTH)]], settings(reward=reward))
    assert found.r1[0].tolist() == pytest.approx([1, 1 / 3])
    assert found.rewards[0].tolist() == pytest.approx(expected)


def test_another_primary_reward_changes_r_and_not_r1():
    config = settings(reward={"primary": "accuracy", "consensus": "off"})
    found = group_rewards([[prediction(BOTH), prediction(BROKEN)]], config)
    assert found.r1[0].tolist() == pytest.approx([1 / 3, 0])
    # Of equal weights the first of MELD's list counts: joy stands before anger.
    assert found.rewards[0].tolist() == [1, 0]
    assert "(accuracy)" in group_words(config, 2)


def test_lines_of_groups_have_r_and_lines_of_single_answers_do_not(tmp_path):
    groups = [[prediction(JOY), prediction(BOTH)], [prediction(BROKEN, number=1), prediction(JOY, number=1)]]
    told = write_groups(tmp_path / "a.jsonl", groups, settings(), {"meld/train/d1": "shared"})
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(line["id"], line["idx"]) for line in lines] == [
        (f"meld/train/d1/{n}", g) for n in (0, 1) for g in (0, 1)
    ]
    assert {(line["responder"], line["part"]) for line in lines} == {("Cy", "shared")}
    # The broken answer has nothing; the one beside it is the whole core.
    rewards = [1.25, 1 / 3 + 0.5, 0, 1.5]
    assert [line["R"] for line in lines] == pytest.approx(rewards)
    assert told["means"]["meld"]["R"] == pytest.approx(sum(rewards) / 4)
    assert told["is"] == (
        "R = r1 + 0.5 r2 over groups of 2, consensus count, top 3, presence 0.05"
    )  # fmt: skip
    told = write_groups(tmp_path / "b.jsonl", [group[:1] for group in groups], settings(), {})
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert told["is"] == SINGLE and not any({"r2", "R"} & line.keys() for line in lines)

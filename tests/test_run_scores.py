"""Scores during training: on the dev subset, and on the held-out inputs of self-play beside it."""

import json
from dataclasses import replace

import pytest

from selfemo_jax.data.dialogues import EMORYNLP
from selfemo_jax.parts import build_parts
from selfemo_jax.phases import plan
from selfemo_jax.reporting.flows import DEV_ANSWERS
from selfemo_jax.rollout.engine import Group
from selfemo_jax.run_scores import dev_metrics
from tests.fabricated import completion, run_data, sample, settings, synthetic, text

JOY, BOTH = text([("joy", 0.8)]), text([("joy", 0.5), ("anger", 0.5)])
JOYFUL = text([("joyful", 1.0)])


class Canned:
    """Answers each request with the next prepared text."""

    def __init__(self, *answers: str):
        self.answers = list(answers)

    def generate(self, requests, sampling):
        for request in requests:
            yield Group(request_id=request.id, completions=(completion(self.answers.pop(0)),))


def configured(run_dir, **changes):
    return settings(
        run_dir=str(run_dir),
        eval={"selfemo": True} | changes,
        flywheel={"heldout": 1.0, "retrain": {"init": "cold"}},
    )  # fmt: skip


DEV = (sample(0, gold={"joy": 1.0}),)
CHILDREN = (
    synthetic(sample(1, gold={"joy": 1.0}), iteration=1),
    synthetic(sample(2, gold={"anger": 1.0}), iteration=1),
    synthetic(sample(3, gold={"joyful": 1.0}, labels=EMORYNLP), iteration=1),
    synthetic(sample(4, gold={"fear": 1.0}), iteration=1),
)
RECORDS = [{"accepted": True, "iteration": 1, "sample": child.to_json()} for child in CHILDREN]


def scored(config, phase_name: str, *answers: str) -> dict[str, float]:
    engine = Canned(*answers)
    data = replace(run_data({"meld": DEV}), majority={"meld": "neutral"})
    (phase,) = (phase for phase in plan(config) if phase.name == phase_name)
    found = dev_metrics(engine, DEV, build_parts(config), data, phase, records=lambda: RECORDS)
    assert not engine.answers, "not every input was asked"
    return found


def test_held_out_inputs_are_scored_by_their_own_lists_and_join_no_mean(tmp_path):
    found = scored(configured(tmp_path), "rl_final", JOY, JOY, BOTH, JOYFUL, "nothing")
    # Right; half the weight, and the first of equals is wrong; right; outside the grammar.
    assert found["dev/selfemo/accuracy"] == pytest.approx(2 / 4)
    assert found["dev/selfemo/r1"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert (found["dev/selfemo/invalid"], found["dev/selfemo/num"]) == (0.25, 4)
    alone = scored(settings(run_dir=str(tmp_path)), "rl_final", JOY)
    assert alone == {name: value for name, value in found.items() if "/selfemo/" not in name}
    assert alone["dev/wf1"] == alone["dev/meld/accuracy"] == 1.0


def test_before_a_harvest_there_is_nothing_to_score(tmp_path):
    assert not any("/selfemo/" in name for name in scored(configured(tmp_path), "rl_1", JOY))


def test_at_most_max_items_are_scored(tmp_path):
    found = scored(configured(tmp_path, max_items=2), "rl_final", JOY, "nothing", "nothing")
    assert (found["dev/selfemo/num"], found["dev/selfemo/accuracy"]) == (2, 0)


def test_the_labels_answered_on_dev_stay_in_the_phases_folder(tmp_path):
    """Of dev alone, and the last score of a phase is the one that stays."""
    config = configured(tmp_path)
    for answer in ("nothing", BOTH):
        scored(config, "rl_1", answer)
    written = (tmp_path / "phases" / "01_rl_1" / DEV_ANSWERS).read_text().splitlines()
    assert list(map(json.loads, written)) == [
        {"id": DEV[0].id, "dataset": "meld", "gold": "joy", "prediction": "joy"}
    ]

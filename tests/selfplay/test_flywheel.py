"""What self-play keeps, why it rejects, and the inputs it makes."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from selfemo_jax.appendlog import AppendLog
from selfemo_jax.data.dialogues import MELD
from selfemo_jax.data.grammar import parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.scoring import Scored
from selfemo_jax.selfplay.flywheel import (
    Verdict,
    best_rollout,
    extend,
    harvest,
    next_responder,
    rejection,
    summarise,
)
from selfemo_jax.selfplay.hygiene import ReplyIndex
from tests.fabricated import completion, prompt, sample, settings, text

FEAR = (("fear", 0.4), ("joy", 0.35))
REPLY = "Hand me an oar, then."
PERSONAS = {"meld/train/d1": {"Ada": "Ada counts every coin.", "Bo": "Bo hums.", "Cy": "Cy doubts."}}


def answer(reply: str = REPLY, *, self_emotion=FEAR, emotion=(("joy", 1.0),)):
    return parse(text(emotion, self_emotion, reply), inventory=MELD.labels)


def step(*rows, samples=None) -> Scored:
    """A scored step: a row is one prompt's (answer text, r1, r2) by rollout, or None for a lost group."""
    samples = samples or [sample(n, gold={"joy": 1.0}) for n in range(len(rows))]
    size = max(len(row) for row in rows if row)
    completions = [tuple(completion(one) for one, _, _ in row or ()) for row in rows]
    answers = [tuple(parse(one, inventory=MELD.labels) for one, _, _ in row or ()) for row in rows]
    full = [
        [(a, *numbers) for a, (_, *numbers) in zip(answers[p], row or (), strict=True)]
        for p, row in enumerate(rows)
    ]
    blank = (parse("", inventory=()), 0.0, 0.0)
    full = [row or [blank] * size for row in full]
    r1, r2 = (np.array([[one[i] for one in row] for row in full], np.float32) for i in (1, 2))
    return Scored(
        samples=tuple(samples),
        prompts=tuple(prompt(of=s.id) for s in samples),
        completions=tuple(completions),
        texts=tuple(tuple(one for one, _, _ in row or ()) for row in rows),
        answers=tuple(answers),
        present=np.array([[row is not None] * size for row in rows]),
        valid=np.array([[one[0].valid for one in row] for row in full]),
        r1=r1,
        r2=r2,
        rewards=r1 + r2,
        advantages=np.zeros_like(r1),
        metrics={},
    )


def played(scored, *, index=None, iteration=1, config=None, personas=PERSONAS, verify=None, encode=None):
    return harvest(
        scored,
        config or settings(),
        index if index is not None else ReplyIndex(),
        personas,
        iteration=iteration,
        policy_version=31,
        encode=encode,
        verify=verify,
    )


SHORT, LONG = (
    text([("joy", 1.0)], FEAR, "Row."),
    text([("joy", 1.0)], FEAR, "Row, row, and do not look down."),
)


@pytest.mark.parametrize(
    ("row", "best"),
    [
        ([(SHORT, 0.3, 1.0), (LONG, 0.4, 0.0)], 1),
        ([(SHORT, 0.5, 0.2), (LONG, 0.5, 0.9)], 1),
        ([(LONG, 0.5, 0.5), (SHORT, 0.5, 0.5)], 1),
        ([(SHORT, 0.5, 0.5), (SHORT, 0.5, 0.5)], 0),
        ([("no answer", 0.9, 0.9), (LONG, 0.0, 0.0)], 1),
    ],
    ids=["r1 before r2", "then r2", "then the shorter", "then the first", "never an invalid one"],
)
def test_the_best_rollout_and_its_ties(row, best):
    assert best_rollout(step(row), 0) == best


def test_without_a_valid_rollout_there_is_no_best_one():
    assert best_rollout(step([("no answer", 0.9, 0.9)] * 2), 0) is None


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (None, {}),
        ("max_depth", {"parent": {"depth": 3}}),
        ("low_reward", {"r1": 0.49}),
        ("grammar", {"answer": {"self_emotion": (("glee", 0.5),)}}),
        ("grammar", {"answer": {"emotion": (("joy", 0.5), ("glee", 0.5))}}),
        ("grammar", {"answer": {"reply": "I feel fear: 0.5 today"}}),
        ("grammar", {"answer": {"reply": "Hand me <b>that</b> oar"}}),
        ("length", {"answer": {"reply": "so " * 81}}),
        ("no_letters", {"answer": {"reply": "... 42 !"}}),
        ("several_turns", {"answer": {"reply": "Row! Ada: no, wait for the tide."}}),
        ("several_turns", {"answer": {"reply": "cy : hand me an oar"}}),
        ("markup", {"answer": {"reply": "We row to [response] before the tide."}}),
        ("markup", {"answer": {"reply": "Then the{ /Self_Emotion }boat."}}),
        ("copy", {"answer": {"reply": "then we row -- ALL 0 miles"}}),
        ("label_word", {"answer": {"reply": "There is no JOY in it."}}),
        ("language", {"answer": {"reply": "Das Boot ist voll, wir rudern jetzt."}}),
        ("near_duplicate", {"index": [REPLY]}),
    ],
)
def test_each_reason_to_reject(reason, changes):
    said = answer(**changes.get("answer", {}))
    parent = replace(sample(gold={"joy": 1.0}), **changes.get("parent", {}))
    index = ReplyIndex(changes.get("index", ()))
    assert rejection(said, said.response, parent, changes.get("r1", 0.5), settings(), index) == reason


def test_limits_themselves_are_accepted():
    config = settings(flywheel={"tau": 0.25, "max_depth": 2})
    parent = replace(sample(gold={"joy": 1.0}), depth=1)
    words = " ".join(["we row far left and home again with you"] * 8 + ["for ever now on the calm old sea"])
    assert len(words.split()) == 80
    assert rejection(answer(words), words, parent, 0.25, config, ReplyIndex()) is None


def test_a_name_without_a_colon_is_no_second_turn():
    for reply in ("Ada, hand me an oar", "Bravado: that is all it is", "Listen: we row"):
        assert (
            rejection(answer(reply), reply, sample(gold={"joy": 1.0}), 1.0, settings(), ReplyIndex()) is None
        )


def test_accepting_a_reply_makes_its_copy_in_the_same_step_a_duplicate():
    row = [(text([("joy", 1.0)], FEAR, REPLY), 1.0, 0.0)]
    index = ReplyIndex()
    found = played(step(row, row), index=index)
    assert [c.reason for c in found] == ["accepted", "near_duplicate"]
    assert found[1].child is None and found[1].reply == REPLY
    assert [c.reason for c in played(step(row), index=index, iteration=2)] == ["near_duplicate"]


def test_an_accepted_rollout_extends_its_dialogue_and_declares_the_gold():
    quoted = text([("joy", 1.0)], FEAR, f'"{REPLY}"')
    (found,) = played(step([("no answer", 0.0, 0.0), (quoted, 0.75, 0.5)]))
    parent, child = found.parent, found.child
    assert child == Sample(
        id="meld/train/d1/0+1",
        root_id="meld/train/d1",
        parent_id="meld/train/d1/0",
        dataset="meld",
        split="train",
        origin="synthetic",
        iteration=1,
        depth=1,
        history=(*parent.history, ("Cy", REPLY)),
        target_speaker="Cy",
        responder=child.responder,
        persona=PERSONAS["meld/train/d1"][child.responder],
        theme=parent.theme,
        inventory=MELD.labels,
        gold={"fear": 0.4, "joy": 0.35},
        reference=None,
        policy_version=31,
    )
    assert child.responder in ("Ada", "Bo")
    assert found.select == {"r1": 0.75, "r2": 0.5, "R": 1.25, "n_valid": 1}
    assert found.completion_ids == completion(quoted).token_ids


def test_lost_and_invalid_groups_are_recorded_with_their_reason():
    scored = step([("no answer", 0.0, 0.0)], None, [(SHORT, 0.2, 0.0)], [(LONG, 1.0, 0.0)])
    found = played(scored)
    assert [c.reason for c in found] == ["no_valid_rollout", "lost", "low_reward", "accepted"]
    assert [c.child is not None for c in found] == [False, False, False, True]
    assert summarise(found) == {
        "harvest/accepted": 0.25,
        "harvest/lost": 0.25,
        "harvest/low_reward": 0.25,
        "harvest/no_valid_rollout": 0.25,
        "harvest/depth": 1.0,
    }


def test_in_a_dyad_the_speaker_before_answers():
    dyad = sample(gold={"joy": 1.0}, history=(("Cy", "Ready?"), ("Bo", "Never.")))
    child = extend(dyad, answer(), REPLY, iteration=1, policy_version=0, personas={}, seed=0)
    assert (child.target_speaker, child.responder, child.persona) == ("Cy", "Bo", None)
    again = extend(child, answer(), "No.", iteration=2, policy_version=0, personas={}, seed=0)
    assert (again.target_speaker, again.responder, again.depth) == ("Bo", "Cy", 2)
    assert [speaker for speaker, _ in again.history] == ["Cy", "Bo", "Cy", "Bo"]


def test_among_several_the_later_speaker_answers_more_often():
    talk = (("Ada", "a"), ("Cy", "b"), ("Bo", "c"))
    drawn = Counter(
        next_responder(sample(n, gold={"joy": 1.0}, history=talk), {}, seed=0) for n in range(600)
    )
    assert set(drawn) == {"Ada", "Bo"}
    assert 0.75 < drawn["Bo"] / 600 < 0.85  # 2^0 against 2^-2


def test_among_several_those_with_a_persona_answer():
    talk = (("Ada", "a"), ("Di", "d"), ("Cy", "b"), ("Bo", "c"))
    samples = [sample(n, gold={"joy": 1.0}, history=talk) for n in range(40)]
    assert {next_responder(s, {"Ada": "...", "Cy": "..."}, seed=0) for s in samples} == {"Ada"}
    assert len({next_responder(s, {"Cy": "..."}, seed=0) for s in samples}) > 1


def test_the_next_responder_is_drawn_from_the_seed_and_the_input():
    talk = (("Ada", "a"), ("Bo", "c"))
    samples = [sample(n, gold={"joy": 1.0}, history=talk) for n in range(30)]
    first = [next_responder(s, {}, seed=0) for s in samples]
    assert first == [next_responder(s, {}, seed=0) for s in samples]
    assert first != [next_responder(s, {}, seed=1) for s in samples]


def test_ids_are_unique_over_iterations_and_depths():
    parents = [sample(n, gold={"joy": 1.0}) for n in range(2)]
    found = []
    for iteration in (1, 2, 3):
        row = [(text([("joy", 1.0)], FEAR, f"Row for {iteration} more days."), 1.0, 0.0)]
        children = [played(step(row, samples=[parent]), iteration=iteration)[0].child for parent in parents]
        parents += [child for child in children if child is not None]
        found += [child.id for child in children if child is not None]
    assert len(found) == 2 * (1 + 2 + 4) and len(set(found)) == len(found)


def test_a_harvest_survives_its_line_in_the_store(tmp_path):
    row = [(text([("joy", 1.0)], FEAR, "Größe ist „alles“, sagt er."), 1.0, 0.5)]
    config = settings(flywheel={"hygiene": {"language": "german"}})
    found = played(step(row, [("no answer", 0.0, 0.0)]), config=config)
    with AppendLog(tmp_path / "flywheel.jsonl") as log:
        for candidate in found:
            log.append({"iteration": 1} | candidate.to_json())
    records = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert Sample.from_json(records[0]["sample"]) == found[0].child
    assert records[0] | {"sample": None} == {
        "iteration": 1,
        "parent_id": "meld/train/d1/0",
        "root_id": "meld/train/d1",
        "dataset": "meld",
        "depth": 1,
        "policy_version": 31,
        "accepted": True,
        "reason": "accepted",
        "reply": "Größe ist „alles“, sagt er.",
        "emotion": {"joy": 1.0},
        "declared": {"fear": 0.4, "joy": 0.35},
        "select": {"r1": 1.0, "r2": 0.5, "R": 1.5, "n_valid": 1},
        "completion_ids": list(found[0].completion_ids),
        "sample": None,
    }
    assert (records[1]["accepted"], records[1]["sample"], records[1]["select"]) == (False, None, {})


def verdicts(*found):
    """A verifier that gives these (agreement, emotion) in turn, and the inputs that it was asked about."""
    asked = []

    def verify(children):
        asked.append([child.history[-1][1] for child in children])
        return [Verdict(agreement=value, emotion=emotion) for value, emotion in found]

    return verify, asked


def rows(*replies):
    return [[(text([("joy", 1.0)], FEAR, reply), 1.0, 0.0)] for reply in replies]


def test_the_verifier_rejects_what_it_reads_otherwise_and_its_duplicate_is_free_again():
    verify, asked = verdicts((0.49, {"joy": 1.0}), (0.5, {"fear": 1.0}), (0.0, {}))
    step_of_four = step(*rows("Row to the left now.", "Row to the left now!", "Where is Bo?"), None)
    found = played(step_of_four, verify=verify)
    # One call with every reply that is acceptable by itself; equal replies are told apart after it.
    assert asked == [["Row to the left now.", "Row to the left now!", "Where is Bo?"]]
    assert [c.reason for c in found] == ["verifier", "accepted", "verifier", "lost"]
    assert [c.select.get("verifier") for c in found] == [0.49, 0.5, 0.0, None]
    assert found[1].child is not None and found[1].child.gold == {"fear": 0.4, "joy": 0.35}


def test_the_verifier_is_asked_after_every_rule_that_costs_less():
    verify, asked = verdicts((1.0, {"fear": 1.0}))
    short = [
        "Row to the left now.",
        "Row " + "incomprehensibilities " * 70,
        "Joy, joy!",
        "Then we row, all 3 miles.",
    ]
    scored = step(*rows(*short), [(text([("joy", 1.0)], FEAR, "Where is Bo?"), 0.1, 0.0)])

    def encode(child):
        if len(child.history[-1][1]) > 1000:
            raise ValueError("too long for a prompt")

    config = settings(flywheel={"hygiene": {"language": None}})
    found = played(scored, verify=verify, encode=encode, config=config)
    assert [c.reason for c in found] == ["accepted", "too_long", "label_word", "copy", "low_reward"]
    assert asked == [["Row to the left now."]]
    assert found[1].child is None and found[1].reply.startswith("Row incomp")


def test_a_reply_that_is_too_long_does_not_make_a_shorter_one_a_duplicate():
    index = ReplyIndex()

    def encode(child):
        raise ValueError("too long for a prompt")

    assert [c.reason for c in played(step(*rows(REPLY)), index=index, encode=encode)] == ["too_long"]
    assert len(index) == 0 and [c.reason for c in played(step(*rows(REPLY)), index=index)] == ["accepted"]


def test_of_the_acceptable_rollouts_the_best_is_chosen():
    config = settings(flywheel={"select": "acceptable", "hygiene": {"min_words": 2}})
    row = [
        (SHORT, 1.0, 1.0),
        (LONG, 0.6, 0.0),
        (text([("joy", 1.0)], FEAR, REPLY), 0.6, 0.5),
        (LONG, 0.4, 1.0),
    ]
    (found,) = played(step(row), config=config)
    assert (found.reason, found.reply, found.select["r1"]) == ("accepted", REPLY, pytest.approx(0.6))
    # What was said before is no choice, and where nothing is left the best one says why.
    index = ReplyIndex([REPLY])
    (found,) = played(step(row), config=config, index=index)
    assert (found.reason, found.reply) == ("accepted", "Row, row, and do not look down.")
    (found,) = played(step(row), config=config, index=index)
    assert (found.reason, found.reply, found.child) == ("length", "Row.", None)
    (found,) = played(step(row), config=settings(flywheel={"hygiene": {"min_words": 2}}))
    assert (found.reason, found.reply) == ("length", "Row.")


def test_without_a_version_each_candidate_has_that_of_its_rollout():
    scored = step(*rows(REPLY), [("no answer", 0.0, 0.0)], None)
    found = harvest(scored, settings(), ReplyIndex(), PERSONAS, iteration=1, policy_version=None)
    assert [c.policy_version for c in found] == [7, 7, 0]
    assert found[0].child is not None and found[0].child.policy_version == 7


def test_in_the_arm_with_verifier_labels_its_answer_is_the_gold():
    config = settings(
        flywheel={"control": "verifier_labels", "verifier": {"weights": "cold"}, "retrain": {"init": "cold"}}
    )
    verify, _ = verdicts((0.1, {"anger": 0.75}), (0.0, {}))
    found = played(step(*rows("Row to the left now.", "Where is Bo?")), verify=verify, config=config)
    assert [c.reason for c in found] == ["accepted", "verifier"]
    assert found[0].child is not None and found[0].child.gold == {"anger": 0.75}
    assert found[0].to_json()["declared"] == {"fear": 0.4, "joy": 0.35}


def test_the_verifier_is_not_asked_about_nothing():
    verify, asked = verdicts()
    assert [c.reason for c in played(step([("no answer", 0.0, 0.0)]), verify=verify)] == ["no_valid_rollout"]
    assert asked == []

"""Cold-start answers by an expert (equation 5): reasoning, recognised emotions, own emotions, reply.

The expert does not see the gold labels unless asked to explain them; what it wrote is kept when it is
grammatical, its emotions agree with the gold, and its reply could be a turn of the dialogue.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from selfemo_jax.algo.rewards import weighted_iou
from selfemo_jax.config import Config
from selfemo_jax.data.grammar import Answer as Parsed
from selfemo_jax.data.grammar import acceptable, parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.label_arrays import answers_to_arrays, gold_to_array
from selfemo_jax.data.prompts import normalise_reply
from selfemo_jax.experts.ask import Answer, Question
from selfemo_jax.experts.panel import Panel
from selfemo_jax.selfplay.hygiene import ReplyIndex, text_problem

MIN_REASONING, MAX_REASONING = 20, 4000
"""Characters."""
_HURT = ("sadness", "sad", "disappointed")
_CROSS = ("anger", "angry", "mad", "frustrated")
_HEADINGS = ("reasoning:", "**reasoning**", "# reasoning", "thoughts:")

SYSTEM = """\
You write model answers for an exercise in which somebody plays a person of a conversation: that person \
first reads the other's feelings, then finds its own, then answers aloud. Whoever learns from your answers \
must be able to follow each step."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """One answer of an expert and what became of it."""

    sample: Sample
    """Tagged with its source when accepted."""
    source: str
    reason: str
    """``accepted``, or why not: a code of the grammar, of the reply's hygiene, or of this module."""
    parsed: Parsed = Parsed(valid=False, codes=())
    """The three blocks, as far as they can be read."""
    think: str = ""
    """The reasoning before them."""
    response: str = ""
    """The reply, normalised."""
    r1: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """One line of ``cold_start.jsonl``."""
        return {
            "sample_id": self.sample.id,
            "source": self.source,
            "accepted": self.reason == "accepted",
            "reason": self.reason,
            "r1": self.r1,
            "emotion": dict(self.parsed.emotion),
            "self_emotion": dict(self.parsed.self_emotion),
            "response": self.response,
            "think": self.think,
        }


def cold_question(sample: Sample, *, max_labels: int, gold: Literal["hidden", "shown"]) -> Question:
    """What an expert is asked about an input, in one pass of three parts."""
    inventory = sample.inventory
    persona = _line(sample.persona) if sample.persona else ""
    parts = [f"You play {_line(sample.responder)}."]
    parts.append(
        f"About this person: {persona}" if persona else "Nothing special is known about this person."
    )
    if sample.theme:
        parts.append(f"The scene: {_line(sample.theme)}")
    lines = [f"{n}. {_line(speaker)}: {_line(text)}" for n, (speaker, text) in enumerate(sample.history, 1)]
    lines[-1] += "    <-- the last turn"
    parts += ["\nThe conversation:", *lines]
    parts.append(f"\nEmotion labels: {', '.join(inventory)}")
    if gold == "shown":
        shown = ", ".join(f"{label}:{weight:.2f}" for label, weight in sample.gold.items())
        parts.append(
            f"People who know the whole scene found this in the last turn: {shown}. Give these emotions in "
            "the first part, and let your reasoning show from the turn itself how one comes to them."
        )
    count = "one label" if max_labels == 1 else f"one to {max_labels} labels"
    parts.append(_rules(inventory, count, max_labels, _line(sample.target_speaker), _line(sample.responder)))
    return Question(id=f"{sample.id}#cold", system=SYSTEM, user="\n".join(parts))


def _rules(inventory: Sequence[str], count: str, max_labels: int, speaker: str, responder: str) -> str:
    hurt = next((label for label in _HURT if label in inventory), inventory[0])
    cross = next((label for label in _CROSS if label in inventory and label != hurt), inventory[-1])
    shown = f"{hurt}:0.80, {cross}:0.30" if max_labels > 1 and cross != hurt else f"{hurt}:0.80"
    return f"""
Reason first, in three short numbered steps that a reader can check:
1. what {speaker} feels in the last turn, and which words, and what came before, tell you;
2. what that stirs in {responder}, given who {responder} is;
3. what {responder} would therefore say, and in what tone.

Then write the answer: three blocks, nothing between them and nothing after them.
<emotion>label:weight, ...</emotion>            what {speaker} feels, by step 1
<self_emotion>label:weight, ...</self_emotion>  what {responder} feels, by step 2
<response>...</response>                        what {responder} says, by step 3

In each of the first two blocks give {count} of the list above, in lower case, none twice. The weight says \
how strongly it is felt: a decimal above 0 and at most 1 with two digits; weights need not add up to 1. A \
single clear feeling needs a single label. The reply is one turn of everyday speech that fits what \
{responder} feels: no stage directions, no names of labels, no quotation marks round it, at most 40 words.

The form, shown for another conversation whose last turn was "So they went on the trip without telling me.":
1. The speaker was left out by people close to them and only heard of it later; "without telling me" is the \
sore point, so hurt comes first, with some resentment under it.
2. I am fond of the speaker and was not asked along either, so I share the hurt, more quietly.
3. I would not make it worse; I would show that I noticed and stay near.
<emotion>{shown}</emotion>
<self_emotion>{hurt}:0.45</self_emotion>
<response>That stings. Nobody asked me either. Shall we do something of our own on Saturday?</response>"""


def read_answer(answer: Answer, sample: Sample, config: Config) -> Written:
    """An expert's answer as a training target, or the reason why it is none; r1 and duplicates are not
    looked at here."""
    result = Written(sample=sample, source=answer.source, reason="accepted")
    if answer.refused is not None:
        return replace(result, reason="refused")
    if answer.finish_reason == "length":
        return replace(result, reason="cut_off")
    # What a reasoning model thought before it spoke is not the reasoning that was asked for.
    text = answer.text.rpartition("</think>")[2].strip()
    if text.endswith("```"):
        text = text.removesuffix("```").rstrip()
    at = text.find("<emotion>")
    if at < 0:
        return replace(result, reason="E_NO_EMOTION")
    think, body = _reasoning(text[:at]), text[at:]
    parsed = parse(body, inventory=sample.inventory, max_labels=config.output.max_labels)
    reply = normalise_reply(parsed.response)
    result = replace(result, parsed=parsed, think=think, response=reply)
    if not acceptable(parsed):
        return replace(result, reason=parsed.codes[0])
    if not MIN_REASONING <= len(think) <= MAX_REASONING:
        return replace(result, reason="reasoning_length")
    if "<think>" in think or "<response>" in think or "</" in think:
        return replace(result, reason="reasoning_tag")
    declared = [label for label, _ in parsed.self_emotion]
    problem = text_problem(reply, sample, declared, config.flywheel.hygiene)
    return result if problem is None else replace(result, reason=problem)


def write_answers(panel: Panel, samples: Sequence[Sample], config: Config) -> list[Written]:
    """Ask about every input and judge the answers, in the order of the inputs (method 5.2).

    Accepted: grammatical with reasoning, r1 >= `cold_start.tau`, a reply that passes the hygiene and repeats
    no accepted one. ExpertError as `Panel.ask`.
    """
    cold = config.cold_start
    questions = [
        cold_question(sample, max_labels=config.output.max_labels, gold=cold.gold) for sample in samples
    ]
    answers = panel.ask(questions, what="cold start")
    written = [
        read_answer(answer, sample, config)
        for sample, given in zip(samples, answers, strict=True)
        for answer in given
    ]
    index = ReplyIndex(threshold=config.flywheel.hygiene.near_duplicate)
    judged = []
    for one, r1 in zip(written, _agreement(written), strict=True):
        reason = one.reason
        if reason == "accepted" and r1 < cold.tau:
            reason = "r1"
        if reason == "accepted" and index.near(one.response):
            reason = "duplicate"
        sample = one.sample
        if reason == "accepted":
            index.add(one.response)
            sample = replace(sample, tags=(*sample.tags, f"expert:{one.source}"))
        judged.append(replace(one, reason=reason, r1=r1, sample=sample))
    return judged


def reasons(written: Sequence[Written]) -> Mapping[str, int]:
    """How often each reason occurs, the most frequent first."""
    return dict(Counter(one.reason for one in written).most_common())


def _agreement(written: Sequence[Written]) -> list[float]:
    """r1 of each answer: the weighted IoU of its emotions with the gold; 0 where there are none."""
    if not written:
        return []
    inventories = [one.sample.inventory for one in written]
    num_classes = max(map(len, inventories)) + 1
    pred, valid = answers_to_arrays([[one.parsed] for one in written], inventories, num_classes=num_classes)
    gold = gold_to_array([one.sample.gold for one in written], inventories, num_classes=num_classes)
    r1 = weighted_iou(jnp.asarray(pred), jnp.asarray(gold), jnp.asarray(valid))
    return np.asarray(r1)[:, 0].astype(float).tolist()


def _reasoning(text: str) -> str:
    text = text.strip().removesuffix("```").removeprefix("```").strip()
    for heading in _HEADINGS:
        if text.lower().startswith(heading):
            text = text[len(heading) :].strip(" :\n")
    return text.removesuffix("**Answer:**").removesuffix("Answer:").strip()


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "‹")

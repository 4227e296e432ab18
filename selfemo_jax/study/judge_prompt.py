"""What a judge is asked about two answers, and how its verdict is read (section 4.4, Table 9)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfemo_jax.experts.ask import Question
from selfemo_jax.study.replies import weights

Verdict = Literal["A", "B", "tie"]
TIE = "tie"
LINES: Mapping[str, Verdict] = {
    "answer_a better than answer_b": "A",
    "answer_b better than answer_a": "B",
    TIE: "tie",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the two questions; each is asked by itself."""

    name: str
    asks: str
    with_emotions: bool
    """Whether the candidates' own emotions are shown beside what they say."""


TASKS = (
    Task(
        name="understanding",
        asks="Which candidate understands better who this person is and what it must feel at this moment? "
        "Judge the feelings that it states for itself, and whether its words carry them.",
        with_emotions=True,
    ),
    Task(
        name="expression",
        asks="Which candidate speaks better as this person, here and now? Judge how the feeling comes across "
        "in the words: natural, fitting the last turn, true to the person.",
        with_emotions=False,
    ),
)

_SYSTEM = """\
You judge two answers that were written for one person at one moment of a conversation. You are not told who \
wrote them, and their order means nothing. Longer is not better."""

_STEPS = """\
Write one short paragraph for each of these points, in this order:
1. The person: what its description asks of an answer.
2. The moment: what the last turn and the conversation ask of an answer.
3. Candidate A: what fits, and anything that this person would not feel or say.
4. Candidate B: what fits, and anything that this person would not feel or say.
5. The comparison of the two."""


def question(pair: Mapping[str, Any], task: Task, *, first_is_a: bool, ties: bool) -> Question:
    """The question about a pair of replies, with its first side as candidate A or as B.

    Nothing in it tells the sides apart but what they answered.
    """
    sides = ("first", "second") if first_is_a else ("second", "first")
    responder = _line(pair["responder"])
    about = _line(pair["persona"]) if pair.get("persona") else "nothing special is known."
    turns = enumerate(pair["history"], start=1)
    history = [f"{number}. {_line(who)}: {_line(text)}" for number, (who, text) in turns]
    candidates = [
        f"Candidate {letter}\n{candidate(pair[side], task)}" for letter, side in zip("AB", sides, strict=True)
    ]
    endings = ["answer_A better than answer_B", "answer_B better than answer_A", *([TIE] if ties else [])]
    user = "\n\n".join(
        [
            f"The person: {responder}. About {responder}: {about}",
            "The conversation:\n" + "\n".join(history),
            *candidates,
            f"The question: {task.asks}",
            _STEPS,
            "End with one line that is exactly one of these:\n" + "\n".join(endings),
        ]
    )
    # The identity names the input and the order, for people; a judge never sees it.
    order = "first-second" if first_is_a else "second-first"
    return Question(id=f"{pair['id']} {task.name} {order}", system=_SYSTEM, user=user)


def candidate(answer: Mapping[str, Any], task: Task) -> str:
    """An answer as a judge sees it."""
    said = f'says: "{_line(answer["response"])}"'
    feels = weights(answer.get("self_emotion") or {}) or "not stated"
    return f"feels: {feels}\n{said}" if task.with_emotions else said


def read_verdict(text: str, *, ties: bool) -> Verdict | None:
    """The verdict of the last line that says anything; None where that line is none."""
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if not lines:
        return None
    words = re.sub(r"[*`\"'.#>]|^\W+|\W+$", "", lines[-1]).strip().lower()
    found = LINES.get(" ".join(words.split()))
    return None if found == "tie" and not ties else found


def _line(text: str) -> str:
    return " ".join(str(text).split())

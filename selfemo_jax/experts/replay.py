"""Recorded answers in an expert's place, for tests and for runs that must repeat."""

import json
from importlib import resources
from pathlib import Path

from selfemo_jax.experts.ask import Answer, ChatSampling, Question, question_key
from selfemo_jax.settings.experts import Endpoint

SAMPLE = "sample"
"""Names the answers that come with the package, to inputs of the bundled corpus."""
_BY_HAND = {"question", "text"}


class ReplayExpert:
    """Answers of a file: the cache that an earlier run left, matched by model, prompt and sampling, or lines
    ``{"question": id, "text": answer}`` written by hand, matched by the question's id."""

    def __init__(self, endpoint: Endpoint, sampling: ChatSampling):
        """Read the file; ValueError names a line that is neither."""
        assert endpoint.record is not None and endpoint.model is not None
        self.endpoint, self.model = endpoint, endpoint.model
        path = recording(endpoint.record)
        if not path.is_file():
            raise ValueError(f"expert {endpoint.name}: the recording {path} does not exist")
        self._sampling = sampling
        self._answers, self._written = read_recording(path)

    def answer(self, question: Question) -> Answer | None:
        """What was recorded for the question, with this endpoint's name and at no cost. Nothing recorded:
        a refusal where the endpoint's ``missing`` says so, else None."""
        key = question_key(self.model, question, self._sampling)
        found = self._answers.get(key)
        if found is not None:
            return Answer.from_json(found.to_json() | {"source": self.endpoint.name, "cost": 0.0})
        # Asked again means that the answer could not be read: by hand there is only the one.
        if question.attempt == 0 and question.id in self._written:
            text = self._written[question.id]
            return Answer(key=key, source=self.endpoint.name, model=self.model, text=text)
        if self.endpoint.missing == "refuse":
            words = "the recording does not hold it"
            return Answer(key=key, source=self.endpoint.name, model=self.model, text="", refused=words)
        return None


def recording(name: str) -> Path:
    """The file that ``record`` names."""
    if name == SAMPLE:
        return Path(str(resources.files("selfemo_jax") / "sample" / "expert.jsonl"))
    return Path(name)


def read_recording(path: Path) -> tuple[dict[str, Answer], dict[str, str]]:
    """Recorded answers by key, and those written by hand by their question's id."""
    answers: dict[str, Answer] = {}
    written: dict[str, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if set(record) == _BY_HAND:
                    if not all(isinstance(record[key], str) for key in _BY_HAND):
                        raise TypeError("question and text are strings")
                    if record["question"] in written:
                        raise ValueError(f"{record['question']} was answered before")
                    written[record["question"]] = record["text"]
                else:
                    answer = Answer.from_json(record)
                    answers[answer.key] = answer
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a recorded expert answer ({type(error).__name__}: {error}); "
                    'expected a line of an experts.jsonl, or {"question": ID, "text": ANSWER}'
                ) from None
    return answers, written

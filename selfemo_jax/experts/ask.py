"""What is asked of an expert and what it answers.

A question's key is a digest of the model, the prompt and the sampling: two questions with the same key have
one answer, which is paid for once.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


class ExpertError(ValueError):
    """Experts did not answer; what they did answer is in the cache."""


class Interrupted(ExpertError):
    """Asking was stopped from outside."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One chat of a system and a user message."""

    id: str
    """For people; no part of the key."""
    system: str
    user: str
    attempt: int = 0
    """Above 0: asked again because the answer could not be read. It seeds the sampling."""

    def again(self) -> "Question":
        """The same question, to be answered anew."""
        return replace(self, attempt=self.attempt + 1)


@dataclass(frozen=True, kw_only=True)
class ChatSampling:
    """How an expert's tokens are drawn."""

    temperature: float
    top_p: float
    max_tokens: int
    extra_body: str | None = None
    """JSON object of further request fields."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one answer, or of many added up."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an expert said, or that it refused."""

    key: str
    source: str
    """Name of the endpoint."""
    model: str
    text: str
    finish_reason: str = "stop"
    usage: Usage = Usage()
    cost: float = 0.0
    refused: str | None = None
    """Why the server will never answer this question; the text is then empty."""

    def to_json(self) -> dict[str, Any]:
        """The part of a cache line that holds the answer."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Answer":
        """Inverse of `to_json`; further keys of the line are passed over. KeyError or TypeError otherwise."""
        return Answer(
            key=record["key"],
            source=record["source"],
            model=record["model"],
            text=record["text"],
            finish_reason=record["finish_reason"],
            usage=Usage(**record["usage"]),
            cost=float(record["cost"]),
            refused=record["refused"],
        )


def question_key(model: str, question: Question, sampling: ChatSampling) -> str:
    """Hexadecimal SHA-256 of (model, prompt, sampling)."""
    parts = {
        "model": model,
        "system": question.system,
        "user": question.user,
        "seed": question.attempt,
        "sampling": asdict(sampling),
    }
    # ASCII, so that a lone surrogate in a dialogue has bytes too.
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

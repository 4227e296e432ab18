"""What every rollout engine takes and gives: token ids in, groups of completions out.

An engine is one of `JaxEngine` (in this process) or the client of a serving process. Both obey one rule: a
group is whole or an error, and groups come in any order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be answered `num` times."""

    id: str
    token_ids: tuple[int, ...]
    num: int
    """Number of rollouts of this prompt: the group's size."""
    seed: int
    """With the rollout's index and the token's position it decides every draw; 0 <= seed < 2**64."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """Without the prompt; ends with the stop token when `finish_reason` is ``stop``."""
    logprobs: tuple[float, ...]
    """log p of each token under softmax(logits / temperature), untruncated, one per token; at temperature 0
    under softmax(logits)."""
    finish_reason: FinishReason
    policy_versions: tuple[int, ...]
    """The distinct versions of the policy that sampled it, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All rollouts of one request, or the reason why there are none."""

    request_id: str
    completions: tuple[Completion, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; one for all requests of a call."""

    max_tokens: int
    """Longest completion, its stop token included."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all. For evaluation: the reported logprobs stay untruncated."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach p; 1 keeps all. As `top_k`."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the completion holds it already. As `top_k`."""
    stop_ids: tuple[int, ...]
    """Any of these ends a completion and is part of it."""

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", tuple(dict.fromkeys(self.stop_ids)))
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
        }
        for name, (holds, expected) in limits.items():
            if not holds:
                raise ValueError(f"Sampling.{name}: expected {expected}, found {getattr(self, name)}")


class RolloutError(RuntimeError):
    """Sampling cannot go on: not a fault of the settings, and never a reward of 0."""


def check_requests(
    requests: Sequence[Request], sampling: Sampling, *, vocab_size: int, max_positions: int
) -> None:
    """ValueError for a request that cannot be served."""
    longest = max_positions - sampling.max_tokens
    seen: set[str] = set()
    for request in requests:
        ids, where = request.token_ids, f"request {request.id!r}"
        if request.id in seen:
            raise ValueError(f"{where}: the id occurs twice; ids must be distinct in one call")
        seen.add(request.id)
        if request.num < 1:
            raise ValueError(f"{where}: num is {request.num}, expected at least 1")
        if not 0 <= request.seed < 2**64:
            raise ValueError(f"{where}: seed is {request.seed}, expected 0 <= seed < 2**64")
        if not ids:
            raise ValueError(f"{where}: the prompt is empty; at least one token is needed")
        if len(ids) > longest:
            raise ValueError(
                f"{where}: {len(ids)} prompt tokens and max_tokens={sampling.max_tokens} exceed the "
                f"model's {max_positions} positions; shorten the prompt to {longest}"
            )
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{where}: token {wrong} is outside the vocabulary of {vocab_size}")


class Engine(Protocol):
    """Samples from the newest policy it was given."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """One group per request, in the order in which they complete."""
        ...

    def update_policy(self, params: Any, *, version: int) -> None:
        """Take a copy of the weights (the caller may then donate its own) as policy `version`."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...

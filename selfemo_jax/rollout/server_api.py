"""One serving process over HTTP: its routes, its deadlines, and what of its answers is believed.

Failures have two kinds. `Unreachable`: no answer came, so asking again is right. `Refused`: an answer came
and said no. An answer that came whole and does not fit the request is `Rejected`, with a word for the
counters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from selfemo_jax.rollout.engine import Completion, Request, Sampling

GENERATE = "/inference/v1/generate"
_CONNECT_SECONDS = 10.0
_FLOOR = -9000.0
"""vLLM writes -9999 where a log-prob is not finite."""


class ServerError(RuntimeError):
    """A request to a serving process failed."""


class Unreachable(ServerError):
    """No answer: the process is gone, hangs, or the connection broke."""


class Refused(ServerError):
    """The answer was an error."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Rejected(ServerError):
    """An answer that cannot be trained on; ``kind`` is one word for the counters."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Server:
    """A client of one replica; its methods may be called from several threads."""

    def __init__(
        self, url: str, key: str, *, request_timeout: float, refresh_timeout: float, health_timeout: float
    ):
        self.url = url.rstrip("/")
        self._health_timeout = health_timeout
        self._request_timeout, self._refresh_timeout = request_timeout, refresh_timeout
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            # Waiting requests hold a connection each.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            # A proxy of the environment has no business between two processes of one machine.
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def healthy(self) -> bool:
        """Whether the server says that its engine lives."""
        try:
            return self._client.get("/health", timeout=self._health_timeout).status_code == 200
        except httpx.HTTPError:
            return False

    def generate(
        self, request: Request, sampling: Sampling, *, seeded: bool
    ) -> list[tuple[Completion, tuple[str, ...]]]:
        """The completions of a request, each with the server's names of the versions that sampled it."""
        parameters = {
            "n": request.num,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "logprobs": 0,
            "stop_token_ids": list(sampling.stop_ids),
            # The end-of-turn token of the request counts, not one that the model's files name.
            "ignore_eos": True,
            "detokenize": False,
        }
        if seeded:
            # The generators of the server take 63 bits.
            parameters["seed"] = request.seed % 2**63
        body = {"token_ids": list(request.token_ids), "sampling_params": parameters}
        answer = self._call("POST", GENERATE, self._request_timeout, "to answer with rollouts", json=body)
        return completions_of(answer, request, sampling)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p of tokens 1, 2, ... of a sequence, each given those before it, at temperature 1."""
        body = {
            "token_ids": list(token_ids),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0},
        }
        answer = self._call("POST", GENERATE, self._refresh_timeout, "to score a probe", json=body)
        rows = answer.get("prompt_logprobs") or []
        if len(rows) != len(token_ids):
            raise Rejected("length", f"{self.url}: {len(rows)} scores for a probe of {len(token_ids)} tokens")
        return [_value(row, token) for row, token in zip(rows[1:], token_ids[1:], strict=True)]

    # Control

    def stage(self, path: str) -> list[dict[str, Any]]:
        """Every worker reads and checks a published version; nothing of what is served changes."""
        return self._rpc("stage_weights", [path], "to stage new weights")

    def apply(self, version: int) -> list[dict[str, Any]]:
        """Every worker takes the staged version into the model."""
        return self._rpc("apply_weights", [version], "to apply new weights")

    def applied_digests(self) -> list[dict[str, Any]]:
        """What each worker says that it applied: version and a digest per Hugging Face tensor."""
        return self._rpc("applied_digest", [], "to say what it serves")

    def drop_staged(self) -> None:
        """Forget a staged version."""
        self._rpc("drop_staged", [], "to drop staged weights")

    def pause(self) -> None:
        """Let running requests finish and start no new ones."""
        self._control("/pause?mode=wait", "to pause")

    def resume(self) -> None:
        """Go on after a pause."""
        self._control("/resume", "to resume")

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier prompts, which other weights made."""
        self._control("/reset_prefix_cache", "to reset its prefix cache")

    def set_version(self, version: int) -> None:
        """Name the weights that are served from now on."""
        self._control("/update_weight_version", "to take a version", json={"new_version": str(version)})

    def version(self) -> str:
        """The server's name of what it serves."""
        words = "to say its version"
        return str(self._call("GET", "/weight_info", self._refresh_timeout, words)["weight_version"])

    def paused(self) -> bool:
        """Whether the server is paused."""
        return bool(
            self._call("GET", "/is_paused", self._refresh_timeout, "to say if it is paused")["is_paused"]
        )

    def _rpc(self, method: str, args: Sequence[Any], words: str) -> list[dict[str, Any]]:
        body = {"method": method, "args": list(args), "timeout": self._refresh_timeout}
        answer = self._call("POST", "/collective_rpc", self._refresh_timeout, words, json=body)
        results = answer.get("results") or []
        for result in results:
            if isinstance(result, Mapping) and "error" in result:
                raise Refused(f"{self.url}: {method}: {result['error']}", 500)
        return [dict(result) for result in results if isinstance(result, Mapping)]

    def _control(self, path: str, words: str, *, json: Any = None) -> None:
        self._call("POST", path, self._refresh_timeout, words, json=json)

    def _call(
        self, method: str, path: str, seconds: float, words: str, *, json: Any = None
    ) -> dict[str, Any]:
        timeout = httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        try:
            answer = self._client.request(method, path, json=json, timeout=timeout)
        except httpx.TimeoutException as error:
            waited = _CONNECT_SECONDS if isinstance(error, httpx.ConnectTimeout) else seconds
            raise Unreachable(
                f"the trainer waited {waited:g} s for {self.url}{path} {words}; no answer ({_kind(error)})"
            ) from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"the trainer asked {self.url}{path} {words}: {_kind(error)} {error}"
            ) from error
        if answer.status_code >= 400:
            raise Refused(
                f"{self.url}{path} answered {answer.status_code}: {_reason(answer)}", answer.status_code
            )
        if not answer.content:
            return {}
        try:
            found = answer.json()
        except ValueError as error:
            raise Unreachable(f"{self.url}{path}: the answer was cut or is not JSON: {error}") from error
        return found if isinstance(found, dict) else {"value": found}


def completions_of(
    answer: Mapping[str, Any], request: Request, sampling: Sampling
) -> list[tuple[Completion, tuple[str, ...]]]:
    """Read and check an answer of the generate route; `Rejected` where any of its parts cannot be
    believed."""
    where = f"request {request.id!r}"
    choices = sorted(answer.get("choices") or [], key=lambda choice: choice.get("index", -1))
    if [choice.get("index") for choice in choices] != list(range(request.num)):
        raise Rejected("length", f"{where}: {len(choices)} completions, {request.num} were asked for")
    return [_completion(choice, where, sampling) for choice in choices]


def _completion(
    choice: Mapping[str, Any], where: str, sampling: Sampling
) -> tuple[Completion, tuple[str, ...]]:
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Rejected("abort", f"{where}: a completion ended with {reason!r}: it is cut off")
    ids = [int(token) for token in choice.get("token_ids") or []]
    content = (choice.get("logprobs") or {}).get("content") or []
    if not ids or len(content) != len(ids) or len(ids) > sampling.max_tokens:
        raise Rejected(
            "length",
            f"{where}: {len(ids)} tokens with {len(content)} log-probs, max_tokens {sampling.max_tokens}",
        )
    if any(int(entry["token_id"]) != token for entry, token in zip(content, ids, strict=True)):
        raise Rejected("length", f"{where}: the log-probs are those of other tokens")
    logprobs = [_number(entry.get("logprob")) for entry in content]
    if not all(math.isfinite(value) and _FLOOR < value <= 1e-3 for value in logprobs):
        raise Rejected("nonfinite", f"{where}: a log-prob is not a finite number of at most 0")
    ended = ids[-1] in sampling.stop_ids
    whole = ended or (reason == "length" and len(ids) == sampling.max_tokens)
    if not whole or any(token in sampling.stop_ids for token in ids[:-1]):
        raise Rejected("length", f"{where}: finish reason {reason!r} does not fit its {len(ids)} tokens")
    spans = choice.get("weight_versions") or []
    versions = tuple(dict.fromkeys(str(span["version"]) for span in spans))
    completion = Completion(
        token_ids=tuple(ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if ended else "length",
        policy_versions=(),
    )
    return completion, versions


def _value(row: Mapping[str, Any] | None, token: int) -> float:
    entry = (row or {}).get(str(token))
    value = _number(entry.get("logprob") if isinstance(entry, Mapping) else None)
    if not math.isfinite(value) or value <= _FLOOR:
        raise Rejected("nonfinite", "a probe's log-prob is missing or not finite")
    return value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _kind(error: Exception) -> str:
    return type(error).__name__


def _reason(answer: httpx.Response) -> str:
    try:
        found = answer.json()
    except ValueError:
        return answer.text[:500]
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:2000]

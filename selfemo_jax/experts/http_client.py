"""Questions to an OpenAI-compatible chat server, many at once.

What is temporary (no connection, a time-out, 408, 409, 429, 5xx, a body that is cut or no JSON) is tried
again after a growing, random wait, and never before the moment that the server asks for. What is about one
question (400, 413, 422) is an answer: refused. What is about every question (401, 403, 404, a redirect, a
refusal of whatever is asked) stops: no question is begun, and the answers that are on their way are kept.
"""

import asyncio
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from selfemo_jax.experts.ask import Answer, ChatSampling, ExpertError, Question, Usage, question_key
from selfemo_jax.experts.limits import Gate, reset_wait, retry_after
from selfemo_jax.settings.experts import Endpoint, Expert

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds; the bound of the random wait doubles from the first to the longest."""
LARGEST_BODY = 16 << 20
"""Bytes of an answer that are read."""
SHORTEST_KEY = 12
"""Letters; what is shorter is a placeholder for a server without keys, and may be a word of an answer."""
BUSY = (429, 503)
TEMPORARY = (408, 409, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
REFUSED = (400, 413, 422)

UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What a body that is no chat completion raises, up to numbers without end and lists nested without end."""
MOST_TOKENS = 1 << 40
"""Of one answer; a server that says more does not count."""

Receive = Callable[[Question, Answer], None]
_KEY_TEXT = re.compile(r"[\x21-\x7e]+")


class Temporary(Exception):
    """One request failed in a way that may pass. ``busy``: the server asked for the wait itself."""

    def __init__(self, words: str, *, kind: str, wait: float = 0.0, busy: bool = False):
        super().__init__(words)
        self.kind, self.wait, self.busy = kind, wait, busy


def read_key(endpoint: Endpoint) -> str | None:
    """The key from the environment; ValueError when the variable is empty or cannot be a header. The key
    itself is in no message."""
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise ValueError(
            f"expert {endpoint.name}: the environment variable {endpoint.key_env} (key_env) is not set; put "
            "the server's key into it, or set key_env to null for a server without keys"
        )
    if not _KEY_TEXT.fullmatch(key):
        raise ValueError(
            f"expert {endpoint.name}: the key in {endpoint.key_env} has blanks or letters outside ASCII"
        )
    return key


class HttpExpert:
    """One chat server. ``retries`` counts failed requests by kind; ``seconds`` has the time of the request
    that was answered, by the answer's key; nothing here keeps the key but the
    request headers."""

    def __init__(
        self,
        endpoint: Endpoint,
        expert: Expert,
        sampling: ChatSampling,
        *,
        say: Callable[[str], None] = print,
    ):
        assert endpoint.base_url is not None and endpoint.model is not None
        self.endpoint, self.expert, self.sampling, self._say = endpoint, expert, sampling, say
        self.model = endpoint.model
        self.retries: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._key = read_key(endpoint)
        self._hidden = _spellings(self._key) if self._key else None
        self._url = endpoint.base_url.rstrip("/") + "/chat/completions"

    def __repr__(self) -> str:
        return f"HttpExpert({self.endpoint.name}, {self._url}, {self.model})"

    async def ask(
        self,
        questions: Sequence[Question],
        receive: Receive,
        stopping: Callable[[], bool],
        *,
        proven: bool = False,
    ) -> list[tuple[Question, str]]:
        """Ask all, handing each answer over as it comes; returns the questions that failed, with reasons.

        New questions are no longer begun once ``stopping`` says so, nor is one tried again or waited for.
        ``proven``: the server has answered before, so that a refusal is about its question. ExpertError when
        the server takes no question at all: a wrong key, address or field, failure after failure, or a wait
        beyond `expert.deadline`; it is raised when the requests under way have ended.
        """
        waiting, failed = deque(questions), []
        failure: ExpertError | None = None
        failures_in_a_row = 0
        many = max(3, self.endpoint.concurrency)
        held: list[tuple[Question, Answer]] = []
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.endpoint.concurrency)
        timeout = httpx.Timeout(self.expert.timeout)

        def ending() -> bool:
            return failure is not None or stopping()

        gate = Gate(self.endpoint.name, longest=self.expert.deadline, ending=ending, say=self._say)

        async def work(client: httpx.AsyncClient) -> None:
            nonlocal failure
            try:
                await work_on(client)
            except ExpertError as error:
                # Raised at once it would cancel the others, whose answers are being paid for.
                failure = failure or error

        async def work_on(client: httpx.AsyncClient) -> None:
            nonlocal failures_in_a_row, proven
            while waiting and not ending():
                question = waiting.popleft()
                try:
                    answer = await self._with_retries(client, question, gate, ending)
                except Temporary as error:
                    if ending():
                        return
                    failed.append((question, str(error)))
                    failures_in_a_row += 1
                    if failures_in_a_row >= many:
                        raise ExpertError(
                            f"expert {self.endpoint.name}: {failures_in_a_row} questions failed one after "
                            f"the other, the last with: {error}. Look at the server, then start again"
                        ) from None
                    continue
                if answer is None:
                    return
                failures_in_a_row = 0
                if answer.refused and not proven:
                    held.append((question, answer))
                    if len(held) >= many:
                        raise self._refuses_all(held)
                    continue
                proven = True
                receive(question, answer)

        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout) as client:
            workers = min(self.endpoint.concurrency, len(waiting))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(workers):
                        tasks.create_task(work(client))
            except BaseExceptionGroup as group:
                # The first says what happened; the others were cancelled for it or say the same.
                raise group.exceptions[0] from None
        if held and not proven and failure is None and not stopping():
            failure = self._refuses_all(held)
        # Of too few refusals nobody can tell whose fault they are: those questions are asked again.
        for question, answer in held if proven else ():
            receive(question, answer)
        if failure is not None:
            raise failure
        return failed

    def _refuses_all(self, held: Sequence[tuple[Question, Answer]]) -> ExpertError:
        return ExpertError(
            f"expert {self.endpoint.name}: all of the first {len(held)} questions were refused, the last "
            f"with {held[-1][1].refused}. Look at model, extra_body and expert.max_tokens"
        )

    async def _with_retries(
        self, client: httpx.AsyncClient, question: Question, gate: Gate, ending: Callable[[], bool]
    ) -> Answer | None:
        """The answer; None when asking ends before one came."""
        started, counted = time.monotonic(), 0
        jitter = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)

        def wait(state: RetryCallState) -> float:
            return max(jitter(state), gate.left)

        def stop(state: RetryCallState) -> bool:
            nonlocal counted
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, Temporary)
            self.retries[error.kind] = self.retries.get(error.kind, 0) + 1
            counted += not error.busy
            late = time.monotonic() - started + max(state.upcoming_sleep, error.wait) > self.expert.deadline
            return counted >= self.expert.tries or late or ending()

        retry = retry_if_exception_type(Temporary)
        async for attempt in AsyncRetrying(wait=wait, stop=stop, retry=retry, sleep=gate.wait, reraise=True):
            with attempt:
                if not await gate.passed():
                    return None
                began = time.monotonic()
                answer = await self._request(client, question, gate)
                self.seconds[answer.key] = time.monotonic() - began
                return answer
        raise AssertionError("unreachable: the last error is raised again")

    async def _request(self, client: httpx.AsyncClient, question: Question, gate: Gate) -> Answer:
        try:
            # The client's own limits are between two bytes; a server that drips would never run into them.
            async with asyncio.timeout(self.expert.timeout):
                async with client.stream("POST", self._url, json=self._body(question)) as response:
                    parts, size = [], 0
                    async for part in response.aiter_bytes():
                        parts.append(part)
                        size += len(part)
                        if size > LARGEST_BODY:
                            raise Temporary(f"an answer above {LARGEST_BODY} bytes", kind="body")
        except (TimeoutError, httpx.TimeoutException):
            words = f"no answer within {self.expert.timeout:g} s"
            raise Temporary(words, kind="timeout") from None
        except httpx.ConnectError as error:
            raise Temporary(f"no connection to {self._url}: {self._safe(error)}", kind="connection") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Temporary(f"the answer broke off: {self._safe(error)}", kind="body") from None
        body = b"".join(parts)
        now = time.time()
        if response.status_code != 200:
            return self._not_ok(response, body, question, gate, now)
        if wait := reset_wait(response.headers, tokens=self.sampling.max_tokens, now=now):
            gate.block(wait)
        return self._read(body, question)

    def _not_ok(
        self, response: httpx.Response, body: bytes, question: Question, gate: Gate, now: float
    ) -> Answer:
        status = response.status_code
        words = f"HTTP {status}: {self._safe(_error_words(body))}"
        if status in TEMPORARY or status in BUSY:
            asked = retry_after(response.headers, now=now)
            if asked is None and status == 429:
                asked = reset_wait(response.headers, tokens=self.sampling.max_tokens, now=now) or None
            if asked is not None:
                gate.block(asked)
                gate.check()
            busy = status in BUSY and asked is not None
            raise Temporary(words, kind=str(status), wait=asked or 0.0, busy=busy)
        if status in REFUSED:
            return self._answer(question, "", finish_reason="refused", refused=words)
        hint = {
            401: f"; look at the key in {self.endpoint.key_env or 'key_env (none is set)'}",
            403: f"; look at the key in {self.endpoint.key_env or 'key_env (none is set)'}",
            404: f"; look at base_url and model {self.model!r}",
        }.get(status, "")
        raise ExpertError(f"expert {self.endpoint.name}: {self._url} answered {words}{hint}")

    def _read(self, body: bytes, question: Question) -> Answer:
        try:
            record = json.loads(body)
            choice = record["choices"][0]
            text = choice["message"]["content"]
            usage = record.get("usage") or {}
            finish = choice.get("finish_reason") or "stop"
            counts = Usage(
                prompt_tokens=_count(usage.get("prompt_tokens")),
                completion_tokens=_count(usage.get("completion_tokens")),
            )
            if not isinstance(finish, str) or not (text is None or isinstance(text, str)):
                raise TypeError("content is no text")
        except UNREADABLE as error:
            shown = self._safe(body.decode("utf-8", "replace"), most=120)
            raise Temporary(f"no chat completion ({type(error).__name__}): {shown}", kind="json") from None
        return self._answer(question, text or "", finish_reason=finish, usage=counts)

    def _answer(
        self,
        question: Question,
        text: str,
        *,
        finish_reason: str,
        usage: Usage | None = None,
        refused: str | None = None,
    ) -> Answer:
        usage = usage or Usage()
        price = (
            self.endpoint.price_in * usage.prompt_tokens + self.endpoint.price_out * usage.completion_tokens
        )
        return Answer(
            key=question_key(self.model, question, self.sampling),
            source=self.endpoint.name,
            model=self.model,
            text=self._told(_plain(text)),
            finish_reason=self._told(finish_reason),
            usage=usage,
            cost=price / 1e6,
            refused=refused,
        )

    def _body(self, question: Question) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": _plain(question.system)},
                {"role": "user", "content": _plain(question.user)},
            ],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": question.attempt,
        }
        extra = json.loads(self.sampling.extra_body) if self.sampling.extra_body else {}
        return {name: value for name, value in (body | extra).items() if value is not None}

    def _safe(self, error: object, *, most: int = 300) -> str:
        """The first words without the key, which some servers repeat; masked whole, so that no cut leaves a
        part of it."""
        return " ".join(self._masked(str(error)).split())[:most] or type(error).__name__

    def _told(self, text: str) -> str:
        """What an answer says, which goes to disk: without a key, but with a placeholder such as "none"."""
        return self._masked(text) if self._key and len(self._key) >= SHORTEST_KEY else text

    def _masked(self, words: str) -> str:
        return self._hidden.sub("[key]", words) if self._hidden else words


def _spellings(key: str) -> re.Pattern[str]:
    """The key as it is, and as JSON may spell it: some servers escape a slash, or any sign by its number."""
    return re.compile("".join(rf"\\{{0,3}}(?:{re.escape(c)}|(?i:u{ord(c):04x}))" for c in key))


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _error_words(body: bytes) -> str:
    """The message of an error body as most servers write it, else the body."""
    try:
        record = json.loads(body)
        error = record.get("error", record) if isinstance(record, dict) else record
        message = error.get("message") if isinstance(error, dict) else error
        return str(message if message is not None else error)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _count(tokens: Any) -> int:
    number = int(tokens or 0)
    if not 0 <= number <= MOST_TOKENS:
        raise ValueError(f"{number:.3g} tokens")
    return number

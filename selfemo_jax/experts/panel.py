"""All experts of a run behind one call: who is asked what, what the cache knows, progress, cost, limits."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfemo_jax.experts.ask import (
    Answer,
    ChatSampling,
    ExpertError,
    Interrupted,
    Question,
    Usage,
    question_key,
)
from selfemo_jax.experts.cache import AnswerCache
from selfemo_jax.experts.http_client import HttpExpert
from selfemo_jax.experts.policy import PolicyExpert
from selfemo_jax.experts.replay import ReplayExpert
from selfemo_jax.settings.experts import Endpoint, Expert

SAY_EVERY = 15.0
"""Seconds between lines of progress where there is no terminal."""
SHOWN_FAILURES = 3

MakePolicy = Callable[[Endpoint, ChatSampling], PolicyExpert]


class Panel:
    """The experts of a run and their cache; closed by `close` or the end of a ``with``.

    Example: ``answers = panel.ask(questions, what="personas")`` gives for each question the answers of the
    endpoints it went to, in their order.
    """

    def __init__(
        self,
        settings: Expert,
        cache_path: Path,
        *,
        make_policy: MakePolicy | None = None,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
        console: Console | None = None,
    ):
        """Open the cache and read the keys from the environment; nothing is asked yet.

        ``make_policy`` builds the expert of kind policy when it is first needed. ValueError for a missing
        key or recording, and for a cache in use.
        """
        assert settings.endpoints, "config_check asks for an endpoint"
        self.settings = settings
        self._make_policy, self._stopping, self._say = make_policy, stopping, say
        self._console = console or Console(highlight=False)
        self._experts: dict[str, HttpExpert | PolicyExpert | ReplayExpert] = {}
        for endpoint in settings.endpoints:
            sampling = self.sampling(endpoint)
            if endpoint.kind == "http":
                self._experts[endpoint.name] = HttpExpert(endpoint, settings, sampling, say=say)
            elif endpoint.kind == "replay":
                self._experts[endpoint.name] = ReplayExpert(endpoint, sampling)
        self.cache = AnswerCache(cache_path)
        self.asked, self.usage, self.cost = 0, Usage(), 0.0

    def sampling(self, endpoint: Endpoint) -> ChatSampling:
        """How the endpoint's tokens are drawn."""
        return ChatSampling(
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_tokens=self.settings.max_tokens,
            extra_body=endpoint.extra_body,
        )

    def ask(self, questions: Sequence[Question], *, what: str) -> list[tuple[Answer, ...]]:
        """For each question its answers: of one endpoint (assign split) or of each model (all).

        What the cache holds is not asked again. ExpertError when some could not be answered, were stopped
        or would go over ``max_cost``: everything answered until then is in the cache, and the same call goes
        on from there.
        """
        started = time.monotonic()
        wanted = [(question, self._endpoints_of(question)) for question in questions]
        open_by_endpoint: dict[str, dict[str, Question]] = {}
        # Two endpoints of one model share their answers: the first is asked.
        open_keys: set[str] = set()
        total = 0
        for question, endpoints in wanted:
            for endpoint in endpoints:
                key = self._key(endpoint, question)
                total += 1
                if self.cache.get(key) is None and key not in open_keys:
                    open_keys.add(key)
                    open_by_endpoint.setdefault(endpoint.name, {})[key] = question
        num_open, asked_before = len(open_keys), self.asked
        if num_open:
            self._say(f"{what}: {total} questions, {total - num_open} answers in {self.cache.path}")
            with self._progress(what, num_open) as advance:
                failed = self._ask_open(open_by_endpoint, advance)
            self.cache.flush()
            self._say(self._summary(what, self.asked - asked_before, time.monotonic() - started))
            self._check_complete(what, failed, open_by_endpoint)
        keys = [
            tuple(dict.fromkeys(self._key(endpoint, question) for endpoint in endpoints))
            for question, endpoints in wanted
        ]
        return [tuple(answer for key in some if (answer := self.cache.get(key))) for some in keys]

    @property
    def seconds(self) -> dict[str, float]:
        """Key of an answer that was asked for now -> seconds of its request."""
        experts = [expert for expert in self._experts.values() if isinstance(expert, HttpExpert)]
        return {key: seconds for expert in experts for key, seconds in expert.seconds.items()}

    def num_open(self, questions: Sequence[Question]) -> int:
        """How many requests `ask` would make; the policy's own are not counted."""
        keys = {
            self._key(endpoint, question)
            for question in questions
            for endpoint in self._endpoints_of(question)
            if endpoint.kind != "policy"
        }
        return sum(self.cache.get(key) is None for key in keys)

    def _endpoints_of(self, question: Question) -> Sequence[Endpoint]:
        endpoints = self.settings.endpoints
        if self.settings.assign == "all":
            return endpoints
        # By the prompt alone: other questions move none to another endpoint, and one prompt has one answer.
        words = f"{question.system}\n{question.user}".encode("utf-8", "replace")
        place = int.from_bytes(hashlib.sha256(words).digest()[:8], "big")
        return (endpoints[place % len(endpoints)],)

    def _expert(self, endpoint: Endpoint) -> HttpExpert | PolicyExpert | ReplayExpert:
        if endpoint.name not in self._experts:
            if self._make_policy is None:
                raise ValueError(
                    f"expert {endpoint.name}: kind policy answers inside a training run only; use a server "
                    "(kind http) here"
                )
            self._experts[endpoint.name] = self._make_policy(endpoint, self.sampling(endpoint))
        return self._experts[endpoint.name]

    def _key(self, endpoint: Endpoint, question: Question) -> str:
        return question_key(self._expert(endpoint).model, question, self.sampling(endpoint))

    def _ask_open(
        self, open_by_endpoint: Mapping[str, Mapping[str, Question]], advance: Callable[[], None]
    ) -> list[tuple[Question, str]]:
        failed: list[tuple[Question, str]] = []
        remote: list[tuple[HttpExpert, list[Question]]] = []
        for endpoint in self.settings.endpoints:
            questions = list(open_by_endpoint.get(endpoint.name, {}).values())
            if not questions:
                continue
            expert = self._expert(endpoint)
            if isinstance(expert, HttpExpert):
                remote.append((expert, questions))
            elif isinstance(expert, PolicyExpert):
                for question, answer in expert.ask(questions, self._full):
                    self._receive(endpoint, question, answer, advance)
            else:
                for question in questions:
                    answer = expert.answer(question)
                    if answer is None:
                        failed.append((question, f"the recording {endpoint.record} does not hold it"))
                    else:
                        self._receive(endpoint, question, answer, advance)
        if remote:
            failed += asyncio.run(self._ask_remote(remote, advance))
        return failed

    async def _ask_remote(
        self, remote: Sequence[tuple[HttpExpert, list[Question]]], advance: Callable[[], None]
    ) -> list[tuple[Question, str]]:
        def receive_from(expert: HttpExpert) -> Callable[[Question, Answer], None]:
            return lambda question, answer: self._receive(expert.endpoint, question, answer, advance)

        tasks = [
            asyncio.create_task(
                expert.ask(
                    questions, receive_from(expert), self._full, proven=self.cache.has_spoken(expert.model)
                )
            )
            for expert, questions in remote
        ]
        # One server that fails must not cost the answers that another is writing.
        done = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [result for result in done if isinstance(result, BaseException)]
        if errors:
            self.cache.flush()
            raise errors[0]
        return [failure for result in done if isinstance(result, list) for failure in result]

    def _receive(
        self, endpoint: Endpoint, question: Question, answer: Answer, advance: Callable[[], None]
    ) -> None:
        self.cache.add(answer, question, self.sampling(endpoint))
        self.asked += 1
        self.usage, self.cost = self.usage + answer.usage, self.cost + answer.cost
        advance()

    def _full(self) -> bool:
        limit = self.settings.max_cost
        return self._stopping() or (limit is not None and self.cache.cost >= limit)

    def _check_complete(
        self,
        what: str,
        failed: Sequence[tuple[Question, str]],
        open_by_endpoint: Mapping[str, Mapping[str, Question]],
    ) -> None:
        missing = sum(self.cache.get(key) is None for keys in open_by_endpoint.values() for key in keys)
        if not missing:
            return
        if failed:
            shown = "; ".join(f"{question.id}: {why}" for question, why in failed[:SHOWN_FAILURES])
            why = f"{len(failed)} failed ({shown})"
        elif self._stopping():
            why = "stopped"
        else:
            spent = f"{self.cache.cost:.4g} spent"
            why = f"expert.max_cost {self.settings.max_cost:g} is reached ({spent}); raise it"
        kind = Interrupted if why == "stopped" else ExpertError
        raise kind(
            f"{what}: {missing} questions without an answer: {why}. All answers so far are in "
            f"{self.cache.path}; start again (a training run with --resume) to go on from there"
        )

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        started = last = time.monotonic()
        done = 0
        bar, task = None, None
        if self._console.is_terminal:
            words = TextColumn("{task.fields[words]}")
            eta = (TextColumn("eta"), TimeRemainingColumn())
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *eta, words,
                console=self._console,
            )  # fmt: skip
            task = bar.add_task(what, total=total, words="")
            bar.start()

        def advance() -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if bar is not None and task is not None:
                bar.update(task, advance=1, words=self._spent())
            elif now - last >= SAY_EVERY:
                last = now
                left = (now - started) / done * (total - done)
                self._say(f"{what}: {done}/{total}, eta {left / 60:.1f} min, {self._spent()}")

        try:
            yield advance
        finally:
            if bar is not None:
                bar.stop()

    def _spent(self) -> str:
        tokens = f"{self.usage.prompt_tokens:,} + {self.usage.completion_tokens:,} tokens"
        priced = any(endpoint.price_in or endpoint.price_out for endpoint in self.settings.endpoints)
        return f"cost {self.cost:.4f}, {tokens}" if priced else tokens

    def _summary(self, what: str, num: int, seconds: float) -> str:
        retries: dict[str, int] = {}
        for expert in self._experts.values():
            if isinstance(expert, HttpExpert):
                for kind, count in expert.retries.items():
                    retries[kind] = retries.get(kind, 0) + count
        tried = ", ".join(f"{count} x {kind}" for kind, count in sorted(retries.items()))
        return f"{what}: {num} answers in {seconds:.1f} s, {self._spent()}" + (
            f"; tried again: {tried}" if tried else ""
        )

    def close(self) -> None:
        """Flush and release the cache; a second call does nothing."""
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Answers of a model behind an OpenAI-compatible server, for baselines that are not ours to load.

It is asked with the words of the policy's prompt (the whole history; the server has its own chat template),
by the client of the experts: answers go into a cache beside the scores at once and are never asked for
twice, what is temporary is tried again. The cache belongs to one address: what another server says under the
same model's name is asked of that one. Other weights behind the same address nobody can see from here, so
what came from the cache is told. Blanks around an answer are dropped, as servers differ in them; all
else is scored as the policy's answers are. A refused question is an answer outside the grammar.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from selfemo_jax.config import Config
from selfemo_jax.data.grammar import parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.prompts import build_messages
from selfemo_jax.evaluation.answers import Answers
from selfemo_jax.experts.ask import Answer, ExpertError, Question
from selfemo_jax.experts.panel import Panel
from selfemo_jax.scores import Prediction, prediction_of
from selfemo_jax.settings.experts import Endpoint, Expert

NAME = "endpoint"


def folder_name(model: str, url: str) -> str:
    """A model at an address as the name of a folder."""
    return f"{_plain(model)}_at_{address_name(url)}"


def address_name(url: str) -> str:
    """A server's address as part of a file's name: its own for each, with or without a slash at the end."""
    place, digest = urlsplit(url), hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:8]
    return f"{_plain(place.netloc + place.path)[:80]}-{digest}"


def _with_fields(endpoint: Endpoint, fields: Mapping[str, float]) -> Endpoint:
    """The endpoint asked for these fields too where they are not 0; its own `extra_body` goes before them."""
    extra = json.loads(endpoint.extra_body) if endpoint.extra_body else {}
    extra = {name: value for name, value in fields.items() if value} | extra
    return replace(endpoint, extra_body=json.dumps(extra) if extra else None)


def _plain(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", words).strip("._") or NAME


class EndpointAnswers:
    """One server and model; closed by the end of its ``with`` block."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        url: str,
        model: str,
        key_env: str | None,
        say: Callable[[str], None] = print,
    ):
        """Nothing is asked yet; ``say`` hears how far the asking is, and what the cache answered. ValueError
        for an address that is none, or a key that is not in the environment."""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"--endpoint {url}: expected an address such as http://127.0.0.1:8000/v1")
        if "@" in urlsplit(url).netloc:
            # The address stands beside every score.
            raise ValueError("--endpoint: the address holds a name or password; give a key by --key_env")
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._say = config, say
        self._path = folder / f"{NAME}_answers_{address_name(url)}.jsonl"
        self._written = self._path.stat().st_mtime if self._path.exists() else None
        template = next(iter(config.expert.endpoints), Endpoint(name=NAME))
        endpoint = Endpoint(
            name=NAME, base_url=url, model=model, key_env=key_env, extra_body=template.extra_body,
            price_in=template.price_in, price_out=template.price_out, concurrency=template.concurrency,
        )  # fmt: skip
        self._endpoint = _with_fields(endpoint, {"frequency_penalty": config.eval.frequency_penalty})
        self._panel: Panel | None = None
        self._open(self._endpoint, temperature=0.0, top_p=1.0)

    def answers(self) -> Answers:
        """As `evaluate` takes them."""
        return Answers(greedy=self.greedy, sampled=self.sampled, config=self._config, timed="request")

    def greedy(self, samples: Sequence[Sample]) -> Iterator[Prediction]:
        """One answer each at temperature 0."""
        panel = self._open(self._endpoint, temperature=0.0, top_p=1.0)
        questions = [self._question(sample) for sample in samples]
        yield from self._read(panel, samples, questions, what="greedy answers")

    def sampled(self, samples: Sequence[Sample], num: int) -> Iterator[tuple[Prediction, ...]]:
        """``num`` answers each, drawn as `eval.temperature`, `eval.top_p` and `eval.top_k` say; the server
        gets a seed with each."""
        drawn = self._config.eval
        endpoint = _with_fields(self._endpoint, {"top_k": drawn.top_k})
        panel = self._open(endpoint, temperature=drawn.temperature, top_p=drawn.top_p)
        repeated = [sample for sample in samples for _ in range(num)]
        questions = [self._question(sample, attempt=i) for sample in samples for i in range(1, num + 1)]
        found = list(self._read(panel, repeated, questions, what=f"{num} sampled answers each"))
        for start in range(0, len(found), num):
            yield tuple(found[start : start + num])

    def _question(self, sample: Sample, attempt: int = 0) -> Question:
        config = self._config
        system, user = build_messages(
            sample, max_labels=config.output.max_labels, thinking=config.model.thinking,
            style=config.output.prompt_style, persona=config.eval.persona == "given",
            descriptions=config.output.descriptions,
        )  # fmt: skip
        return Question(id=sample.id, system=system, user=user, attempt=attempt)

    def _read(
        self, panel: Panel, samples: Sequence[Sample], questions: Sequence[Question], *, what: str
    ) -> Iterator[Prediction]:
        answered = panel.ask(questions, what=what)
        if answered and all(answer.refused for (answer,) in answered):
            # Scored as answers outside the grammar they would hide that no question was taken.
            raise ExpertError(
                f"{what}: {self._endpoint.base_url} refused all {len(answered)}, the last with "
                f"{answered[-1][0].refused}. Look at eval.top_k, eval.frequency_penalty and extra_body: not "
                "every server takes them"
            )
        seconds = panel.seconds
        kept = sum(answer.key not in seconds for (answer,) in answered)
        if kept and self._written is not None:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self._written))
            self._say(
                f"{what}: {kept} of {len(answered)} are from {self._path}, last written {when}; if another "
                f"model answers at {self._endpoint.base_url} since, delete that file to ask anew"
            )
        for sample, (answer,) in zip(samples, answered, strict=True):
            # Inputs of the same prompt share one request.
            yield self._prediction(sample, answer, seconds.pop(answer.key, None))

    def _prediction(self, sample: Sample, answer: Answer, seconds: float | None) -> Prediction:
        text, finished = answer.text.strip(), answer.finish_reason != "length"
        read = parse(
            text,
            inventory=sample.inventory,
            max_labels=self._config.output.max_labels,
            thinking=self._config.model.thinking,
            finished=finished,
        )
        return prediction_of(
            sample, text, read, self._config, finished=finished, seconds=seconds,
            num_prompt_tokens=answer.usage.prompt_tokens, num_tokens=answer.usage.completion_tokens,
        )  # fmt: skip

    def _open(self, endpoint: Endpoint, *, temperature: float, top_p: float) -> Panel:
        self.close()
        given = self._config.expert
        settings = Expert(
            endpoints=[endpoint], temperature=temperature, top_p=top_p, timeout=given.timeout,
            max_tokens=self._config.rollout.max_tokens, deadline=given.deadline, tries=given.tries,
            max_cost=given.max_cost,
        )  # fmt: skip
        self._panel = Panel(settings, self._path, say=self._say)
        return self._panel

    def close(self) -> None:
        """Release the cache; a second call does nothing."""
        if self._panel is not None:
            self._panel.close()
            self._panel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

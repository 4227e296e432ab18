"""Answers of a model behind an OpenAI-compatible server, for baselines that are not ours to load.

It is asked with the words of the policy's prompt (the whole history; the server has its own chat template),
by the client of the experts: answers go into a cache beside the scores at once and are never asked for
twice, what is temporary is tried again. Blanks around an answer are dropped, as servers differ in them; all
else is scored as the policy's answers are. A refused question is an answer outside the grammar.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from selfemo_jax.config import Config
from selfemo_jax.data.grammar import parse
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.prompts import build_messages
from selfemo_jax.evaluation.answers import Answers
from selfemo_jax.experts.ask import Answer, Question
from selfemo_jax.experts.panel import Panel
from selfemo_jax.scores import Prediction, prediction_of
from selfemo_jax.settings.experts import Endpoint, Expert

NAME = "endpoint"


def folder_name(model: str) -> str:
    """The model's name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._") or NAME


class EndpointAnswers:
    """One server and model; closed by the end of its ``with`` block."""

    def __init__(self, config: Config, folder: Path, *, url: str, model: str, key_env: str | None):
        """Nothing is asked yet. ValueError for an address that is none, or a key that is not in the
        environment."""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"--endpoint {url}: expected an address such as http://127.0.0.1:8000/v1")
        if "@" in urlsplit(url).netloc:
            # The address stands beside every score.
            raise ValueError("--endpoint: the address holds a name or password; give a key by --key_env")
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._path = config, folder / f"{NAME}_answers.jsonl"
        template = next(iter(config.expert.endpoints), Endpoint(name=NAME))
        extra = json.loads(template.extra_body) if template.extra_body else {}
        if config.eval.frequency_penalty:
            extra = {"frequency_penalty": config.eval.frequency_penalty} | extra
        extra_body = json.dumps(extra) if extra else None
        self._endpoint = Endpoint(
            name=NAME, base_url=url, model=model, key_env=key_env, extra_body=extra_body,
            price_in=template.price_in, price_out=template.price_out, concurrency=template.concurrency,
        )  # fmt: skip
        self._panel: Panel | None = None
        self._open(temperature=0.0, top_p=1.0)

    def answers(self) -> Answers:
        """As `evaluate` takes them."""
        return Answers(greedy=self.greedy, sampled=self.sampled, config=self._config)

    def greedy(self, samples: Sequence[Sample]) -> Iterator[Prediction]:
        """One answer each at temperature 0."""
        panel = self._open(temperature=0.0, top_p=1.0)
        questions = [self._question(sample) for sample in samples]
        yield from self._read(panel, samples, questions, what="greedy answers")

    def sampled(self, samples: Sequence[Sample], num: int) -> Iterator[tuple[Prediction, ...]]:
        """``num`` answers each, drawn as `eval.temperature` and `eval.top_p` say; the server gets a seed
        with each."""
        drawn = self._config.eval
        panel = self._open(temperature=drawn.temperature, top_p=drawn.top_p)
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
        for sample, (answer,) in zip(samples, answered, strict=True):
            yield self._prediction(sample, answer, panel.seconds.get(answer.key))

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

    def _open(self, *, temperature: float, top_p: float) -> Panel:
        self.close()
        given = self._config.expert
        settings = Expert(
            endpoints=[self._endpoint], temperature=temperature, top_p=top_p, timeout=given.timeout,
            max_tokens=self._config.rollout.max_tokens, deadline=given.deadline, tries=given.tries,
            max_cost=given.max_cost,
        )  # fmt: skip
        self._panel = Panel(settings, self._path)
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

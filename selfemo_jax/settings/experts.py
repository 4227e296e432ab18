"""Settings of expert models and of what they write: personas and scenes."""

from dataclasses import dataclass, field
from typing import Literal

from selfemo_jax.settings.numbers import Count, NotNegative, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One expert model: who answers, what it costs, how hard it may be pressed."""

    name: str
    """Marks every sample that it wrote."""
    kind: Literal["http", "policy", "replay"] = "http"
    """http: an OpenAI-compatible chat server; policy: this run's base policy; replay: a recorded file."""
    base_url: str | None = None
    """http: where the server is, as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """The model's name at the server, and in the recording."""
    key_env: str | None = None
    """Environment variable that holds the key; null: no key is sent."""
    record: str | None = None
    """replay: the file of answers that an earlier run left (its experts.jsonl), or one written by hand with
    lines of question and text; sample: answers to inputs of the bundled corpus."""
    missing: Literal["fail", "refuse"] = "fail"
    """replay: a question that the file does not hold stops the run, or counts as refused."""
    extra_body: str | None = None
    """A JSON object of further request fields; null as a value takes a field out."""
    price_in: NotNegative = 0.0
    """Price of a million prompt tokens."""
    price_out: NotNegative = 0.0
    """Price of a million completion tokens."""
    concurrency: Count = 8
    """Requests under way at once."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """The models that write personas and cold-start answers."""

    endpoints: list[Endpoint] = field(default_factory=list)
    """At least one where persona.source or cold_start.source asks for an expert."""
    assign: Literal["split", "all"] = "split"
    """split: each question goes to one endpoint; all: every endpoint answers every question."""
    cache: str | None = None
    """File of all answers ever given; null: experts.jsonl in the run folder."""
    temperature: NotNegative = 0.7
    """0 is greedy."""
    top_p: Share = 1.0
    """Nucleus of the experts' sampling."""
    max_tokens: Count = 1024
    """Longest answer."""
    timeout: Positive = 120.0
    """Seconds for one request."""
    deadline: Positive = 900.0
    """Seconds for one question with all its tries."""
    tries: Count = 6
    """Requests for one question before it counts as failed; those sent back by a busy server do not count."""
    max_cost: Positive | None = None
    """Spending, in the unit of the prices and with what the cache already holds, at which the run stops."""


@dataclass(frozen=True, kw_only=True)
class Persona:
    """Where persona sentences and scene themes come from (equation 4)."""

    source: Literal["given", "expert", "none"] = "given"
    """given: the data's own; expert: extracted before the first phase; none: no personas, no themes."""
    scope: Literal["segment", "history"] = "segment"
    """What an expert reads: the whole dialogue, or for each input its own history alone: no future turn."""
    max_turns: Count = 40
    """Longest piece an expert reads: a segment is cut into windows, a history to its last turns."""
    splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits that get personas; others than train need scope history and are told by eval.persona given."""

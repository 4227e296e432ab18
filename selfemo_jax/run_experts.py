"""What experts add to a run before its first phase: personas and scenes, and cold-start answers.

Everything asked and answered goes through one cache (`expert.cache`), so a run that was stopped asks on where
it was. What the run took from it is identified twice: by the fingerprint of its data, and by the length and
SHA-256 of the cache in ``experts.json`` of the run folder, which a resumed run must still find.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfemo_jax.appendlog import atomic_write, read_json
from selfemo_jax.config import Config
from selfemo_jax.data.biographies import Biographies
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.prompts import completion_ids
from selfemo_jax.distributed import from_first, num_processes
from selfemo_jax.experts.ask import ChatSampling, Interrupted
from selfemo_jax.experts.panel import MakePolicy, Panel
from selfemo_jax.experts.policy import PolicyExpert
from selfemo_jax.parts import Parts, base_weights, make_engine
from selfemo_jax.phases import ORIGINAL, plan
from selfemo_jax.run_biographies import add_biographies
from selfemo_jax.run_data import RunData, with_experts
from selfemo_jax.run_inputs import cold_inputs
from selfemo_jax.run_personas import add_personas, to_jsonl
from selfemo_jax.run_resume import Stopped
from selfemo_jax.scores import encode_prompt
from selfemo_jax.selfplay import cold_start
from selfemo_jax.settings.experts import Endpoint

Say = Callable[[str], None]


LEAST_PROMPT = 256
"""Tokens that a policy must have for a question; the shortest about a dialogue is longer."""


def needs_experts(config: Config) -> bool:
    """Whether a run asks experts for anything."""
    return config.output.biography == "expert" or _uses_personas(config) or _uses_examples(config)


def _uses_personas(config: Config) -> bool:
    """Whether a phase or an evaluation tells what experts infer."""
    return config.persona.source == "expert" and bool(plan(config) or config.eval.persona == "given")


def _uses_examples(config: Config) -> bool:
    """Whether a phase learns from cold-start answers of experts."""
    cold = any(phase.kind == "sft" and ORIGINAL in phase.buffer for phase in plan(config))
    return cold and config.cold_start.source in ("expert", "mixed")


def cache_path(config: Config, folder: Path) -> Path:
    """The file of all expert answers."""
    return Path(config.expert.cache) if config.expert.cache else folder / "experts.jsonl"


def ask_experts(config: Config, parts: Parts, data: RunData, folder: Path, say: Say) -> RunData:
    """The data with personas and cold-start answers; unchanged when the settings ask for none.

    Leaves ``personas.jsonl``, ``cold_start.jsonl`` and ``experts.json`` in the run folder. SIGTERM lets the
    requests under way end and raises Stopped. ExpertError when something is left unanswered, ValueError when
    the cache lost what this run used before.
    """
    if not needs_experts(config):
        return data
    if num_processes() > 1:
        _check_one_asks(config)

        def asked() -> dict[str, Any]:
            try:
                return told_others(_ask(config, parts, data, folder, say))
            except Stopped as stopped:
                return {"stopped": str(stopped)}

        told = from_first(asked, channel="experts")
        if "stopped" in told:
            raise Stopped(told["stopped"])
        return as_told(data, told)
    return _ask(config, parts, data, folder, say)


def _check_one_asks(config: Config) -> None:
    """Servers are asked by the first process alone; the policy itself would need all of them."""
    names = [endpoint.name for endpoint in config.expert.endpoints if endpoint.kind == "policy"]
    if names:
        raise ValueError(
            f"expert {names[0]}: the policy cannot be the expert of a run of {num_processes()} processes; "
            "serve it (tools/vllm_sidecar.py serve) and name the server as an endpoint of kind http, or "
            "start the run as one process"
        )


def told_others(data: RunData) -> dict[str, Any]:
    """What experts may have changed, as JSON, for the processes that did not ask."""

    def written(sets: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
        return {name: [sample.to_json() for sample in samples] for name, samples in sets.items()}

    found = data.biographies
    lines = [[*speaker, text] for speaker, text in found.written.items()] if found else []
    return {
        "train": written(data.train),
        "evaluation": {split: written(sets) for split, sets in data.evaluation.items()},
        "personas": {root: dict(found) for root, found in data.personas.items()},
        "examples": [[sample.to_json(), list(ids)] for sample, ids in data.expert_examples],
        "biographies": found and {"source": found.source, "written": lines},
        "cache": dict(data.expert_cache),
        "fingerprint": data.fingerprint,
    }


def as_told(data: RunData, told: Mapping[str, Any]) -> RunData:
    """The data of a process that did not ask, with what `told_others` says."""

    def read(sets: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Sample, ...]]:
        return {name: tuple(map(Sample.from_json, samples)) for name, samples in sets.items()}

    return replace(
        data,
        train=read(told["train"]),
        evaluation={split: read(sets) for split, sets in told["evaluation"].items()},
        personas=told["personas"],
        expert_examples=tuple((Sample.from_json(sample), tuple(ids)) for sample, ids in told["examples"]),
        expert_cache=told["cache"],
        biographies=_read_biographies(told["biographies"]),
        fingerprint=told["fingerprint"],
    )


def _read_biographies(found: Mapping[str, Any] | None) -> Biographies | None:
    if found is None:
        return None
    written = {(dataset, speaker): text for dataset, speaker, text in found["written"]}
    return Biographies(source=found["source"], written=written)


def _ask(config: Config, parts: Parts, data: RunData, folder: Path, say: Say) -> RunData:
    record = folder / "experts.json"
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signal())
        panel = Panel(
            config.expert,
            cache_path(config, folder),
            make_policy=_policy_maker(config, parts, stack),
            stopping=stopping,
            say=say,
        )
        stack.enter_context(panel)
        if record.exists():
            before = read_json(record)
            panel.cache.check_prefix(before["length"], before["sha256"])
        try:
            if _uses_personas(config):
                data = add_personas(config, data, panel, folder, say)
            data = add_biographies(config, data, panel, folder)
            if _uses_examples(config):
                data = add_examples(config, parts.codec, data, panel, folder, say)
        except Interrupted as error:
            raise Stopped(str(error)) from None
        panel.cache.flush()
        length, digest = panel.cache.length_and_digest()
        used = {
            "cache": str(panel.cache.path),
            "length": length,
            "sha256": digest,
            "inputs": data.fingerprint,
        }
        atomic_write(record, json.dumps(used, indent=1) + "\n")
    return replace(data, expert_cache=used)


def add_examples(
    config: Config, codec: TextCodec, data: RunData, panel: Panel, folder: Path, say: Say
) -> RunData:
    """The data with the accepted cold-start answers of experts (equation 5)."""
    if config.cold_start.source not in ("expert", "mixed"):
        return data
    asked = [sample for samples in cold_inputs(config, data).values() for sample in samples]
    # What the policy is not told must not decide what it is to say.
    told = asked if config.data.persona else [replace(s, persona=None, theme=None) for s in asked]
    written = cold_start.write_answers(panel, told, config)
    examples, judged = [], []
    original = {sample.id: sample for sample in asked}
    for one in written:
        if one.reason == "accepted":
            sample = replace(original[one.sample.id], tags=one.sample.tags)
            ids = _target(one, sample, codec, config)
            if len(ids) <= config.rollout.max_tokens:
                examples.append((sample, ids))
            else:
                one = replace(one, reason="too_long")
        judged.append(one)
    atomic_write(folder / "cold_start.jsonl", to_jsonl([one.to_json() for one in judged]))
    counts = cold_start.reasons(judged)
    words = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    say(f"cold start: {len(examples)} of {len(judged)} expert answers accepted ({words})")
    if not examples and config.cold_start.source == "expert":
        raise ValueError(
            f"cold_start.source expert: no answer was accepted ({words}); look at "
            f"{folder / 'cold_start.jsonl'}, cold_start.tau, expert.max_tokens and rollout.max_tokens"
        )
    return with_experts(
        data, train=data.train, evaluation=data.evaluation, personas=data.personas, examples=examples
    )


def _target(one: cold_start.Written, sample: Sample, codec: TextCodec, config: Config) -> tuple[int, ...]:
    thinking = config.model.thinking
    think_open = thinking and encode_prompt(sample, codec, config, persona=config.data.persona).think_open
    return tuple(
        completion_ids(
            one.parsed.emotion,
            one.parsed.self_emotion,
            one.response,
            codec,
            think=one.think if thinking else None,
            think_open=think_open,
        )
    )


def _policy_maker(config: Config, parts: Parts, stack: ExitStack) -> MakePolicy:
    def make(endpoint: Endpoint, sampling: ChatSampling) -> PolicyExpert:
        max_prompt = parts.model.max_positions - sampling.max_tokens
        if max_prompt < LEAST_PROMPT:
            raise ValueError(
                f"expert {endpoint.name}: the policy reads {parts.model.max_positions} tokens (with random "
                f"weights batch.row_tokens) and expert.max_tokens is {sampling.max_tokens}, which leaves "
                f"{max_prompt} for a question; expected {LEAST_PROMPT} or more: lower expert.max_tokens, or "
                "raise batch.row_tokens"
            )
        # Recorded rollouts answer the prompts of training, not these.
        live = replace(config, rollout=replace(config.rollout, replay=None))
        engine = make_engine(replace(parts, config=live))
        stack.callback(engine.close)
        return PolicyExpert(
            endpoint,
            sampling,
            engine,
            parts.codec,
            base_weights(parts),
            thinking=config.model.thinking,
            max_prompt=max_prompt,
        )

    return make


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Inside the block a SIGTERM only makes the function that it gives say True."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)

"""Inputs, answers and groups written by hand, for the tests of everything between the engine and the
update."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from selfemo_jax.config import Config
from selfemo_jax.config_io import parse_config
from selfemo_jax.data.codec import TextCodec, load_codec
from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, LabelSet
from selfemo_jax.data.grammar import serialise
from selfemo_jax.data.inputs import Reference, Sample
from selfemo_jax.data.prompts import Prompt
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.rollout.engine import Completion, Group
from selfemo_jax.run_data import RunData

LABEL_SETS = {labels.name: labels for labels in (MELD, EMORYNLP, IEMOCAP)}
Pairs = Sequence[tuple[str, float]]


@functools.cache
def codec() -> TextCodec:
    return load_codec(bundled_tokenizer())


def settings(**sections) -> Config:
    """A validated configuration for a few prompts; sections as in YAML."""
    base = {
        "platform": "cpu",
        "output": {"prompt_style": "brief"},
        "data": {"max_prompt": 128},
        "reward": {"preset": "robust"},
        "rl": {"prompts_per_step": 4, "mini_prompts": 4, "group_size": 4},
        "batch": {"row_tokens": 256, "micro_rows": 1},
        "rollout": {"max_tokens": 64},
        "flywheel": {"retrain": {"init": "cold"}},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return parse_config(base)


def sample(
    number: int = 0, *, dialogue: str = "d1", labels: LabelSet = MELD, gold: Mapping[str, float], **changes
) -> Sample:
    """An original input: Ada and Bo have spoken, Cy answers Bo."""
    root = f"{labels.name}/train/{dialogue}"
    fields = {
        "id": f"{root}/{number}",
        "root_id": root,
        "dataset": labels.name,
        "split": "train",
        "history": (("Ada", "The ferry left without us."), ("Bo", f"Then we row, all {number} miles.")),
        "target_speaker": "Bo",
        "responder": "Cy",
        "inventory": labels.labels,
        "gold": dict(gold),
        "reference": Reference(speaker="Cy", text="I can row.", labels={labels.labels[0]: 1.0}),
    }
    return Sample(**(fields | changes))


def synthetic(parent: Sample, *, iteration: int, **changes) -> Sample:
    return replace(
        parent,
        **{
            "id": f"{parent.id}+{iteration}",
            "parent_id": parent.id,
            "origin": "synthetic",
            "iteration": iteration,
            "depth": parent.depth + 1,
            "reference": None,
        }
        | changes,
    )


def text(emotion: Pairs, self_emotion: Pairs = (("fear", 0.4),), reply: str = "Hand me an oar, then.") -> str:
    return serialise(emotion, self_emotion, reply)


def completion(answer: str, *, finish: str = "stop", logprob: float = -0.5, version: int = 7) -> Completion:
    ids = (*codec().encode_markup(answer), *([codec().eos_id] if finish == "stop" else []))
    return Completion(
        token_ids=tuple(ids),
        logprobs=(logprob,) * len(ids),
        finish_reason=finish,
        policy_versions=(version,),
    )


def group(name: str, answers: Sequence[str | Completion]) -> Group:
    members = (one if isinstance(one, Completion) else completion(one) for one in answers)
    return Group(request_id=name, completions=tuple(members))


def prompt(length: int = 3, *, of: str = "") -> Prompt:
    return Prompt(
        token_ids=tuple(range(10, 10 + length)), think_open=False, num_dropped_turns=0, sample_id=of
    )


def run_data(train: Mapping[str, Sequence[Sample]]) -> RunData:
    return RunData(
        label_sets={name: LABEL_SETS[name] for name in train},
        train={name: tuple(samples) for name, samples in train.items()},
        evaluation={},
        personas={},
        majority={},
        fingerprint="",
        report={"readers": {}, "parts": {"from": [], "unread": {}}},
    )

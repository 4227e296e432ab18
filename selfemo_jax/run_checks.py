"""What a run looks at before it begins: data and folders that do not fit it stop it at once, and not at the
step or the phase that meets them."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec, load_codec
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.pipeline import mixture_weights
from selfemo_jax.data.prompts import PromptTooLong
from selfemo_jax.label_phase import training_dialogues
from selfemo_jax.model.weights import open_model
from selfemo_jax.parts import Parts
from selfemo_jax.phases import BASE, plan
from selfemo_jax.run_data import RunData, by_dataset, fixed_subset
from selfemo_jax.run_inputs import cold_inputs
from selfemo_jax.scores import encode_prompt

LOOKED_AT = 32
"""Inputs of each data set and split whose prompts are made: those with the most text in what no prompt leaves
out."""
MOST_NAMED = 5
UNCHECKED = ("dtype", "max_positions")
"""Fields of a model in which a verifier may differ: it runs in the type of the policy, on its prompts."""


def check_run(config: Config, parts: Parts, data: RunData) -> None:
    """ValueError where the data or a folder that the settings name does not go with them."""
    check_mixture(config, data)
    check_verifier(parts)
    check_prompts(config, parts.codec, data)


def check_mixture(config: Config, data: RunData) -> None:
    """ValueError where `data.mixture.weights` does not name each data set of the run."""
    mixture = config.data.mixture
    if mixture.kind == "weights":
        sizes = {name: len(samples) for name, samples in data.train.items()}
        mixture_weights(sizes, kind=mixture.kind, temperature=mixture.temperature, weights=mixture.weights)


def check_verifier(parts: Parts) -> None:
    """ValueError where the folder that `flywheel.verifier.weights` names is none of a model, or not one of
    the policy's architecture and tokenizer, as its arrays take the place of the policy's."""
    name = parts.config.flywheel.verifier.weights
    harvests = any(phase.kind == "harvest" for phase in plan(parts.config))
    if name in (None, BASE, "cold") or not harvests:
        return
    try:
        model = open_model(name)[0]
        codec = load_codec(Path(name)) if (Path(name) / "tokenizer.json").exists() else parts.codec
    except ValueError as error:
        raise ValueError(f"flywheel.verifier.weights: {error}") from error
    different = [
        f"{field.name} {getattr(model, field.name)} ({getattr(parts.model, field.name)})"
        for field in fields(model)
        if field.compare
        and field.name not in UNCHECKED
        and getattr(model, field.name) != getattr(parts.model, field.name)
    ]
    if different:
        raise ValueError(
            f"flywheel.verifier.weights {name}: a model of another shape than the policy, in brackets: "
            f"{', '.join(different)}; name one that was trained from the same base"
        )
    if codec.tokenizer.get_vocab() != parts.codec.tokenizer.get_vocab():
        raise ValueError(
            f"flywheel.verifier.weights {name}: its tokenizer has other tokens than the policy's "
            f"({parts.tokenizer_folder}); name a model that was trained with the same one"
        )


def check_prompts(config: Config, codec: TextCodec, data: RunData) -> None:
    """ValueError where the prompt of an input is longer than `data.max_prompt` with its last turn alone."""
    found: dict[str, PromptTooLong] = {}
    for samples, persona in _in_use(config, data):
        for sample in _longest(samples, persona=persona):
            try:
                encode_prompt(sample, codec, config, persona=persona)
            except PromptTooLong as error:
                found[sample.id] = error
    if not found:
        return
    worst = sorted(found, key=lambda name: (-found[name].num_tokens, name))
    named = [f"{name} ({found[name].num_tokens} tokens)" for name in worst[:MOST_NAMED]]
    if len(worst) > MOST_NAMED:
        named.append(f"at least {len(worst) - MOST_NAMED} more")
    style = " or use output.prompt_style brief," if config.output.prompt_style == "full" else ""
    raise ValueError(
        f"data.max_prompt is {config.data.max_prompt}, and with their last turn alone the prompts of these "
        f"inputs are longer: {', '.join(named)}; raise it to {found[worst[0]].num_tokens} or more,{style} or "
        "shorten these utterances in the data"
    )


def _in_use(config: Config, data: RunData) -> Iterator[tuple[Sequence[Sample], bool]]:
    """Inputs of one data set and split that the run will make prompts of, and whether those tell a
    persona."""
    phases = {phase.kind for phase in plan(config)}
    if phases & {"rl", "harvest"}:
        train = data.train
    elif "sft" in phases and config.cold_start.source in ("expert", "mixed"):
        train = cold_inputs(config, data)
    else:
        usable = [s for s in data.all_train() if s.reference is not None and s.reference.labels]
        train = by_dataset(usable) if "sft" in phases else {}
    chosen = list(train.values())
    if "labels" in phases or ("sft" in phases and config.cold_start.lines == "all"):
        # Every labelled line is asked about there, not only those with an answer.
        dialogues = training_dialogues(data, config).values()
        chosen += [tuple(sample for dialogue in found for sample in dialogue) for found in dialogues]
    yield from ((samples, config.data.persona) for samples in chosen)
    told = config.eval.persona == "given"
    for split in {config.data.dev_split, *config.eval.final_splits}:
        sets = data.evaluation.get(split, {})
        if split in config.eval.final_splits or "labels" in phases:
            yield from ((samples, told) for samples in sets.values())
        elif phases:
            whole = [sample for name in sorted(sets) for sample in sets[name]]
            yield fixed_subset(whole, config.eval.max_items, seed=config.seed, purpose="dev"), told


def _longest(samples: Sequence[Sample], *, persona: bool) -> list[Sample]:
    """The inputs with the most bytes of text that stands in every prompt of theirs."""

    def size(sample: Sample) -> int:
        kept = [*sample.history[-1], sample.responder, sample.target_speaker, sample.about]
        kept += [sample.persona, sample.theme] if persona else []
        return sum(len((text or "").encode("utf-8", "replace")) for text in kept)

    return sorted(samples, key=size, reverse=True)[:LOOKED_AT]

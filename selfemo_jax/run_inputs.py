"""What a phase trains on: original inputs, what earlier harvests added, and the supervised examples of
both."""

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.curriculum import difficulties, root_of
from selfemo_jax.data.dialogues import heaviest_label
from selfemo_jax.data.inputs import Sample, shuffle_gold
from selfemo_jax.data.label_rows import Answered, LabelTable, class_weights
from selfemo_jax.data.pipeline import Batch, mixture_weights, with_floor
from selfemo_jax.data.prompts import Prompt, completion_ids, normalise_reply
from selfemo_jax.label_phase import training_dialogues
from selfemo_jax.phases import ORIGINAL, SELFEMO, Phase
from selfemo_jax.rollout.engine import Request
from selfemo_jax.rollout.stream import make_requests
from selfemo_jax.run_data import RunData, by_dataset, fixed_subset
from selfemo_jax.scores import encode_prompt
from selfemo_jax.selfplay.selection import Shares, choose, label_shares

SYNTHETIC = "synthetic"
MIN_SYNTHETIC = 2
"""Synthetic inputs that every batch asks for, so that a small harvest is met from the first step on."""
MOST_OFTEN = 4
"""A synthetic input is asked at most so many times as often as an original one, however few there are."""
Example = tuple[Sample, tuple[int, ...] | None]
"""An input and the completion to learn; None is the completion made of the human data."""
LABEL_ALONE: tuple[int, ...] = ()
"""In place of a completion: one that ends with the token that tells the gold label apart."""


def synthetic_inputs(
    phase: Phase, records: Iterable[Mapping[str, Any]], config: Config, *, human: Shares | None = None
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Accepted inputs of the phase's harvests (lines of ``flywheel.jsonl``): for training, and held out.

    ``human`` label shares bound those of the training part, whose gold is permuted in the arm
    `shuffled_labels`.
    """
    accepted: dict[int, list[Sample]] = {iteration: [] for iteration in _iterations(phase)}
    for record in records:
        if record["accepted"] and record["iteration"] in accepted:
            accepted[record["iteration"]].append(Sample.from_json(record["sample"]))
    wheel = config.flywheel
    training: list[Sample] = []
    held: list[Sample] = []
    for samples in accepted.values():
        selection = choose(
            samples,
            n_syn=wheel.n_syn,
            heldout=wheel.heldout,
            seed=config.seed,
            human=human,
            max_label_ratio=wheel.max_label_ratio,
        )
        training += selection.training
        held += selection.heldout
    if wheel.control == "shuffled_labels":
        training = list(shuffle_gold(training, config.seed))
    return tuple(training), tuple(held)


def heldout_inputs(
    phase: Phase, records: Callable[[], Iterable[Mapping[str, Any]]], config: Config
) -> tuple[Sample, ...]:
    """The synthetic inputs held out of the harvests that the phase learns from, at most `eval.max_items`
    fixed by the seed; none without `eval.selfemo`. ``records`` reads the lines of ``flywheel.jsonl``."""
    if not config.eval.selfemo or not _iterations(phase):
        return ()
    _, held = synthetic_inputs(phase, records(), config)
    return fixed_subset(held, config.eval.max_items, seed=config.seed, purpose=SELFEMO)


def phase_inputs(
    phase: Phase, data: RunData, records: Sequence[Mapping[str, Any]], config: Config
) -> dict[str, tuple[Sample, ...]]:
    """The phase's buffer: original inputs by data set, and the harvests' under ``synthetic``."""
    synthetic, _ = synthetic_inputs(phase, records, config, human=label_shares(data.all_train()))
    return dict(data.train) | ({SYNTHETIC: synthetic} if synthetic else {})


def phase_examples(
    phase: Phase,
    data: RunData,
    records: Sequence[Mapping[str, Any]],
    codec: TextCodec,
    config: Config,
) -> dict[str, tuple[Example, ...]]:
    """Supervised examples by data set: of the human data or by experts for the cold start, else the accepted
    best rollouts. With `cold_start.lines: all` the other labelled lines of the training dialogues are among
    the former."""
    if ORIGINAL not in phase.buffer:
        return {SYNTHETIC: _accepted(phase, data, records, config)}
    asked = config.cold_start.source in ("expert", "mixed")
    examples = (_with_experts if asked else _of_humans)(data, codec, config)
    return _with_other_lines(examples, data, config) if config.cold_start.lines == "all" else examples


def _of_humans(data: RunData, codec: TextCodec, config: Config) -> dict[str, tuple[Example, ...]]:
    usable = [s for s in data.all_train() if s.reference is not None and s.reference.labels]
    if not usable:
        raise ValueError(
            "cold_start.source human: no training input has a labelled next turn by another speaker; use "
            "data.rule context_and_responder, or cold_start.source none with a model that knows the grammar"
        )
    # An answer that a rollout cannot hold is left out: cut short it would teach answers without an end.
    fits = functools.partial(_fits, codec=codec, config=config)
    usable = [sample for sample in usable if fits(sample)]
    if not usable:
        raise ValueError(
            f"cold_start.source human: no answer made of the human data fits into rollout.max_tokens "
            f"{config.rollout.max_tokens}; raise it"
        )
    number = config.cold_start.num
    examples: dict[str, tuple[Example, ...]] = {}
    for name, samples in by_dataset(usable).items():
        share = None if number is None else max(1, round(number * len(samples) / len(usable)))
        chosen = fixed_subset(samples, share, seed=config.seed, purpose=f"cold/{name}")
        examples[name] = tuple((sample, None) for sample in chosen)
    return examples


def cold_inputs(config: Config, data: RunData) -> dict[str, tuple[Sample, ...]]:
    """The training inputs that experts are asked about, by data set, fixed by the seed."""
    number, usable = config.cold_start.num, data.all_train()
    chosen: dict[str, tuple[Sample, ...]] = {}
    for name, samples in by_dataset(usable).items():
        share = None if number is None else max(1, round(number * len(samples) / len(usable)))
        chosen[name] = fixed_subset(samples, share, seed=config.seed, purpose=f"cold/{name}")
    return chosen


def _with_other_lines(
    examples: Mapping[str, Sequence[Example]], data: RunData, config: Config
) -> dict[str, tuple[Example, ...]]:
    """The examples in the order of their dialogues, and among them every labelled line that has none."""
    own: dict[str, list[Example]] = {}
    for example in (example for chosen in examples.values() for example in chosen):
        own.setdefault(example[0].id, []).append(example)
    lines = {
        name: [sample for dialogue in dialogues for sample in dialogue]
        for name, dialogues in training_dialogues(data, config).items()
    }
    assert own.keys() <= {sample.id for samples in lines.values() for sample in samples}
    return {
        name: tuple(example for s in samples for example in own.get(s.id, [(s, LABEL_ALONE)]))
        for name, samples in lines.items()
    }


def _with_experts(data: RunData, codec: TextCodec, config: Config) -> dict[str, tuple[Example, ...]]:
    written: dict[str, list[Example]] = {}
    for sample, completion in data.expert_examples:
        written.setdefault(sample.id, []).append((sample, completion))
    examples: dict[str, tuple[Example, ...]] = {}
    for name, samples in cold_inputs(config, data).items():
        chosen: list[Example] = []
        for sample in samples:
            human = sample.reference is not None and bool(sample.reference.labels)
            if sample.id in written:
                chosen += written[sample.id]
            elif config.cold_start.source == "mixed" and human and _fits(sample, codec=codec, config=config):
                chosen.append((sample, None))
        if chosen:
            examples[name] = tuple(chosen)
    if not examples:
        raise ValueError(
            f"cold_start.source {config.cold_start.source}: no expert's answer was accepted and no input has "
            "a labelled next turn; look at cold_start.jsonl in the run folder"
        )
    return examples


def source_weights(sources: Mapping[str, Sequence[Any]], config: Config) -> dict[str, float]:
    """Share of a batch that each source gets; a harvest gets its share of the buffer, within bounds."""
    settings = config.data.mixture
    originals = {name: len(items) for name, items in sources.items() if name != SYNTHETIC}
    num_synthetic = len(sources.get(SYNTHETIC, ()))
    if not originals:
        return {SYNTHETIC: 1.0}
    weights = mixture_weights(
        originals, kind=settings.kind, temperature=settings.temperature, weights=settings.weights
    )
    if config.flywheel.control == "original_only":
        return weights | ({SYNTHETIC: 0.0} if num_synthetic else {})
    if not num_synthetic:
        return weights
    own = num_synthetic / (num_synthetic + sum(originals.values()))
    share = min(config.flywheel.max_share, own)
    weights = {name: value * (1 - share) for name, value in weights.items()} | {SYNTHETIC: share}
    least = min(MIN_SYNTHETIC / config.rl.prompts_per_step, MOST_OFTEN * own, config.flywheel.max_share, 0.5)
    return with_floor(weights, floor={SYNTHETIC: least})


def step_requests(
    step: int, batch: Batch, *, phase: Phase, config: Config, before: int
) -> tuple[Request, ...]:
    """Requests of a step of the phase, each with its own sampling seed; ``before`` is the number of global
    steps that were done when the phase began."""
    return make_requests(
        batch,
        num=config.rl.group_size,
        global_step=before + step,
        seed=config.seed,
        phase=phase.index,
        step=step,
    )


def encode_input(sample: Sample, codec: TextCodec, config: Config) -> tuple[Sample, Prompt]:
    """An input and its training prompt."""
    return sample, encode_prompt(sample, codec, config, persona=config.data.persona)


def encode_example(
    example: Example, codec: TextCodec, config: Config
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt ids and completion ids of a supervised example."""
    prompt = encode_input(example[0], codec, config)[1]
    return prompt.token_ids, _completion(example, prompt, codec, config)


def example_dialogues(
    examples: Mapping[str, Sequence[Example]],
) -> dict[str, tuple[tuple[Example, ...], ...]]:
    """The examples of each dialogue, by source: the items of `cold_start.rows: dialogues`."""
    found: dict[str, tuple[tuple[Example, ...], ...]] = {}
    for name, chosen in examples.items():
        groups: dict[str, list[Example]] = {}
        for example in chosen:
            groups.setdefault(example[0].root_id, []).append(example)
        found[name] = tuple(map(tuple, groups.values()))
    return found


def example_encoder(
    data: RunData, codec: TextCodec, config: Config, table: LabelTable | None
) -> Callable[[Any], Any]:
    """`encode_example`, or with `cold_start.rows: dialogues` `encode_dialogue`, labels weighted by how
    frequent they are in what the cold start learns from."""
    if config.cold_start.rows != "dialogues":
        return functools.partial(encode_example, codec=codec, config=config)
    assert table is not None
    lines = training_dialogues(data, config) if config.cold_start.lines == "all" else {}
    learned = [sample for dialogues in lines.values() for dialogue in dialogues for sample in dialogue]
    weights = class_weights(learned or data.all_train(), power=config.cold_start.class_power)
    return functools.partial(encode_dialogue, codec=codec, config=config, table=table, weights=weights)


def encode_dialogue(
    examples: Sequence[Example],
    codec: TextCodec,
    config: Config,
    *,
    table: LabelTable,
    weights: Mapping[tuple[str, str], float],
) -> list[Answered]:
    """The examples of a dialogue as sequences that share what their prompts have in common; human-made ones
    that are not among `cold_start.whole_answers` end with their label."""
    answered = []
    for example in examples:
        sample, prompt = encode_input(example[0], codec, config)
        opening, label = table.opening(sample.dataset), heaviest_label(sample.gold)
        if example[1] == LABEL_ALONE:
            completion = (*opening, table.token_ids[table.index(sample.dataset, label)])
        else:
            completion = _completion(example, prompt, codec, config)
        label_at = len(opening) if completion[: len(opening)] == opening else None
        drawn = random.Random(f"whole/{config.seed}/{sample.id}").random()
        whole = drawn < config.cold_start.whole_answers or example[1] is not None
        if label_at is not None and not whole:
            completion = completion[: label_at + 1]
        answered.append(
            Answered(
                prompt_ids=prompt.token_ids,
                completion_ids=completion,
                window=(sample.root_id, prompt.num_dropped_turns),
                label_at=label_at,
                weight=weights.get((sample.dataset, label), 1.0),
            )
        )
    return answered


def opening_inputs(
    sources: Mapping[str, Sequence[Sample]], config: Config, *, seed: int
) -> tuple[Sample, ...]:
    """The inputs that self-play begins from, in a seeded order: those that may carry another generated
    turn."""
    wheel = config.flywheel
    pool = [sample for name in sorted(sources) for sample in sources[name] if sample.depth < wheel.max_depth]
    random.Random(f"play/{seed}").shuffle(pool)
    return tuple(pool[: wheel.max_inputs])


def _completion(example: Example, prompt: Prompt, codec: TextCodec, config: Config) -> tuple[int, ...]:
    sample, completion = example
    if completion is not None:
        return tuple(completion)
    assert sample.reference is not None and sample.reference.labels is not None
    ids = completion_ids(
        sample.gold,
        sample.reference.labels,
        normalise_reply(sample.reference.text),
        codec,
        think="" if config.model.thinking else None,
        think_open=prompt.think_open,
    )
    return tuple(ids)


def _fits(sample: Sample, *, codec: TextCodec, config: Config) -> bool:
    return len(encode_example((sample, None), codec, config)[1]) <= config.rollout.max_tokens


def _iterations(phase: Phase) -> list[int]:
    return [int(name.removeprefix("harvest_")) for name in phase.buffer if name != ORIGINAL]


def _accepted(
    phase: Phase, data: RunData, records: Sequence[Mapping[str, Any]], config: Config
) -> tuple[Example, ...]:
    # The completion says what its child holds, so that one of a held-out child is not learned either.
    human = label_shares(data.all_train())
    training = {sample.id for sample in synthetic_inputs(phase, records, config, human=human)[0]}
    known = {sample.id: sample for sample in data.all_train()}
    examples = []
    for record in records:
        if record["accepted"]:
            child = Sample.from_json(record["sample"])
            if child.id in training:
                examples.append((known[record["parent_id"]], tuple(record["completion_ids"])))
            known[child.id] = child
    return tuple(examples)


def item_difficulty(data: RunData, config: Config) -> Callable[[Any], float] | None:
    """How hard an item of a supervised phase is; None without a curriculum (`cold_start.order`)."""
    if config.cold_start.order == "shuffled":
        return None
    hard = difficulties(data.dialogues)
    return lambda item: hard[root_of(item)]

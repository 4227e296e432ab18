"""The labelled inputs of a run: read, decontaminated, built, subsampled, and identified by a digest."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfemo_jax.config import Config
from selfemo_jax.data.audit import SAME_SOURCE, decontaminate, scored_parts
from selfemo_jax.data.biographies import Biographies, count_lines
from selfemo_jax.data.dialogues import Corpus, Dialogue, LabelSet, heaviest_label, load_corpora
from selfemo_jax.data.inputs import Sample, build_inputs, shuffle_gold


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything labelled that a run sees, by data set name."""

    label_sets: Mapping[str, LabelSet]
    train: Mapping[str, tuple[Sample, ...]]
    """Original training inputs."""
    evaluation: Mapping[str, Mapping[str, tuple[Sample, ...]]]
    """split -> data set -> every labelled utterance of the split."""
    personas: Mapping[str, Mapping[str, str]]
    """Root dialogue of a training input -> speaker -> persona sentence."""
    majority: Mapping[str, str]
    """Most frequent training label of each set."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Root dialogue of an evaluation input -> shared, clean, scripted or improvised: the part it is scored in
    beside the whole set, decided before decontamination; `clean (without emorynlp)` where that set could not
    be read."""
    parts_from: tuple[str, ...] = ()
    """The sets whose training dialogues decided the parts: those of the run and what has the same source."""
    fingerprint: str
    """SHA-256 over every input: a run that is resumed must find the same."""
    report: Mapping[str, Any]
    """What the readers found, repaired and doubted, what decontamination dropped, and the inputs counted."""
    dialogues: Mapping[str, Dialogue] = field(default_factory=dict)
    """Root dialogue of a training input -> the whole dialogue."""
    biographies: Biographies | None = None
    """What the inputs are told of the speaker to recognise."""
    expert_examples: tuple[tuple[Sample, tuple[int, ...]], ...] = ()
    """Training inputs with the completions that experts wrote for the cold start."""
    expert_cache: Mapping[str, Any] = field(default_factory=dict)
    """File, length and SHA-256 of the expert answers behind all this; empty where none was asked."""

    @property
    def num_classes(self) -> int:
        """C: the longest label list and one slot for unknown labels."""
        return max(len(labels.labels) for labels in self.label_sets.values()) + 1

    def all_train(self) -> tuple[Sample, ...]:
        """All original training inputs, set after set."""
        return tuple(sample for name in sorted(self.train) for sample in self.train[name])

    def split(self, name: str) -> tuple[Sample, ...]:
        """All inputs of an evaluation split, set after set."""
        if name not in self.evaluation:
            raise ValueError(f"no split {name!r}; the data has {', '.join(self.evaluation)}")
        return tuple(s for dataset in sorted(self.evaluation[name]) for s in self.evaluation[name][dataset])


def load_data(config: Config) -> RunData:
    """Read the configured sets and build their inputs; the data module's errors say which file and line."""
    corpora = {corpus.label_set.name: corpus for corpus in _corpora(config)}
    report: dict[str, Any] = {"decontaminate": config.data.decontaminate}
    beside, unread = same_source(config.data.sets, _root(config))
    parts, parts_from = scored_parts(corpora, beside=beside), [*corpora, *(one.name for one in beside)]
    parts = _told_apart(parts, unread)
    report["parts"] = {"from": sorted(parts_from), "unread": unread}
    if config.data.decontaminate:
        corpora, report["decontaminated"] = decontaminate(corpora)
    report["readers"] = {name: corpus.report.to_json() for name, corpus in sorted(corpora.items())}
    if config.persona.source != "given":
        corpora = {name: _without_personas(corpus) for name, corpus in corpora.items()}
    train, majority = {}, {}
    personas: dict[str, Mapping[str, str]] = {}
    dialogues: dict[str, Dialogue] = {}
    for name, corpus in sorted(corpora.items()):
        samples = build_inputs(corpus.splits["train"], corpus.label_set, rule=_training_rule(config))
        if config.data.shuffle_gold:
            samples = shuffle_gold(samples, config.seed)
        train[name] = samples
        majority[name] = _majority(corpus)
        for dialogue in corpus.splits["train"]:
            root_id = f"{dialogue.dataset}/{dialogue.split}/{dialogue.dialogue_id}"
            personas[root_id], dialogues[root_id] = dialogue.personas, dialogue
    train = _subset(train, config.data.max_items, config.seed)
    splits = sorted({split for corpus in corpora.values() for split in corpus.splits} - {"train"})
    evaluation = {
        split: {
            name: build_inputs(_without_themes(corpus.splits[split]), corpus.label_set, rule="all")
            for name, corpus in sorted(corpora.items())
            if split in corpus.splits
        }
        for split in splits
    }
    report["train_inputs"] = {name: len(samples) for name, samples in train.items()}
    report["evaluation_inputs"] = {
        split: {name: len(samples) for name, samples in sets.items()} for split, sets in evaluation.items()
    }
    _check_similarity(config.reward.similarity, [corpus.label_set for corpus in corpora.values()])
    data = RunData(
        label_sets={name: corpus.label_set for name, corpus in corpora.items()},
        train=train,
        evaluation=evaluation,
        personas=personas,
        majority=majority,
        parts=parts,
        parts_from=tuple(sorted(parts_from)),
        fingerprint=_fingerprint(train, evaluation),
        report=report,
        dialogues=dialogues,
    )
    if config.output.biography == "train_lines":
        return tell_biographies(data, count_lines(dialogues))
    return data


def same_source(names: Sequence[str], root: Path | None) -> tuple[list[Corpus], dict[str, str]]:
    """The sets that are not among the names but share scenes with one that is; and why one is not at hand."""
    used, found, unread = set(names), [], {}
    for name in SAME_SOURCE if used & set(SAME_SOURCE) else ():
        if name not in used:
            try:
                found.extend(load_corpora([name], root))
            except (ValueError, OSError) as error:
                unread[name] = str(error)
    return found, unread


def doubts(data: RunData, config: Config) -> tuple[str, ...]:
    """What the person who starts a run should know of its data: warnings of the readers, what was dropped
    from training, a split that is not there, and prompts that hold less than the settings promise."""
    readers = data.report["readers"].values()
    told = [line for reader in readers for line in (*reader["warnings"], *reader["leakage"])]
    told += part_doubts(data)
    if not any(data.evaluation.get("dev", {}).values()):
        told.append("the data has no labelled dev utterance: the last policy is scored, not the best by dev")
    promised = config.data.persona and config.persona.source == "given" and config.phases != "none"
    if promised and not any(sample.persona for sample in data.all_train()):
        told.append(
            "no training input has a persona: every responder is played as a neutral participant; with "
            "persona.source expert a model infers them from the dialogues"
        )
    return tuple(f"data: {line}" for line in told)


def part_doubts(data: RunData) -> list[str]:
    """What the person who reads scores should know of the parts that they are told in."""
    return [
        f"{name} cannot be read: the parts shared and clean are not those of runs that have it, and say "
        f"so in their names ({reason})"
        for name, reason in data.report["parts"]["unread"].items()
    ]


def tell_biographies(data: RunData, biographies: Biographies) -> RunData:
    """The data whose inputs are told what is known of the speaker to recognise."""
    train = {name: biographies.told(samples) for name, samples in data.train.items()}
    evaluation = {
        split: {name: biographies.told(samples) for name, samples in sets.items()}
        for split, sets in data.evaluation.items()
    }
    digest = _fingerprint(train, evaluation)
    return replace(data, train=train, evaluation=evaluation, biographies=biographies, fingerprint=digest)


def with_experts(
    data: RunData,
    *,
    train: Mapping[str, tuple[Sample, ...]],
    evaluation: Mapping[str, Mapping[str, tuple[Sample, ...]]],
    personas: Mapping[str, Mapping[str, str]],
    examples: Sequence[tuple[Sample, tuple[int, ...]]],
) -> RunData:
    """The data with what experts added to it; the fingerprint covers all of it."""
    written = [[sample.to_json(), list(ids)] for sample, ids in examples]
    digest = hashlib.sha256(_fingerprint(train, evaluation).encode())
    digest.update(json.dumps([written, {root: dict(personas[root]) for root in sorted(personas)}]).encode())
    return replace(
        data,
        train=train,
        evaluation=evaluation,
        personas=personas,
        expert_examples=tuple(examples),
        fingerprint=digest.hexdigest(),
    )


def fixed_subset(
    samples: Sequence[Sample], number: int | None, *, seed: int, purpose: str
) -> tuple[Sample, ...]:
    """``number`` samples that depend on the seed and the purpose alone, in their original order; all for
    None."""
    if number is None or number >= len(samples):
        return tuple(samples)
    chosen = sorted(random.Random(f"{purpose}/{seed}").sample(range(len(samples)), number))
    return tuple(samples[index] for index in chosen)


def by_dataset(samples: Iterable[Sample]) -> dict[str, tuple[Sample, ...]]:
    """The samples of each data set, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.dataset, []).append(sample)
    return {name: tuple(group) for name, group in groups.items()}


def _corpora(config: Config) -> Sequence[Corpus]:
    return load_corpora(config.data.sets, _root(config), speaker_style=config.data.speaker_style)


def _root(config: Config) -> Path | None:
    root = config.data.root or os.environ.get("SELFEMO_DATA")
    return Path(root) if root else None


def _told_apart(parts: Mapping[str, str], unread: Iterable[str]) -> dict[str, str]:
    """The parts under names of their own where a set was missing that could have made them shared: systems
    are paired on parts of the same name."""
    words = "".join(f" (without {name})" for name in unread)
    return {
        root: f"{part}{words}" if root.partition("/")[0] in SAME_SOURCE else part
        for root, part in parts.items()
    }


def _without_personas(corpus: Corpus) -> Corpus:
    splits = {
        split: tuple(replace(dialogue, personas={}, theme=None) for dialogue in dialogues)
        for split, dialogues in corpus.splits.items()
    }
    return replace(corpus, splits=splits)


def _without_themes(dialogues: Iterable[Dialogue]) -> tuple[Dialogue, ...]:
    """A theme sums up the whole dialogue: with it an input that is scored would tell what is said later."""
    return tuple(replace(dialogue, theme=None) for dialogue in dialogues)


def _training_rule(config: Config) -> str:
    """Which utterances become training inputs; without self-play none needs a real responder."""
    return "any_responder" if config.flywheel.control == "all_original" else config.data.rule


def _check_similarity(pairs: Mapping[str, float], sets: Sequence[LabelSet]) -> None:
    for pair in pairs:
        if not any(set(pair.split("/")) <= set(labels.labels) for labels in sets):
            names = "; ".join(f"{labels.name}: {', '.join(labels.labels)}" for labels in sets)
            raise ValueError(
                f"reward.similarity names {pair!r}, but no data set has both labels; the lists are {names}"
            )


def _majority(corpus: Corpus) -> str:
    counts = Counter(
        heaviest_label(turn.labels)
        for dialogue in corpus.splits["train"]
        for turn in dialogue.turns
        if turn.labels
    )
    if not counts:
        raise ValueError(f"data set {corpus.name}: no turn of its train split has a label")
    return min(counts, key=lambda label: (-counts[label], corpus.label_set.labels.index(label)))


def _subset(
    train: Mapping[str, tuple[Sample, ...]], number: int | None, seed: int
) -> dict[str, tuple[Sample, ...]]:
    """At most ``number`` inputs over all sets together, each set keeping its share."""
    total = sum(len(samples) for samples in train.values())
    if number is None or number >= total:
        return dict(train)
    return {
        name: fixed_subset(
            samples, max(1, number * len(samples) // total), seed=seed, purpose=f"train/{name}"
        )
        for name, samples in train.items()
    }


def _fingerprint(train: Mapping, evaluation: Mapping) -> str:
    digest = hashlib.sha256()
    for part in (train, *evaluation.values()):
        for name in sorted(part):
            for sample in part[name]:
                digest.update(json.dumps(sample.to_json(), sort_keys=True).encode())
    return digest.hexdigest()

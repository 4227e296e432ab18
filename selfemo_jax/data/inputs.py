"""Labelled inputs: a history whose last utterance is to be recognised, and who answers it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from selfemo_jax.data.dialogues import Dialogue, LabelSet, speakers

RULES = ("context_and_responder", "any_responder", "all")
LISTENER = "Listener"
"""The responder of a monologue under the rule `all`."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The real next turn."""

    speaker: str
    text: str
    labels: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled input."""

    id: str
    root_id: str
    """The dialogue it grew from; held-out parts are cut along it."""
    parent_id: str | None = None
    dataset: str
    split: str
    origin: str = "original"
    """original | synthetic"""
    iteration: int = 0
    depth: int = 0
    """Generated turns in the history."""
    history: tuple[tuple[str, str], ...]
    """(speaker, text), oldest first; the last is the utterance to recognise."""
    target_speaker: str
    responder: str
    persona: str | None = None
    """The responder's."""
    about: str | None = None
    """What training dialogues say of the target speaker (`data.biographies`)."""
    theme: str | None = None
    inventory: tuple[str, ...]
    gold: Mapping[str, float]
    reference: Reference | None = None
    policy_version: int | None = None
    """The policy that wrote the last turn; None for human turns."""
    tags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` gives the equal sample back."""
        record = asdict(self)
        record["history"] = [list(turn) for turn in self.history]
        record["inventory"], record["tags"] = list(self.inventory), list(self.tags)
        record["gold"] = dict(self.gold)
        if self.about is None:
            # Records and fingerprints of runs without biographies are those of before there were any.
            del record["about"]
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Sample:
        """Inverse of `to_json`. ValueError for unknown or missing keys and for values of the wrong type."""
        where = f"sample {record.get('id', '<no id>')!r}"
        record = {"about": None, **record}
        _check_keys(record, Sample, where)
        strings = ("id", "root_id", "dataset", "split", "origin", "target_speaker", "responder")
        kinds = dict.fromkeys(strings, str) | {"iteration": int, "depth": int, "gold": dict}
        kinds |= dict.fromkeys(("history", "inventory", "tags"), list)
        optional = {
            "parent_id": str,
            "persona": str,
            "about": str,
            "theme": str,
            "reference": dict,
            "policy_version": int,
        }
        _check_types(record, kinds, optional, where)
        history = record["history"]
        pairs = [isinstance(turn, list) and [type(part) for part in turn] == [str, str] for turn in history]
        if not history or not all(pairs):
            raise ValueError(
                f"{where}: history must be a non-empty list of [speaker, text] pairs of strings."
            )
        for key in ("inventory", "tags"):
            if not all(isinstance(word, str) for word in record[key]):
                raise ValueError(f"{where}: {key} must be a list of strings, found {record[key]!r}.")
        reference = record["reference"]
        if reference is not None:
            at = f"{where}, reference"
            _check_keys(reference, Reference, at)
            _check_types(reference, {"speaker": str, "text": str}, {"labels": dict}, at)
            labels = None if reference["labels"] is None else _weights(reference["labels"], at)
            reference = Reference(speaker=reference["speaker"], text=reference["text"], labels=labels)
        return Sample(
            **{
                **record,
                "history": tuple(map(tuple, history)),
                "inventory": tuple(record["inventory"]),
                "tags": tuple(record["tags"]),
                "gold": _weights(record["gold"], where),
                "reference": reference,
            }
        )


def build_inputs(dialogues: Sequence[Dialogue], label_set: LabelSet, *, rule: str) -> tuple[Sample, ...]:
    """One sample for each labelled turn that the rule admits, in dialogue and turn order.

    Rules (the responder is who answers the last utterance, and whose persona is told):
        context_and_responder: at least one earlier turn, and the next turn is by somebody else, who responds.
        any_responder: with context or not; the next turn's speaker if somebody else, else another speaker of
            the dialogue; turns of a monologue are left out.
        all: every labelled turn; the responder as in `any_responder`, "Listener" in a monologue.

    The other speaker is the one who spoke last before the turn, else who speaks first after it.
    `reference` is the next turn when the responder speaks it. The persona and theme are the dialogue's own.
    """
    if rule not in RULES:
        raise ValueError(f"data.rule is {rule!r}; expected one of {', '.join(RULES)}.")
    samples = []
    for dialogue in dialogues:
        root_id = f"{dialogue.dataset}/{dialogue.split}/{dialogue.dialogue_id}"
        for index, turn in enumerate(dialogue.turns):
            if not turn.labels:
                continue
            responder = _responder(dialogue, index, rule)
            if responder is None:
                continue
            following = dialogue.turns[index + 1] if index + 1 < len(dialogue.turns) else None
            reference = None
            if following is not None and following.speaker == responder:
                reference = Reference(speaker=following.speaker, text=following.text, labels=following.labels)
            samples.append(
                Sample(
                    id=f"{root_id}/{index}",
                    root_id=root_id,
                    dataset=dialogue.dataset,
                    split=dialogue.split,
                    history=tuple((t.speaker, t.text) for t in dialogue.turns[: index + 1]),
                    target_speaker=turn.speaker,
                    responder=responder,
                    persona=dialogue.personas.get(responder),
                    theme=dialogue.theme,
                    inventory=label_set.labels,
                    gold=dict(turn.labels),
                    reference=reference,
                )
            )
    return tuple(samples)


def shuffle_gold(samples: Sequence[Sample], seed: int) -> tuple[Sample, ...]:
    """Permute gold among the samples of each data set: a control with the same inputs and label counts."""
    shuffled = list(samples)
    for dataset in sorted({sample.dataset for sample in samples}):
        places = [i for i, sample in enumerate(samples) if sample.dataset == dataset]
        sources = places[:]
        random.Random(f"{seed}/{dataset}").shuffle(sources)
        for place, source in zip(places, sources, strict=True):
            shuffled[place] = replace(samples[place], gold=samples[source].gold)
    return tuple(shuffled)


def _responder(dialogue: Dialogue, index: int, rule: str) -> str | None:
    speaker = dialogue.turns[index].speaker
    following = dialogue.turns[index + 1].speaker if index + 1 < len(dialogue.turns) else speaker
    if rule == "context_and_responder":
        return following if index > 0 and following != speaker else None
    if following != speaker:
        return following
    if len(speakers(dialogue)) > 1:
        return next(other for other in _by_recency(dialogue, index) if other != speaker)
    return LISTENER if rule == "all" else None


def _by_recency(dialogue: Dialogue, index: int) -> Iterator[str]:
    yield from (turn.speaker for turn in reversed(dialogue.turns[:index]))
    yield from (turn.speaker for turn in dialogue.turns[index + 1 :])


def _check_keys(record: Mapping[str, Any], kind: type, where: str) -> None:
    names = {field.name for field in fields(kind)}
    unknown, missing = sorted(set(record) - names), sorted(names - set(record))
    if unknown or missing:
        parts = [
            f"{word} {', '.join(keys)}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys
        ]
        raise ValueError(f"{where}: {'; '.join(parts)}. The keys are {', '.join(sorted(names))}.")


def _check_types(
    record: Mapping[str, Any], kinds: dict[str, type], optional: dict[str, type], where: str
) -> None:
    for key, kind in {**kinds, **optional}.items():
        value = record[key]
        if value is None and key in optional:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}; expected {kind.__name__}.")


def _weights(weights: Mapping[str, Any], where: str) -> dict[str, float]:
    for label, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise ValueError(
                f"{where}: label {label!r} has weight {weight!r}; expected a number above 0 and at most 1."
            )
    return {label: float(weight) for label, weight in weights.items()}

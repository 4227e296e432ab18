"""The flywheel (equation 7): select the best rollout of a prompt, accept or reject it, extend the dialogue.

The accepted reply becomes the next turn of the dialogue, and the emotions that the policy declared for itself
become that turn's gold label. What a record holds is the new input together with where it came from; a
rejected rollout is recorded with its reason, so that an acceptance rate can be explained.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfemo_jax.config import Config
from selfemo_jax.data.grammar import Answer, acceptable
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.prompts import normalise_reply
from selfemo_jax.scoring import Scored

Personas = Mapping[str, Mapping[str, str]]
"""Root dialogue -> speaker -> persona sentence."""
MIN_WORDS, MAX_WORDS = 1, 80
NEAR_DUPLICATE = 0.8
"""Jaccard similarity of word 3-grams from which a reply repeats one that is already in the store."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The best rollout of one prompt and what became of it."""

    parent: Sample
    child: Sample | None
    """The new input; None when the rollout was rejected."""
    reason: str
    """``accepted``, or why not."""
    reply: str
    select: Mapping[str, float]
    """r1, r2, R of the chosen rollout and the number of valid rollouts of its group."""
    completion_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """One line of ``flywheel.jsonl``."""
        return {
            "parent_id": self.parent.id,
            "root_id": self.parent.root_id,
            "accepted": self.child is not None,
            "reason": self.reason,
            "reply": self.reply,
            "select": dict(self.select),
            "completion_ids": list(self.completion_ids),
            "sample": None if self.child is None else self.child.to_json(),
        }


class ReplyIndex:
    """Word 3-grams of the accepted replies, to find near-duplicates; the same order of calls gives the same
    answers."""

    def __init__(self, replies: Iterable[str] = ()):
        self._grams: list[frozenset] = []
        self._where: dict[tuple, list[int]] = {}
        for reply in replies:
            self.add(reply)

    def add(self, reply: str) -> None:
        """Remember an accepted reply."""
        grams = _trigrams(reply)
        for gram in grams:
            self._where.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)

    def near(self, reply: str) -> bool:
        """Whether an accepted reply is the same but for a few words."""
        grams = _trigrams(reply)
        shared = Counter(place for gram in grams for place in self._where.get(gram, ()))
        return any(
            count / (len(grams) + len(self._grams[place]) - count) >= NEAR_DUPLICATE
            for place, count in shared.items()
        )


def best_rollout(scored: Scored, prompt: int) -> int | None:
    """Index of the group's best valid rollout: highest r1, then r2, then the shorter, then the first; None
    without one."""
    valid = np.flatnonzero(scored.valid[prompt])
    if not len(valid):
        return None
    lengths = [len(completion.token_ids) for completion in scored.completions[prompt]]
    return int(min(valid, key=lambda g: (-scored.r1[prompt, g], -scored.r2[prompt, g], lengths[g], g)))


def harvest(
    scored: Scored,
    config: Config,
    index: ReplyIndex,
    personas: Personas,
    *,
    iteration: int,
    policy_version: int,
) -> list[Candidate]:
    """Judge the best rollout of every prompt of a step (method 3.3); accepted replies enter ``index``."""
    candidates = []
    for prompt, parent in enumerate(scored.samples):
        chosen = best_rollout(scored, prompt)
        if chosen is None:
            reason = "lost" if not scored.present[prompt].any() else "no_valid_rollout"
            candidates.append(
                Candidate(parent=parent, child=None, reason=reason, reply="", select={}, completion_ids=())
            )
            continue
        answer = scored.answers[prompt][chosen]
        reply = normalise_reply(answer.response)
        reason = rejection(answer, reply, parent, float(scored.r1[prompt, chosen]), config, index)
        child = None
        if reason is None:
            child = extend(
                parent,
                answer,
                reply,
                iteration=iteration,
                policy_version=policy_version,
                personas=personas,
                seed=config.seed,
            )
            index.add(reply)
        select = {
            "r1": float(scored.r1[prompt, chosen]),
            "r2": float(scored.r2[prompt, chosen]),
            "R": float(scored.rewards[prompt, chosen]),
            "n_valid": int(scored.valid[prompt].sum()),
        }
        candidates.append(
            Candidate(
                parent=parent,
                child=child,
                reason=reason or "accepted",
                reply=reply,
                select=select,
                completion_ids=scored.completions[prompt][chosen].token_ids,
            )
        )
    return candidates


def rejection(
    answer: Answer, reply: str, parent: Sample, r1: float, config: Config, index: ReplyIndex
) -> str | None:
    """Why the best rollout of ``parent`` may not extend its dialogue; None when it may."""
    words = reply.split()
    if parent.depth >= config.flywheel.max_depth:
        return "max_depth"
    if r1 < config.flywheel.tau:
        return "low_reward"
    if not acceptable(answer):
        return "grammar"
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return "length"
    if not any(character.isalpha() for character in reply):
        return "no_letters"
    if _names_a_speaker(reply, parent):
        return "several_turns"
    if _words(reply) == _words(parent.history[-1][1]):
        return "copy"
    if index.near(reply):
        return "near_duplicate"
    return None


def extend(
    parent: Sample,
    answer: Answer,
    reply: str,
    *,
    iteration: int,
    policy_version: int,
    personas: Personas,
    seed: int,
) -> Sample:
    """The new input: the reply is the last turn, its declared emotions are the gold, the next speaker
    responds."""
    history = (*parent.history, (parent.responder, reply))
    known = personas.get(parent.root_id, {})
    responder = next_responder(parent, known, seed=seed)
    return Sample(
        id=f"{parent.id}+{iteration}",
        root_id=parent.root_id,
        parent_id=parent.id,
        dataset=parent.dataset,
        split=parent.split,
        origin="synthetic",
        iteration=iteration,
        depth=parent.depth + 1,
        history=history,
        target_speaker=parent.responder,
        responder=responder,
        persona=known.get(responder),
        theme=parent.theme,
        inventory=parent.inventory,
        gold=dict(answer.self_emotion),
        reference=None,
        policy_version=policy_version,
    )


def next_responder(parent: Sample, personas: Mapping[str, str], *, seed: int) -> str:
    """Who answers the reply: in a dyad the speaker before; else one of the others, those with a persona if
    there are any, the later they spoke the likelier."""
    last_spoken = {speaker: position for position, (speaker, _) in enumerate(parent.history)}
    others = [speaker for speaker in last_spoken if speaker != parent.responder]
    if len(others) <= 1:
        return parent.target_speaker
    others = [speaker for speaker in others if speaker in personas] or others
    newest = max(last_spoken[speaker] for speaker in others)
    weights = [2.0 ** (last_spoken[speaker] - newest) for speaker in others]
    return random.Random(f"{seed}/{parent.id}/{parent.depth}").choices(others, weights)[0]


def choose(
    children: Sequence[Sample], *, n_syn: int, heldout: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The synthetic training inputs and the held-out SELF-EMO test part of a harvest.

    Whole root dialogues are held out, by a hash of their id, so that a root never lies on both sides. The
    rest is capped at ``n_syn`` with its data sets balanced: taken in turn, each set in a seeded order.
    """
    held = tuple(child for child in children if _is_heldout(child.root_id, heldout, seed))
    rest = [child for child in children if not _is_heldout(child.root_id, heldout, seed)]
    queues: dict[str, list[Sample]] = {}
    for child in rest:
        queues.setdefault(child.dataset, []).append(child)
    for dataset in sorted(queues):
        random.Random(f"{seed}/{dataset}").shuffle(queues[dataset])
    chosen: list[Sample] = []
    while len(chosen) < n_syn and any(queues.values()):
        for dataset in sorted(queues):
            if queues[dataset] and len(chosen) < n_syn:
                chosen.append(queues[dataset].pop())
    return tuple(chosen), held


def summarise(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Share of prompts by outcome, and mean depth of what was accepted."""
    counts = Counter(candidate.reason for candidate in candidates)
    metrics = {f"harvest/{reason}": count / len(candidates) for reason, count in sorted(counts.items())}
    depths = [candidate.child.depth for candidate in candidates if candidate.child is not None]
    return metrics | {"harvest/depth": float(np.mean(depths)) if depths else 0.0}


def _is_heldout(root_id: str, share: float, seed: int) -> bool:
    return random.Random(f"heldout/{seed}/{root_id}").random() < share


def _names_a_speaker(reply: str, parent: Sample) -> bool:
    """Whether the reply writes ``Name:`` of somebody in the dialogue, as a script of several turns does."""
    names = {parent.responder, *(speaker for speaker, _ in parent.history)}
    pattern = "|".join(re.escape(name) for name in sorted(names))
    return re.search(rf"(?<!\w)(?:{pattern})\s*:", reply, re.IGNORECASE) is not None


def _words(text: str) -> tuple[str, ...]:
    kept = "".join(character if character.isalnum() else " " for character in text.lower())
    return tuple(kept.split())


def _trigrams(text: str) -> frozenset:
    words = _words(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset({words})

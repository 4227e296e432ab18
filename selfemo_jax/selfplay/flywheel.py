"""The flywheel (equation 7): select the best rollout of a prompt, accept or reject it, extend the dialogue.

The accepted reply becomes the next turn of the dialogue, and the emotions that the policy declared for itself
become that turn's gold label. What a record holds is the new input together with where it came from; a
rejected rollout is recorded with its reason, so that an acceptance rate can be explained.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from selfemo_jax.config import Config
from selfemo_jax.data.grammar import Answer, acceptable
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.prompts import normalise_reply
from selfemo_jax.rollout.engine import Completion
from selfemo_jax.scoring import Scored
from selfemo_jax.selfplay.hygiene import ReplyIndex, text_problem

Personas = Mapping[str, Mapping[str, str]]
"""Root dialogue -> speaker -> persona sentence."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the verifier reads in a reply."""

    agreement: float
    """Weighted IoU of its answer with the declared emotions; 0 when it gave no valid answer."""
    emotion: Mapping[str, float]
    """Its answer; empty when it gave no valid one."""


Verify = Callable[[Sequence[Sample]], Sequence[Verdict]]
"""A frozen recogniser: new inputs in, one verdict each."""
Encode = Callable[[Sample], Any]
"""Makes an input's prompt; ValueError where none can hold it."""
TOO_LONG = "too_long"
"""Reason of a reply that no prompt can hold."""


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
    """r1, r2, R of the chosen rollout, the number of valid rollouts of its group, and the verifier's
    agreement where there is a verifier."""
    completion_ids: tuple[int, ...]
    policy_version: int
    emotion: Mapping[str, float] = field(default_factory=dict)
    """What it recognised in the last speaker."""
    declared: Mapping[str, float] = field(default_factory=dict)
    """The emotions that it declared for itself: the gold of its child, but for an arm of comparison."""

    def to_json(self) -> dict[str, Any]:
        """One line of ``flywheel.jsonl``."""
        return {
            "parent_id": self.parent.id,
            "root_id": self.parent.root_id,
            "dataset": self.parent.dataset,
            "depth": self.parent.depth + 1,
            "policy_version": self.policy_version,
            "accepted": self.child is not None,
            "reason": self.reason,
            "reply": self.reply,
            "emotion": dict(self.emotion),
            "declared": dict(self.declared),
            "select": dict(self.select),
            "completion_ids": list(self.completion_ids),
            "sample": None if self.child is None else self.child.to_json(),
        }


def ranked_rollouts(scored: Scored, prompt: int) -> list[int]:
    """Indices of the group's valid rollouts, the best first: highest r1, then r2, then the shorter, then the
    first."""
    valid = np.flatnonzero(scored.valid[prompt])
    lengths = [len(completion.token_ids) for completion in scored.completions[prompt]]
    return sorted(
        map(int, valid), key=lambda g: (-scored.r1[prompt, g], -scored.r2[prompt, g], lengths[g], g)
    )


def best_rollout(scored: Scored, prompt: int) -> int | None:
    """Index of the group's best valid rollout; None without one."""
    return next(iter(ranked_rollouts(scored, prompt)), None)


def harvest(
    scored: Scored,
    config: Config,
    index: ReplyIndex,
    personas: Personas,
    *,
    iteration: int,
    policy_version: int | None,
    encode: Encode | None = None,
    verify: Verify | None = None,
) -> list[Candidate]:
    """Judge the best rollout of every prompt of a step (method 3.3); accepted replies enter ``index``.

    ``policy_version`` None takes that of each rollout. With ``encode`` a reply that alone fills a prompt is
    rejected: it could be neither played on nor trained on. With ``verify`` an accepted child must also
    convince a frozen recogniser, all of the step in one call, after every rule that costs less.
    """
    drafts = [
        _draft(
            scored,
            prompt,
            config,
            index,
            personas,
            iteration=iteration,
            policy_version=policy_version,
            encode=encode,
        )
        for prompt in range(len(scored.samples))
    ]
    if verify is not None:
        drafts = _verified(drafts, verify, config)
    candidates = []
    for draft in drafts:
        # Again, now that the replies of this step are known one after the other.
        if draft.child is not None and index.near(draft.reply):
            draft = replace(draft, child=None, reason="near_duplicate")
        if draft.child is not None:
            index.add(draft.reply)
        candidates.append(draft)
    return candidates


def _draft(
    scored: Scored,
    prompt: int,
    config: Config,
    index: ReplyIndex,
    personas: Personas,
    *,
    iteration: int,
    policy_version: int | None,
    encode: Encode | None,
) -> Candidate:
    """The chosen rollout of a prompt, with its child unless it is rejected by itself."""
    parent, ranked = scored.samples[prompt], ranked_rollouts(scored, prompt)
    completions = scored.completions[prompt]
    if not ranked:
        return Candidate(
            parent=parent,
            child=None,
            reason="no_valid_rollout" if scored.present[prompt].any() else "lost",
            reply="",
            select={},
            completion_ids=(),
            policy_version=_newest(completions) if policy_version is None else policy_version,
        )

    def judge(g: int) -> Candidate:
        answer = scored.answers[prompt][g]
        reply = normalise_reply(answer.response)
        reason = rejection(answer, reply, parent, float(scored.r1[prompt, g]), config, index)
        version = _newest([completions[g]]) if policy_version is None else policy_version
        child = None
        if reason is None:
            child = extend(
                parent,
                answer,
                reply,
                iteration=iteration,
                policy_version=version,
                personas=personas,
                seed=config.seed,
            )
            if encode is not None and not _fits(child, encode):
                child, reason = None, TOO_LONG
        return Candidate(
            parent=parent,
            child=child,
            reason=reason or "accepted",
            reply=reply,
            select={
                "r1": float(scored.r1[prompt, g]),
                "r2": float(scored.r2[prompt, g]),
                "R": float(scored.rewards[prompt, g]),
                "n_valid": len(ranked),
            },
            completion_ids=completions[g].token_ids,
            policy_version=version,
            emotion=dict(answer.emotion),
            declared=dict(answer.self_emotion),
        )

    best = judge(ranked[0])
    if config.flywheel.select == "reward":
        return best
    # The best is what is reported where none may become a turn.
    return next((draft for g in ranked if (draft := judge(g)).child is not None), best)


def _newest(completions: Sequence[Completion]) -> int:
    """The newest policy that wrote any of them; 0 for a lost group."""
    return max((version for completion in completions for version in completion.policy_versions), default=0)


def _fits(sample: Sample, encode: Encode) -> bool:
    try:
        encode(sample)
    except ValueError:
        return False
    return True


def _verified(drafts: Sequence[Candidate], verify: Verify, config: Config) -> list[Candidate]:
    """The drafts after the verifier: rejected where it disagrees; in the arm `verifier_labels` relabelled."""
    children = [draft.child for draft in drafts if draft.child is not None]
    verdicts = iter(verify(children) if children else ())
    judged = []
    for draft in drafts:
        if draft.child is not None:
            verdict = next(verdicts)
            draft = replace(draft, select={**draft.select, "verifier": verdict.agreement})
            relabel = config.flywheel.control == "verifier_labels"
            if not verdict.emotion or (verdict.agreement < config.flywheel.verifier.tau and not relabel):
                draft = replace(draft, child=None, reason="verifier")
            elif relabel:
                assert draft.child is not None
                draft = replace(draft, child=replace(draft.child, gold=dict(verdict.emotion)))
        judged.append(draft)
    return judged


def rejection(
    answer: Answer, reply: str, parent: Sample, r1: float, config: Config, index: ReplyIndex
) -> str | None:
    """Why the best rollout of ``parent`` may not extend its dialogue; None when it may."""
    wheel = config.flywheel
    if parent.depth >= wheel.max_depth:
        return "max_depth"
    if r1 < wheel.tau:
        return "low_reward"
    if not acceptable(answer):
        return "grammar"
    declared = [label for label, _ in answer.self_emotion]
    if problem := text_problem(reply, parent, declared, wheel.hygiene):
        return problem
    return "near_duplicate" if index.near(reply) else None


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


def summarise(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Share of prompts by outcome, and mean depth of what was accepted."""
    counts = Counter(candidate.reason for candidate in candidates)
    metrics = {f"harvest/{reason}": count / len(candidates) for reason, count in sorted(counts.items())}
    depths = [candidate.child.depth for candidate in candidates if candidate.child is not None]
    return metrics | {"harvest/depth": float(np.mean(depths)) if depths else 0.0}

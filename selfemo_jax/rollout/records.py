"""Recorded rollouts: ``rollouts/step_N.npz`` (ids, log-probs, versions) for replay and ``step_N.jsonl`` for
reading.

Both are written aside and renamed. `ReplayEngine` gives the recorded groups back, so that a run's losses can
be computed again on another mesh or after a change that should change nothing.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config_check import parse_keep
from selfemo_jax.rollout.engine import Completion, Engine, Group, Request, Sampling
from selfemo_jax.scoring import Scored

FOLDER = "rollouts"
_REASONS = ("stop", "length")


def step_file(run_dir: Path, global_step: int, suffix: str) -> Path:
    """Path of a step's record; ``suffix`` is ``npz`` or ``jsonl``."""
    return run_dir / FOLDER / f"step_{global_step:06d}.{suffix}"


def save_groups(
    run_dir: Path, global_step: int, requests: Sequence[Request], groups: Sequence[Group]
) -> None:
    """Write the groups of a step as flat arrays; ``groups[p]`` answers ``requests[p]``."""
    atomic_write(step_file(run_dir, global_step, "npz"), groups_to_bytes(requests, groups))


def groups_to_bytes(requests: Sequence[Request], groups: Sequence[Group]) -> bytes:
    """The recorded form of groups; log-probs are float32 in it."""
    completions = [completion for group in groups for completion in group.completions]
    versions = [completion.policy_versions for completion in completions]
    arrays = {
        "request_ids": np.array([request.id for request in requests]),
        "errors": np.array([group.error or "" for group in groups]),
        "prompt_lengths": np.array([len(request.token_ids) for request in requests], np.int32),
        "prompt_ids": _flat([request.token_ids for request in requests], np.int32),
        "group_sizes": np.array([len(group.completions) for group in groups], np.int32),
        "lengths": np.array([len(completion.token_ids) for completion in completions], np.int32),
        "token_ids": _flat([completion.token_ids for completion in completions], np.int32),
        "logprobs": _flat([completion.logprobs for completion in completions], np.float32),
        "finish": np.array([_REASONS.index(completion.finish_reason) for completion in completions], np.int8),
        "version_lengths": np.array([len(some) for some in versions], np.int32),
        "versions": _flat(versions, np.int64),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def load_groups(path: Path) -> tuple[list[Request], list[Group]]:
    """Read what `save_groups` wrote; ValueError where the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as recorded rollouts: {error}") from error
    return groups_from_bytes(content, where=str(path))


def groups_from_bytes(content: bytes, *, where: str) -> tuple[list[Request], list[Group]]:
    """The inverse of `groups_to_bytes`, without the requests' seeds; ValueError opens with ``where``."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _groups_of({name: arrays[name] for name in arrays.files})
    # zipfile, zlib and numpy raise a dozen kinds between them for a cut or overwritten file.
    except Exception as error:
        raise ValueError(f"{where}: cannot be read as recorded rollouts: {error}") from error


def _groups_of(data: dict[str, np.ndarray]) -> tuple[list[Request], list[Group]]:
    prompts = _cut(data["prompt_ids"], data["prompt_lengths"])
    tokens = _cut(data["token_ids"], data["lengths"])
    logprobs = _cut(data["logprobs"], data["lengths"])
    versions = _cut(data["versions"], data["version_lengths"])
    if int(data["group_sizes"].sum()) != len(tokens):
        raise ValueError(f"{len(tokens)} completions for groups of {int(data['group_sizes'].sum())}")
    completions = [
        Completion(
            token_ids=tuple(ids.tolist()),
            logprobs=tuple(values.tolist()),
            finish_reason=_REASONS[int(reason)],
            policy_versions=tuple(some.tolist()),
        )
        for ids, values, reason, some in zip(tokens, logprobs, data["finish"], versions, strict=True)
    ]
    requests, groups, cursor = [], [], 0
    for name, error, prompt, size in zip(
        data["request_ids"].tolist(), data["errors"].tolist(), prompts, data["group_sizes"], strict=True
    ):
        requests.append(Request(id=name, token_ids=tuple(prompt.tolist()), num=int(size), seed=0))
        members = tuple(completions[cursor : cursor + int(size)])
        groups.append(Group(request_id=name, completions=members, error=error or None))
        cursor += int(size)
    return requests, groups


def save_texts(run_dir: Path, global_step: int, scored: Scored) -> None:
    """One JSON object per rollout: text, reading, rewards, advantage and the versions that sampled it."""
    lines = []
    for p, sample in enumerate(scored.samples):
        for g, completion in enumerate(scored.completions[p]):
            answer = scored.answers[p][g]
            line: dict[str, Any] = {
                "step": global_step,
                "sample_id": sample.id,
                "dataset": sample.dataset,
                "origin": sample.origin,
                "idx": g,
                "history": [list(turn) for turn in sample.history] if g == 0 else None,
                "gold": dict(sample.gold),
                "text": scored.texts[p][g],
                "parse": {
                    "valid": bool(scored.valid[p, g]),
                    "codes": list(answer.codes),
                    "emotion": dict(answer.emotion),
                    "self_emotion": dict(answer.self_emotion),
                    "response": answer.response,
                },
                "finish": completion.finish_reason,
                "r1": float(scored.r1[p, g]),
                "r2": float(scored.r2[p, g]),
                "R": float(scored.rewards[p, g]),
                "advantage": float(scored.advantages[p, g]),
                "policy_versions": list(completion.policy_versions),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    atomic_write(step_file(run_dir, global_step, "jsonl"), "\n".join(lines) + "\n")


def prune(run_dir: Path, global_step: int, *, keep: str) -> None:
    """Delete the record that the rule no longer keeps once ``global_step`` is written."""
    kind, number = parse_keep(keep)
    old = global_step - number if kind == "last" else global_step - 1
    if kind == "all" or old < 0 or (kind == "every" and old % number == 0):
        return
    for suffix in ("npz", "jsonl"):
        step_file(run_dir, old, suffix).unlink(missing_ok=True)


def set_aside(run_dir: Path, *, after: int, into: Path) -> int:
    """Move the records of steps beyond ``after`` into a folder; returns how many steps they were."""
    steps = set()
    for path in sorted((run_dir / FOLDER).glob("step_*.*")):
        step = int(path.stem.removeprefix("step_"))
        if step > after:
            (into / FOLDER).mkdir(parents=True, exist_ok=True)
            path.rename(into / FOLDER / path.name)
            steps.add(step)
    return len(steps)


class ReplayEngine:
    """An engine that answers sampling requests with the rollouts of a recorded run, and greedy ones with
    ``inner``."""

    def __init__(self, inner: Engine, run_dir: Path):
        self._inner, self._run_dir = inner, run_dir
        if not (run_dir / FOLDER).is_dir():
            raise ValueError(f"rollout.replay: {run_dir} has no {FOLDER}/ folder; expected a run's folder")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Recorded groups; ValueError where the recorded prompts are not those that this run asks for."""
        if sampling.temperature == 0.0:
            yield from self._inner.generate(requests, sampling)
            return
        global_step = int(requests[0].id.split(":", 1)[0])
        path = step_file(self._run_dir, global_step, "npz")
        if not path.exists():
            raise ValueError(f"rollout.replay: {path} is missing; the recorded run kept fewer steps")
        recorded = {request.id: (request, group) for request, group in zip(*load_groups(path), strict=True)}
        for request in requests:
            found = recorded.get(request.id)
            if found is None or found[0].token_ids != request.token_ids:
                raise ValueError(
                    f"rollout.replay: {path} holds another prompt than {request.id!r}; replay needs the "
                    "data, seed and configuration of the recorded run"
                )
            group = found[1]
            if group.error is None and len(group.completions) != request.num:
                raise ValueError(
                    f"rollout.replay: {path} holds {len(group.completions)} rollouts of {request.id!r}, "
                    f"rl.group_size is {request.num}; set it to what the recorded run had"
                )
            yield group

    def update_policy(self, params: Any, *, version: int) -> None:
        """Pass the weights to the engine that answers greedy requests."""
        self._inner.update_policy(params, version=version)

    def close(self) -> None:
        """Close the inner engine."""
        self._inner.close()


def _flat(rows: Sequence[Sequence], dtype) -> np.ndarray:
    return np.array([value for row in rows for value in row], dtype)


def _cut(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if int(lengths.sum()) != len(values):
        raise ValueError(f"{len(values)} values for lengths that add up to {int(lengths.sum())}")
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []

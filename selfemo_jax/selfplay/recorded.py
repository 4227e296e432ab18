"""Harvest without sampling (`flywheel.harvest: replay`): what SELF-GRPO sampled last is judged again.

The rollouts of a training phase were made by a policy that changed from step to step, so a record carries the
version that wrote it. They end after one turn: a reply is played on only when its dialogue, as an input of
the next round, is answered again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.rollout.engine import Group, Request
from selfemo_jax.rollout.records import load_groups, step_file
from selfemo_jax.rollout.stream import Rollouts
from selfemo_jax.selfplay.play import Encode, Turn


@dataclass(frozen=True, kw_only=True)
class RecordedTurn(Turn):
    """A turn whose answers are known: ``answers[n]`` are those to ``live[n]``."""

    answers: tuple[tuple[Request, Group], ...]

    def rollouts(self, encode: Encode, *, after: int) -> Iterator[tuple[int, Rollouts]]:
        """The steps beyond step ``after``, as an engine would give them. ValueError where an input has
        another prompt than the recorded one."""
        for step in range(max(self.first, after + 1), self.last + 1):
            part = slice((step - self.first) * self.size, (step - self.first + 1) * self.size)
            items = tuple(encode(sample) for sample in self.live[part])
            for (sample, prompt), (request, _) in zip(items, self.answers[part], strict=True):
                if prompt.token_ids != request.token_ids:
                    raise ValueError(
                        f"flywheel.harvest replay: the prompt of {sample.id} is not the recorded one; the "
                        "data or its settings changed since; start a new run"
                    )
            requests, groups = zip(*self.answers[part], strict=True)
            yield step, Rollouts(batch=Batch(items=items, state={}), requests=requests, groups=groups)


def newest_answers(
    run_dir: Path,
    steps: Sequence[int],
    samples: Mapping[str, Sample],
    *,
    max_depth: int,
    most: int | None,
    size: int,
) -> RecordedTurn:
    """The newest recorded group of each input that these global steps answered, newest step first.

    ``samples`` are the phase's inputs by id, ``most`` the inputs taken at most, ``size`` those of a step of
    the harvest. Inputs that carry ``max_depth`` generated turns are left out. ValueError where a record is
    missing.
    """
    found: dict[str, tuple[Request, Group]] = {}
    for step in sorted(steps, reverse=True):
        path = step_file(run_dir, step, "npz")
        if not path.exists():
            raise ValueError(
                f"flywheel.harvest replay: {path} is missing; it needs the rollouts of the last "
                f"{len(steps)} steps of RL; set rollout.keep to all, or to last N with N at least "
                "flywheel.max_age"
            )
        for request, group in zip(*load_groups(path), strict=True):
            # A request's id is step:place:input.
            name = request.id.split(":", 2)[2]
            if name not in samples:
                raise ValueError(f"flywheel.harvest replay: {path} answers {name}, which is no input of RL")
            if name not in found and samples[name].depth < max_depth:
                found[name] = (request, group)
    chosen = list(found)[:most]
    return RecordedTurn(
        number=1,
        live=tuple(samples[name] for name in chosen),
        first=1,
        size=size,
        most=math.ceil(len(chosen) / size),
        answers=tuple(found[name] for name in chosen),
    )

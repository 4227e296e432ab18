"""Role-based self-play (equations 6 and 7): dialogues played on turn by turn, all of them together.

A turn is one round over every live dialogue: its responder is asked with its own persona, a group of answers
is sampled, the best is judged. Where it is accepted, the reply is the dialogue's next utterance with the
declared emotions as gold, and the dialogue stays live with another responder until it carries ``max_depth``
generated turns. Each turn of a dialogue is a new input with a prompt of its own.

Who plays on is read from the stored records alone, never from memory, so that a harvest that was killed in
its middle goes on exactly as one that was not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfemo_jax.config import Config, Flywheel
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.inputs import Sample
from selfemo_jax.data.pipeline import Batch
from selfemo_jax.data.prompts import Prompt, encode_history
from selfemo_jax.rollout.engine import Engine, Sampling
from selfemo_jax.rollout.stream import generate_groups, make_requests
from selfemo_jax.scoring import Scorer, score_groups
from selfemo_jax.selfplay.flywheel import Candidate, Personas, harvest
from selfemo_jax.selfplay.hygiene import ReplyIndex

Encode = Callable[[Sample], tuple[Sample, Prompt]]
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One round: every live dialogue is asked once, in steps of one engine call each."""

    number: int
    """From 1, the first generated turn of this harvest."""
    live: tuple[Sample, ...]
    first: int
    """Step of the harvest (from 1) at which the turn begins."""
    size: int
    """Dialogues in a step."""
    most: int
    """Steps of the whole harvest if from here on every reply is accepted."""

    @property
    def last(self) -> int:
        """Step of the harvest at which the turn ends."""
        return self.first + math.ceil(len(self.live) / self.size) - 1

    def batches(self, encode: Encode, *, after: int = 0) -> Iterator[Batch]:
        """The inputs of each step beyond step ``after``, encoded when they are asked for."""
        for step in range(max(self.first, after + 1), self.last + 1):
            start = (step - self.first) * self.size
            chosen = self.live[start : start + self.size]
            yield Batch(items=tuple(encode(sample) for sample in chosen), state={})

    def metrics(self) -> dict[str, float]:
        """What a step says about the turn that it belongs to."""
        return {"play/turn": float(self.number), "play/live": float(len(self.live))}


def turns(
    opening: Sequence[Sample], judged: Callable[[], Sequence[Record]], settings: Flywheel
) -> Iterator[Turn]:
    """The turns of a harvest over the dialogues of ``opening``, to ``max_depth`` generated turns.

    ``judged`` gives the records of this harvest in the order of its inputs. It is read when the next turn is
    asked for, by when every input of the turns before must have its record.
    """
    max_depth, size = settings.max_depth, settings.dialogues_per_step
    live = tuple(sample for sample in opening if sample.depth < max_depth)
    number, asked, first = 0, 0, 1
    while live:
        number += 1
        turn = Turn(
            number=number,
            live=live,
            first=first,
            size=size,
            most=first - 1 + most_steps(live, max_depth=max_depth, size=size),
        )
        yield turn
        records = judged()[asked : asked + len(live)]
        assert [record["parent_id"] for record in records] == [sample.id for sample in live]
        asked, first = asked + len(live), turn.last + 1
        live = playing_on(records, max_depth=max_depth)


def playing_on(records: Sequence[Record], *, max_depth: int) -> tuple[Sample, ...]:
    """The dialogues of a turn's records that the next turn goes on with, in the same order."""
    accepted = (Sample.from_json(record["sample"]) for record in records if record["accepted"])
    return tuple(child for child in accepted if child.depth < max_depth)


def most_steps(live: Sequence[Sample], *, max_depth: int, size: int) -> int:
    """Steps of a harvest of these dialogues if every reply is accepted."""
    depths = [sample.depth for sample in live]
    return sum(
        math.ceil(sum(depth + turn < max_depth for depth in depths) / size) for turn in range(max_depth)
    )


def records_of(
    candidates: Sequence[Candidate], turn: Turn, codec: TextCodec, *, style: str
) -> list[dict[str, Any]]:
    """Lines of the flywheel's store for the judged rollouts of a step.

    ``line_ids`` are the ids of the new history line (number, speaker and normalised reply); every later
    prompt of the dialogue holds them as they are here.
    """
    return [
        {
            "turn": turn.number,
            **candidate.to_json(),
            "line_ids": list(line_ids(candidate.child, codec, style=style)) if candidate.child else [],
        }
        for candidate in candidates
    ]


def line_ids(sample: Sample, codec: TextCodec, *, style: str) -> tuple[int, ...]:
    """Ids of the last line of an input's history, as its prompt and every later one hold them."""
    return encode_history(sample.history, codec, style=style)[-1]


def play_out(
    engine: Engine,
    opening: Sequence[Sample],
    codec: TextCodec,
    config: Config,
    scorer: Scorer,
    encode: Encode,
    personas: Personas,
    *,
    num_classes: int,
    seed: int,
) -> Iterator[tuple[Turn, list[Candidate]]]:
    """The turns of a play without a run: the judged candidates of each step as they come. Nothing is
    stored."""
    wheel = config.flywheel
    index = ReplyIndex(threshold=wheel.hygiene.near_duplicate)
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        stop_ids=codec.stop_ids,
    )
    records: list[dict[str, Any]] = []
    for turn in turns(opening, lambda: records, wheel):
        for step, batch in enumerate(turn.batches(encode), start=turn.first):
            num = config.rl.group_size
            requests = make_requests(batch, num=num, global_step=step, seed=seed, phase=0, step=step)
            groups = generate_groups(engine, requests, sampling)
            samples, prompts = zip(*batch.items, strict=True)
            scored = score_groups(
                samples, prompts, groups, codec, scorer, config,
                num_classes=num_classes, step=1, total_steps=1,
            )  # fmt: skip
            candidates = harvest(
                scored, config, index, personas, iteration=1, policy_version=0, encode=encode
            )
            records.extend(records_of(candidates, turn, codec, style=config.output.prompt_style))
            yield turn, candidates


def accepted_replies(records: Iterable[Record]) -> Iterator[str]:
    """The replies that became turns, in order."""
    return (record["reply"] for record in records if record["accepted"])

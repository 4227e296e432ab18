"""The tokens of one case, written to a folder as arrays that both sides read: same rows, same packing."""

import dataclasses
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.data.batching import TrainSequence, pack, scatter
from selfemo_jax.model import flops
from selfemo_jax.model.flops import Work

PACKED_WORK = ("logprobs", "rl_update", "sft_update")
"""Phases whose work lies in rows."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a case works on, in ``folder``."""

    folder: Path
    num_tokens: int
    """Tokens of all sequences, each with its prompt: the same whatever the layout."""
    prompts: tuple[int, ...]
    """Prompt lengths."""
    works: dict[str, Work]
    """Of the rows of each layout."""
    padding: dict[str, float]
    """Share of each layout's positions that hold nothing."""

    def tokens(self, settings: BenchSettings, phase: str) -> int | None:
        """What the phase's rate counts: tokens of whole sequences for updates and steps, prompt tokens for
        a prefill, sampled tokens for what samples."""
        if phase == "refresh":
            return None
        num_rows = len(self.prompts) * settings.group_size
        sampled = num_rows * settings.completion
        counts = {
            "prefill": sum(self.prompts),
            "decode": sampled - num_rows,
            "rollout": sampled,
            "rl_step": settings.group_size * sum(self.prompts) + sampled,
        }
        return counts.get(phase, self.num_tokens)

    def flops(self, settings: BenchSettings, phase: str, layout: str) -> float | None:
        """What the phase has to compute once; None where it computes nothing."""
        config = settings.model_config
        group = (settings.completion,) * settings.group_size
        prefill = sum((flops.sequence_work(n, num_head=1) for n in self.prompts), Work())
        rollout = sum((flops.group_work(n, group) for n in self.prompts), Work())
        if phase == "logprobs":
            return flops.forward_flops(config, self.works[layout])
        if phase in PACKED_WORK:
            return flops.train_flops(config, self.works[layout])
        if phase == "prefill":
            return flops.forward_flops(config, prefill)
        if phase == "rollout":
            return flops.forward_flops(config, rollout)
        if phase == "decode":
            return flops.forward_flops(config, rollout) - flops.forward_flops(config, prefill)
        if phase == "rl_step":
            # The rollout, the reference's log-probs and the update.
            of = flops.group_work if layout == "shared_prefix" else flops.separate_work
            rows = sum((of(n, group) for n in self.prompts), Work())
            return flops.forward_flops(config, rollout + rows) + flops.train_flops(config, rows)
        return None


def make_task(settings: BenchSettings, folder: Path) -> Task:
    """Draw the sequences and write the rows of each layout."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = draw_sequences(settings)
    rng = np.random.default_rng(settings.seed + 1)
    uniform = -np.log(settings.model_config.vocab_size)
    reference = [rng.normal(uniform, 0.1, len(item.completion_ids)) for item in sequences]
    works, padding = {}, {}
    for layout in settings.layouts:
        row_tokens, micro_rows = _rows(settings, sequences, layout)
        packed = pack(sequences, layout=layout, row_tokens=row_tokens, micro_rows=micro_rows)
        batch = replace(packed.batch, ref_logprobs=scatter(reference, packed, fill=0.0))
        arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
        np.savez(folder / f"{layout}.npz", micro_rows=micro_rows, **arrays)
        num_head = sum(place.length for place in packed.places)
        works[layout] = flops.rows_work(batch.segment_ids, batch.prefix_ids, num_head=num_head)
        padding[layout] = packed.padding_share
    prompts = [item.prompt_ids for item in sequences[:: settings.group_size]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return Task(
        folder=folder,
        num_tokens=sum(len(item.prompt_ids) + len(item.completion_ids) for item in sequences),
        prompts=tuple(map(len, prompts)),
        works=works,
        padding=padding,
    )


def draw_sequences(settings: BenchSettings) -> list[TrainSequence]:
    """Random groups; lengths within a tenth of their means, each token's weight that of a token mean."""
    rng = np.random.default_rng(settings.seed)
    vocab = settings.model_config.vocab_size

    def near(mean: int) -> int:
        return int(rng.integers(mean - mean // 10, mean + mean // 10 + 1))

    def draw(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, vocab, length).tolist())

    prompts = [draw(near(settings.prompt)) for _ in range(settings.groups)]
    drawn = [
        TrainSequence(
            group=group,
            prompt_ids=prompt,
            completion_ids=draw(near(settings.completion)),
            token_weight=0.0,
            advantage=float(rng.normal()),
        )
        for group, prompt in enumerate(prompts)
        for _ in range(settings.group_size)
    ]
    weight = 1.0 / sum(len(item.completion_ids) for item in drawn)
    return [dataclasses.replace(item, token_weight=weight) for item in drawn]


def _rows(settings: BenchSettings, sequences: list[TrainSequence], layout: str) -> tuple[int, int]:
    """Length of the rows, and rows of a micro-batch: a multiple of the devices."""
    longest = max(len(item.prompt_ids) + len(item.completion_ids) - 1 for item in sequences)
    micro_rows = 1
    if layout == "separate":
        row_tokens, micro_rows = longest, settings.group_size
    elif layout == "packed":
        row_tokens = max(settings.row_tokens, longest)
    else:
        groups: dict[int, int] = {}
        for item in sequences:
            groups.setdefault(item.group, len(item.prompt_ids) - 1)
            groups[item.group] += len(item.completion_ids)
        row_tokens = settings.prefix_row_tokens or max(groups.values())
    micro_rows = micro_batch_rows(settings, row_tokens, otherwise=micro_rows)
    for cut in settings.micro_cuts if layout == "separate" else ():
        if micro_rows % (cut * settings.devices):
            raise ValueError(
                f"bench: micro_cuts has {cut}: micro-batches of {micro_rows} rows on {settings.devices} "
                "devices cannot be cut into so many equal parts; leave it out (--micro_cuts 1)"
            )
    return row_tokens, micro_rows


def micro_batch_rows(settings: BenchSettings, row_tokens: int, *, otherwise: int = 1) -> int:
    """Rows of a micro-batch: a multiple of the devices."""
    rows = max(1, settings.micro_tokens // row_tokens) if settings.micro_tokens else otherwise
    return -(-rows // settings.devices) * settings.devices

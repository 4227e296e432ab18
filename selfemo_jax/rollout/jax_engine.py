"""Rollouts sampled in this process, on the devices of the mesh.

The host half: it decides which prompts decode when, moves rows to smaller layouts as they finish, refills
freed rows with waiting prompts, and hands out groups as they complete. `rollout/decode.py` is the compiled
half, `rollout/slots.py` the rule of the shapes. Rows are split over data and fsdp, heads over tp.
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from selfemo_jax.allocator import limit_freed_memory
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params
from selfemo_jax.model.sharding import check_tp, make_mesh
from selfemo_jax.rollout.board import Board, Live, Prompt, Row, seat
from selfemo_jax.rollout.decode import Caches, Programs, programs
from selfemo_jax.rollout.engine import Completion, Group, Request, Sampling, check_requests
from selfemo_jax.rollout.prefix_rows import by_dialogue, prefilled, prefilled_together
from selfemo_jax.rollout.slots import (
    SHRINK,
    Layout,
    choose_layout,
    completion_columns,
    prompt_columns,
    widths,
    worth_stopping_at,
)

_MAX_UNROLLED = 8
# XLA:CPU copies what is sliced out of a stack, and widens all of a bfloat16 stack to float32 for it.
_MAX_UNROLLED_CPU = 48
_STOP_IDS_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has done since it was made; a difference of two is a step's."""

    num_tokens: int = 0
    """Completion tokens sampled."""
    num_prompt_tokens: int = 0
    """Prompt tokens prefilled, padding not counted."""
    num_row_steps: int = 0
    """Rows paid for, summed over the decode steps; ``num_tokens`` over this is the occupancy."""
    num_compilations: int = 0
    compile_seconds: float = 0.0
    """Seconds of the calls that compiled."""
    prefill_seconds: float = 0.0
    """Seconds spent in starting prefills; their work overlaps with the decoding that follows."""
    seconds: float = 0.0
    """Seconds inside `generate`, compilation included."""


class JaxEngine:
    """The engine of a run without a serving process; see `rollout/engine.py` for the contract."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        mesh: Mesh | None = None,
        *,
        max_rows: int = 64,
        prompt_multiple: int = 64,
        completion_bucket: int = 32,
        chunk: int = 16,
        prefill_tokens: int = 4096,
        decode_layout: Literal["replicate", "shard"] = "replicate",
        unroll: bool | None = None,
        share_prompts: bool = False,
    ):
        """``max_rows`` completions decode at once (their caches bound the memory); more wait.

        Prompts are padded to multiples of ``prompt_multiple`` and prefilled about ``prefill_tokens`` at a
        time; completion caches grow from ``completion_bucket`` columns by doubling; the host looks at the
        rows every ``chunk`` tokens. ``decode_layout`` ``replicate`` keeps whole weights (up to tp) on every
        data row of the mesh, ``shard`` leaves them split over fsdp. ``unroll`` compiles each layer by itself:
        by default up to 8 layers, on a CPU up to 48. ``share_prompts`` prefills once what prompts of a
        growing dialogue have in common. ValueError where tp does not divide the model.
        """
        self._config, self._compute = config, compute
        self._mesh = make_mesh({}) if mesh is None else mesh
        sizes = dict(self._mesh.shape)
        check_tp(config, sizes)
        if decode_layout not in ("replicate", "shard"):
            raise ValueError(f"JaxEngine: decode_layout {decode_layout!r} is not replicate or shard")
        for name, value in (("max_rows", max_rows), ("chunk", chunk), ("prompt_multiple", prompt_multiple)):
            if value < 1:
                raise ValueError(f"JaxEngine: {name} must be at least 1, found {value}")
        self._multiple = sizes.get("data", 1) * sizes.get("fsdp", 1)
        self._max_rows = -(-max_rows // self._multiple) * self._multiple
        self._prompt_multiple, self._completion_bucket = prompt_multiple, completion_bucket
        self._chunk, self._prefill_tokens, self._share_prompts = chunk, prefill_tokens, share_prompts
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        deepest = _MAX_UNROLLED_CPU if on_cpu else _MAX_UNROLLED
        unroll = config.num_layers <= deepest if unroll is None else unroll
        # A single layer cannot be looped over.
        self._programs: Programs = programs(
            config,
            compute,
            self._mesh,
            unroll=unroll or config.num_layers == 1,
            shard=decode_layout == "shard",
        )
        self._weights: Params | None = None
        self._version = -1
        self._known_columns: set[int] = set()
        self._counts = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        self._closed = False

    def update_policy(self, params: Params, *, version: int) -> None:
        """Copy ``params`` (any sharding) into the decode layout and the compute dtype; rows in the making go
        on with the new policy and name both versions."""
        self._check_open()
        # The old copy goes first: both together may not fit.
        self._weights = None
        first = jax.tree.leaves(params)[0]
        there = isinstance(first, jax.Array) and first.sharding.device_set == set(self._mesh.devices.flat)
        if not there:
            params = jax.tree.map(np.asarray, params)
        self._weights = self._call(self._programs.take_weights, params)
        self._version = version

    def close(self) -> None:
        """Free the weights; further calls fail."""
        self._weights = None
        self._closed = True

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        return EngineStats(**self._counts)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """One group per request as they complete; ValueError for a request that cannot be served, before
        anything is sampled."""
        self._check_open()
        if self._weights is None:
            raise ValueError("JaxEngine.generate: no policy yet; call update_policy first")
        check_requests(
            requests,
            sampling,
            vocab_size=self._config.vocab_size,
            max_positions=self._config.max_positions,
        )
        return self._generate(tuple(requests), sampling)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("JaxEngine: the engine is closed; make a new one")

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        if not requests:
            return
        began = time.perf_counter()
        largest = max(request.num for request in requests)
        allowed = widths(min(largest, max(1, self._max_rows // self._multiple)))
        waiting = [
            Prompt(request=request, rollouts=range(start, min(start + self._max_rows, request.num)))
            for request in map(requests.__getitem__, self._in_order(requests))
            for start in range(0, request.num, self._max_rows)
        ]
        done: dict[str, dict[int, Completion]] = {request.id: {} for request in requests}
        wanted = {request.id: request.num for request in requests}
        board: Board | None = None
        while waiting or (board is not None and board.live()):
            board = self._arrange(board, waiting, allowed, sampling)
            limit_freed_memory()
            for row in self._decode(board, sampling):
                request_id = row.prompt.request.id
                done[request_id][row.rollout] = _completion(row, sampling)
                if len(done[request_id]) == wanted[request_id]:
                    found = done.pop(request_id)
                    group = Group(
                        request_id=request_id, completions=tuple(found[i] for i in range(len(found)))
                    )
                    self._counts["seconds"] += time.perf_counter() - began
                    yield group
                    began = time.perf_counter()
        self._counts["seconds"] += time.perf_counter() - began

    def _in_order(self, requests: Sequence[Request]) -> list[int]:
        """Longest prompts first, or those of a dialogue together."""
        if self._share_prompts:
            return by_dialogue([request.token_ids for request in requests])
        return sorted(range(len(requests)), key=lambda index: -len(requests[index].token_ids))

    def _arrange(
        self, board: Board | None, waiting: list[Prompt], allowed: Sequence[int], sampling: Sampling
    ) -> Board:
        """The board of the next chunk: refilled from ``waiting``, shrunk, or with more columns, if that is
        due."""
        live: Live = {} if board is None else board.live()
        counts = [len(rows) for rows in live.values()]
        new = self._admissible(counts, waiting, allowed)
        counts += [len(prompt.rollouts) for prompt in new]
        layout = choose_layout(counts, allowed, multiple=self._multiple, max_rows=self._max_rows)
        assert layout is not None
        if board is not None and not new:
            if layout.rows > SHRINK * board.layout.rows:
                layout = board.layout
            if layout == board.layout and board.column < board.length:
                return board
        del waiting[: len(new)]
        return self._move(board, live, new, layout, sampling)

    def _admissible(self, live: list[int], waiting: list[Prompt], allowed: Sequence[int]) -> list[Prompt]:
        """The next prompts that fit beside the live rows; none where a prefill of so few would not pay."""
        num, rows = 0, 0
        while num < len(waiting):
            counts = live + [len(prompt.rollouts) for prompt in waiting[: num + 1]]
            if sum(counts) > self._max_rows or (
                choose_layout(counts, allowed, multiple=self._multiple, max_rows=self._max_rows) is None
            ):
                break
            rows += len(waiting[num].rollouts)
            num += 1
        pays = not live or num == len(waiting) or 4 * rows >= self._max_rows
        return waiting[:num] if pays else []

    def _move(
        self,
        old: Board | None,
        live: Live,
        new: list[Prompt],
        layout: Layout,
        sampling: Sampling,
    ) -> Board:
        seats = seat(live, new, layout, old_width=old.layout.width if old else 1)
        oldest = max((len(row.tokens) for placed in live.values() for _, row in placed), default=0)
        longest = max(len(prompt.request.token_ids) - 1 for prompt in (*live, *new))
        columns = prompt_columns(longest, multiple=self._prompt_multiple, known=self._known_columns)
        if live and not new:
            assert old is not None
            columns = min(columns, old.prompt_length)
        self._known_columns.add(columns)
        length = completion_columns(
            oldest + 1, smallest=self._completion_bucket, max_tokens=sampling.max_tokens
        )
        if live:
            assert old is not None
            prompts, caches = old.prompts, old.caches
            same = seats.slot_source == list(range(old.layout.slots)) and columns == old.prompt_length
            if not same:
                prompts = self._call(
                    self._programs.take_slots, prompts, np.array(seats.slot_source, np.int32), length=columns
                )
            caches = self._call(
                self._programs.take_rows,
                caches,
                np.array(seats.row_source, np.int32),
                np.int32(old.column - oldest),
                length=length,
            )
        else:
            prompts, caches = self._call(
                self._programs.empty,
                slots=layout.slots,
                width=layout.width,
                prompt_length=columns,
                length=length,
            )
        if new:
            prompts = self._prefill(prompts, seats.fresh, num_slots=layout.slots, columns=columns)
        return Board(
            layout=layout,
            slots=seats.slots,
            rows=seats.rows,
            prompts=prompts,
            caches=caches,
            prompt_length=columns,
            length=length,
            column=oldest,
        )

    def _prefill(
        self, prompts: Caches, fresh: Mapping[Prompt, Sequence[int]], *, num_slots: int, columns: int
    ) -> Caches:
        """Prefill new prompts, longest first or by dialogue, and write them into all their slots."""
        began = time.perf_counter()
        given = list(fresh)
        order = [given[index] for index in self._in_order([prompt.request for prompt in given])]
        layout, program = prefilled, self._programs.prefill
        if self._share_prompts:
            layout, program = prefilled_together, self._programs.prefill_rows
        for which, new in layout(
            functools.partial(self._call, program, self._weights),
            [prompt.request.token_ids for prompt in order],
            columns=columns,
            budget=self._prefill_tokens * self._multiple,
            multiple=self._multiple,
        ):
            size = new[0][0].shape[-4]
            copies = max(len(fresh[order[index]]) for index in which)
            for copy in range(copies):
                target = np.full(size, num_slots, np.int32)
                for row, index in enumerate(which):
                    places = fresh[order[index]]
                    target[row] = places[copy] if copy < len(places) else num_slots
                prompts = self._call(self._programs.admit, prompts, new, target)
        self._counts["num_prompt_tokens"] += sum(len(prompt.request.token_ids) - 1 for prompt in order)
        self._counts["prefill_seconds"] += time.perf_counter() - began
        return prompts

    def _decode(self, board: Board, sampling: Sampling) -> list[Row]:
        """Run one chunk; the rows that it finished, taken off the board."""
        slots, width = board.layout.slots, board.layout.width
        inputs = {
            "token": np.zeros((slots, width), np.int32),
            "count": np.zeros((slots, width), np.int32),
            "live": np.zeros((slots, width), bool),
            "prompt_length": np.zeros(slots, np.int32),
        }
        if sampling.frequency_penalty:
            inputs["said"] = np.full((slots, width, board.length), -1, np.int32)
        # As many rows in every layout, so that this is compiled once.
        seeds, rollouts = np.zeros((self._max_rows, 2), np.uint32), np.zeros(self._max_rows, np.int32)
        counts = np.zeros(self._max_rows, np.int32)
        for slot, prompt in enumerate(board.slots):
            if prompt is None:
                continue
            request = prompt.request
            inputs["prompt_length"][slot] = len(request.token_ids) - 1
            seeds[slot * width : (slot + 1) * width] = (request.seed >> 32, request.seed & 0xFFFFFFFF)
            for place, row in enumerate(board.rows[slot]):
                if row is not None:
                    inputs["token"][slot, place] = row.tokens[-1] if row.tokens else request.token_ids[-1]
                    inputs["count"][slot, place] = len(row.tokens)
                    inputs["live"][slot, place] = True
                    if sampling.frequency_penalty:
                        inputs["said"][slot, place, : len(row.tokens)] = row.tokens
                    rollouts[slot * width + place] = row.rollout
        counts[: slots * width] = inputs["count"].reshape(-1)
        padding = -len(sampling.stop_ids) % _STOP_IDS_MULTIPLE
        numbers = {
            "column": np.int32(board.column),
            "limit": np.int32(min(self._chunk, board.length - board.column)),
            "stop_at": np.int32(worth_stopping_at(board.layout, multiple=self._multiple)),
            "max_tokens": np.int32(sampling.max_tokens),
            "stop_ids": np.array((*sampling.stop_ids, *[-1] * padding), np.int32),
        }
        draws = np.zeros((self._max_rows, self._chunk, 2), np.float32)
        if sampling.temperature > 0:
            draws = self._call(self._programs.uniforms, seeds, rollouts, counts, chunk=self._chunk)
        version = self._version
        board.caches, result = self._call(
            self._programs.decode, self._weights, board.prompts, board.caches, inputs, draws, numbers,
            chunk=self._chunk, temperature=float(sampling.temperature), top_k=sampling.top_k,
            top_p=float(sampling.top_p), frequency_penalty=float(sampling.frequency_penalty),
        )  # fmt: skip
        result = jax.device_get(result)
        steps = int(result["steps"])
        assert steps > 0
        board.column += steps
        self._counts["num_row_steps"] += steps * board.layout.rows
        added = result["count"] - inputs["count"]
        self._counts["num_tokens"] += int(added.sum())
        finished = []
        for slot, rows in enumerate(board.rows):
            for place, row in enumerate(rows):
                if row is None:
                    continue
                num = int(added[slot, place])
                row.tokens += result["tokens"][slot, place, :num].tolist()
                row.logprobs += result["logprobs"][slot, place, :num].tolist()
                if version not in row.versions:
                    row.versions.append(version)
                if not result["live"][slot, place]:
                    finished.append(row)
                    rows[place] = None
        return finished

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a compiled function and count the compilation it may need."""
        before, began = function._cache_size(), time.perf_counter()
        result = function(*args, **kwargs)
        if function._cache_size() > before:
            self._counts["num_compilations"] += 1
            self._counts["compile_seconds"] += time.perf_counter() - began
        return result


def _completion(row: Row, sampling: Sampling) -> Completion:
    return Completion(
        token_ids=tuple(row.tokens),
        logprobs=tuple(row.logprobs),
        finish_reason="stop" if row.tokens[-1] in sampling.stop_ids else "length",
        policy_versions=tuple(row.versions),
    )

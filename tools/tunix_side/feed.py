"""What tunix is fed and what is checked of its answers, with nothing of tunix: text, a gate, shapes.

Shape letters: P prompts, G completions of each, B = P * G rows, T tokens.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PAD = -1
"""Outside the vocabulary: tunix masks every token that equals its padding, sampled ones too."""


class Words:
    """The tokenizer that tunix asks for: a prompt's text is its ids, and no token ends a sequence."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return PAD

    def pad_id(self) -> int:
        return PAD


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of even tokens, which costs nothing and differs within a group."""
    words = [completion.split() for completion in completions]
    return [sum(int(word) % 2 == 0 for word in each) / len(each) for each in words]


class Gate:
    """A trainer's data: one batch of prompts for each `step`, which ends when the next is asked for."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self._prompts = [Words().decode(prompt) for prompt in prompts]
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._in_step = False
        self._failure: BaseException | None = None

    def start(self, train: Callable[["Gate"], None]) -> None:
        """Run the trainer over this data, in a thread."""
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()

    def _run(self, train: Callable[["Gate"], None]) -> None:
        try:
            train(self)
            self._done.put(RuntimeError("the trainer ended before its data"))
        # Handed to the step that waits.
        except BaseException as error:
            self._done.put(error)

    def __iter__(self) -> "Gate":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._in_step:
            self._done.put(None)
        self._in_step = True
        if not self._go.get():
            raise StopIteration
        return {"prompts": np.array(self._prompts)}

    def step(self) -> float:
        """Let the trainer take one step; its seconds. What the trainer raised is raised here."""
        if self._failure is not None:
            raise RuntimeError("the trainer has failed before") from self._failure
        began = time.perf_counter()
        self._go.put(True)
        self._failure = self._done.get()
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - began

    def close(self) -> None:
        """End the data, and wait for the trainer to end."""
        if self._thread is not None:
            self._go.put(False)
            self._thread.join(timeout=60)


def check_rollout(
    tokens: Sequence[np.ndarray],
    padded_prompts: np.ndarray,
    prompts: Sequence[Sequence[int]],
    *,
    num: int,
    length: int,
    vocab_size: int,
) -> int:
    """Number of sampled tokens; ValueError unless each of ``prompts``, left-padded to one length in
    ``padded_prompts`` ``[B, T]``, has ``num`` completions of exactly ``length`` tokens of the vocabulary."""
    longest = max(map(len, prompts))
    asked = [[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts for _ in range(num)]
    if padded_prompts.shape != (len(asked), longest) or (padded_prompts != np.array(asked)).any():
        raise ValueError(
            f"tunix: its rollout read prompts {padded_prompts.shape}, expected {num} of each of "
            f"{len(prompts)}, padded to {longest}, with the ids that it was given"
        )
    lengths = [len(row) for row in tokens]
    if lengths != [length] * len(asked):
        raise ValueError(
            f"tunix: {length} tokens were demanded of each of {len(asked)} rows, sampled were {lengths}"
        )
    sampled = np.stack(tokens)
    if sampled.min() < 0 or sampled.max() >= vocab_size:
        raise ValueError(
            f"tunix: sampled ids from {sampled.min()} to {sampled.max()}, of a vocabulary of {vocab_size}"
        )
    return sampled.size


def check_example(example: Any, *, longest: int, length: int) -> int:
    """Rows of a micro-batch; ValueError unless each has a prompt of ``longest`` places, ``length`` tokens
    that all count, an advantage, and reference log-probs."""
    rows = len(example.prompt_ids)
    expected = {
        "prompt_ids": (rows, longest),
        "completion_ids": (rows, length),
        "completion_mask": (rows, length),
        "ref_per_token_logps": (rows, length),
        "advantages": (rows,),
    }
    found = {name: np.shape(getattr(example, name)) for name in expected}
    if found != expected:
        raise ValueError(f"tunix: updates on {found}, expected {expected}")
    if not np.all(example.completion_mask):
        raise ValueError("tunix: updates on completions of which tokens are masked")
    return rows

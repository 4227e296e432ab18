"""Sampling, refresh, and a whole RL step by hand: `generate` of transformers and the update of `rows`."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .rows import Micro, Scorer, Tensor, Updater, load_model


class Sampler:
    """`generate` over one left-padded batch of all rows, each prompt ``group_size`` times."""

    def __init__(self, model: Any, case: dict[str, Any], device: torch.device):
        self._model, self._case, self._device = model, case, device
        prompts = json.loads((Path(case["folder"]) / "prompts.json").read_text())
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(p)) + p for p in prompts]
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.ids, self.mask = torch.tensor(rows, device=device), torch.tensor(seen, device=device)
        self.prompts = prompts

    def __call__(self, num: int, max_tokens: int, *, sample: bool = True) -> Tensor:
        """The new tokens ``[P * num, max_tokens]``; nothing stops early."""
        mixed = nullcontext()
        if self._case["dtype"] == "bfloat16" and self._model.dtype == torch.float32:
            mixed = torch.autocast(self._device.type, torch.bfloat16)
        chosen = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
        with torch.inference_mode(), mixed:
            out = self._model.generate(
                input_ids=self.ids.repeat_interleave(num, 0),
                attention_mask=self.mask.repeat_interleave(num, 0),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=self._case["cache"],
                disable_compile=not self._case["compile"],
                **({"do_sample": False} | chosen),
            )
        return out[:, self.ids.shape[1] :]


def generate_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, Any]]:
    """The first token alone, then all of them."""
    dtype = torch.bfloat16 if case["dtype"] == "bfloat16" else torch.float32
    model = load_model(case, device, dtype=dtype).eval()
    ask = Sampler(model, case, device)
    checked = False

    def run() -> dict[str, Any]:
        nonlocal checked
        began = time.perf_counter()
        ask(case["group_size"], 1)
        wait(device)
        prefilled = time.perf_counter()
        found = ask(case["group_size"], case["completion"])
        wait(device)
        ended = time.perf_counter()
        prefill, whole = prefilled - began, ended - prefilled
        values: dict[str, Any] = {
            "prefill_s": prefill, "rollout_s": whole, "decode_s": whole - prefill, "tokens": found.numel()
        }  # fmt: skip
        if not checked:
            checked = True
            values["greedy"] = ask(1, min(16, case["completion"]), sample=False).flatten().tolist()
        return values

    return run


def refresh_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """Copy every weight into a second model in the sampler's type."""
    dtype = torch.bfloat16 if case["dtype"] == "bfloat16" else torch.float32
    source, target = load_model(case, device), load_model(case, device, dtype=dtype)

    def run() -> dict[str, float]:
        copy_weights(source, target)
        wait(device)
        return {}

    return run


def copy_weights(source: Any, target: Any) -> None:
    """Every weight, cast to the target's type."""
    with torch.no_grad():
        new, old = list(source.parameters()), list(target.parameters())
        torch._foreach_copy_(old, new)


def step_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """Sample, reward, advantages, reference log-probs, one update. In bfloat16 a copy in that type samples
    and is refreshed, since the policy's float32 weights are twice the bytes to read; else the policy itself
    samples."""
    policy, reference = load_model(case, device), load_model(case, device).eval()
    copies = case["dtype"] == "bfloat16"
    sampler = load_model(case, device, dtype=torch.bfloat16) if copies else policy
    ask, take = Sampler(sampler, case, device), Updater(policy, case)
    score = Scorer(reference, case)
    size = case["group_size"]

    def run() -> dict[str, float]:
        began = time.perf_counter()
        sampler.eval()
        found = ask(size, case["completion"]).clone()
        policy.train()
        wait(device)
        sampled = time.perf_counter()
        rewards = (found % 2 == 0).float().mean(dim=1).reshape(-1, size)
        spread = rewards.std(dim=1, keepdim=True) + 1e-6
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / spread).flatten()
        micros = [
            sampled_rows(
                ask.prompts[p], found[p * size : (p + 1) * size], advantages[p * size : (p + 1) * size], ask
            )
            for p in range(len(ask.prompts))
        ]
        with torch.no_grad():
            for micro in micros:
                micro.reference.copy_(score(micro))
        wait(device)
        scored = time.perf_counter()
        values = take(micros)
        wait(device)
        updated = time.perf_counter()
        if copies:
            copy_weights(policy, sampler)
            wait(device)
        return {
            "rollout_s": sampled - began,
            "reference_s": scored - sampled,
            "update_s": updated - scored,
            "refresh_s": time.perf_counter() - updated,
            "step_loss": values["loss"],
            "tokens": found.numel(),
        }

    return run


def sampled_rows(prompt: list[int], completions: Tensor, advantages: Tensor, ask: Sampler) -> Micro:
    """A group as separate rows, right-padded to one length for all groups."""
    num, length = completions.shape
    longest = ask.ids.shape[1] + length - 1
    tokens = torch.zeros((num, longest), dtype=torch.int64, device=completions.device)
    tokens[:, : len(prompt)] = torch.tensor(prompt, device=completions.device)
    tokens[:, len(prompt) : len(prompt) + length - 1] = completions[:, :-1]
    starts = torch.arange(num, device=completions.device)[:, None] * longest + len(prompt) - 1
    places = starts + torch.arange(length, device=completions.device)
    total = len(ask.prompts) * num * length
    weights = torch.full((num * length,), 1.0 / total, device=completions.device)
    return Micro(
        tokens=tokens, positions=None, mask=None, places=places.flatten(), targets=completions.flatten(),
        weights=weights, advantages=advantages.repeat_interleave(length), reference=torch.zeros_like(weights),
    )  # fmt: skip


def wait(device: torch.device) -> None:
    """Until the accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

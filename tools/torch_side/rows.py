"""Log-probs and updates on the rows that the JAX side gets: Qwen3 of transformers, made as fast as it goes.

What makes it strong: logits of the target positions alone, in chunks of the same budget and recomputed where
they exceed it; causal attention without a mask for separate rows, the exact mask for packed and shared-prefix
ones; torch.compile of the decoder and of the head; fused AdamW; autocast where the type is bfloat16; FSDP2
over several devices. Shape letters: B rows, T tokens, S targets of a micro-batch, V vocabulary, D model.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro-batch on the device."""

    tokens: Tensor
    """``[B, T]``."""
    positions: Tensor | None
    mask: Any
    """``[B, 1, T, T]``, True where attention looks, or a block mask; None: causal."""
    places: Tensor
    """``[S]``: where targets lie among the B * T positions; filled up with 0, whose weight is 0."""
    targets: Tensor
    weights: Tensor
    advantages: Tensor
    reference: Tensor


def load_model(case: dict[str, Any], device: torch.device, *, dtype: torch.dtype | None = None) -> Any:
    """The model of the case's folder with float32 (or ``dtype``) weights, split by FSDP2 over several
    processes."""
    model = AutoModelForCausalLM.from_pretrained(
        case["model_folder"], dtype=dtype or torch.float32, attn_implementation=case["attention"]
    )
    model = model.to(device).train()
    if case["remat"] == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if dist.is_initialized():
        shard(model, case)
    return model


def shard(model: Any, case: dict[str, Any]) -> None:
    """FSDP2: each layer and the rest gathered by themselves, products in the case's type."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if case["dtype"] == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if case["compile"]:
            layer.compile(dynamic=False)
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    # The loss reads the head beside the model's own forward, so hooks that gather it must run there too.
    model.forward = _head_and_body(model)


def _head_and_body(model: Any) -> Callable[..., Any]:
    def forward(body: Callable[..., Any], head: Callable[..., Any], *args: Any) -> Any:
        return head(model.lm_head.weight, *body(*args))

    return forward


def read_micros(case: dict[str, Any], device: torch.device) -> list[Micro]:
    """The case's rows; over several processes each takes every so many rows of a micro-batch."""
    with np.load(Path(case["folder"]) / f"{case['layout']}.npz") as arrays:
        rows = dict(arrays)
    micro_rows = int(rows.pop("micro_rows")) // case["micro_cut"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(0, len(rows["tokens"]), micro_rows)
    parts = [{name: rows[name][start : start + micro_rows][rank::world] for name in rows} for start in starts]
    most = max(1, *(int((part["token_weights"] != 0).sum()) for part in parts))
    return [_micro(part, case["layout"], case["attention"], most, device) for part in parts]


def _micro(
    part: dict[str, np.ndarray], layout: str, attention: str, most: int, device: torch.device
) -> Micro:
    (places,) = np.nonzero(part["token_weights"].reshape(-1))

    def filled(name: str) -> Tensor:
        values = part[name].reshape(-1)[places]
        values = np.concatenate([values, np.zeros(most - len(values), values.dtype)])
        return torch.from_numpy(values.astype(np.int64 if name == "targets" else np.float32)).to(device)

    mask = positions = None
    tokens = torch.from_numpy(part["tokens"].astype(np.int64)).to(device)
    if layout != "separate":
        positions = torch.from_numpy(part["positions"].astype(np.int64)).to(device)
        if attention == "flash_attention_2":
            # It finds the segments in the positions, of a single row.
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        else:
            segments = torch.from_numpy(part["segment_ids"]).to(device)
            mask = visible(segments, torch.from_numpy(part["prefix_ids"]).to(device), attention)
    index = np.concatenate([places, np.zeros(most - len(places), places.dtype)])
    return Micro(
        tokens=tokens,
        positions=positions,
        mask=mask,
        places=torch.from_numpy(index).to(device),
        targets=filled("targets"),
        weights=filled("token_weights"),
        advantages=filled("advantages"),
        reference=filled("ref_logprobs"),
    )


def visible(segments: Tensor, prefixes: Tensor, attention: str) -> Any:
    """The rule i sees j iff j <= i and segment[j] is the segment or the prefix of i, as ``[B, 1, T, T]`` or
    for FlexAttention."""
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b, h, i, j):
            del h
            same = (segments[b, j] == segments[b, i]) | (segments[b, j] == prefixes[b, i])
            return (j <= i) & same

        num_rows, num_tokens = segments.shape
        return create_block_mask(rule, num_rows, None, num_tokens, num_tokens, device=str(segments.device))
    keys = segments[:, None, :]
    related = (keys == segments[:, :, None]) | (keys == prefixes[:, :, None])
    causal = torch.ones(related.shape[1:], dtype=torch.bool, device=segments.device).tril()
    return (related & causal)[:, None]


class Scorer:
    """Log-probs of a micro-batch's targets, compiled or not."""

    def __init__(self, model: Any, case: dict[str, Any]):
        self._model = model
        config = model.config
        budget = case["logits_budget_mib"] * 2**20
        self._chunk = max(1, budget // (4 * config.vocab_size))
        self._dtype = torch.bfloat16 if case["dtype"] == "bfloat16" else None
        body, head = self._hidden, _chosen_logprobs
        if case["compile"] and not dist.is_initialized():
            body, head = torch.compile(body, dynamic=False), torch.compile(head, dynamic=False)
        self._body, self._head = body, head

    def __call__(self, micro: Micro) -> Tensor:
        """``[S]``, float32."""
        device = micro.tokens.device.type
        mixed = nullcontext()
        if self._dtype is not None and not dist.is_initialized():
            mixed = torch.autocast(device, self._dtype)
        with mixed:
            if dist.is_initialized():
                return self._model(self._body_with_targets, self._score, micro)
            return self._score(self._model.lm_head.weight, *self._body_with_targets(micro))

    def _body_with_targets(self, micro: Micro) -> tuple[Tensor, Tensor]:
        hidden = self._body(micro.tokens, micro.positions, micro.mask)
        return hidden.reshape(-1, hidden.shape[-1])[micro.places], micro.targets

    def _hidden(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        # A dict of masks is taken as it is, None inside it as causal: nothing is looked for in the positions.
        found = self._model.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            use_cache=False,
        )
        return found.last_hidden_state

    def _score(self, weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        if len(hidden) <= self._chunk:
            return self._head(hidden, weight, targets)
        chunks = zip(hidden.split(self._chunk), targets.split(self._chunk), strict=True)
        return torch.cat(
            [checkpoint(self._head, part, weight, ids, use_reentrant=False) for part, ids in chunks]
        )


def _chosen_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits.gather(-1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


def logprob_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """Score all rows without gradients."""
    model, micros = load_model(case, device).eval(), read_micros(case, device)
    score = Scorer(model, case)

    def run() -> dict[str, float]:
        with torch.no_grad():
            found = [(score(micro) * (micro.weights != 0)).sum() for micro in micros]
        num = sum(int((micro.weights != 0).sum()) for micro in micros)
        return {"loss": -everywhere(sum(float(one) for one in found), device) / everywhere(num, device)}

    return run


def update_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """Gradients of all micro-batches, clipping, one AdamW step."""
    model, micros = load_model(case, device), read_micros(case, device)
    take = Updater(model, case)
    return lambda: take(micros)


class Updater:
    """Updates of one model; ``case["phase"]`` decides the objective."""

    def __init__(self, model: Any, case: dict[str, Any]):
        self._model, self._case, self._score = model, case, Scorer(model, case)
        optim = case["optim"]
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optim["lr"],
            betas=(optim["b1"], optim["b2"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            fused=True,
        )

    def __call__(self, micros: list[Micro]) -> dict[str, float]:
        world = dist.get_world_size() if dist.is_initialized() else 1
        total = torch.zeros((), device=micros[0].tokens.device)
        for micro in micros:
            loss = objective(self._score(micro), micro, self._case)
            # FSDP2 takes the mean of the gradients over processes; the objective is a sum.
            (loss * world).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._case["optim"]["clip_norm"])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": everywhere(float(total), total.device), "grad_norm": float(norm)}


def objective(logprobs: Tensor, micro: Micro, case: dict[str, Any]) -> Tensor:
    """The sum that the JAX side computes: clipped surrogate on policy and k3, or the likelihood."""
    if case["phase"] == "sft_update":
        return -(micro.weights * logprobs).sum()
    loss = case["loss"]
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = ratio.clamp(1.0 - loss["clip_low"], 1.0 + loss["clip_high"])
    surrogate = torch.maximum(-micro.advantages * ratio, -micro.advantages * clipped)
    gap = (micro.reference - logprobs).clamp(-20.0, 20.0)
    kl = (torch.exp(gap) - gap - 1.0).clamp(-10.0, 10.0)
    return (micro.weights * (surrogate + loss["kl_coef"] * kl)).sum()


def everywhere(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def parameters_of(model: Any) -> Iterator[Tensor]:
    """A model's weights without their gradients."""
    return (parameter.detach() for parameter in model.parameters())

"""Compare the RL update (forward, backward, optimizer) with torch eager on this machine.

    python tools/bench_step.py [--groups 4 --group_size 8 --prompt 400 --completion 60] [--json FILE]

All sides train the same small Qwen3 with the same random weights on the same tokens, with the same clipped
objective, KL term, gradient clipping and AdamW: ours on separate rows and on shared-prefix rows, and
transformers' Qwen3ForCausalLM (sdpa attention, one thread per core) on right-padded rows, with the logits of
all positions and with those of the completions only. Micro-batches are one group each. Before anything is
timed, the losses of a first update must agree to 1e-4. Runs are interleaved, A B C D A B C D, and ratios are
taken round by round, so that a machine that is busy elsewhere slows all sides; processor seconds, which other
processes hardly change, are compared beside the wall clock. Needs torch, which the package
itself does not.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Torch's waiting threads would otherwise burn the cores that JAX runs on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import numpy as np
import torch
import transformers

from selfemo_jax.algo.losses import token_weights
from selfemo_jax.config import Loss, Optim
from selfemo_jax.data.batching import Packed, TrainSequence, pack, scatter
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, init_params
from selfemo_jax.model.hf_convert import save_hf
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.train_step import make_steps, update

OURS = {"ours, separate rows": "separate", "ours, shared prefix": "shared_prefix"}
THEIRS = {"torch, all logits": False, "torch, completion logits": True}
LOSS = Loss(kl_coef=0.001, clip_dual=None)
OPTIM = Optim(lr=1e-5)

Run = Callable[[], float]
"""One update; returns its loss."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print a table and write JSON; the exit status."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = ModelConfig(
        architecture="qwen3",
        vocab_size=args.vocab_size,
        embed_dim=args.embed_dim,
        mlp_dim=3 * args.embed_dim,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        num_kv_heads=max(1, args.num_heads // 2),
        head_dim=args.head_dim,
        rope_theta=1e6,
        tie_embeddings=True,
        max_positions=4096,
    )
    sequences, ref_logprobs = _data(args)
    params = init_params(config, jax.random.key(args.seed))
    sides: dict[str, Run] = {}
    for name, layout in OURS.items():
        sides[name] = _ours(config, params, sequences, ref_logprobs, layout, args)
    for name, keep in THEIRS.items():
        sides[name] = _theirs(_torch_model(config, params), sequences, ref_logprobs, args, keep=keep)

    losses = {name: run() for name, run in sides.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise RuntimeError(f"bench_step: the sides do not compute the same loss: {losses}")
    for _ in range(args.warmup):
        for run in sides.values():
            run()
    load_before = os.getloadavg()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            used = time.process_time()
            run()
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - used)

    num_tokens = sum(len(item.prompt_ids) + len(item.completion_ids) for item in sequences)
    pairs = [(ours, other) for ours in OURS for other in THEIRS]
    pairs.append(("ours, shared prefix", "ours, separate rows"))
    speedup = {f"{ours} / {other}": _spread(seconds[other], seconds[ours]) for ours, other in pairs}
    cpu_speedup = {
        f"{ours} / {other}": _spread(cpu_seconds[other], cpu_seconds[ours]) for ours, other in pairs
    }
    result = {
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "cores": len(os.sched_getaffinity(0)),
        "load": {"before": load_before, "after": os.getloadavg()},
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
        "tokens": num_tokens,
        "first_loss": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "speedup": speedup,
        "cpu_speedup": cpu_speedup,
    }
    print(f"{num_tokens} tokens an update; load {load_before[0]:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'side':24s} {'s (best)':>9s} {'s (median)':>11s} {'CPU s':>7s} {'tokens/s':>9s}")
    for name, taken in seconds.items():
        median, cpu = statistics.median(taken), statistics.median(cpu_seconds[name])
        print(f"{name:24s} {min(taken):9.3f} {median:11.3f} {cpu:7.3f} {num_tokens / median:9.0f}")
    for name, ratio in speedup.items():
        cpu = cpu_speedup[name]
        print(
            f"{name}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), "
            f"in CPU seconds {cpu['median']:.2f} ({cpu['min']:.2f} to {cpu['max']:.2f})"
        )
    if args.json is None:
        print(json.dumps(result))
    else:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "groups": (4, "prompts of one update"),
        "group_size": (8, "G, completions of each"),
        "prompt": (400, "mean prompt length; lengths lie within a tenth of it"),
        "completion": (60, "mean completion length, likewise"),
        "rounds": (5, "interleaved updates of each side"),
        "warmup": (1, "updates of each side before them, beside the first one"),
        "vocab_size": (8192, "V"),
        "embed_dim": (256, "D; the MLP is three times as wide"),
        "num_layers": (4, "L"),
        "num_heads": (8, "N; half as many key-value heads"),
        "head_dim": (32, "H"),
        "logits_budget_mib": (256, "MiB of logits that are held at once"),
        "seed": (0, "of weights and tokens"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default %(default)d)")
    parser.add_argument("--json", type=Path, help="write the result here instead of printing it")
    return parser


def _spread(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, over the rounds."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _data(args: argparse.Namespace) -> tuple[list[TrainSequence], list[np.ndarray]]:
    """The sequences of one update and a reference log-prob of each of their targets."""
    rng = np.random.default_rng(args.seed)

    def near(mean):
        return int(rng.integers(mean - mean // 10, mean + mean // 10 + 1))

    def draw(length):
        return tuple(rng.integers(1, args.vocab_size, length).tolist())

    prompts = [draw(near(args.prompt)) for _ in range(args.groups)]
    completions = [[draw(near(args.completion)) for _ in range(args.group_size)] for _ in prompts]
    lengths = np.array([[len(completion) for completion in group] for group in completions])
    weights = token_weights(lengths, "token-mean")
    sequences = [
        TrainSequence(
            group=group,
            prompt_ids=prompts[group],
            completion_ids=completion,
            token_weight=float(weights[group, index]),
            advantage=float(rng.normal()),
        )
        for group in range(args.groups)
        for index, completion in enumerate(completions[group])
    ]
    uniform = -np.log(args.vocab_size)
    return sequences, [rng.normal(uniform, 0.1, len(item.completion_ids)) for item in sequences]


def _ours(
    config: ModelConfig,
    params: Params,
    sequences: list[TrainSequence],
    ref_logprobs: list[np.ndarray],
    layout: str,
    args: argparse.Namespace,
) -> Run:
    micro_rows = args.group_size if layout == "separate" else 1
    packed: Packed = pack(
        sequences, layout=layout, row_tokens=_row_tokens(sequences, layout), micro_rows=micro_rows
    )
    packed.batch.ref_logprobs[:] = scatter(ref_logprobs, packed, fill=0.0)
    steps = make_steps(
        config,
        Compute(),
        make_mesh({}, jax.devices()[:1]),
        optim=OPTIM,
        loss=LOSS,
        temperature=1.0,
        logits_budget_mib=args.logits_budget_mib,
    )
    state = steps.init_state(jax.device_put(jax.tree.map(np.array, params), steps.param_shardings))

    def run() -> float:
        nonlocal state
        state, metrics = update(
            steps, state, packed.batch, kind="rl", micro_rows=micro_rows, rate=OPTIM.lr, where="bench"
        )
        jax.block_until_ready(state)
        return metrics["loss"]

    return run


def _row_tokens(sequences: list[TrainSequence], layout: str) -> int:
    """The shortest row that holds the longest sequence, or the longest whole group."""
    if layout == "separate":
        return max(len(item.prompt_ids) + len(item.completion_ids) - 1 for item in sequences)
    groups: dict[int, int] = {}
    for item in sequences:
        groups.setdefault(item.group, len(item.prompt_ids) - 1)
        groups[item.group] += len(item.completion_ids)
    return max(groups.values())


def _torch_model(config: ModelConfig, params: Params) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        save_hf(params, config, Path(folder) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", attn_implementation="sdpa", dtype=torch.float32
        ).train()


def _theirs(
    model: torch.nn.Module,
    sequences: list[TrainSequence],
    ref_logprobs: list[np.ndarray],
    args: argparse.Namespace,
    *,
    keep: bool,
) -> Run:
    """``keep``: the logits of the completions' positions alone (all rows of a group start there)."""
    batches = []
    for start in range(0, len(sequences), args.group_size):
        items = sequences[start : start + args.group_size]
        longest = max(len(item.completion_ids) for item in items)
        prompt = len(items[0].prompt_ids)
        ids = np.zeros((len(items), prompt + longest), np.int64)
        seen, weight = np.zeros_like(ids), np.zeros((len(items), longest), np.float32)
        reference = np.zeros_like(weight)
        for row, item in enumerate(items):
            length = len(item.completion_ids)
            ids[row, : prompt + length] = (*item.prompt_ids, *item.completion_ids)
            seen[row, : prompt + length] = 1
            weight[row, :length] = item.token_weight
            reference[row, :length] = ref_logprobs[start + row]
        advantage = np.array([[item.advantage] for item in items], np.float32)
        batches.append([torch.from_numpy(x) for x in (ids, seen, weight, reference, advantage)])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM.lr,
        betas=(OPTIM.b1, OPTIM.b2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )

    def run() -> float:
        total = 0.0
        for ids, seen, weight, reference, advantage in batches:
            length = weight.shape[1]
            out = model(
                input_ids=ids,
                attention_mask=seen,
                use_cache=False,
                logits_to_keep=length + 1 if keep else 0,
            )
            logits = out.logits[:, -length - 1 : -1]
            chosen = logits.gather(-1, ids[:, -length:, None])[..., 0]
            logprobs = chosen - torch.logsumexp(logits, dim=-1)
            ratio = torch.exp(logprobs - logprobs.detach())
            clipped = ratio.clamp(1.0 - LOSS.clip_low, 1.0 + LOSS.clip_high)
            surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
            gap = reference - logprobs
            kl = torch.exp(gap) - gap - 1.0
            loss = (weight * (surrogate + LOSS.kl_coef * kl)).sum()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return run


if __name__ == "__main__":
    sys.exit(main())

"""Compare the JAX rollout engine with `generate` of transformers on this machine.

    python tools/bench_generate.py [--prompts 8 --num 8 --prompt_tokens 400 --max_tokens 60] [--json FILE]

Both sample the same rollouts' worth of tokens from the same small Qwen3 with random weights: every prompt
`num` times, at temperature 1, never stopping early. `generate` gets one left-padded batch of all rows, sdpa
attention, and the faster of its dynamic and its static cache; torch gets as many threads as there are cores.
The runs are interleaved, A B A B, after a warm-up of each, and the ratio is taken round by round, so that a
machine that is busy elsewhere slows both. Needs torch, which the package itself does not.
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
from typing import Any

# Torch's waiting threads would otherwise burn the cores that JAX runs on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import numpy as np
import torch
import transformers

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, Params, init_params
from selfemo_jax.model.hf_convert import save_hf
from selfemo_jax.rollout.engine import Request, Sampling
from selfemo_jax.rollout.jax_engine import JaxEngine


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
    params = init_params(config, jax.random.key(args.seed))
    prompts = _prompts(args, np.random.default_rng(args.seed))
    model = _torch_model(config, params)
    sides: dict[str, Callable[[int], int]] = {
        f"generate {cache}": _generate(model, prompts, args, cache) for cache in ("dynamic", "static")
    }
    sides["JaxEngine"] = _jax(config, params, prompts, args)
    for name, run in list(sides.items()):
        took = _timed(run, 0)[0]
        print(f"warm-up  {name:18s} {took:7.2f} s", file=sys.stderr)
    trial = {name: min(_timed(sides[name], 1)[0] for _ in range(2)) for name in sides if name != "JaxEngine"}
    slower = max(trial, key=trial.__getitem__)
    del sides[slower]

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, int] = {}
    for round_number in range(args.rounds):
        for name, run in sides.items():
            took, tokens[name] = _timed(run, 2 + round_number)
            seconds[name].append(took)
    baseline = next(name for name in sides if name != "JaxEngine")
    rates = {name: [tokens[name] / took for took in taken] for name, taken in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["JaxEngine"], rates[baseline], strict=True)]
    result = {
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "cores": len(os.sched_getaffinity(0)),
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
        "left_out": {"side": slower, "seconds": trial[slower], "other_seconds": trial[baseline]},
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(f"{'side':18s} {'tokens':>7s} {'s (best)':>9s} {'s (median)':>10s} {'tokens/s':>9s}")
    for name, taken in seconds.items():
        rate = result["tokens_per_second"][name]
        print(f"{name:18s} {tokens[name]:7d} {min(taken):9.3f} {statistics.median(taken):10.3f} {rate:9.0f}")
    print(f"JaxEngine / {baseline}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.json is None:
        print(json.dumps(result))
    else:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "prompts": (8, "number of prompts"),
        "num": (8, "rollouts of each"),
        "prompt_tokens": (400, "mean prompt length; lengths lie within a tenth of it"),
        "max_tokens": (60, "tokens of each rollout"),
        "rounds": (5, "interleaved runs of each side"),
        "vocab_size": (8192, "V"),
        "embed_dim": (256, "D; the MLP is three times as wide"),
        "num_layers": (4, "L"),
        "num_heads": (8, "N; half as many key-value heads"),
        "head_dim": (32, "H"),
        "seed": (0, "of weights and prompts"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default %(default)d)")
    parser.add_argument("--json", type=Path, help="write the result here instead of printing it")
    return parser


def _prompts(args: argparse.Namespace, rng: np.random.Generator) -> list[list[int]]:
    spread = args.prompt_tokens // 10
    lengths = rng.integers(args.prompt_tokens - spread, args.prompt_tokens + spread + 1, args.prompts)
    return [rng.integers(1, args.vocab_size, length).tolist() for length in lengths]


def _torch_model(config: ModelConfig, params: Params) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_hf(params, config, Path(folder) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", attn_implementation="sdpa", dtype=torch.float32
        ).eval()


def _generate(
    model: Any, prompts: list[list[int]], args: argparse.Namespace, cache: str
) -> Callable[[int], int]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts for _ in range(args.num)])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(args.num)])

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=args.max_tokens, min_new_tokens=args.max_tokens, eos_token_id=None,
                pad_token_id=0, cache_implementation=cache, disable_compile=True,
            )  # fmt: skip
        return out[:, longest:].numel()

    return run


def _jax(
    config: ModelConfig, params: Params, prompts: list[list[int]], args: argparse.Namespace
) -> Callable[[int], int]:
    engine = JaxEngine(config, Compute(), max_rows=args.prompts * args.num)
    engine.update_policy(params, version=0)
    sampling = Sampling(max_tokens=args.max_tokens, stop_ids=())

    def run(seed: int) -> int:
        requests = [
            Request(id=str(i), token_ids=tuple(prompt), num=args.num, seed=1000 * seed + i)
            for i, prompt in enumerate(prompts)
        ]
        groups = list(engine.generate(requests, sampling))
        return sum(len(completion.token_ids) for group in groups for completion in group.completions)

    return run


def _timed(run: Callable[[int], int], seed: int) -> tuple[float, int]:
    began = time.perf_counter()
    tokens = run(seed)
    return time.perf_counter() - began, tokens


if __name__ == "__main__":
    sys.exit(main())

"""The JAX side of the benchmark: builds each phase from the functions that a run uses, and serves them.

    python -m selfemo_jax.bench.jax_side --platform cpu --devices 1

The driver (`tools/bench_throughput.py`) starts it and talks to it as `bench/worker.py` says.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfemo_jax.bench.light import without_jaxtyping

# Before the imports below: each of them looks for jaxtyping.
without_jaxtyping()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from selfemo_jax.accelerators import MEMORY_VARIABLES  # noqa: E402
from selfemo_jax.algo.advantages import group_advantages  # noqa: E402
from selfemo_jax.bench.worker import serve, take_stdout  # noqa: E402
from selfemo_jax.config import Loss, Optim  # noqa: E402
from selfemo_jax.data.batching import PackedBatch, TrainSequence, pack  # noqa: E402
from selfemo_jax.model.config import ModelConfig  # noqa: E402
from selfemo_jax.model.decoder import Compute  # noqa: E402
from selfemo_jax.model.hf_convert import load_params, open_model, save_hf  # noqa: E402
from selfemo_jax.model.sharding import make_mesh, param_shardings  # noqa: E402
from selfemo_jax.profiling import largest_items  # noqa: E402
from selfemo_jax.rollout.engine import Group, Request, Sampling  # noqa: E402
from selfemo_jax.rollout.jax_engine import JaxEngine  # noqa: E402
from selfemo_jax.train_step import Steps, born_sharded, make_steps, sequence_logprobs, update  # noqa: E402

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
Values = dict[str, float]


class Run:
    """A phase ready to run; closing it drops what it holds."""

    def __init__(self, run: Callable[[], Values]):
        self._run: Callable[[], Values] | None = run

    def __call__(self) -> Values:
        assert self._run is not None
        return self._run()

    def close(self) -> None:
        self._run = None


class JaxSide:
    """One process's JAX devices."""

    def __init__(self, *, devices: int):
        self._mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
        self._devices = jax.devices()[:devices]

    def describe(self) -> dict[str, Any]:
        """Versions, device, flags."""
        return {
            "side": "jax",
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "python": sys.version.split()[0],
            "platform": self._devices[0].platform,
            "device": self._devices[0].device_kind,
            "num_devices": len(self._devices),
            "cores": len(os.sched_getaffinity(0)),
            "flags": {
                name: os.environ[name] for name in ("XLA_FLAGS", *MEMORY_VARIABLES) if name in os.environ
            },
        }

    def peak_bytes(self) -> int | None:
        """Most bytes of one device that were in use."""
        found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._devices]
        return max((value for value in found if value is not None), default=None)

    def profile(self, run: Run, folder: str) -> list[tuple[str, float]]:
        """One run's trace for XProf or TensorBoard."""
        with jax.profiler.trace(folder):
            run()
        return largest_items(Path(folder))

    def open(self, case: dict[str, Any]) -> Run:
        """The contestant of a case; ``weights`` makes the model folder itself."""
        phase = case["phase"]
        if phase == "weights":
            return Run(lambda: self._write_weights(case))
        if phase == "products":
            return Run(_products(case["dtype"]))
        if phase in ("logprobs", "rl_update", "sft_update"):
            return Run(self._rows(case))
        engine_run = {"generate": self._generate, "refresh": self._refresh, "rl_step": self._rl_step}
        return Run(engine_run[phase](case))

    def _write_weights(self, case: dict[str, Any]) -> Values:
        config = ModelConfig(**case["model"])
        params = born_sharded(config, self._mesh, seed=case["seed"], dtype="float32")
        save_hf(params, config, Path(case["model_folder"]))
        return {}

    def _steps(self, case: dict[str, Any]) -> tuple[ModelConfig, Compute, Steps]:
        config, _ = open_model(case["model_folder"])
        compute = compute_of(case)
        steps = make_steps(
            config,
            compute,
            self._mesh,
            optim=Optim(**case["optim"]),
            loss=Loss(**case["loss"]),
            temperature=1.0,
            logits_budget_mib=case["logits_budget_mib"],
        )
        return config, compute, steps

    def _params(self, case: dict[str, Any], config: ModelConfig) -> Any:
        shardings = param_shardings(config, self._mesh)
        return load_params(case["model_folder"], dtype="float32", shardings=shardings)

    def _rows(self, case: dict[str, Any]) -> Callable[[], Values]:
        config, _, steps = self._steps(case)
        batch, micro_rows = read_rows(case)
        params = self._params(case, config)
        if case["phase"] == "logprobs":
            mask = batch.token_weights != 0

            def score() -> Values:
                logprobs = sequence_logprobs(steps, params, batch, micro_rows=micro_rows)
                return {"loss": -float(logprobs[mask].mean())}

            return score
        state = steps.init_state(params)
        kind = case["phase"].removesuffix("_update")

        def one_update() -> Values:
            nonlocal state
            state, metrics = update(
                steps, state, batch, kind=kind, micro_rows=micro_rows, rate=case["optim"]["lr"], where="bench"
            )
            jax.block_until_ready(state)
            return {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}

        return one_update

    def _engine(self, case: dict[str, Any]) -> tuple[JaxEngine, list[list[int]]]:
        config, _ = open_model(case["model_folder"])
        prompts = json.loads((Path(case["folder"]) / "prompts.json").read_text())
        engine = JaxEngine(config, compute_of(case), self._mesh, max_rows=len(prompts) * case["group_size"])
        return engine, prompts

    def _generate(self, case: dict[str, Any]) -> Callable[[], Values]:
        engine, prompts = self._engine(case)
        config, _ = open_model(case["model_folder"])
        engine.update_policy(self._params(case, config), version=0)
        checked: list[int] | None = None
        count = 0

        def ask(num: int, max_tokens: int, *, temperature: float = 1.0) -> list[Group]:
            nonlocal count
            count += 1
            return rollout(
                engine, prompts, num=num, max_tokens=max_tokens, seed=count, temperature=temperature
            )

        def generate() -> Any:
            nonlocal checked
            began = time.perf_counter()
            ask(case["group_size"], 1)
            prefilled = time.perf_counter()
            groups = ask(case["group_size"], case["completion"])
            ended = time.perf_counter()
            values: dict[str, Any] = parts(began, prefilled, ended)
            values["tokens"] = sum(len(one.token_ids) for group in groups for one in group.completions)
            if checked is None:
                greedy = ask(1, min(16, case["completion"]), temperature=0.0)
                checked = [token for group in in_order(greedy) for token in group.completions[0].token_ids]
                values["greedy"] = checked
            return values

        return generate

    def _refresh(self, case: dict[str, Any]) -> Callable[[], Values]:
        engine, _ = self._engine(case)
        config, _ = open_model(case["model_folder"])
        params = self._params(case, config)
        version = 0

        def refresh() -> Values:
            nonlocal version
            version += 1
            engine.update_policy(params, version=version)
            jax.block_until_ready(engine._weights)
            return {}

        return refresh

    def _rl_step(self, case: dict[str, Any]) -> Callable[[], Values]:
        """Sample, reward, advantages, reference log-probs, one update, refresh."""
        config, _, steps = self._steps(case)
        engine, prompts = self._engine(case)
        reference = self._params(case, config)
        state = steps.init_state(self._params(case, config))
        engine.update_policy(state.params, version=0)
        size, length = case["group_size"], case["completion"]
        longest = max(map(len, prompts)) - 1 + size * length
        step = 0
        checked: dict[str, Any] = {}
        if case["greedy"]:
            groups = rollout(engine, prompts, num=1, max_tokens=min(16, length), seed=0, temperature=0.0)
            checked["greedy"] = [token for one in in_order(groups) for token in one.completions[0].token_ids]

        def whole_step() -> Values:
            nonlocal state, step
            step += 1
            began = time.perf_counter()
            groups = rollout(engine, prompts, num=size, max_tokens=length, seed=step, temperature=1.0)
            sampled = time.perf_counter()
            rewards = rewards_of(groups)
            advantages = np.asarray(group_advantages(rewards, np.ones_like(rewards, bool)))
            sequences = [
                TrainSequence(
                    group=p,
                    prompt_ids=tuple(prompts[p]),
                    completion_ids=one.token_ids,
                    token_weight=1.0 / (len(prompts) * size * length),
                    advantage=float(advantages[p, g]),
                    rollout_logprobs=one.logprobs,
                )
                for p, group in enumerate(in_order(groups))
                for g, one in enumerate(group.completions)
            ]
            rows = case["micro_rows"]
            packed = pack(sequences, layout="shared_prefix", row_tokens=longest, micro_rows=rows)
            batch = packed.batch
            batch.ref_logprobs[:] = sequence_logprobs(steps, reference, batch, micro_rows=rows)
            scored = time.perf_counter()
            state, metrics = update(
                steps, state, batch, kind="rl", micro_rows=rows, rate=case["optim"]["lr"], where="bench"
            )
            jax.block_until_ready(state)
            updated = time.perf_counter()
            engine.update_policy(state.params, version=step)
            jax.block_until_ready(engine._weights)
            ended = time.perf_counter()
            return {
                "rollout_s": sampled - began,
                "reference_s": scored - sampled,
                "update_s": updated - scored,
                "refresh_s": ended - updated,
                "step_loss": metrics["loss"],
                "tokens": sum(len(one.token_ids) for group in groups for one in group.completions),
                **checked,
            }

        return whole_step


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def compute_of(case: dict[str, Any]) -> Compute:
    """Both sides run the output head in the type of the rest and take its softmax in float32."""
    return Compute(
        dtype=case["dtype"],
        remat=case["remat"],
        attention=case["attention"],
        logits_float32=case["dtype"] == "float32",
    )


def read_rows(case: dict[str, Any]) -> tuple[PackedBatch, int]:
    """The rows of the case's layout, and how many are a micro-batch."""
    with np.load(Path(case["folder"]) / f"{case['layout']}.npz") as arrays:
        found = dict(arrays)
    micro_rows = int(found.pop("micro_rows"))
    return PackedBatch(**found), micro_rows // case["micro_cut"]


def rollout(
    engine: JaxEngine, prompts: list[list[int]], *, num: int, max_tokens: int, seed: int, temperature: float
) -> list[Group]:
    """All groups; nothing stops early."""
    requests = [
        Request(id=str(index), token_ids=tuple(prompt), num=num, seed=1000 * seed + index)
        for index, prompt in enumerate(prompts)
    ]
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, stop_ids=())
    return list(engine.generate(requests, sampling))


def in_order(groups: list[Group]) -> list[Group]:
    """By prompt."""
    return sorted(groups, key=lambda group: int(group.request_id))


def rewards_of(groups: list[Group]) -> np.ndarray:
    """``[P, G]``: the share of even tokens, which costs nothing and differs within a group."""
    return np.array(
        [
            [np.mean([token % 2 == 0 for token in one.token_ids]) for one in group.completions]
            for group in in_order(groups)
        ],
        np.float32,
    )


def parts(began: float, prefilled: float, ended: float) -> Values:
    """Seconds of the parts of a generation: the first token alone, all tokens, and what lies between."""
    prefill, whole = prefilled - began, ended - prefilled
    return {"prefill_s": prefill, "rollout_s": whole, "decode_s": whole - prefill}


def _products(dtype: str) -> Callable[[], Values]:
    """The best rate of one large matrix product, as a peak for devices whose peak is not published."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)

    def run() -> Values:
        product(x, x).block_until_ready()
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            product(x, x).block_until_ready()
            taken.append(time.perf_counter() - began)
        return {"flops_per_s": 2.0 * size**3 / min(taken)}

    return run


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--platform", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="default")
    args = parser.parse_args()
    answers = take_stdout()
    if args.platform != "auto":
        jax.config.update("jax_platforms", "cuda" if args.platform == "gpu" else "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.precision != "default":
        jax.config.update("jax_default_matmul_precision", args.precision)
    serve(JaxSide(devices=args.devices), commands=sys.stdin, answers=answers)


if __name__ == "__main__":
    main()

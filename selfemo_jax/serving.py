"""The vLLM engine of a run, assembled: where its weights and logs lie, what its servers start on, what it is
probed with."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from selfemo_jax.checkpoint import TOKENIZER_FILES
from selfemo_jax.config import Config
from selfemo_jax.data.codec import TextCodec
from selfemo_jax.data.dialogues import load_corpora
from selfemo_jax.data.inputs import build_inputs
from selfemo_jax.data.prompts import build_prompt
from selfemo_jax.distributed import num_processes
from selfemo_jax.parts import Parts, make_engine
from selfemo_jax.rollout.engine import Engine
from selfemo_jax.rollout.first_process import FirstProcessEngine, local_mesh
from selfemo_jax.rollout.proof import NOISE
from selfemo_jax.rollout.publish import Publisher, write_model_folder
from selfemo_jax.rollout.records import ReplayEngine
from selfemo_jax.rollout.refresh import MIN_PROBE_TOKENS
from selfemo_jax.rollout.supervisor import KEY_VARIABLE, Sidecar, attach, sidecar_python, start_sidecar
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from selfemo_jax.rollout.vllm_engine import VllmEngine

PROBE_TOKENS = 192
_PROBE_ROOM = 4


def run_engine(parts: Parts, run_dir: Path, say: Callable[[str], None]) -> Engine:
    """The engine of a training run, as `rollout.engine` and `rollout.replay` name it; evaluation and the like
    take `parts.make_engine`, which needs no servers."""
    config = parts.config
    if config.rollout.engine == "jax":
        return make_engine(parts)
    if num_processes() == 1:
        engine = start_vllm_engine(parts, run_dir, say)
    else:
        # Servers belong to process 0, which scores their probes on its own devices.
        engine = FirstProcessEngine(
            lambda: start_vllm_engine(dataclasses.replace(parts, mesh=local_mesh()), run_dir, say),
            parts.model,
            parts.mesh,
            dtype=serving_dtype(config),
        )
    return ReplayEngine(engine, Path(config.rollout.replay)) if config.rollout.replay else engine


def start_vllm_engine(parts: Parts, run_dir: Path, say: Callable[[str], None]) -> VllmEngine:
    """The engine that `rollout.engine: vllm` names. Its servers start in the background; the first refresh
    waits for them."""
    config = parts.config
    if not config.rollout.sidecar.attach:
        # Before anything is trained that would wait for it.
        sidecar_python(config.rollout.sidecar.environment)
    dtype = serving_dtype(config)
    settings = dataclasses.replace(
        config.rollout, sidecar=dataclasses.replace(config.rollout.sidecar, dtype=dtype)
    )
    root = Path(settings.sidecar.weights_root or run_dir / "weights").absolute()
    folder = run_dir / "sidecar" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_model_folder(
        folder, parts.model, dtype=dtype, tokenizer=parts.tokenizer_folder, copy=copy_tokenizer
    )
    longest = min(
        parts.model.max_positions,
        max(config.data.max_prompt + config.rollout.max_tokens, PROBE_TOKENS + _PROBE_ROOM),
    )
    probes = probe_sequences(
        parts.codec, config, num=settings.sidecar.probes, length=min(PROBE_TOKENS, longest - _PROBE_ROOM)
    )
    if len(probes[0]) < MIN_PROBE_TOKENS:
        say(
            f"rollout: probes of {len(probes[0])} tokens, as the policy has only {longest} positions; an old "
            f"cache of prompts is only seen with {MIN_PROBE_TOKENS} or more"
        )
    return VllmEngine(
        dataclasses.replace(parts.model, max_positions=longest),
        settings,
        start=functools.partial(_start, settings.sidecar, folder, run_dir, root, longest),
        publisher=Publisher(
            root,
            parts.model,
            dtype=dtype,
            keep=settings.sidecar.keep_versions,
            transport=settings.sidecar.transport,
        ),
        logprobs=TrainerLogprobs(parts.model, parts.compute, parts.mesh),
        probes=probes,
        dtype=dtype,
        noise=numeric_noise(parts, dtype),
        say=say,
    )


def serving_dtype(config: Config) -> str:
    """float32 on the CPU, where vLLM is slow in bfloat16, and bfloat16 elsewhere, unless one is named."""
    named = config.rollout.sidecar.dtype
    if named != "auto":
        return named
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def numeric_noise(parts: Parts, dtype: str) -> float:
    """Of one token's log-prob: float32's only where both sides compute in it; GPUs round its products."""
    exact = dtype == parts.compute.dtype == "float32" and jax.default_backend() == "cpu"
    return NOISE["float32" if exact else "bfloat16"]


def probe_sequences(codec: TextCodec, config: Config, *, num: int, length: int) -> list[tuple[int, ...]]:
    """Prompts of the bundled sample in the run's own style, joined and cut to ``length`` tokens."""
    corpora = load_corpora(("sample",), None, speaker_style=config.data.speaker_style)
    samples = [
        sample
        for corpus in corpora
        for sample in build_inputs(corpus.splits["train"], corpus.label_set, rule="all")
    ]
    joined: list[int] = []
    for sample in samples:
        prompt = build_prompt(
            sample,
            codec,
            max_labels=config.output.max_labels,
            max_tokens=config.data.max_prompt,
            thinking=config.model.thinking,
            style=config.output.prompt_style,
            persona=config.data.persona,
        )
        joined += prompt.token_ids
        if len(joined) >= num * length:
            break
    return [tuple(joined[i * length : (i + 1) * length]) for i in range(num)]


def _start(settings, folder: Path, run_dir: Path, root: Path, longest: int) -> Sidecar:
    if settings.attach:
        key = os.environ.get(KEY_VARIABLE, "")
        return attach(settings.attach, key, timeout=settings.start_timeout)
    return start_sidecar(
        settings, model_folder=folder, run_dir=run_dir, weights_root=root, max_model_len=longest
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files into a folder that a server starts on."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

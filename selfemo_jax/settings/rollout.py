"""Settings of sampling."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from selfemo_jax.settings.numbers import Bounds, Count, Natural, Positive, Share


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The vLLM processes that sample when `rollout.engine` is vllm."""

    environment: str = ".venv-vllm"
    """Their virtual environment, made by `python tools/vllm_sidecar.py setup`, or its Python; the variable
    SELFEMO_VLLM_PYTHON overrides it."""
    attach: list[str] = field(default_factory=list)
    """URLs of servers that someone else runs, their key in SELFEMO_SIDECAR_KEY; empty: start our own."""
    replicas: Count = 1
    """Servers, each with the whole policy; they share the prompts of a step, groups kept whole."""
    tensor_parallel: Count = 1
    """Devices over which each server splits the policy."""
    devices: list[int] = field(default_factory=list)
    """GPUs of the servers, replicas x tensor_parallel of them, as in [4, 5, 6, 7]; empty: the first of those
    that the trainer sees."""
    memory_share: Share = 0.85
    """Share of each GPU's memory that a server takes. Where the trainer uses the same GPU, it gets what is
    left of 0.92, which must be 0.2 at least."""
    cpu_cache_gb: Count = 1
    """Key-value cache of a server on the CPU, GiB."""
    cpu_threads: Count = 1
    """Threads of a server on the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the served policy; auto is bfloat16 on GPUs and float32 on the CPU, where bfloat16 is slow."""
    transport: Literal["orbax", "safetensors"] = "orbax"
    """How new weights reach the servers: the published Orbax arrays, or a Hugging Face folder."""
    weights_root: str | None = None
    """Folder of the published versions, on disk or below /dev/shm; null: weights/ in the run folder."""
    keep_versions: Count = 3
    """Published versions kept, the current one included; 2 or more allow a rollback."""
    start_timeout: Positive = 600.0
    """Seconds until a started server must answer."""
    health_timeout: Positive = 10.0
    """Seconds after which a server that does not say that it is well is taken for dead."""
    request_timeout: Positive = 600.0
    """Seconds until a request for rollouts must be answered."""
    retries: Natural = 3
    """How often a request that got no answer is asked again; an answer that says no is never."""
    probes: Annotated[int, Bounds("8 or more", low=8)] = 8
    """Sequences that trainer and servers both score to prove a refresh."""
    slope_rollouts: Natural = 32
    """Rollouts of each version that the trainer also scores under the version before it, for sync/slope; 0
    saves that copy of the weights."""
    refresh_timeout: Positive = 300.0
    """Seconds for each part of a refresh: stage, pause, apply."""
    max_restarts: Natural = 3
    """Restarts in a row, without a healthy spell between them, before the run stops."""
    on_unproven: Literal["stop", "rollback"] = "stop"
    """What follows a refresh that is not proven: stop the run, or serve the last proven version again."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling of completions for training."""

    engine: Literal["jax", "vllm"] = "jax"
    """The sampler in this process, or a vLLM sidecar."""
    temperature: Positive = 1.0
    """Of the softmax, for sampling and for the trainer's log-probs alike."""
    max_tokens: Count = 256
    """Longest completion."""
    seeded: bool = True
    """Send each request's own seed to the servers; off where seeds of requests cost speed. The JAX engine
    always uses them."""
    top_k: Natural = 0
    """Must stay 0 (off): truncated sampling breaks the recorded log-probs."""
    top_p: float = 1.0
    """Must stay 1 (off), for the same reason."""
    max_rows: Count = 128
    """Completions decoded at once."""
    overlap: Natural = 0
    """Steps the sampler may run ahead of the trainer."""
    replay: str | None = None
    """Run folder whose recorded rollouts are used instead of sampling."""
    keep: str = "all"
    """Rollout files kept: all, last N or every N."""
    max_lost: Share = 0.05
    """Share of a step's groups that may be lost before the run stops."""
    gap_warn: Positive | None = 0.005
    """Mean difference of probabilities between sampler and trainer above which a warning is printed; null:
    none. A sampler in bfloat16, or one that runs ahead, has more."""
    gap_stop: Positive | None = 0.05
    """The same above which the run stops before it saves; null: never."""
    sidecar: Sidecar = field(default_factory=Sidecar)
    """The vLLM servers, for engine vllm."""

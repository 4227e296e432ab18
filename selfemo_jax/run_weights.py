"""Weights of a run: what its phases left, and what it saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from selfemo_jax import phases as plans
from selfemo_jax.appendlog import read_json
from selfemo_jax.cards import write_cards
from selfemo_jax.checkpoint import save_weights
from selfemo_jax.distributed import is_first
from selfemo_jax.lora import read_adapters, write_adapters
from selfemo_jax.model.adapters import LORA, adapted, init_adapters, is_adapted, merged
from selfemo_jax.model.decoder import Params
from selfemo_jax.model.weights import CERTIFICATE_NAME
from selfemo_jax.parts import Parts, base_weights, weights_of
from selfemo_jax.phases import Phase

ADAPTERS = "adapter"
"""Folder of a policy's adapters inside that of its merged weights."""


def weights_folder(run_dir: Path, phase: Phase) -> Path:
    """Where a finished phase's weights are."""
    return plans.phase_dir(run_dir, phase) / "weights"


def weights_named(name: str, parts: Parts, plan: tuple[Phase, ...], run_dir: Path) -> Params:
    """The weights that the finished phase of that name left, or the base policy's."""
    if name == plans.BASE:
        return base_weights(parts)
    phase = next(phase for phase in plan if phase.name == name)
    return weights_of(parts, weights_folder(run_dir, phase))


def adapted_weights(name: str, base: Params, parts: Parts, plan: tuple[Phase, ...], run_dir: Path) -> Params:
    """The base with the adapters that the finished phase of that name left, or with new ones, which change
    nothing yet. The base's arrays are shared; adapters are whole on each device."""
    lora, dtype = parts.config.lora, parts.config.model.param_dtype
    whole = NamedSharding(parts.mesh, PartitionSpec())
    if name == plans.BASE:
        key = jax.random.fold_in(jax.random.key(parts.config.seed), 1)
        adapters = init_adapters(parts.model, key, rank=lora.rank, targets=lora.targets, dtype=dtype)
    else:
        phase = next(phase for phase in plan if phase.name == name)
        adapters = read_adapters(weights_folder(run_dir, phase) / ADAPTERS, parts.model, lora)
        adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), adapters)
    scale = jnp.float32(lora.alpha / lora.rank)
    return adapted(base, jax.device_put(adapters, whole), scale=jax.device_put(scale, whole))


def best_kept(recorded: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """The best policy that a checkpoint recorded, if its weights are still those in ``folder``. A later step,
    taken back since, may have written over them: the steps to come then choose anew."""
    certificate = folder / CERTIFICATE_NAME
    if recorded is None or not certificate.exists():
        return None
    source = read_json(certificate)["source"]
    return dict(recorded) if source["global_step"] == recorded["global_step"] else None


def save_policy(folder: Path, params: Params, parts: Parts, *, phase: Phase, global_step: int) -> None:
    """Write a policy as a converted folder whose certificate says where in the run it was made; one with
    adapters merged, and the adapters beside it."""
    certificate = {
        "source": {"kind": "trained", "phase": phase.name, "global_step": global_step},
        **({"note": parts.note} if parts.note else {}),
    }
    save_weights(
        folder, merged(params), parts.model, tokenizer=parts.tokenizer_folder, certificate=certificate
    )
    if is_first():
        write_cards(folder, Path(parts.config.run_dir) if parts.config.run_dir else None)
    if is_adapted(params) and is_first():
        config = parts.config
        write_adapters(folder / ADAPTERS, params[LORA], config.lora, base=config.model.path)

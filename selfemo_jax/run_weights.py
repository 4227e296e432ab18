"""Weights of a run: what its phases left, and what it saves."""

from pathlib import Path

from selfemo_jax import phases as plans
from selfemo_jax.checkpoint import save_weights
from selfemo_jax.model.decoder import Params
from selfemo_jax.parts import Parts, base_weights, weights_of
from selfemo_jax.phases import Phase


def weights_folder(run_dir: Path, phase: Phase) -> Path:
    """Where a finished phase's weights are."""
    return plans.phase_dir(run_dir, phase) / "weights"


def weights_named(name: str, parts: Parts, plan: tuple[Phase, ...], run_dir: Path) -> Params:
    """The weights that the finished phase of that name left, or the base policy's."""
    if name == plans.BASE:
        return base_weights(parts)
    phase = next(phase for phase in plan if phase.name == name)
    return weights_of(parts, weights_folder(run_dir, phase))


def save_policy(folder: Path, params: Params, parts: Parts, *, phase: Phase, global_step: int) -> None:
    """Write a policy as a converted folder whose certificate says where in the run it was made."""
    certificate = {
        "source": {"kind": "trained", "phase": phase.name, "global_step": global_step},
        **({"note": parts.note} if parts.note else {}),
    }
    save_weights(folder, params, parts.model, tokenizer=parts.tokenizer_folder, certificate=certificate)

"""The optimizer of an update and its rate."""

import numpy as np
import optax

from selfemo_jax.settings.model import Optim


def learning_rate(optim: Optim, *, step: int, total_steps: int) -> float:
    """The rate of a phase's ``step`` (from 0): linear warm-up, then constant, cosine or linear decay to 0."""
    warmup = optim.warmup * total_steps
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + float(np.cos(np.pi * progress)))
    return optim.lr * (1.0 - progress) if optim.schedule == "linear" else optim.lr


def make_optimizer(optim: Optim) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) after clipping by the global norm, without its rate, which each step
    passes."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype="float32"),
        optax.add_decayed_weights(optim.weight_decay),
    )

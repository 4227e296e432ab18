"""Rotary position embedding (arXiv:2104.09864) in the half-rotation form of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from selfemo_jax.model.config import LinearScaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each of the ``head_dim / 2`` pairs, float32, after the configuration's scaling
    rule."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / np.float32(scaling.factor)
    # Llama 3: long waves are stretched by the factor, short ones kept, those between are blended.
    low_wavelength = scaling.original_max_positions / scaling.low_freq_factor
    high_wavelength = scaling.original_max_positions / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = np.where(wavelengths > low_wavelength, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= low_wavelength) & (wavelengths >= high_wavelength)
    return np.where(between, blended, scaled).astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Cosine and sine of every position's angles, float32: bfloat16 cannot tell position 256 from 257."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], tables: tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]
) -> Float[Array, "B T N H"]:
    """Rotate each head's halves by the tables' angles; float32 inside, ``x``'s dtype out."""
    cos, sin = tables
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    shape = x32.shape
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * jnp.broadcast_to(cos, shape) + turned * jnp.broadcast_to(sin, shape)).astype(x.dtype)

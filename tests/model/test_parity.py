"""Logits of this project's decoder against transformers, float32 on CPU, at most 1e-4 apart."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfemo_jax.model.decoder import Compute, forward, logits
from selfemo_jax.model.hf_convert import load_params, open_model
from tests.model.checkpoints import LLAMA3_SCALING, hf_config, random_model

# Two rows of unequal length, beyond llama3's original 32 positions and beyond one block of attention.
LENGTHS = (170, 111)
WIDTH = 384
MODELS = [
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "rope_theta": 1e6}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
]


def rows(vocab_size: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length) for length in LENGTHS]


def reference_logits(model, row: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(row)[None]).logits[0].float().numpy()


def our_logits(folder, tokens, positions, segment_ids, **compute) -> np.ndarray:
    config, _ = open_model(folder)
    params = load_params(folder, dtype="float32")
    compute = Compute(**compute)
    hidden = forward(
        params,
        config,
        compute,
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segment_ids),
        prefix_ids=jnp.full(segment_ids.shape, -1, jnp.int32),
    )
    return np.asarray(logits(params, config, compute, hidden))


def assert_same_logits(ours, theirs) -> None:
    """Both give logits a row, at most 1e-4 apart; where not, say which side gives other numbers when asked
    again: a side that moves is at fault, not the arithmetic."""
    found, expected = ours(), theirs()
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        apart = np.abs(a - b)
        if not apart.max() <= 1e-4:
            moved = [
                max(float(np.abs(x - y).max()) for x, y in zip(before, again(), strict=True))
                for before, again in ((found, ours), (expected, theirs))
            ]
            place = np.unravel_index(np.nanargmax(apart), apart.shape)
            pytest.fail(
                f"row {row}: logits {apart.max():.3g} apart at {place}, {(apart > 1e-4).mean():.1%} of them "
                f"above 1e-4; asked again, ours moved by {moved[0]:.3g}, transformers' by {moved[1]:.3g} "
                f"({torch.get_num_threads()} threads of torch)"
            )


@pytest.mark.parametrize(("kind", "changes"), MODELS)
@pytest.mark.parametrize("attention", ["dense", "blocked"])
def test_padded_and_packed_rows_give_the_logits_of_transformers(tmp_path, kind, changes, attention):
    model = random_model(hf_config(kind, **changes))
    model.save_pretrained(tmp_path)
    first, second = both = rows(96)

    def theirs():
        return [reference_logits(model, row) for row in both]

    assert np.abs(theirs()[0]).max() > 1

    padded = np.zeros((2, WIDTH), np.int32)
    padded[0, : len(first)], padded[1, : len(second)] = first, second
    pad_segments = np.full((2, WIDTH), -2, np.int32)
    pad_segments[0, : len(first)], pad_segments[1, : len(second)] = 0, 0
    pad_positions = np.tile(np.arange(WIDTH, dtype=np.int32), (2, 1))

    def ours_padded():
        found = our_logits(tmp_path, padded, pad_positions, pad_segments, attention=attention)
        return [found[0, : len(first)], found[1, : len(second)]]

    assert_same_logits(ours_padded, theirs)

    packed = np.zeros((1, WIDTH), np.int32)
    packed[0, : sum(LENGTHS)] = np.concatenate([first, second])
    segments = np.full((1, WIDTH), -2, np.int32)
    segments[0, : sum(LENGTHS)] = np.repeat([0, 1], LENGTHS)
    positions = np.zeros((1, WIDTH), np.int32)
    positions[0, : sum(LENGTHS)] = np.concatenate([np.arange(n) for n in LENGTHS])

    def ours_packed():
        found = our_logits(tmp_path, packed, positions, segments, attention=attention)
        return [found[0, : len(first)], found[0, len(first) : sum(LENGTHS)]]

    assert_same_logits(ours_packed, theirs)

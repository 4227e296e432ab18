"""FLOPs counted by hand, by the attention rule, and against what XLA counts."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.data.batching import pack
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, abstract_params, forward, logits
from selfemo_jax.model.flops import (
    CONVENTIONS,
    Work,
    block_weights,
    convert_mfu,
    decode_bytes,
    forward_flops,
    group_work,
    known_device,
    matmul_weights,
    mfu,
    rows_work,
    separate_work,
    sequence_work,
    train_flops,
)
from tests.model.tiny import sequences

# Head size 2 although D / N is not: what takes D for N * H counts wrong here.
SMALL = ModelConfig(
    architecture="qwen3", vocab_size=7, embed_dim=4, mlp_dim=5, num_layers=2, num_heads=3, num_kv_heads=1,
    head_dim=2, rope_theta=1e4, tie_embeddings=True, max_positions=64,
)  # fmt: skip
QWEN3_4B = ModelConfig(
    architecture="qwen3", vocab_size=151_936, embed_dim=2560, mlp_dim=9728, num_layers=36, num_heads=32,
    num_kv_heads=8, head_dim=128, rope_theta=1e6, tie_embeddings=True, max_positions=40_960,
)  # fmt: skip


def test_a_sequence_of_three_tokens_by_hand():
    # q and o 4*6 each, k and v 4*2 each: 64; MLP 3*4*5 = 60; two layers.
    assert block_weights(SMALL) == 248
    assert matmul_weights(SMALL) == 248 + 28
    assert sequence_work(3) == Work(num_tokens=3, num_pairs=6, num_head=3)
    # 2*248*3 in the blocks, 4*2*3*2 for each of 6 pairs, 2*28*3 in the head.
    assert forward_flops(SMALL, sequence_work(3)) == 1488 + 288 + 168
    assert train_flops(SMALL, sequence_work(3)) == 3 * 1944
    assert forward_flops(SMALL, sequence_work(3, num_head=1)) == 1488 + 288 + 56


def test_a_group_by_hand():
    # Two trunk tokens see 1 and 2; the branch of two sees 3 and 4, that of one sees 3.
    assert group_work(3, (2, 1)) == Work(num_tokens=5, num_pairs=13, num_head=3)
    # Sequences of 4 and 3 positions.
    assert separate_work(3, (2, 1)) == Work(num_tokens=7, num_pairs=10 + 6, num_head=3)
    assert group_work(1, (2,)) == separate_work(1, (2,)) == sequence_work(2)


@pytest.mark.parametrize("layout", ["separate", "packed", "shared_prefix"])
def test_rows_count_as_their_lengths_do_in_each_layout(layout):
    groups = ((9, (4, 7, 1)), (1, (3, 5)), (6, (2, 8, 6)))
    items = sequences(groups)
    batch = pack(items, layout=layout, row_tokens=45, micro_rows=2).batch
    found = rows_work(batch.segment_ids, batch.prefix_ids, num_head=int((batch.token_weights != 0).sum()))
    of = group_work if layout == "shared_prefix" else separate_work
    assert found == sum((of(prompt, lengths) for prompt, lengths in groups), Work())


def test_padding_counts_for_nothing():
    segments, prefixes = np.array([[1, 1, 0, 0]]), np.full((1, 4), -1)
    assert rows_work(segments, prefixes, num_head=1) == sequence_work(2, num_head=1)


def test_sharing_a_prompt_of_400_among_8_saves_four_fifths_of_the_tokens_and_no_logits():
    rows, group = separate_work(400, (60,) * 8), group_work(400, (60,) * 8)
    assert (rows.num_tokens, group.num_tokens) == (8 * 459, 399 + 480)
    assert rows.num_head == group.num_head == 480


def test_xla_counts_the_same_products():
    # Dense attention computes every pair, so a full square is what the compiler counts.
    tokens = 32
    params, _ = abstract_params(SMALL)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def run(params, ids):
        zeros = jnp.zeros_like(ids)
        hidden = forward(
            params, SMALL, Compute(attention="dense"), tokens=ids, positions=zeros, segment_ids=zeros,
            prefix_ids=zeros - 1,
        )  # fmt: skip
        return logits(params, SMALL, Compute(), hidden)

    def products(jaxpr, times=1.0):
        """FLOPs of the matrix products of a traced function."""
        total = 0.0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                depth = np.prod([left[axis] for axis in contracted])
                total += times * 2.0 * depth * np.prod(equation.outvars[0].aval.shape)
            inner_times = times * equation.params.get("length", 1)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += products(inner, inner_times)
        return total

    counted = products(jax.make_jaxpr(run)(params, ids).jaxpr)
    square = Work(num_tokens=tokens, num_pairs=tokens**2, num_head=tokens)
    assert counted == forward_flops(SMALL, square)


def test_the_published_numbers_of_prime_rl_convert_by_hand():
    assert matmul_weights(QWEN3_4B) == 4_022_272_000
    # 3,250 tokens/s on an H100 at 16k: 13.9 % by its formula, 12.7 % causal with the real head size.
    theirs = 3250 * CONVENTIONS["prime-rl"](QWEN3_4B, 16_384)
    assert mfu(theirs, 1.0, peak=989e12) == pytest.approx(0.139, abs=5e-4)
    ours = convert_mfu(0.139, QWEN3_4B, tokens=16_384, source="prime-rl")
    assert ours == pytest.approx(0.127, abs=5e-4)
    wide = 6.0 * matmul_weights(QWEN3_4B) + 12 * 36 * 32 * 128 * 16_384
    assert mfu(3250 * wide, 1.0, peak=989e12) == pytest.approx(0.175, abs=5e-4)


def test_conventions_by_hand():
    t = 10
    pairs = 12 * 2 * 3 * 2 * t  # 12 L N H T
    # Embedding 28, blocks 248, norms: 2*4 + 2*2 a layer, 4 at the end.
    assert SMALL.num_params == 28 + 248 + 2 * 12 + 4 == 304
    expected = {
        "exact": (3 * (2 * 248 * 10 + 48 * 55 + 2 * 28 * 10)) / 10,
        "6ND": 6 * 304,
        "6ND, no embeddings": 6 * 248,
        "PaLM": 6 * 304 + pairs,
        "Megatron": 72 * 2 * 16 * (1 + t / 24 + 7 / (12 * 2 * 4)),
        "Megatron, recomputing": 96 * 2 * 16 * (1 + t / 24 + 7 / (16 * 2 * 4)),
        "verl": 6 * (276 + 28) + pairs / 2,
        "MaxText": 6 * 276 + pairs / 2,
        "prime-rl": 6 * 276 + 12 * 2 * 4 * t,
        "tunix": 6 * 304 / t,
    }
    assert set(expected) == set(CONVENTIONS)
    for name, value in expected.items():
        assert CONVENTIONS[name](SMALL, t) == pytest.approx(value, rel=1e-12), name
    back = convert_mfu(
        convert_mfu(0.4, SMALL, tokens=t, source="verl"), SMALL, tokens=t, source="exact", target="verl"
    )
    assert back == pytest.approx(0.4)


def test_an_unknown_convention_is_named():
    with pytest.raises(ValueError, match="unknown convention 'megatrom'.*'Megatron'"):
        convert_mfu(0.4, SMALL, tokens=8, source="megatrom")


def test_a_decode_step_reads_weights_and_caches():
    # Keys and values of one position: 2 * 2 layers * 1 head * 2 = 8 numbers.
    found = decode_bytes(SMALL, prompts=(5, 7), group_size=3, sampled=2.0, itemsize=2)
    assert found == 2 * (276 + 8 * (12 + 6 * 2))


def test_devices_are_known_by_their_drivers_names():
    assert known_device("NVIDIA H200") == known_device("H200")
    assert known_device("NVIDIA H100 PCIe") != known_device("NVIDIA H100 80GB HBM3")
    assert known_device("NVIDIA A100-SXM4-80GB") == known_device("A100")
    nvl = known_device("NVIDIA H100 NVL")
    assert nvl is not None and nvl.flops == 835e12
    # Not an L4, though its name begins like one.
    assert known_device("NVIDIA L40") is None and known_device("NVIDIA L4") is not None
    assert known_device("cpu") is None

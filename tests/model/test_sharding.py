"""Where weights lie on a mesh: the rule by hand, the errors, and what each device holds."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.sharding import (
    SMALL_BYTES,
    batch_sharding,
    check_tp,
    make_mesh,
    param_shardings,
    partition_spec,
    placements,
)

# Every weight but the norms is above 64 KiB.
CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=512,
    embed_dim=128,
    mlp_dim=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=1e4,
    tie_embeddings=False,
    max_positions=512,
)
MESHES = ({"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"data": 2, "fsdp": 2, "tp": 2})


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "expected"),
    [
        ((1000, 64), ("vocab", "embed"), {"tp": 2, "fsdp": 4}, P("tp", "fsdp")),
        ((1000, 64), ("vocab", "embed"), {"tp": 1, "fsdp": 8}, P(("fsdp", "tp"), None)),
        ((1001, 64), ("vocab", "embed"), {"tp": 1, "fsdp": 8}, P(None, ("fsdp", "tp"))),
        ((1001, 63), ("vocab", "embed"), {"tp": 1, "fsdp": 8}, P(None, None)),
        ((8, 64, 128), ("layers", "mlp", "embed"), {"tp": 2, "fsdp": 4}, P(None, "tp", "fsdp")),
        # Layers are never split: the scan walks over them.
        ((64, 63, 65), ("layers", "embed", "head_dim"), {"tp": 1, "fsdp": 8}, P(None, None, None)),
        ((64, 63, 65), ("layers", "embed", "mlp"), {"tp": 5, "fsdp": 3}, P(None, "fsdp", "tp")),
        ((30000,), ("embed",), {"tp": 2, "fsdp": 4}, P(("fsdp", "tp"))),
        # Divisible by fsdp but not by both: fsdp alone.
        ((30004,), ("embed",), {"tp": 2, "fsdp": 4}, P("fsdp")),
        ((64, 256), ("vocab", "embed"), {"tp": 2, "fsdp": 4}, P()),
    ],
)  # fmt: skip
def test_partition_by_hand(shape, axes, sizes, expected):
    assert partition_spec(shape, axes, sizes) == expected


def test_small_leaves_end_at_64_kib():
    exact = SMALL_BYTES // 4
    assert partition_spec((exact,), ("embed",), {"fsdp": 8}) == P()
    assert partition_spec((exact + 8,), ("embed",), {"fsdp": 8}) == P(("fsdp", "tp"))


@pytest.mark.parametrize("axes", MESHES)
def test_each_device_holds_its_share_of_every_large_weight(axes):
    mesh = make_mesh(axes)
    ways = axes.get("fsdp", 1) * axes.get("tp", 1)
    lines = placements(CONFIG, mesh, dtype="float32")
    assert {line.path for line in lines} >= {"embed", "head", "final_norm", "layers/q", "layers/down"}
    large = 0
    for line in lines:
        size = 4 * int(np.prod(line.shape))
        large += size > SMALL_BYTES
        assert line.bytes_per_device == (size // ways if size > SMALL_BYTES else size), line
    assert large == 9


def test_placements_count_the_stored_type():
    mesh = make_mesh({"fsdp": 8})
    wide, narrow = (placements(CONFIG, mesh, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert [2 * line.bytes_per_device for line in narrow] == [line.bytes_per_device for line in wide]


def test_shard_shapes_by_hand():
    shardings = param_shardings(CONFIG, make_mesh({"fsdp": 4, "tp": 2}))

    def shard(node, shape):
        return node.shard_shape(shape)

    assert shard(shardings["embed"], (512, 128)) == (256, 32)
    assert shard(shardings["layers"]["q"], (3, 128, 4, 32)) == (3, 32, 2, 32)
    assert shard(shardings["layers"]["o"], (3, 4, 32, 128)) == (3, 2, 32, 32)
    assert shard(shardings["layers"]["down"], (3, 256, 128)) == (3, 128, 32)
    assert shard(shardings["layers"]["q_norm"], (3, 32)) == (3, 32)


def test_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    assert batch_sharding(mesh, ndim=3).shard_shape((8, 5, 3)) == (2, 5, 3)


def test_tp_that_does_not_divide_names_the_dimension_and_the_nearest_mesh():
    expected = "--mesh: tp=4 does not divide num_kv_heads=2; the nearest valid mesh is fsdp=4,tp=2"
    with pytest.raises(ValueError) as error:
        param_shardings(CONFIG, make_mesh({"fsdp": 2, "tp": 4}))
    assert str(error.value) == expected
    with pytest.raises(
        ValueError, match=r"tp=3 does not divide num_heads=4, num_kv_heads=2, mlp_dim=256, vocab"
    ):
        check_tp(CONFIG, {"tp": 3})
    check_tp(dataclasses.replace(CONFIG, num_kv_heads=4), {"tp": 4})


def test_too_few_devices_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"--mesh asks for 16 devices, found 8 \(cpu\); ask for --mesh 8 or"):
        make_mesh({"fsdp": 16})
    assert make_mesh({"tp": 2}).devices.shape == (1, 1, 2)
    assert len(jax.devices()) == 8

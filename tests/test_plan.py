"""The planner: its formulas by hand, its account of compiled programs, and both against real arrays."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from selfemo_jax.config import Config, parse_mesh
from selfemo_jax.config_io import config_folder, read_config
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.sharding import make_mesh, placements
from selfemo_jax.plan import formulas
from selfemo_jax.plan.compiled import abstract_batch, abstract_state, compile_step, local_bytes, planned_steps
from selfemo_jax.plan.devices import GB, Efficiency, plan_device
from selfemo_jax.plan.formulas import Workload
from selfemo_jax.plan.hlo import collectives
from selfemo_jax.plan.planning import make_plan
from selfemo_jax.plan.shapes import planned_model, published_shape
from selfemo_jax.train_step import born_sharded
from tests.fabricated import settings
from tools import plan as plan_tool

SMALL = ModelConfig(
    architecture="qwen3", vocab_size=512, embed_dim=128, mlp_dim=256, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=32, rope_theta=1e4, tie_embeddings=True, max_positions=256,
)  # fmt: skip
ONE = {"data": 1, "fsdp": 1, "tp": 1}
EIGHT = {"data": 1, "fsdp": 8, "tp": 1}

HLO = """
%body.1 (p: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %all-gather.1 = f32[4,64]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %r = f32[10]{0} all-reduce(%y), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
}
%cond.1 (p: (s32[], f32[4,64])) -> pred[] {
  %lt = pred[] compare(%a, %b), direction=LT
}
%add (a: f32[], b: f32[]) -> f32[] {
  %sum = f32[] add(%a, %b)
}
ENTRY %main (p0: f32[4,64]) -> f32[4,64] {
  %w = (s32[], f32[4,64]) while(%t), condition=%cond.1, body=%body.1, config={"known_trip_count":{"n":"5"}}
  %ags = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%q), replica_groups={{0,1},{2,3}}, dimensions={0}
  %agd = bf16[16]{0} all-gather-done(%ags)
  %rs = f32[6]{0} reduce-scatter(%z), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %cp = f32[4,64]{1,0} copy(%v)
}
"""


def test_collectives_are_counted_as_often_as_their_loop_runs():
    found = {(one.kind, one.group): (one.count, one.received) for one in collectives(HLO).found}
    assert found == {
        # 1024 bytes of which three quarters come from the others, five times; two of four devices more below.
        ("all-gather", 4): (5, 5 * 1024 * 3 / 4),
        ("all-reduce", 4): (5, 5 * 2 * 40 * 3 / 4),
        # The started one names its operand too: 32 bytes of result, half of them another's.
        ("all-gather", 2): (1, 16.0),
        # Its result is what is left of twice as much.
        ("reduce-scatter", 2): (1, 24.0),
    }
    assert collectives(HLO).open_loops == 0
    unknown = re.sub(r", config=\S+", "", HLO)
    assert collectives(unknown).open_loops == 1


@pytest.mark.parametrize(
    ("name", "millions"),
    [("qwen3-0.6b", 596.0), ("qwen3-1.7b", 1720.6), ("qwen3-4b", 4022.5), ("qwen3-8b", 8190.7)],
)
def test_published_shapes_have_their_published_sizes(name, millions):
    assert published_shape(name).num_params / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_token_of_the_4b_model_has_144_kib_of_cache():
    assert formulas.cache_per_token(published_shape("qwen3-4b"), itemsize=2) == 144 * 1024


def test_the_state_of_the_4b_model_takes_16_bytes_a_weight_over_eight_devices():
    model = published_shape("qwen3-4b")
    config = dataclasses.replace(Config(), mesh="8")
    found = formulas.memory(model, config, EIGHT)
    state = found.parameters + found.optimizer + found.accumulator
    # What is not split (norms) is a few hundred thousand weights.
    assert state == pytest.approx(16 * model.num_params / 8, rel=2e-3)


@pytest.mark.parametrize("mesh", ["1", "8", "fsdp=4,tp=2", "data=2,fsdp=2,tp=2"])
def test_bytes_of_parameters_are_those_of_the_sharding_table(mesh):
    axes = parse_mesh(mesh)
    lines = placements(SMALL, make_mesh(axes), dtype="float32")
    expected = sum(line.bytes_per_device for line in lines)
    assert formulas.param_bytes(SMALL, axes, itemsize=4) == expected


def test_a_server_has_what_its_weights_leave_of_its_share():
    config = read_config(config_folder() / "qwen3_4b.yaml")
    sidecar = dataclasses.replace(config.rollout.sidecar, memory_share=0.5, tensor_parallel=2)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, sidecar=sidecar))
    model = published_shape("qwen3-4b")
    found = formulas.sidecar_cache(model, config, plan_device("h100"))
    assert found.weights == model.num_params
    assert found.cache == 40 * GB - model.num_params
    assert found.tokens == int(2 * found.cache / (144 * 1024))


def test_the_search_finds_the_last_size_that_fits():
    for limit in (0, 7, 8, 100, 1024, 5000):
        found = formulas.largest(lambda n, limit=limit: n <= limit, low=8, high=1024, multiple=8)
        assert found == (0 if limit < 8 else min(limit // 8 * 8, 1024))


def test_recomputing_more_keeps_less_and_costs_time():
    model, config = published_shape("qwen3-0.6b"), read_config(config_folder() / "qwen3_4b.yaml")
    device, work = plan_device("h100"), Workload(prompt_tokens=300, completion_tokens=1200)
    sizes, seconds = [], []
    for remat in ("none", "dots", "attention", "full"):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        sizes.append(formulas.memory(model, changed, EIGHT).total)
        seconds.append(formulas.step_time(model, changed, EIGHT, device, work, Efficiency()).update)
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3] == pytest.approx(4 / 3 * seconds[0])
    # Beside each block's input: 16 attended heads of 128 in bfloat16, and a float32 sum of each.
    positions = config.batch.micro_rows / 8 * config.batch.row_tokens
    attended = model.num_layers * positions * 16 * (2 * 128 + 4)
    assert sizes[2] - sizes[3] == pytest.approx(attended)


def test_the_kernel_for_a_gpu_is_planned_without_one_and_keeps_no_scores(capsys):
    model, config = published_shape("qwen3-0.6b"), read_config(config_folder() / "qwen3_4b.yaml")
    blocks = []
    for attention in ("dense", "blocked", "pallas"):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
        blocks.append(formulas.memory(model, changed, EIGHT).block)
    assert blocks[0] > blocks[1] > blocks[2]
    words = [
        "--config",
        str(config_folder() / "tiny.yaml"),
        "--device",
        "h100",
        "--model.attention",
        "pallas",
    ]
    assert plan_tool.main(words) == 0
    assert "by formula alone" in capsys.readouterr().out


def test_old_logprobs_cost_time_wherever_the_loss_needs_them():
    model, device = published_shape("qwen3-0.6b"), plan_device("h100")
    work = Workload(prompt_tokens=300, completion_tokens=60)
    for change, needed in (({}, False), ({"importance": "token"}, True), ({"importance_band": 2.0}, True)):
        config = Config(loss=dataclasses.replace(Config().loss, **change))
        rl = dataclasses.replace(config.rl, mini_prompts=config.rl.prompts_per_step, updates_per_batch=1)
        config = dataclasses.replace(config, rl=rl)
        found = formulas.step_time(model, config, ONE, device, work, Efficiency()).old_logprobs
        assert (found > 0) == needed, change


def test_adapters_need_no_moments_of_the_base():
    model = published_shape("qwen3-8b")
    config = read_config(config_folder() / "qwen3_8b.yaml")
    lora = dataclasses.replace(config.lora, rank=16, base_dtype="bfloat16")
    found = formulas.memory(model, dataclasses.replace(config, lora=lora), ONE)
    assert found.parameters == pytest.approx(2 * model.num_params, rel=0.02)
    assert found.optimizer < 0.03 * found.parameters and found.reference == 0


def test_a_model_too_large_is_told_what_would_help():
    model = published_shape("qwen3-8b")
    config = dataclasses.replace(read_config(config_folder() / "qwen3_8b.yaml"), mesh="1")
    plan = make_plan(model, config, plan_device("h100"))
    words = "\n".join(plan.advice)
    assert not plan.fits
    assert "does not fit" in words and "lora.rank" in words and re.search(r"fsdp=\d+ devices", words)


def test_what_is_searched_fits_and_the_next_size_does_not():
    model, config = published_shape("qwen3-4b"), read_config(config_folder() / "qwen3_4b.yaml")
    device = plan_device("h100")
    plan = make_plan(model, config, device)
    assert plan.fits and plan.budget.row_tokens >= config.batch.row_tokens

    def total(tokens: int) -> float:
        batch = dataclasses.replace(config.batch, row_tokens=tokens)
        return formulas.memory(model, dataclasses.replace(config, batch=batch), EIGHT).total

    assert total(plan.budget.row_tokens) <= device.usable < total(plan.budget.row_tokens + 128)
    json.dumps(plan.to_json())


def test_a_device_or_model_that_is_not_known_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean h100"):
        plan_device("h10")
    with pytest.raises(ValueError, match="did you mean qwen3-4b"):
        planned_model(Config(), "qwen3-4")
    (tmp_path / "config.json").write_text(json.dumps(published_shape("qwen3-0.6b").to_hf()))
    found, where = planned_model(Config(), str(tmp_path))
    assert found.num_layers == 28 and where.endswith("config.json")


@pytest.fixture(scope="module", params=["8", "fsdp=2,tp=2"])
def compiled(request):
    """A small step as it is compiled, and what it is compiled from."""
    config = settings(mesh=request.param, batch={"row_tokens": 256, "micro_rows": 8})
    mesh = make_mesh(parse_mesh(config.mesh))
    return config, mesh, compile_step(SMALL, config, mesh)


def test_what_is_planned_is_what_real_arrays_take(compiled):
    config, mesh, step = compiled
    steps = planned_steps(SMALL, config, mesh)
    state = steps.init_state(born_sharded(SMALL, mesh, seed=0, dtype="float32"))
    accumulator = steps.zeros["rl"]()
    device = mesh.devices.flat[0]

    def live(tree) -> int:
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    assert live(state.params) == step.parameters
    assert live(state.opt_state) == step.optimizer
    assert live(accumulator) == step.accumulator
    params, planned = abstract_state(steps, SMALL, config)
    assert local_bytes(planned) == live(state)
    # The compiler's own account of its arguments is that of the arrays, to the padding of small ones.
    given = step.parameters + step.accumulator + step.batch
    assert step.program("update").arguments == pytest.approx(given, rel=0.1)
    assert local_bytes(abstract_batch(mesh, rows=8, tokens=256)) == step.batch
    jax.tree.map(lambda shape, leaf: np.testing.assert_equal(shape.shape, leaf.shape), params, state.params)


def test_the_formulas_are_near_the_compiled_step(compiled):
    config, _, step = compiled
    plan = make_plan(SMALL, config, plan_device("cpu", num_devices=8), compiled=step)
    memory = plan.memory
    assert memory.parameters == step.parameters
    assert memory.optimizer == pytest.approx(step.optimizer, rel=1e-3)
    assert memory.accumulator == pytest.approx(step.accumulator, rel=1e-2)
    assert memory.batch == step.batch
    assert plan.formula_error is not None and abs(plan.formula_error) < 0.35


def test_weights_that_are_split_are_gathered(compiled):
    config, _, step = compiled
    kinds = {one.kind for one in step.program("update").collectives.found}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert step.program("update").collectives.open_loops == 0
    moved = sum(formulas.collective_bytes(SMALL, config, parse_mesh(config.mesh)).values())
    received = step.program("update").collectives.received
    # The CPU backend adds gradients up whole, where others scatter the sums.
    assert 0.3 * moved < received < 4 * moved, (received, moved)

"""The planner: its formulas by hand, its account of compiled programs, and both against real arrays."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from selfemo_jax.config import Config, parse_mesh
from selfemo_jax.config_io import config_folder, read_config
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.flops import forward_flops, group_work, separate_work, sequence_work
from selfemo_jax.model.sharding import make_mesh, placements
from selfemo_jax.plan import formulas
from selfemo_jax.plan.compiled import abstract_batch, abstract_state, compile_step, local_bytes, planned_steps
from selfemo_jax.plan.devices import GIB, PLAN_DEVICES, Efficiency, plan_device
from selfemo_jax.plan.figures import Workload
from selfemo_jax.plan.hlo import collectives
from selfemo_jax.plan.planning import largest, make_plan
from selfemo_jax.plan.shapes import planned_model, published_shape
from selfemo_jax.settings.model import Freeze
from selfemo_jax.train_step import born_sharded
from tests.fabricated import settings
from tools import plan as plan_tool

SMALL = ModelConfig(
    architecture="qwen3", vocab_size=512, embed_dim=128, mlp_dim=256, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=32, rope_theta=1e4, tie_embeddings=True, max_positions=256,
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
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
    assert found.cache == 0.5 * 79.2 * GIB - model.num_params
    assert found.tokens == int(2 * found.cache / (144 * 1024))


def test_the_search_finds_the_last_size_that_fits():
    for limit in (0, 7, 8, 100, 1024, 5000):
        found = largest(lambda n, limit=limit: n <= limit, low=8, high=1024, multiple=8)
        assert found == (0 if limit < 8 else min(limit // 8 * 8, 1024))


def test_recomputing_more_keeps_less_and_costs_time():
    model, config = published_shape("qwen3-0.6b"), read_config(config_folder() / "qwen3_4b.yaml")
    device, work = plan_device("h100"), Workload(prompt_tokens=300, completion_tokens=1200)
    # Passes for log-probs, which keep nothing, would be the worst moment of the smallest.
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, logprobs_at_once=1))
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


def seconds_of(**changes) -> formulas.StepTime:
    """Of a step of the 4B model on one H100; 400 tokens, 8 times 60, all products in one type."""
    config = read_config(config_folder() / "qwen3_4b.yaml")
    for section, values in changes.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **values)}
        )
    work = Workload(prompt_tokens=400, completion_tokens=60)
    model = published_shape("qwen3-4b")
    return formulas.step_time(model, config, ONE, plan_device("h100"), work, Efficiency())


def test_rows_that_repeat_their_prompt_take_as_much_longer_as_they_compute():
    model, lengths = published_shape("qwen3-4b"), [60] * 8
    works = {
        "shared_prefix": group_work(400, lengths),
        "packed": separate_work(400, lengths),
        # A row of its own for each, filled up.
        "separate": sum([sequence_work(512, num_head=60)] * 7, sequence_work(512, num_head=60)),
    }
    all_bfloat16 = {"logits_float32": False}
    found = {
        layout: seconds_of(rl={"layout": layout}, batch={"row_tokens": 512}, model=all_bfloat16)
        for layout in works
    }
    shared = forward_flops(model, works["shared_prefix"])
    for layout, work in works.items():
        ratio = forward_flops(model, work) / shared
        for part in ("update", "reference", "old_logprobs"):
            assert getattr(found[layout], part) == pytest.approx(
                ratio * getattr(found["shared_prefix"], part)
            ), (layout, part)
        # The sampler shares prompts whatever the rows of the update are.
        assert found[layout].rollout_decode == found["shared_prefix"].rollout_decode
    assert found["packed"].update > 3.5 * found["shared_prefix"].update


def test_float32_products_take_twice_as_long_on_a_gpu_and_those_of_the_head_too():
    all_bfloat16, wide_head = (seconds_of(model={"logits_float32": wide}).update for wide in (False, True))
    assert seconds_of(model={"compute_dtype": "float32"}).update == pytest.approx(2 * all_bfloat16)
    mixed = {"compute_dtype": "float32", "product_dtype": "bfloat16", "logits_float32": False}
    assert seconds_of(model=mixed).update == pytest.approx(all_bfloat16)
    model, work = published_shape("qwen3-4b"), group_work(400, [60] * 8)
    head = 2 * model.vocab_size * model.embed_dim * work.num_head / forward_flops(model, work)
    assert wide_head == pytest.approx((1 + head) * all_bfloat16)
    cpu = plan_device("cpu")
    assert cpu.flops_of("float32") == cpu.flops_of("bfloat16") == cpu.flops


def test_frozen_blocks_have_no_backward_pass():
    usual, frozen = seconds_of(), seconds_of(model={"freeze": Freeze(layers=18)})
    assert frozen.reference == usual.reference and frozen.optimizer < 0.6 * usual.optimizer
    # Of 36 blocks half go forward only, of 4 passes with remat full: 1 + 3 / 2 of 4, but for the head.
    assert 2.5 / 4 * usual.update < frozen.update < 0.75 * usual.update


def test_what_a_run_may_fill_is_the_share_that_jax_is_told_to_take(tmp_path, monkeypatch, capsys):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert plan_device("h100").usable == pytest.approx(0.92 * 79.2 * GIB)
    # Card memory counts in GiB: below the number of the name where that is so many GB, never above it in GiB.
    sizes = {name: device.memory / GIB for name, device in PLAN_DEVICES.items()}
    assert sizes == {"h200": 139.8, "h100": 79.2, "h100-pcie": 79.2, "a100": 79.2, "l40s": 44.4, "l4": 22.0}
    assert plan_device("h100", taken=0.5).usable == pytest.approx(0.42 * 79.2 * GIB)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75")
    assert plan_device("h100", taken=0.5).usable == pytest.approx(0.75 * 79.2 * GIB)
    words = ["--config", str(config_folder() / "tiny.yaml"), "--device", "h100", "--no_compile"]
    written = tmp_path / "made" / "plan.json"
    assert plan_tool.main([*words, "--json", str(written)]) == 0
    assert json.loads(written.read_text())["fits"]
    assert (
        "75% of all, what servers on the same GPU leave, unless XLA_CLIENT_MEM_FRACTION says"
        in capsys.readouterr().out
    )


def test_wide_passes_for_logprobs_are_part_of_the_peak():
    wide = {"row_tokens": 256, "micro_rows": 2, "logprobs_at_once": 8}
    config = settings(batch=wide, model={"remat": "full", "attention": "dense"}, loss={"kl_coef": 0.1})
    step = compile_step(SMALL, config, make_mesh(ONE))
    logprobs, update = step.program("logprobs"), step.program("update")
    # Five of the batch's arrays are read, four bytes a position, eight micro-batches.
    assert logprobs.arguments - step.parameters == 5 * 4 * (8 * 2 * 256)
    # The wide pass is the worst moment: beside it lie the moments, and in an update the accumulator too.
    assert step.peak() == logprobs.total + step.optimizer > 1.2 * (update.total + step.optimizer)
    found = formulas.memory(SMALL, config, ONE)
    assert found.logprobs == pytest.approx(logprobs.total - step.parameters, rel=0.2)
    narrow = dataclasses.replace(config, batch=dataclasses.replace(config.batch, logprobs_at_once=1))
    assert found.total > 1.2 * formulas.memory(SMALL, narrow, ONE).total


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


MESHES = {
    "8": {},
    "fsdp=2,tp=2": {},
    "fsdp=2": {"freeze": {"embeddings": True, "layers": 1}},
}


@pytest.fixture(scope="module", params=list(MESHES))
def compiled(request):
    """A small step as it is compiled, and what it is compiled from."""
    mesh = request.param
    config = settings(mesh=mesh, batch={"row_tokens": 256, "micro_rows": 8}, model=MESHES[mesh])
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
    # Beside both moments lies their count, beside the gradients the metrics' sums.
    assert memory.optimizer == step.optimizer - 4
    assert memory.accumulator == pytest.approx(step.accumulator, abs=256)
    assert memory.batch == step.batch
    assert plan.formula_error is not None and abs(plan.formula_error) < 0.16


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak starts anew there"
)
@pytest.mark.parametrize(
    ("model", "batch", "worst"),
    [
        ({"attention": "dense"}, {"micro_rows": 4}, "update"),
        ({"attention": "dense", "remat": "full"}, {"micro_rows": 2, "logprobs_at_once": 8}, "logprobs"),
    ],
)
def test_an_update_takes_what_was_planned(tmp_path, model, batch, worst):
    """Some hundred MiB, most of them temporaries: measured from the system's own count of this process."""
    settings_of_libc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-m", "tests.plan_worker", str(tmp_path), json.dumps(model), json.dumps(batch)]
    done = subprocess.run(
        command, env=environment | settings_of_libc | {"XLA_FLAGS": ""}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] == worst and found["planned"] > 2 * found["held"], found
    assert found["measured"] == pytest.approx(found["planned"], rel=0.1), found


def test_weights_that_are_split_are_gathered(compiled):
    config, _, step = compiled
    kinds = {one.kind for one in step.program("update").collectives.found}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert step.program("update").collectives.open_loops == 0
    moved = sum(formulas.collective_bytes(SMALL, config, parse_mesh(config.mesh)).values())
    received = step.program("update").collectives.received
    # The CPU backend adds gradients up whole, where others scatter the sums.
    assert 0.3 * moved < received < 4 * moved, (received, moved)

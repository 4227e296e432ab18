"""Adapters: the base stays as it is, what is merged is what was trained, and nothing is lost on the way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfemo_jax.checkpoint import StateStore, save_weights
from selfemo_jax.config import Loss, Optim
from selfemo_jax.config_io import load_config
from selfemo_jax.lora import read_adapters, write_adapters
from selfemo_jax.model.adapters import (
    TARGETS,
    adapted,
    base_of,
    init_adapters,
    is_adapted,
    merge,
    merged,
    target_shapes,
)
from selfemo_jax.model.decoder import Compute, forward, logits
from selfemo_jax.model.hf_convert import to_hf
from selfemo_jax.model.sharding import make_mesh, param_shardings
from selfemo_jax.model.weights import load_params
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.rollout.publish import snapshot
from selfemo_jax.settings.model import Lora
from selfemo_jax.train_step import Steps, make_steps, sequence_logprobs, update
from tests import micro
from tests.model.tiny import TINY, packed, sequences, weights

LORA = Lora(rank=3, alpha=6.0)
WIDE = dataclasses.replace(TINY, vocab_size=96, embed_dim=128, mlp_dim=256)
"""Large enough that a mesh splits its weights."""


def policy(*, model=TINY, targets=TARGETS, seed=3):
    """A base and adapters that do something."""
    adapters = init_adapters(model, jax.random.key(seed), rank=LORA.rank, targets=targets)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 2 * len(TARGETS)))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), adapters)
    return adapted(weights(model), adapters, scale=jnp.float32(2.0))


@functools.cache
def steps_of(model=TINY, mesh: tuple = (), **loss) -> Steps:
    return make_steps(
        model,
        Compute(),
        make_mesh(dict(mesh)),
        optim=Optim(lr=1e-2, weight_decay=0.1),
        loss=Loss(**loss),
        temperature=1.0,
        logits_budget_mib=64,
        lora=LORA,
    )


@functools.cache
def batch(micro_rows: int = 1):
    found = packed(
        sequences(vocab_size=90), layout="shared_prefix", row_tokens=48, micro_rows=micro_rows
    ).batch
    return found


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, fields, *, model):
    return logits(params, model, Compute(), forward(params, model, Compute(), **fields))


def all_logits(params, model=TINY):
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 19), dtype=np.int32)
    fields = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(19, dtype=np.int32), tokens.shape),
        "segment_ids": np.zeros_like(tokens),
        "prefix_ids": np.full_like(tokens, -1),
    }
    return np.asarray(_logits(params, fields, model=model))


@pytest.mark.parametrize("targets", [TARGETS, ("o",), ("q", "down")], ids="-".join)
def test_merged_weights_give_the_logits_of_the_adapters(targets):
    params = policy(targets=targets)
    plain = merged(params)
    assert not is_adapted(plain) and jax.tree.structure(plain) == jax.tree.structure(weights())
    found, base = all_logits(params), all_logits(base_of(params))
    assert np.abs(found - base).max() > 0.1, "the adapters must do something"
    np.testing.assert_allclose(all_logits(plain), found, rtol=0, atol=1e-5)
    for name in TARGETS:
        changed = np.abs(np.asarray(plain["layers"][name] - params["layers"][name])).max() > 0
        assert changed == (name in targets), name


def test_a_merged_weight_is_the_base_plus_the_scaled_product_by_hand():
    params = policy(targets=("o",))
    pair = params["lora"]["o"]
    assert target_shapes(TINY, ("o",)) == {"o": (TINY.num_heads * TINY.head_dim, TINY.embed_dim)}
    expected = np.asarray(params["layers"]["o"][1]).reshape(-1, TINY.embed_dim) + 2.0 * (
        np.asarray(pair["a"][1]) @ np.asarray(pair["b"][1])
    )
    found = np.asarray(merge(params)["layers"]["o"][1]).reshape(-1, TINY.embed_dim)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_new_adapters_change_nothing():
    adapters = init_adapters(TINY, jax.random.key(0), rank=2, targets=TARGETS)
    params = adapted(weights(), adapters, scale=jnp.float32(16.0))
    np.testing.assert_array_equal(all_logits(params), all_logits(weights()))
    assert all(float(jnp.abs(pair["a"]).max()) > 0 for pair in adapters.values())


def test_the_gradient_of_the_adapters_is_that_of_the_merged_weights_by_the_chain_rule():
    steps, params = steps_of(), policy()
    on_mesh = {name: jnp.asarray(getattr(batch(), name)) for name in vars(batch())}
    found = steps.sft_gradients(steps.parts(params), steps.zeros["sft"](), on_mesh).gradients["lora"]
    whole = make_steps(
        TINY, Compute(), make_mesh({}), optim=Optim(), loss=Loss(), temperature=1.0, logits_budget_mib=64
    )
    dense = whole.sft_gradients(whole.parts(merge(params)), whole.zeros["sft"](), on_mesh).gradients["layers"]
    for name, (inputs, outputs) in target_shapes(TINY, TARGETS).items():
        slope = np.asarray(dense[name], np.float64).reshape(TINY.num_layers, inputs, outputs)
        a, b = (np.asarray(params["lora"][name][part], np.float64) for part in ("a", "b"))
        np.testing.assert_allclose(found[name]["a"], 2.0 * slope @ b.swapaxes(1, 2), rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[name]["b"], 2.0 * a.swapaxes(1, 2) @ slope, rtol=0, atol=1e-5)


def test_an_update_changes_adapters_alone_and_has_no_moments_for_the_base():
    steps, params = steps_of(), policy()
    before = jax.tree.map(np.array, params)
    state = steps.init_state(params)
    num_adapters = sum(leaf.size for leaf in jax.tree.leaves(params["lora"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * num_adapters
    gradients = steps.zeros["rl"]().gradients
    assert sum(leaf.size for leaf in jax.tree.leaves(gradients)) == num_adapters
    state = state.replace(params=base_of(params) | {"lora": jax.tree.map(jnp.copy, params["lora"])} | {
        "lora_scale": params["lora_scale"]
    })  # fmt: skip
    after, metrics = update(steps, state, batch(), kind="sft", micro_rows=1, rate=1e-2, where="here")
    assert metrics["grad_norm"] > 0 and metrics["loss"] > 0
    for found, kept in zip(
        jax.tree.leaves(base_of(after.params)), jax.tree.leaves(base_of(params)), strict=True
    ):
        assert found is kept, "the base is the same array: never copied, never given away"
    assert (np.asarray(after.params["lora"]["q"]["b"]) != before["lora"]["q"]["b"]).all()
    assert float(after.params["lora_scale"]) == 2.0


def test_no_gradient_of_the_base_is_computed():
    """A third of the work of a step is the gradients of weights: with adapters it must be gone."""
    model = dataclasses.replace(WIDE, num_layers=1, mlp_dim=512)

    def flops(steps, params):
        on_mesh = {name: jnp.asarray(getattr(batch(), name)) for name in vars(batch())}
        lowered = steps.sft_gradients.lower(steps.parts(params), steps.zeros["sft"](), on_mesh)
        return lowered.compile().cost_analysis()["flops"]

    whole = make_steps(
        model, Compute(), make_mesh({}), optim=Optim(), loss=Loss(), temperature=1.0, logits_budget_mib=64
    )
    assert flops(steps_of(model), policy(model=model)) < 0.85 * flops(whole, weights(model))


def test_the_reference_with_adapters_off_is_the_base_and_costs_no_copy():
    steps, params = steps_of(), policy()
    reference = base_of(params)
    assert reference["layers"]["q"] is params["layers"]["q"]
    found = sequence_logprobs(steps, reference, batch(), micro_rows=1)
    np.testing.assert_array_equal(found, sequence_logprobs(steps, weights(), batch(), micro_rows=1))
    assert np.abs(found - sequence_logprobs(steps, params, batch(), micro_rows=1)).max() > 1e-2


def test_a_base_in_half_precision_is_trained_and_merged_in_full():
    steps, params = steps_of(), policy()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base_of(params))
    params = adapted(half, params["lora"], scale=params["lora_scale"])
    served = snapshot(params, dtype="float32")
    np.testing.assert_allclose(all_logits(served), all_logits(params), rtol=0, atol=2e-5)
    assert merge(params)["layers"]["q"].dtype == jnp.bfloat16
    state, _ = update(
        steps,
        steps.init_state(adapted(half, jax.tree.map(jnp.copy, params["lora"]), scale=params["lora_scale"])),
        batch(), kind="sft", micro_rows=1, rate=1e-2, where="here",
    )  # fmt: skip
    assert state.params["embed"].dtype == jnp.bfloat16 and state.params["lora"]["q"]["a"].dtype == jnp.float32


def test_a_mesh_changes_nothing_and_the_snapshot_lies_as_the_base_did():
    params = policy(model=WIDE)
    many = steps_of(WIDE, (("data", 2), ("fsdp", 2), ("tp", 2)))
    shardings = param_shardings(WIDE, many.mesh)
    whole = jax.sharding.NamedSharding(many.mesh, jax.sharding.PartitionSpec())
    placed = adapted(
        jax.device_put(base_of(params), shardings),
        jax.device_put(params["lora"], whole),
        scale=jax.device_put(params["lora_scale"], whole),
    )
    assert not placed["layers"]["gate"].sharding.is_fully_replicated
    served = snapshot(placed, dtype="float32")
    assert served["layers"]["gate"].sharding == placed["layers"]["gate"].sharding
    np.testing.assert_allclose(served["layers"]["gate"], merge(params)["layers"]["gate"], rtol=0, atol=1e-5)
    one = steps_of(WIDE)
    rows = batch(4)
    fresh = one.init_state(jax.tree.map(jnp.copy, params))
    _, alone = update(one, fresh, rows, kind="sft", micro_rows=4, rate=1e-2, where="")
    state, split = update(many, many.init_state(placed), rows, kind="sft", micro_rows=4, rate=1e-2, where="")
    assert split["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert not is_adapted(merged(state.params))


def test_a_saved_state_holds_adapters_alone_and_comes_back_bit_for_bit(tmp_path):
    steps, params = steps_of(), policy()
    fresh = steps.init_state(jax.tree.map(jnp.copy, params))
    state, _ = update(steps, fresh, batch(), kind="sft", micro_rows=1, rate=1e-2, where="")
    store = StateStore(tmp_path, keep=1, asynchronous=False)
    store.save(1, state, {"a": 1})
    assert not list(tmp_path.rglob("*embed*")), "the base is not saved: it never changes"
    again = store.restore(1, steps.init_state(jax.tree.map(jnp.copy, params)))
    store.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_adapters_written_for_peft_are_read_back_bit_for_bit_and_those_of_others_are_refused(tmp_path):
    params = policy()
    write_adapters(tmp_path, params["lora"], LORA, base="some/base")
    found = read_adapters(tmp_path, TINY, LORA)
    for name in TARGETS:
        for part in ("a", "b"):
            np.testing.assert_array_equal(found[name][part], params["lora"][name][part])
    with pytest.raises(ValueError, match="adapters of rank 3, alpha 6.0 .* the settings say lora.rank 4"):
        read_adapters(tmp_path, TINY, Lora(rank=4, alpha=6.0))
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj.lora_A.weight: found F32 \[3, 32\], expected"):
        read_adapters(tmp_path, WIDE, LORA)


def test_peft_loads_the_folder_and_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    params = policy()
    save_weights(tmp_path / "flax", base_of(params), TINY, tokenizer=bundled_tokenizer(), certificate={})
    to_hf(tmp_path / "flax", tmp_path / "base")
    write_adapters(tmp_path / "adapter", params["lora"], LORA, base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 19))
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
        merged_by_peft = model.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(all_logits(params), found, rtol=0, atol=2e-5)
    np.testing.assert_allclose(all_logits(merged(params)), merged_by_peft, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--lora.targets=[q,q]"], "each once"),
        (["--model.freeze.layers=1"], "model.freeze names weights"),
    ],
)
def test_settings_that_do_not_fit_adapters_are_refused(words, reason):
    with pytest.raises(ValueError, match=reason):
        load_config(["--run_dir=x", "--lora.rank=2", *words], prog="train")


@pytest.mark.slow
def test_a_stopped_and_resumed_run_with_adapters_equals_an_uninterrupted_one(tmp_path):
    words = micro.random_settings() + micro.flags({
        "lora.rank": 4, "loss.kl_coef": 0.1, "rl.steps": 3, "cold_start.epochs": 2, "checkpoint.every": 1,
        "rl.updates_per_batch": 2,
    })  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert micro.run(whole, *words) == 0
    lines = micro.metrics(whole)
    cold = max(line["step"] for line in lines if line["phase"] == "cold")
    assert any(line.get("kl", 0) > 0 for line in lines)
    with micro.stopped_at(3, cold + 2):
        assert micro.run(stopped, *words) == 75
        assert micro.run(stopped, "--resume") == 75
    assert micro.run(stopped, "--resume") == 0
    micro.assert_same_runs(whole, stopped)
    folders = sorted(path.parent for path in whole.glob("phases/*/weights/adapter"))
    assert [folder.parent.name for folder in folders] == ["00_cold", "01_rl_final"]
    policies = [load_params(folder, dtype="float32") for folder in folders]
    for name, leaf in policies[0]["layers"].items():
        same = np.array_equal(leaf, policies[1]["layers"][name])
        assert same == (name not in TARGETS), name
    np.testing.assert_array_equal(policies[0]["embed"], policies[1]["embed"])
    for folder in folders:
        again = stopped / folder.relative_to(whole) / "adapter" / "adapter_model.safetensors"
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == again.read_bytes()

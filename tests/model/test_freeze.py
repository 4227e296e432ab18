"""What is frozen stays as it is, costs no moments, and changes no gradient of the rest."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from selfemo_jax.config import Loss, Optim
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.freeze import check_frozen, join, put_back, split
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.settings.model import Freeze
from selfemo_jax.train_step import Steps, device_batch, make_steps, update
from tests.model.tiny import TINY, assert_trees_close, packed, sequences, weights

THREE = dataclasses.replace(TINY, num_layers=3)


@functools.cache
def steps_of(embeddings: bool, layers: int) -> Steps:
    return make_steps(
        THREE,
        Compute(),
        make_mesh({}),
        optim=Optim(lr=1e-2, weight_decay=0.1, clip_norm=1e9, eps=1e-3),
        loss=Loss(),
        temperature=1.0,
        logits_budget_mib=64,
        freeze=Freeze(embeddings=embeddings, layers=layers),
    )


@functools.cache
def batch():
    return packed(sequences(), layout="shared_prefix", row_tokens=48).batch


def gradients(steps: Steps, params):
    on_mesh = device_batch(batch(), steps.mesh)
    return steps.sft_gradients(steps.parts(params), steps.zeros["sft"](), on_mesh).gradients


def test_parts_put_together_again_are_the_whole():
    params = weights(THREE)
    trained, frozen = split(params, embeddings=True, layers=2)
    assert set(frozen) == {"embed", "layers"} and "embed" not in trained
    assert trained["layers"]["q"].shape[0] == 1 and frozen["layers"]["q"].shape[0] == 2
    joined = join(trained, frozen)
    assert joined["lower"]["q"].shape[0] == 2 and joined["embed"] is not None
    changed = jax.tree.map(lambda weight: weight + 1, trained)
    whole = put_back(params, changed, layers=2)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    np.testing.assert_array_equal(whole["layers"]["q"][:2], params["layers"]["q"][:2])
    np.testing.assert_array_equal(whole["layers"]["q"][2:], params["layers"]["q"][2:] + 1)
    np.testing.assert_array_equal(whole["embed"], params["embed"])


@pytest.mark.parametrize(("embeddings", "layers"), [(True, 0), (False, 1), (True, 2)])
def test_the_gradient_of_what_is_trained_is_that_of_the_whole_model(embeddings, layers):
    params = weights(THREE)
    whole = gradients(steps_of(False, 0), params)
    expected, _ = split(whole, embeddings=embeddings, layers=layers)
    if layers:
        # The embedding then has a gradient from the head alone, the whole model also from its tokens.
        expected.pop("embed", None)
    found = gradients(steps_of(embeddings, layers), params)
    assert ("embed" in found) == (not embeddings)
    found = {name: leaf for name, leaf in found.items() if name in expected}
    assert_trees_close(found, expected, bound=1e-5)


def test_an_update_leaves_frozen_weights_and_has_no_moments_for_them():
    steps = steps_of(True, 2)
    params = weights(THREE)
    state = steps.init_state(jax.device_put(jax.tree.map(np.array, params), steps.param_shardings))
    trained, _ = split(params, embeddings=True, layers=2)
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * num_trained
    after, metrics = update(steps, state, batch(), kind="sft", micro_rows=1, rate=1e-2, where="here")
    assert metrics["grad_norm"] > 0
    np.testing.assert_array_equal(after.params["embed"], params["embed"])
    for name, weight in params["layers"].items():
        np.testing.assert_array_equal(after.params["layers"][name][:2], weight[:2])
        assert (np.asarray(after.params["layers"][name][2:]) != np.asarray(weight[2:])).any(), name


def test_weights_that_are_not_cut_are_not_copied_for_an_update():
    params = weights(THREE)
    trained, frozen = steps_of(True, 0).parts(params)
    assert trained["layers"] is params["layers"] and frozen["embed"] is params["embed"]
    trained, frozen = steps_of(True, 2).parts(params)
    assert trained["final_norm"] is params["final_norm"] and frozen["embed"] is params["embed"]


def test_a_model_without_a_trained_block_is_refused():
    with pytest.raises(ValueError, match=r"model.freeze.layers is 3 and the model has 3 blocks.*at most 2"):
        check_frozen(THREE, layers=3)

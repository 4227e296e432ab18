"""Which steps a profile covers, and what it says."""

import re

import jax
import jax.numpy as jnp
import pytest

from selfemo_jax.config import Loss, Optim
from selfemo_jax.config_check import parse_steps
from selfemo_jax.config_io import load_config
from selfemo_jax.model.decoder import Compute, abstract_params
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.profiling import StepProfiler, largest_items
from selfemo_jax.train_step import make_steps
from tests.model.tiny import TINY, arrays, packed, sequences


@jax.jit
def products(x):
    return jnp.tanh(x @ x) @ x


def test_steps_are_read_in_both_spellings_and_refused_backwards():
    assert parse_steps("5") == (5, 5)
    assert parse_steps("3:5") == parse_steps("3-5") == (3, 5)
    with pytest.raises(ValueError, match="expected FIRST or FIRST:LAST"):
        parse_steps("5:3")


def test_the_short_flag_is_the_setting(tmp_path):
    config, _ = load_config(["--run_dir", str(tmp_path), "--profile_steps", "3:5"], prog="train")
    assert config.log.profile_steps == "3:5"


def test_the_named_steps_are_recorded_once(tmp_path):
    profiler, x = StepProfiler("2:3", tmp_path / "profile"), jnp.ones((64, 64))
    ended = []
    for step in range(1, 6):
        profiler.begin(step)
        ended.append(profiler.end(step, products(x)))
    assert ended == [None, None, tmp_path / "profile", None, None]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    names = [name for name, _ in largest_items(tmp_path / "profile")]
    assert names and all(not name[-1].isdigit() for name in names)


def test_a_run_that_ends_between_them_keeps_what_it_has(tmp_path):
    profiler = StepProfiler("1:9", tmp_path)
    profiler.begin(1)
    products(jnp.ones((64, 64))).block_until_ready()
    profiler.close()
    profiler.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_nothing_is_recorded_unless_asked(tmp_path):
    profiler = StepProfiler(None, tmp_path / "profile")
    profiler.begin(1)
    assert profiler.end(1) is None and not (tmp_path / "profile").exists()
    assert largest_items(tmp_path) == []


def test_a_trace_reads_like_the_code():
    steps = make_steps(
        TINY, Compute(), make_mesh({}, jax.devices()[:1]), optim=Optim(), loss=Loss(), temperature=1.0,
        logits_budget_mib=1,
    )  # fmt: skip
    batch = arrays(packed(sequences(), layout="separate", row_tokens=24).batch)
    params, _ = abstract_params(TINY)
    state, zeros = jax.eval_shape(steps.init_state, params), jax.eval_shape(steps.zeros["rl"])
    update = steps.rl_gradients.lower(
        jax.eval_shape(steps.parts, params), zeros, batch, on_policy=True
    ).as_text(debug_info=True)
    for scope in ("embed", "attention", "output_mlp", "lm_head"):
        # Within a gradient the name of a scope stands in brackets, as jvp(embed)/.
        assert re.search(rf"\b{scope}\)?/", update), scope
    assert "optimizer/" in steps.apply.lower(state, zeros, 1e-3).as_text(debug_info=True)

"""The work of a case: the same tokens in every layout, counted by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.bench.task import draw_sequences, make_task, micro_batch_rows
from selfemo_jax.model.flops import Work, forward_flops, group_work, separate_work, sequence_work, train_flops

SETTINGS = BenchSettings(model="tiny", groups=2, group_size=3, prompt=20, completion=10, row_tokens=80)


def test_every_layout_holds_the_same_targets(tmp_path):
    task = make_task(SETTINGS, tmp_path)
    sequences = draw_sequences(SETTINGS)
    wanted = sorted(token for item in sequences for token in item.completion_ids)
    for layout in SETTINGS.layouts:
        with np.load(tmp_path / f"{layout}.npz") as rows:
            mask = rows["token_weights"] != 0
            assert sorted(rows["targets"][mask].tolist()) == wanted
            assert rows["token_weights"].sum() == pytest.approx(1.0, abs=1e-5)
            assert len(rows["tokens"]) % int(rows["micro_rows"]) == 0
            assert task.works[layout].num_head == len(wanted)
    assert task.works["separate"] == task.works["packed"]
    assert task.works["shared_prefix"].num_tokens < task.works["packed"].num_tokens
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert [tuple(prompt) for prompt in prompts] == [sequences[0].prompt_ids, sequences[3].prompt_ids]
    assert task.num_tokens == sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)


def test_rates_count_what_each_phase_makes(tmp_path):
    task = make_task(SETTINGS, tmp_path)
    prompts = sum(task.prompts)
    assert task.tokens(SETTINGS, "prefill") == prompts
    assert task.tokens(SETTINGS, "rollout") == 2 * 3 * 10
    assert task.tokens(SETTINGS, "decode") == 2 * 3 * 9
    assert task.tokens(SETTINGS, "rl_step") == 3 * prompts + 60
    assert task.tokens(SETTINGS, "refresh") is None


def test_flops_of_each_phase_by_their_lengths(tmp_path):
    task, config = make_task(SETTINGS, tmp_path), SETTINGS.model_config
    rollout = sum((group_work(n, (10,) * 3) for n in task.prompts), Work())
    prefill = sum((sequence_work(n, num_head=1) for n in task.prompts), Work())
    rows = sum((separate_work(n, (10,) * 3) for n in task.prompts), Work())
    counts = {name: task.flops(SETTINGS, name, "") for name in ("prefill", "decode", "rollout")}
    assert counts["rollout"] == forward_flops(config, rollout)
    assert counts["prefill"] + counts["decode"] == pytest.approx(counts["rollout"])
    assert counts["prefill"] == forward_flops(config, prefill)
    update = task.flops(SETTINGS, "rl_update", "packed")
    assert update == train_flops(config, task.works["packed"])
    assert task.flops(SETTINGS, "logprobs", "packed") == pytest.approx(update / 3)
    shared, apart = (task.flops(SETTINGS, "rl_step", name) for name in ("shared_prefix", "separate"))
    assert shared == pytest.approx(5 * forward_flops(config, rollout))
    assert apart == pytest.approx(forward_flops(config, rollout) + 4 * forward_flops(config, rows))
    assert task.flops(SETTINGS, "refresh", "") is None


def test_micro_batches_split_over_the_devices():
    assert micro_batch_rows(BenchSettings(devices=4), 100) == 4
    assert micro_batch_rows(BenchSettings(devices=4, micro_tokens=900), 100) == 12
    assert micro_batch_rows(BenchSettings(), 100, otherwise=8) == 8


def test_a_micro_batch_is_cut_into_equal_parts_or_nothing_is_measured(tmp_path):
    make_task(replace(SETTINGS, micro_cuts=(1, SETTINGS.group_size)), tmp_path)
    with pytest.raises(ValueError, match=f"of {SETTINGS.group_size} rows on 1 devices .* leave it out"):
        make_task(replace(SETTINGS, micro_cuts=(SETTINGS.group_size + 1,)), tmp_path)

"""The comparison with torch runs, checks that both sides compute one loss, and writes what it measured."""

import json

import pytest


def test_step_comparison_runs_and_records_both_sides(tmp_path, capsys):
    pytest.importorskip("torch")
    from tools import bench_step

    out = tmp_path / "step.json"
    sizes = "--groups 2 --group_size 3 --prompt 20 --completion 10 --rounds 2 --warmup 0 --vocab_size 64"
    model = "--embed_dim 32 --num_layers 2 --num_heads 2 --head_dim 16"
    assert bench_step.main([*sizes.split(), *model.split(), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["seconds"]) == {*bench_step.OURS, *bench_step.THEIRS}
    assert all(len(taken) == 2 for taken in result["seconds"].values())
    assert max(result["first_loss"].values()) - min(result["first_loss"].values()) <= 1e-4
    name = "ours, shared prefix / torch, completion logits"
    ours, theirs = (result["seconds"][side] for side in name.split(" / "))
    ratio = [b / a for a, b in zip(ours, theirs, strict=True)]
    assert result["speedup"][name]["min"] == pytest.approx(min(ratio))
    assert {"jax", "torch", "transformers"} == set(result["versions"])
    assert name in capsys.readouterr().out

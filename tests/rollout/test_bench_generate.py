import json

from tools.bench_generate import main


def test_the_comparison_runs_and_counts_the_same_tokens_on_both_sides(tmp_path, capsys):
    sizes = {
        "prompts": 2, "num": 2, "prompt_tokens": 20, "max_tokens": 3, "rounds": 2, "vocab_size": 64,
        "embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8,
    }  # fmt: skip
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    assert main([*flags, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["tokens"].values()) == {12}
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    ratio = result["ratio"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    table = capsys.readouterr().out
    assert "JaxEngine" in table and "tokens/s" in table

"""After the first steps of its phases a run compiles nothing more; and it traces the steps it is told to."""

from selfemo_jax.profiling import largest_items
from tests import micro


def test_a_run_compiles_nothing_after_the_first_step_of_each_phase(tmp_path):
    """Random weights hardly ever write a stop token, so that all rollouts are alike: a group fits into a
    row of 288 and has 160 targets, for which the head computes 216 positions. A trained policy's rollouts go
    on varying for a while."""
    few = {
        "batch.row_tokens": 288,
        "cold_start.epochs": 1,
        "rl.steps": 5,
        "data.max_items": 96,
        "data.max_prompt": 128,
        "eval.every": 0,
    }
    words = [*micro.random_settings(), *micro.flags(few), "--profile_steps=2:3"]
    assert micro.run(tmp_path, *words) == 0
    # The trace of two steps among the others: written once, with what ran in them.
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert largest_items(tmp_path / "profile")
    by_phase: dict[str, list[float]] = {}
    for line in micro.metrics(tmp_path):
        by_phase.setdefault(line["phase"], []).append(line["compile/count"])
    assert {name: len(counts) for name, counts in by_phase.items()} == {"cold": 6, "rl_final": 5}
    for name, counts in by_phase.items():
        assert counts[0] > 0, "nothing was counted"
        # The line of the last step also tells what the scores after it compiled.
        assert not any(counts[1:-1]), (name, counts)

"""The end of a step: what is saved and timed, and what a time limit leaves in every kind of phase."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from selfemo_jax.phases import Phase
from selfemo_jax.run import TIME_LIMIT, Run
from selfemo_jax.run_resume import Stopped, stop_check
from selfemo_jax.run_weights import best_kept

OVER = f"{TIME_LIMIT} of 5 min reached"


def run_that(why: str) -> MagicMock:
    """A run whose next step ends for that reason; `timed` holds the names of its timers."""
    run = MagicMock(engine=SimpleNamespace(), global_step=7, dir="runs/x", timed=[])
    run._total = 9
    run.config.checkpoint.every = 4
    run._watch.end.return_value = {"time/step": 1.0}
    run._why_stop.return_value = why

    @contextlib.contextmanager
    def timer(name: str):
        run.timed.append(name)
        yield

    run.timer = timer
    return run


def end(run: MagicMock, kind: str, state, *, step: int) -> None:
    phase = Phase(index=2, kind=kind, name=f"{kind}_1", iteration=1, init="rl_1", buffer=("original",))
    Run._end(run, phase, step, state, {}, None)


@pytest.mark.parametrize("kind", ["labels", "sft", "rl", "harvest"])
def test_a_time_limit_saves_and_scores_in_every_phase(kind):
    run, state = run_that(OVER), None if kind == "harvest" else MagicMock()
    with pytest.raises(Stopped, match=f"{OVER} at {kind}_1 step 3; saved, go on with --resume"):
        end(run, kind, state, step=3)
    # A harvest changes no weights: those that it plays with are scored.
    params = run.weights.return_value if state is None else state.params
    run._score_final.assert_called_once_with(params, notice=f"unfinished: {OVER}")
    assert run._store.save.call_args.args[:2] == (7, state) and run.timed == ["save"]
    assert [name for name, *_ in run._store.method_calls] == ["save", "wait"]


def test_a_signal_saves_and_scores_nothing():
    run = run_that("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM at rl_1 step 3"):
        end(run, "rl", MagicMock(), step=3)
    run._score_final.assert_not_called()
    assert run._store.save.call_count == 1


def test_a_signal_ends_the_scoring_of_whole_splits():
    reasons = [""]
    check = stop_check(lambda: reasons[-1], Path("runs/x"))
    for _ in range(50):
        check()
    reasons.append("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM while whole splits are scored; .* --resume --run_dir runs/x"):
        for _ in range(16):
            check()


@pytest.mark.parametrize(("step", "saves"), [(3, 0), (4, 1), (8, 1)])
def test_a_state_is_saved_when_it_is_due(step, saves):
    run = run_that("")
    end(run, "rl", MagicMock(), step=step)
    assert run._store.save.call_count == saves == len(run.timed)


def test_the_best_policy_is_kept_only_while_its_weights_are_there(tmp_path):
    recorded = {"dev/wf1": 0.4, "global_step": 20, "phase": "rl_final"}
    assert best_kept(None, tmp_path) is None
    assert best_kept(recorded, tmp_path) is None
    for step, expected in ((20, recorded), (40, None)):
        source = {"kind": "trained", "phase": "rl_final", "global_step": step}
        (tmp_path / "certificate.json").write_text(json.dumps({"format": 1, "source": source}))
        assert best_kept(recorded, tmp_path) == expected

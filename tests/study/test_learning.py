"""The study of whether RL teaches: differences, their errors, and the whole command on a micro run."""

import json
import math

import numpy as np
import pytest

from selfemo_jax.study import learning
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.learning import rise
from tests import micro
from tests.report.folders import write_run


def test_mean_difference_and_both_errors_by_hand():
    before = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    after = np.array([[1.0, 0.5, 1.0], [0.5, 0.5, 0.5]])
    # Five such pairs of dialogues.
    before, after = np.tile(before, 5), np.tile(after, 5)
    result = rise(before, after, [f"{name}{n}" for n in range(5) for name in ("a", "a", "b")])
    # Differences: [1, 0, 0] and [0.5, 0.5, -0.5]; means 1/3 and 1/6.
    assert result.mean == pytest.approx(0.25)
    assert result.se_seeds == pytest.approx((1 / 3 - 1 / 6) / math.sqrt(2) / math.sqrt(2))
    # Averaged over seeds [0.75, 0.25, -0.25]; less the mean [0.5, 0, -0.5]; dialogue sums 0.5 and -0.5.
    assert result.se_dialogues == pytest.approx(math.sqrt(10 / 9 * 5 * (0.25 + 0.25)) / 15)
    assert result.holds is True, "0.25 > 2 x 0.111"


def test_inputs_of_one_dialogue_do_not_count_as_independent():
    before, after = np.zeros((1, 20)), np.tile([[0.3, 0.3, 0.1, 0.1]], 5)
    apart = rise(before, after, [str(n) for n in range(20)])
    together = rise(before, after, [str(n // 2) for n in range(20)])
    # 20 x .1^2 x 20 / 19 beside 10 x .2^2 x 10 / 9.
    assert together.se_dialogues / apart.se_dialogues == pytest.approx(math.sqrt(2 * (10 / 9) / (20 / 19)))


def test_one_seed_has_no_error_over_seeds_and_is_judged_by_dialogues():
    result = rise(np.zeros((1, 10)), np.full((1, 10), 0.5), list("abcdefghij"))
    assert result.se_seeds is None
    assert result.se_dialogues == 0
    assert result.holds is True


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_dialogues_say_nothing_of_a_rise(seeds):
    for roots in ("aaa", "abc"):
        result = rise(np.zeros((seeds, 3)), np.full((seeds, 3), 0.5), list(roots))
        assert result.se_dialogues is result.holds is None and result.mean == 0.5


def test_one_seed_and_few_dialogues_leave_whole_json_and_a_table_that_says_why(tmp_path, monkeypatch, capsys):
    r1 = {"roots": ["a", "b"], "before": np.array([0.1, 0.2]), "after": np.array([0.3, 0.2])}
    monkeypatch.setattr(learning, "_train", lambda run_dir, arguments: write_run(run_dir))
    monkeypatch.setattr(learning, "held_out_r1", lambda run_dir, splits: dict.fromkeys(splits, r1))
    assert main(["learning", "--seeds", "1", "--arms", "base", "--out", str(tmp_path)]) == 0

    def bare(token):
        pytest.fail(f"learning.json holds {token}, which is no JSON")

    found = json.loads((tmp_path / "learning.json").read_text(), parse_constant=bare)
    base = found["arms"]["base"]
    assert base["se_seeds"] is base["se_dialogues"] is base["holds"] is None
    assert "fewer than 10 dialogues" in capsys.readouterr().out


def test_only_test_says_whether_r1_rose_and_dev_is_said_to_be_selected_on(tmp_path, monkeypatch, capsys):
    """The reported policy is the best by dev score: by chance alone it is better there."""
    roots = [str(n) for n in range(10)]
    before, up = np.full(10, 0.25), np.full(10, 0.75)
    both = {
        "test": {"roots": roots, "before": before, "after": before},
        "dev": {"roots": roots, "before": before, "after": up},
    }
    monkeypatch.setattr(learning, "_train", lambda run_dir, arguments: write_run(run_dir))
    monkeypatch.setattr(learning, "held_out_r1", lambda run_dir, splits: both)
    assert main(["learning", "--seeds", "2", "--arms", "base", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "learning.json").read_text())
    assert found["splits"] == ["test"] and found["arms"]["base"]["holds"] is False
    assert found["arms"]["base"]["mean"] == 0 and found["dev (selected on)"]["base"]["mean"] == 0.5
    assert "holds" not in found["dev (selected on)"]["base"]
    printed = capsys.readouterr().out
    assert "greedy r1 on test (10 inputs)" in printed
    assert "on dev, which the reported policy was selected on (10 inputs)" in printed
    assert printed.count("rise") == 1


def test_a_finished_run_is_measured_on_each_split_apart():
    run = micro.base_run()
    found = learning.held_out_r1(run, ["test", "dev"])
    sizes = {split: len(values["roots"]) for split, values in found.items()}
    assert list(sizes) == ["test", "dev"] and all(sizes.values())
    for split, values in found.items():
        assert all(f"/{split}/" in root for root in values["roots"])
        assert values["before"].shape == values["after"].shape == (sizes[split],)
        assert values["before"].min() >= 0 and values["after"].max() <= 1


def test_no_change_is_no_rise():
    same = np.tile([[0.2, 0.9]], 5)
    assert rise(same, same, list("abcdefghij")).holds is False


def test_arrays_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one column an input"):
        rise(np.zeros((1, 3)), np.zeros((1, 3)), ["a", "b"])


def test_no_seed_is_refused(tmp_path, capsys):
    assert main(["learning", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds is 0" in capsys.readouterr().err


def test_settings_that_train_refuses_are_named_before_anything_is_trained(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("rl: {stepz: 3}\n")
    assert main(["learning", "--config", str(config), "--out", str(tmp_path / "runs")]) == 2
    assert "rl.steps" in capsys.readouterr().err and not (tmp_path / "runs").exists()

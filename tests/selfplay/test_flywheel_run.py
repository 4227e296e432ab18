"""The flywheel inside a run: two harvests, SFT before RL, a stop by drift and a resume; the verifier."""

import json
import re
from collections import Counter

import pytest

from selfemo_jax.selfplay.store import Store, read_store
from tests import micro

pytestmark = pytest.mark.slow


def test_two_iterations_with_a_stop_by_drift_and_a_resume(tmp_path, capsys):
    words = micro.settings(
        flywheel__iterations=2,
        flywheel__retrain__method="sft_then_grpo",
        flywheel__retrain__init="current",
        flywheel__drift__alarm=0.0,
        flywheel__drift__stop=0.0,
        flywheel__drift__least=1,
        # Whatever was asked once is left out after.
        flywheel__tau_low=1.0,
    )
    assert micro.run(tmp_path, *words) == 2
    assert "flywheel.drift.stop is 0.0" in capsys.readouterr().err
    stopped = json.loads((tmp_path / "phases" / "02_harvest_1" / "harvest.json").read_text())
    assert stopped["training"] >= 1 and not (tmp_path / "phases" / "02_harvest_1" / "DONE").exists()

    assert micro.run(tmp_path, "--resume", "--flywheel.drift.stop=null") == 0
    names = sorted(path.name for path in (tmp_path / "phases").iterdir())
    assert names == ["00_cold", "01_rl_1", "02_harvest_1", "03_sft_2", "04_rl_2", "05_harvest_2"] + [
        "06_sft_3",
        "07_rl_final",
    ]
    said = re.findall(r"(\w+): \d+ synthetic inputs taught nothing before", capsys.readouterr().out)
    assert said == ["rl_final"]
    for iteration, folder in ((1, "02_harvest_1"), (2, "05_harvest_2")):
        report = json.loads((tmp_path / "phases" / folder / "harvest.json").read_text())
        records = list(read_store(tmp_path / "flywheel.jsonl", iteration=iteration))
        reasons = Counter(record["reason"] for record in records)
        assert report["proposed"] == len(records) and report["accepted"] == reasons["accepted"]
        assert report["rejected"] == {name: n for name, n in reasons.items() if name != "accepted"}
        placed = sum(len(ids) for ids in report["places"].values())
        assert placed == report["accepted"]
        for record in records:
            assert (record["sample"] is not None) == record["accepted"]
            if record["accepted"]:
                assert record["sample"]["gold"] == record["declared"]
    assert json.loads((tmp_path / "phases" / "02_harvest_1" / "harvest.json").read_text())["alarm"]


def test_a_verifier_judges_inside_a_run(tmp_path):
    words = micro.settings(flywheel__verifier__weights="cold", rl__steps=1, eval__every=0)
    assert micro.run(tmp_path, *words) == 0
    records = list(read_store(tmp_path / "flywheel.jsonl"))
    # A policy this small agrees with few replies; what counts is that it was asked and that its word holds.
    judged = [record for record in records if "verifier" in record["select"]]
    assert judged
    for record in judged:
        kept = record["select"]["verifier"] >= 0.5
        assert kept or record["reason"] == "verifier"


def test_synthetic_inputs_change_the_first_update_after_the_harvest(tmp_path):
    assert micro.run(tmp_path, *micro.settings(flywheel__n_syn=0)) == 0
    report = json.loads((tmp_path / "phases" / "02_harvest_1" / "harvest.json").read_text())
    assert report["training"] == 0 and report["accepted"] == report["left_out"]["cap"] >= 1
    lines, without = micro.untimed(micro.full_run()), micro.untimed(tmp_path)
    # Up to the last phase nothing tells the two runs apart.
    before = [line for line in lines if line["phase"] != "rl_final"]
    assert before == without[: len(before)]
    first, other = lines[len(before)], without[len(before)]
    assert (first["phase"], first["phase_step"]) == (other["phase"], other["phase_step"]) == ("rl_final", 1)
    assert first["data/synthetic"] > 0 and other.get("data/synthetic", 0) == 0
    assert first["loss"] != other["loss"]


def test_a_run_that_somebody_writes_is_refused(tmp_path, capsys):
    with Store(tmp_path / "flywheel.jsonl"):
        assert micro.run(tmp_path, *micro.settings()) == 2
    assert "another process is writing this run" in capsys.readouterr().err

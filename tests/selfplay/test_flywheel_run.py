"""The flywheel inside a run: two harvests, each judged by a verifier, SFT before RL, a stop by drift and a
resume."""

import json
from collections import Counter

import pytest

from selfemo_jax.selfplay.store import Store, read_store
from tests import micro

pytestmark = pytest.mark.slow


def test_two_iterations_with_a_verifier_a_stop_by_drift_and_a_resume(tmp_path, capsys):
    words = micro.settings(
        flywheel__iterations=2,
        flywheel__retrain__method="sft_then_grpo",
        flywheel__retrain__init="current",
        flywheel__verifier__weights="cold",
        flywheel__verifier__tau=0.3,
        flywheel__drift__alarm=0.0,
        flywheel__drift__stop=0.0,
        flywheel__drift__least=1,
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
    for iteration, folder in ((1, "02_harvest_1"), (2, "05_harvest_2")):
        report = json.loads((tmp_path / "phases" / folder / "harvest.json").read_text())
        records = list(read_store(tmp_path / "flywheel.jsonl", iteration=iteration))
        reasons = Counter(record["reason"] for record in records)
        assert report["proposed"] == len(records) and report["accepted"] == reasons["accepted"]
        assert report["rejected"] == {name: n for name, n in reasons.items() if name != "accepted"}
        placed = sum(len(ids) for ids in report["places"].values())
        assert placed == report["accepted"]
        for record in records:
            if record["accepted"]:
                assert record["select"]["verifier"] >= 0.3
                assert record["sample"]["gold"] == record["declared"]
            elif record["reason"] == "verifier":
                assert record["sample"] is None
    assert any("verifier" in record["select"] for record in read_store(tmp_path / "flywheel.jsonl"))
    assert json.loads((tmp_path / "phases" / "02_harvest_1" / "harvest.json").read_text())["alarm"]


def test_a_run_that_somebody_writes_is_refused(tmp_path, capsys):
    with Store(tmp_path / "flywheel.jsonl"):
        assert micro.run(tmp_path, *micro.settings()) == 2
    assert "another process is writing this run" in capsys.readouterr().err

"""The flywheel inside a run: two harvests, SFT before RL, a stop by drift and a resume; the verifier."""

import json
import re
from collections import Counter

import pytest

from selfemo_jax import lengths
from selfemo_jax.selfplay.store import Store, read_store
from tests import micro


def counts_agree(run_dir, folder: str, iteration: int) -> dict:
    """The report of a harvest, which says of its reasons and places what the store holds."""
    report = json.loads((run_dir / "phases" / folder / "harvest.json").read_text())
    records = list(read_store(run_dir / "flywheel.jsonl", iteration=iteration))
    reasons = Counter(record["reason"] for record in records)
    assert report["proposed"] == len(records) and report["accepted"] == reasons["accepted"]
    assert report["rejected"] == {name: n for name, n in reasons.items() if name != "accepted"}
    placed = sum(len(ids) for ids in report["places"].values())
    assert placed == report["accepted"]
    for record in records:
        assert (record["sample"] is not None) == record["accepted"]
        if record["accepted"]:
            assert record["sample"]["gold"] == record["declared"]
    return report


def test_two_iterations_of_sft_and_rl_each_learn_from_what_was_played_before(tmp_path, monkeypatch):
    # A quarter of the time of so small a run is the drawing of lengths, which has tests of its own.
    monkeypatch.setattr(lengths, "picture", lambda content: b"")
    words = micro.settings(
        cold_start__source="none",
        data__sets="[sample/meld]",
        data__max_items=48,
        flywheel__iterations=2,
        flywheel__retrain__method="sft_then_grpo",
        flywheel__retrain__init="current",
        flywheel__dialogues_per_step=8,
        flywheel__max_inputs=6,
        flywheel__max_depth=2,
        rl__steps=1,
        loss__kl_coef=0,
        eval__every=0,
        eval__max_items=2,
    )
    assert micro.run(tmp_path, *words) == 0
    names = sorted(path.name for path in (tmp_path / "phases").iterdir())
    assert names == ["00_rl_1", "01_harvest_1", "02_sft_2", "03_rl_2", "04_harvest_2", "05_sft_3"] + [
        "06_rl_final"
    ]
    reports = [
        counts_agree(tmp_path, folder, place)
        for place, folder in enumerate(("01_harvest_1", "04_harvest_2"), start=1)
    ]
    first, second = (report["training"] for report in reports)
    assert first >= 1 and second >= 1
    # What was accepted in one iteration is not accepted again in the next.
    replies = [record["reply"] for record in read_store(tmp_path / "flywheel.jsonl", accepted=True)]
    assert len(set(replies)) == len(replies)
    lines = {line["phase"]: line for line in micro.metrics(tmp_path)}
    # SFT learns from the harvests alone, all of them; RL from originals and harvests.
    assert lines["sft_2"]["phase_step"] == -(-first // 16)
    assert lines["sft_3"]["phase_step"] == -(-(first + second) // 16)
    assert "data/synthetic" not in lines["rl_1"] or lines["rl_1"]["data/synthetic"] == 0
    for name in ("rl_2", "rl_final"):
        found = lines[name]
        assert found["data/synthetic"] >= 1 and found["data/original"] >= 1
        # Told apart, and together again the mean over all prompts.
        both = sum(found[f"reward/r1/{o}"] * found[f"data/{o}"] for o in ("original", "synthetic"))
        assert found["reward/r1"] == pytest.approx(both / 8, abs=1e-6)


@pytest.mark.slow
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
    counts_agree(tmp_path, "05_harvest_2", 2)
    assert counts_agree(tmp_path, "02_harvest_1", 1)["alarm"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_somebody_writes_is_refused(tmp_path, capsys):
    with Store(tmp_path / "flywheel.jsonl"):
        assert micro.run(tmp_path, *micro.settings()) == 2
    assert "another process is writing this run" in capsys.readouterr().err

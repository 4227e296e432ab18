"""The words of a plumbing run, in what every command that reads a run's folder prints and writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax import browse
from selfemo_jax.run_note import joined_notes, run_note
from selfemo_jax.selfplay import stats
from selfemo_jax.study import __main__ as study
from selfemo_jax.study import learning
from tests.report.folders import write_lines, write_run
from tests.selfplay.test_stats import GOOD
from tests.study.test_clusters import invented

NOTE = "plumbing run, not a result"


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "run", note=NOTE)
    places = {"places": {"training": [], "heldout": []}}
    (folder / "phases" / "02_harvest_1" / "harvest.json").write_text(json.dumps(GOOD | places))
    personas = [{"root": p.root, "speaker": p.speaker, "persona": p.sentence} for p in invented(60)[0]]
    write_lines(folder / "personas.jsonl", personas)
    return folder


def test_the_note_is_that_of_the_run_around_a_folder(run, tmp_path):
    assert run_note(run) == run_note(run / "phases" / "02_harvest_1") == NOTE
    assert run_note(tmp_path) == ""
    assert joined_notes([NOTE, "", f"the run goes on; {NOTE}"]) == f"{NOTE}; the run goes on"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (browse.main, ["RUN"]),
        (browse.main, ["RUN", "--step", "first", "--against", "last"]),
        (stats.main, ["RUN", "--least=50"]),
        (study.main, ["clusters", "--personas", "RUN/personas.jsonl", "--min-cluster-size", "8"]),
    ],
)
def test_every_command_prints_the_note_of_a_plumbing_run(run, capsys, main, words):
    assert main([word.replace("RUN", str(run)) for word in words]) == 0
    out = capsys.readouterr().out
    tables = out.count("┏")
    assert out.count(NOTE) == tables > 0
    (run / "config.yaml").write_text("note: ''\n")
    assert main([word.replace("RUN", str(run)) for word in words]) == 0
    assert NOTE not in capsys.readouterr().out


def test_json_carries_the_note(run, capsys):
    assert browse.main([str(run), "--json"]) == 0
    assert {json.loads(line)["note"] for line in capsys.readouterr().out.splitlines()} == {NOTE}
    assert stats.main([str(run), "--json", "--least=50"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == NOTE
    words = ["clusters", "--personas", str(run / "personas.jsonl"), "--min-cluster-size", "8"]
    assert study.main([*words, "--out", str(run / "study")]) == 0
    assert json.loads((run / "study" / "clusters.json").read_text())["note"] == NOTE


def test_the_study_of_learning_carries_the_note_of_its_runs(tmp_path, monkeypatch, capsys):
    r1 = {"roots": ["a", "b"], "before": np.array([0.1, 0.2]), "after": np.array([0.3, 0.2])}
    both = {"test": r1, "dev": r1}
    monkeypatch.setattr(learning, "_train", lambda run_dir, arguments: write_run(run_dir, note=NOTE))
    monkeypatch.setattr(learning, "held_out_r1", lambda run_dir, splits: both)
    assert study.main(["learning", "--seeds", "2", "--arms", "base", "--out", str(tmp_path)]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if "greedy r1" in line]
    assert len(titles) == 2 and all(title.endswith(f" - {NOTE}") for title in titles)
    assert json.loads((tmp_path / "learning.json").read_text())["note"] == NOTE

"""The command on confusions: what it prints and writes, and what it says of runs that have none."""

import json

from selfemo_jax.study.__main__ import main
from tests.report.folders import NOTE, write_changes, write_phase, write_run


def test_a_pair_that_grew_is_named_and_written(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    write_changes(run)
    assert main(["confusions", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "alarm: tiny, cold to rl_1: anger read as joy 2 -> 9 (7 came, 0 went, Holm's p 0.0156)" in printed
    assert NOTE in printed
    found = json.loads((run / "study" / "confusions.json").read_text())
    assert found["note"] == NOTE and found["alarms"].startswith("alarm: tiny")
    assert [row["alarm"] for row in found["pairs"]] == [True, False]
    # Seven angry answers became joy, and one of the two back.
    (flow,) = found["flows"]
    assert (flow["out of"], flow["into"], flow["moved"], flow["back"]) == ("anger", "joy", 8, 0)
    (matrix,) = found["matrices"]
    assert (matrix["before"], matrix["after"]) == ([[0, 1, 1], [2, 8, 0]], [[1, 0, 1], [9, 1, 0]])
    assert (run / "study" / "confusions.png").stat().st_size > 1000


def test_nothing_grew_and_chosen_phases(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for name in ("00_cold", "01_rl_1", "03_rl_final"):
        write_phase(run, name, [("joy", "joy"), ("anger", "joy" if name == "00_cold" else "anger")])
    assert main(["confusions", str(run), "--phases", "cold", "rl_final"]) == 0
    assert "no confusion grew more than by chance" in capsys.readouterr().out
    rows = json.loads((run / "study" / "confusions.json").read_text())["pairs"]
    assert [(row["from"], row["to"], row["went"]) for row in rows] == [("cold", "rl_final", 1)]


def test_mistakes_are_named(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["confusions", str(run)]) == 2
    assert "dev_predictions.jsonl, a change needs two" in capsys.readouterr().err
    write_changes(run)
    assert main(["confusions", str(run), "--phases", "rl_9"]) == 2
    assert "has cold, rl_1" in capsys.readouterr().err
    with (run / "phases" / "00_cold" / "dev_predictions.jsonl").open("a") as file:
        file.write("{broken\n")
    assert main(["confusions", str(run)]) == 2
    assert "1 damaged line" in capsys.readouterr().err

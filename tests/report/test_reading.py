"""What a report reads from a run's folder, worked out by hand."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from selfemo_jax import report
from selfemo_jax.reporting import curves, dialogues, rollouts, runs, scores, studies
from selfemo_jax.reporting.compare import comparisons, seed_groups
from tests.report.folders import (
    HOSTILE,
    LABELS,
    flywheel,
    predictions,
    write_clusters,
    write_lines,
    write_run,
)


def read(folder, **limits):
    return runs.read_run(folder, label="run", **({"most_rollouts": 1000, "most_dialogues": 100} | limits))


def test_curves_tell_a_share_of_zero_from_a_metric_that_was_not_logged(tmp_path):
    found = read(write_run(tmp_path)).summary["curves"]
    assert found["steps"] == [1, 2, 3, 4, 5, 6]
    assert found["series"]["parse/E_PAIR"] == [None, 0.5, 0.0, 0.0, 0.0, None]
    assert found["series"]["reward/r1"] == [None, 0.2, 0.3, 0.4, 0.5, None]
    assert "reward/lambda" not in found["series"], "a metric that was never finite"


def test_thinned_curves_keep_sparse_metrics_and_never_mix_phases():
    lines = [{"step": s, "phase": "a" if s <= 5 else "b", "kl": float(s)} for s in range(1, 12)]
    lines[6]["dev/wf1"] = 0.5
    found = curves.columns(lines, most=4)
    assert found["steps"] == [3, 5, 8, 11]
    assert found["series"]["kl"] == [2.0, 4.5, 7.0, 10.0]
    assert found["series"]["dev/wf1"] == [None, None, 0.5, None]


def test_time_that_no_timer_saw_is_shown_as_such(tmp_path):
    cold, rl, harvest = read(write_run(tmp_path)).summary["times"]
    assert (cold["phase"], cold["steps"], cold["seconds"], cold["tokens"]) == ("cold", 1, 3.0, 10)
    assert cold["parts"] == {"update": 2.0, "other": 1.0}
    assert rl["parts"] == {"rollout": 6.0, "other": 2.0} and rl["tokens"] == 80
    assert harvest["seconds"] == 1.0


def test_the_card_names_commit_hardware_data_tokens_and_time(tmp_path):
    text = json.dumps(read(write_run(tmp_path)).summary["card"])
    for part in (
        "f00df00d",
        "1 x cpu",
        "abc123",
        '"tokens trained on", "90"',
        '"wall time of steps", "12 s"',
        '"peak memory of a device", "2.00 GiB"',
        '"peak memory of the process", "1.50 GiB"',
    ):
        assert part in text
    assert runs.read_run(tmp_path, label="x", most_rollouts=1, most_dialogues=1).summary["settings"][
        "optim.lr"
    ]


def test_a_group_is_never_cut_by_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "BLOCK_ROWS", 4)
    files = rollouts.step_files(write_run(tmp_path, steps=3, prompts=3, group_size=3))
    found = list(rollouts.blocks(files, 0, []))
    assert [len(block["rows"]["idx"]) for block in found] == [6, 6, 6, 6, 3]
    for block in found:
        assert block["rows"]["group"] == [place // 3 for place in range(len(block["rows"]["idx"]))]
        assert [turn[0] for history in block["groups"]["history"] for turn in history[:1]] == ["Ada"] * (
            len(block["rows"]["idx"]) // 3
        )
    steps = [step for block in found for step in block["groups"]["step"]]
    assert steps == [2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_an_answer_outside_the_grammar_has_no_label(tmp_path):
    (block,) = rollouts.blocks(rollouts.step_files(write_run(tmp_path, steps=1, prompts=1)), 0, [])
    # All three name a label in their emotion field; the third is malformed.
    assert (block["rows"]["valid"], block["rows"]["predicted"]) == ([1, 1, 0], ["joy", "anger", ""])


def test_too_many_rollouts_are_thinned_by_steps_evenly_and_said(tmp_path):
    folder = write_run(tmp_path, steps=10, prompts=2, group_size=5)
    files, total = rollouts.choose_steps(rollouts.step_files(folder), most=50)
    assert total == 100
    assert [path.stem for path in files] == [f"step_{step:06d}" for step in (3, 5, 7, 9, 11)]
    notices = read(folder, most_rollouts=50).notices
    assert any("of 100 rollouts only 5 evenly spaced steps" in notice for notice in notices)


def test_a_dialogue_is_its_context_its_accepted_turns_and_its_rejected_end():
    (found,), number = dialogues.conversations(flywheel(""), most=10)
    assert number == 1, "a dialogue whose first reply was rejected is none"
    assert found["context"] == [("Ada", "Who left the gate open?")]
    assert [(turn["speaker"], turn["text"].strip()) for turn in found["turns"]] == [
        ("Bo", "First reply."),
        ("Ada", "Second reply."),
    ]
    assert list(found["turns"][0]["declared"].items()) == [("anger", 0.6), ("joy", 0.3)]
    assert found["turns"][0]["recognised"] == {"anger": 0.9}
    assert (found["ending"]["text"], found["ending"]["reason"]) == ("Third reply.", "near_duplicate")


def test_a_store_without_declared_emotions_takes_them_from_the_child():
    records = [{k: v for k, v in r.items() if k not in ("declared", "emotion")} for r in flywheel("")]
    (found,), _ = dialogues.conversations(records, most=10)
    assert found["turns"][1]["declared"] == {"anger": 0.6, "joy": 0.3}


def test_many_dialogues_are_chosen_evenly():
    records = []
    for place in range(10):
        (first, *_) = flywheel("")
        records.append(first | {"parent_id": str(place), "sample": first["sample"] | {"id": f"{place}+1"}})
    found, number = dialogues.conversations(records, most=5)
    assert number == 10 and [one["id"] for one in found] == ["0+1", "2+1", "4+1", "6+1", "8+1"]


@pytest.mark.parametrize("seed", range(5))
def test_weighted_f1_of_confusions_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    labels = ["a", "b", "c"]
    lines = [
        {"id": f"s/test/{random.integers(9)}/{i}", "gold": labels[random.integers(3)],
         "prediction": [*labels, None, "other"][random.integers(5)]}
        for i in range(60)
    ]  # fmt: skip
    gold, predicted = ([str(line[key]) for line in lines] for key in ("gold", "prediction"))
    expected = f1_score(gold, predicted, labels=labels, average="weighted", zero_division=0)
    confusion = scores.count(lines, labels).confusion
    assert scores.weighted_f1(confusion.sum(0)) == pytest.approx(expected, abs=1e-12)
    assert scores.accuracy(confusion.sum(0)) == pytest.approx(np.mean(np.array(gold) == predicted))


def test_the_interval_of_a_score_contains_it_and_resamples_dialogues(tmp_path):
    (row,) = read(write_run(tmp_path, right=(1, 1, 0, 0, 1, 1, 0, 1) * 3)).summary["scores"]
    low, high = row["intervals"]["accuracy"]
    assert low <= row["accuracy"] == 0.625 <= high
    # Dialogues with accuracies 1, 0, 1, .5, each three times: their variance is .1719, so that the mean of
    # twelve has a deviation of .1197; of 24 utterances it would be .0988.
    assert high - low == pytest.approx(2 * 1.96 * 0.1197, abs=0.03)
    confusion = scores.count(predictions((1, 1, 0, 0)), LABELS).confusion
    (draws,) = scores.resampled([confusion], num=500)
    assert set(scores.accuracy(draws)) == {0.0, 0.5, 1.0}, "utterances of a dialogue come together"


def test_predictions_that_are_not_those_of_the_scores_get_no_interval(tmp_path):
    folder = write_run(tmp_path)
    path = folder / "eval" / "test_predictions.jsonl"
    path.write_text(path.read_text().replace('"prediction": null', '"prediction": "anger"'))
    found = read(folder)
    assert found.summary["scores"][0]["intervals"] == {}
    assert any("not those of its scores" in notice for notice in found.notices)


def test_a_comparison_is_paired_and_holm_corrected():
    sides = ([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    few = scores.compare(*map(predictions, sides), LABELS)
    assert (few["dialogues"], few["interval"], few["p_bootstrap"]) == (5, None, None)
    # Two-sided exact: 2 (C(7,0) + C(7,1)) / 2^7.
    assert few["p_mcnemar"] == pytest.approx(2 * 8 / 128)
    found = scores.compare(*(predictions(side * 2) for side in sides), LABELS)
    assert found["num"] == 20 and found["dialogues"] == 10
    assert (found["won"], found["lost"]) == (12, 2)
    assert found["p_mcnemar"] == pytest.approx(2 * (1 + 14 + 91) / 2**14, abs=1e-5)
    assert found["difference"] == pytest.approx(found["weighted_f1"][1] - found["weighted_f1"][0], abs=1e-4)
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert scores.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert scores.holm([0.5, 0.9]) == [1.0, 1.0]
    assert scores.holm([0.04, None, 0.01]) == [pytest.approx(0.04), None, pytest.approx(0.02)]


def test_equal_runs_differ_by_nothing():
    same = predictions([1, 0, 1, 1] * 5)
    found = scores.compare(same, same, LABELS)
    assert found["difference"] == 0.0 and found["p_mcnemar"] == 1.0 and found["p_bootstrap"] == 1.0
    assert scores.compare(same, [], LABELS) is None


def test_seeds_are_runs_that_differ_in_the_seed_alone(tmp_path):
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    folders.append(write_run(tmp_path / "c", seed=2, right=(0, 0, 0, 0)))
    config = folders[2] / "config.yaml"
    config.write_text(config.read_text().replace("0.001", "0.5"))
    found = [read(folder) for folder in folders]
    (row,) = seed_groups(found)
    assert row["runs"] == [0, 1] and row["accuracy"] == [0.75, 0.0, 2]
    assert [(line["first"], line["second"]) for line in comparisons(found)] == [(0, 1), (0, 2)]


def test_damaged_and_missing_files_become_notices(tmp_path):
    folder = write_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')
    (folder / "eval" / "final.json").unlink()
    (folder / "env.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    found = read(folder)
    text = " ".join(found.notices)
    for part in ("metrics.jsonl: 1 damaged line", "no final scores", "env.json cannot", "config.yaml cannot"):
        assert part in text
    assert found.summary["curves"]["steps"][-1] == 6


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl; expected the folder of a run"):
        read(tmp_path)


def test_names_of_runs_are_short_and_different(tmp_path):
    assert runs.labels_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert runs.labels_of([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert len(set(runs.labels_of([tmp_path, tmp_path]))) == 2


def test_studies_become_tables_by_their_shape(tmp_path):
    path = tmp_path / "clusters.json"
    rows = [
        {"cluster": HOSTILE, "n": 3, "mean": 0.4, "low": 0.3, "high": 0.5},
        {"cluster": "b", "n": 2, "mean": 0.1},
    ]
    path.write_text(json.dumps({"note": "of a test", "clusters": rows, "noise": 0.2}))
    values, table = studies.tables(path, [])
    assert table["kind"] == "clusters" and table["interval"] == ["mean", "low", "high"]
    assert table["note"] == "of a test" and table["rows"][1] == ["b", 2, 0.1, None, None]
    assert values["rows"] == [["noise", 0.2]]
    arms = tmp_path / "arms.json"
    arms.write_text(json.dumps({"full": {"f1": 0.5, "p_value": 0.01}, "none": {"f1": 0.4, "p_value": 0.2}}))
    (table,) = studies.tables(arms, [])
    assert table["kind"] == "significance" and table["columns"] == ["name", "f1", "p_value"]
    drawn = tmp_path / "curves.json"
    drawn.write_text(json.dumps({"curves": [{"last": 1.0}], "points": [{"step": 1, "value": 0.5}] * 300}))
    assert [table["title"] for table in studies.tables(drawn, [])] == ["curves / curves"]
    (tmp_path / "bad.json").write_text("no")
    notices: list[str] = []
    assert studies.tables(tmp_path / "bad.json", notices) == [] and "bad.json cannot be read" in notices[0]


def test_persona_clusters_of_a_run_are_a_map_and_a_table(tmp_path):
    folder = write_run(tmp_path)
    assert read(folder).summary["personas"] is None
    write_clusters(folder, "Calm.")
    found = read(folder).summary["personas"]
    assert found["num"] == 4 and found["names"] == {0: "kind_0", 1: "kind_1"}
    assert found["points"][3] == [0.5, 0.5, -1, "Calm."]
    (path,) = studies.run_studies(folder)
    values, table = studies.tables(path, [], of="tiny")
    assert table["source"] == "tiny: clusters.json" and table["rows"][0] == [0, "kind_0", 2]


def test_parts_of_a_set_are_scored_beside_it_and_not_compared(tmp_path):
    folder = write_run(tmp_path)
    path = folder / "eval" / "final.json"
    final = json.loads(path.read_text())
    tiny = final["splits"]["test"]["sets"]["tiny"]
    tiny["parts"] = {"shared": tiny | {"num": 1}, "clean": tiny | {"num": 3}}
    path.write_text(json.dumps(final))
    found = read(folder)
    assert [(row["set"], row["part"], row["num"]) for row in found.summary["scores"]] == [
        ("tiny", "", 4),
        ("tiny", "shared", 1),
        ("tiny", "clean", 3),
    ]
    assert len(comparisons([found, found])) == 1


def test_each_score_has_its_yardsticks_readings_and_calibration(tmp_path):
    (row,) = read(write_run(tmp_path)).summary["scores"]
    assert list(row["yardsticks"]) == ["majority", "stratified random", "TF-IDF + LR"]
    assert row["yardsticks"]["TF-IDF + LR"] == [0.55, 0.5], "weighted F1, accuracy"
    assert row["readings"] == {"lenient": 0.875, "instructerc": 0.625}
    assert (row["calibration"]["ece"], row["samples"]) == (0.4, None)


def test_samples_of_a_later_evaluation_join_the_scores_that_the_run_ended_with(tmp_path):
    folder = write_run(tmp_path)
    result = json.loads((folder / "eval" / "final.json").read_text())["splits"]["test"]
    both = {"weighted_f1": 0.5, "accuracy": 0.25}
    drawn = {"n": 8, "mean": both, "sd": both, "maj": {**both, "weighted_f1": 0.75}, "any": 1.0, "votes": {}}
    later = folder / "eval" / "test.json"
    later.write_text(json.dumps(result | {"samples": {"tiny": drawn}}))
    (row,) = read(folder).summary["scores"]
    assert (row["samples"]["n"], row["samples"]["maj"]["weighted_f1"]) == (8, 0.75)
    assert row["weighted_f1"] == pytest.approx(result["sets"]["tiny"]["weighted_f1"], abs=1e-4)
    # Another policy was evaluated into the same folder: nothing of it may stand beside the run's scores.
    other = {"tiny": result["sets"]["tiny"] | {"accuracy": 0.1}}
    later.write_text(json.dumps(result | {"sets": other, "samples": {"tiny": drawn}}))
    assert read(folder).summary["scores"][0]["samples"] is None


def test_samples_stand_beside_the_part_that_they_are_of(tmp_path):
    folder = write_run(tmp_path)
    path = folder / "eval" / "final.json"
    final = json.loads(path.read_text())
    result = final["splits"]["test"]
    tiny = result["sets"]["tiny"]
    tiny["parts"] = {"shared": tiny | {"num": 1}, "clean": tiny | {"num": 3}}

    def drawn(wf1):
        both = {"weighted_f1": wf1, "accuracy": 0.25}
        return {"n": 8, "mean": both, "sd": both, "maj": both, "any": 1.0, "votes": {}}

    result["samples"] = {"tiny": drawn(0.5) | {"parts": {"shared": drawn(0.75)}}}
    path.write_text(json.dumps(final))
    rows = {row["part"]: row["samples"] for row in read(folder).summary["scores"]}
    assert (rows[""]["maj"]["weighted_f1"], rows["shared"]["maj"]["weighted_f1"]) == (0.5, 0.75)
    assert rows["clean"] is None
    # Evaluations that told no parts of their samples.
    del result["samples"]["tiny"]["parts"]
    path.write_text(json.dumps(final))
    whole, *of_parts = read(folder).summary["scores"]
    assert whole["samples"]["n"] == 8 and [row["samples"] for row in of_parts] == [None, None]


def test_runs_are_compared_on_the_parts_that_their_answers_tell(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", right=(1, 1, 1, 1))]
    for folder in folders:
        path = folder / "eval" / "test_predictions.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        parts = ("shared", "shared", "clean", "clean")
        write_lines(path, [line | {"part": part} for line, part in zip(lines, parts, strict=True)])
        path = folder / "eval" / "final.json"
        final = json.loads(path.read_text())
        tiny = final["splits"]["test"]["sets"]["tiny"]
        share = 0.5 if folder.name == "a" else 1.0
        tiny["parts"] = {
            "shared": tiny | {"num": 2, "accuracy": share},
            "clean": tiny | {"num": 2, "accuracy": 1.0},
        }
        yardsticks = final["splits"]["test"]["yardsticks"]["tiny"]
        yardsticks["majority"]["parts"] = {"shared": {"weighted_f1": 0.2, "accuracy": 0.1}}
        path.write_text(json.dumps(final))
    found = [read(folder) for folder in folders]
    # The first run misses the second of two shared inputs: one dialogue, which has no interval.
    shared = next(row for row in found[0].summary["scores"] if row["part"] == "shared")
    assert shared["intervals"] == {} and found[0].notices == []
    assert shared["yardsticks"] == {"majority": [0.2, 0.1]}
    rows = comparisons(found)
    assert [(row["part"], row["num"], row["won"]) for row in rows] == [
        ("", 4, 1),
        ("shared", 2, 1),
        ("clean", 2, 0),
    ]
    assert [row.get("p_mcnemar_holm") for row in rows[1:]] == [None, None], "the family is of whole sets"
    assert rows[0]["p_mcnemar_holm"] == rows[0]["p_mcnemar"]


def test_a_run_is_never_lost_to_its_report(tmp_path, monkeypatch):
    said: list[str] = []
    report.report_at_end(tmp_path / "none", said.append)
    assert said[0].startswith("notice: no report was written: ValueError")
    report.report_at_end(write_run(tmp_path), said.append)
    assert said[1].startswith(f"report: {tmp_path / 'report.html'} (")

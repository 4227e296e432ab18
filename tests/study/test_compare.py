"""Comparing runs: pairs by input, families of tests, and mistakes that would compare unlike things."""

import json

import pytest

from selfemo_jax.reporting import studies
from selfemo_jax.study.__main__ import main
from selfemo_jax.study.reading import read_predictions, short_names
from tests.study.invented import NOTE, evaluated, predictions

RIGHT, WRONG, SILENT = ("joy", "joy"), ("joy", "fear"), ("joy", None)


def meld(turns, dialogues=10):
    return predictions("meld", {f"d{place}": turns for place in range(dialogues)})


def compared(tmp_path, *runs, words=()):
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out"), "--samples", "200", *words]) == 0
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_a_clear_difference_is_found_and_every_output_says_what_it_is(tmp_path, capsys):
    runs = (
        evaluated(tmp_path / "a", meld([RIGHT, WRONG, SILENT])),
        evaluated(tmp_path / "b", meld([RIGHT, RIGHT, SILENT])),
    )
    found = compared(tmp_path, *runs)
    first, second = found["scores"]
    assert (first["run"], first["n"], first["dialogues"]) == ("a", 30, 10)
    assert (first["accuracy"], second["accuracy"]) == (
        pytest.approx(100 / 3, abs=1e-3),
        pytest.approx(66.6667),
    )
    (test,) = found["significance"]
    assert (test["won"], test["lost"]) == (10, 0)
    assert test["p_mcnemar"] == pytest.approx(2 / 2**10) == test["p_mcnemar_holm"]
    assert test["difference accuracy"] == pytest.approx(100 / 3, abs=1e-3)
    # All dialogues are alike, so that no draw of them differs.
    assert test["difference accuracy ci"] == [pytest.approx(100 / 3, abs=1e-3)] * 2
    printed = capsys.readouterr().out
    assert NOTE in printed and found["note"] == NOTE
    assert found["remark"] == "" and "fewer than" not in printed
    assert NOTE in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000


def test_few_dialogues_have_no_interval_and_no_p_and_it_is_said(tmp_path, capsys):
    """Every draw of one dialogue is the same: an interval of no width, and p = 2 / 5001."""
    both = [*meld([RIGHT, WRONG]), *predictions("emo", {"d0": [WRONG, WRONG, RIGHT]})]
    better = [line | {"prediction": line["gold"]} for line in both]
    found = compared(tmp_path, evaluated(tmp_path / "a", both), evaluated(tmp_path / "b", better))
    scores = {(row["run"], row["set"]): row for row in found["scores"]}
    assert scores["a", "emo"]["accuracy"] == pytest.approx(33.3333)
    assert scores["a", "emo"]["accuracy ci"] is scores["a", "mean of sets"]["weighted_f1 ci"] is None
    assert scores["a", "meld"]["accuracy ci"] is not None
    emo, meld_, mean = found["significance"]
    for row in (emo, mean):
        assert row["difference w-F1 ci"] is row["difference accuracy ci"] is row["p_bootstrap"] is None
    # Holm's family of the bootstrap is the one test that has a p; McNemar's are two.
    assert emo["p_bootstrap_holm"] is None and meld_["p_bootstrap_holm"] == meld_["p_bootstrap"] < 0.05
    assert meld_["p_mcnemar_holm"] == pytest.approx(2 * meld_["p_mcnemar"])
    printed = capsys.readouterr().out
    assert "33.33 [-]" in printed and found["remark"] in printed
    assert found["remark"].startswith("-: fewer than 10 dialogues")
    assert found["remark"] in (tmp_path / "out" / "compare.md").read_text()
    _, significance = studies.tables(tmp_path / "out" / "compare.json", [])[1:]
    assert significance["rows"][0][significance["columns"].index("p_bootstrap")] is None


def test_the_report_reads_the_tables(tmp_path):
    runs = [evaluated(tmp_path / name, meld([RIGHT, WRONG])) for name in "ab"]
    compared(tmp_path, *runs)
    tables = studies.tables(tmp_path / "out" / "compare.json", [])
    assert {table["kind"] for table in tables} >= {"significance"}


def test_parts_of_a_set_are_compared_with_their_like_and_outside_the_family(tmp_path):
    def told(turns, first):
        lines = meld(turns, dialogues=4)
        return [line | {"part": "shared" if "/d0/" in line["id"] else first} for line in lines]

    runs = (
        evaluated(tmp_path / "a", told([WRONG, WRONG], "clean")),
        evaluated(tmp_path / "b", told([RIGHT, WRONG], "clean")),
    )
    found = compared(tmp_path, *runs)
    rows = {(row["run"], row["set"]): row for row in found["scores"]}
    assert list(rows) == [("a", "meld"), ("b", "meld"), ("a", "meld, clean"), ("a", "meld, shared"),
                          ("b", "meld, clean"), ("b", "meld, shared")]  # fmt: skip
    assert [rows["b", name]["n"] for name in ("meld", "meld, shared", "meld, clean")] == [8, 2, 6]
    assert rows["b", "meld, clean"]["accuracy"] == 50.0
    whole, clean, shared = found["significance"]
    assert (whole["set"], clean["set"], shared["set"]) == ("meld", "meld, clean", "meld, shared")
    assert (shared["won"], clean["won"]) == (1, 3)
    assert whole["p_mcnemar_holm"] == whole["p_mcnemar"], "one test alone is a family of one"
    assert shared["p_mcnemar_holm"] is None and clean["p_bootstrap_holm"] is None
    # A system whose lines tell no parts, or one part only, is compared on whole sets.
    third = evaluated(tmp_path / "c", told([RIGHT, WRONG], "shared"))
    assert [row["set"] for row in compared(tmp_path, runs[0], third)["significance"]] == ["meld"]


def test_holm_counts_sets_and_runs_but_not_the_row_over_all_sets(tmp_path):
    both = [
        *predictions("meld", {f"d{place}": [RIGHT, WRONG] for place in range(4)}),
        *predictions("emo", {f"d{place}": [RIGHT] for place in range(4)}),
    ]
    other = [line | {"prediction": line["gold"]} for line in both]
    runs = [
        evaluated(tmp_path / "a", both),
        evaluated(tmp_path / "b", other),
        evaluated(tmp_path / "c", both),
    ]
    rows = compared(tmp_path, *runs)["significance"]
    assert [(row["run"], row["set"]) for row in rows] == [
        (run, name) for run in "bc" for name in ("emo", "meld", "mean of sets")
    ]
    family = [row for row in rows if row["set"] != "mean of sets"]
    smallest = min(family, key=lambda row: row["p_mcnemar"])
    assert smallest["p_mcnemar"] == pytest.approx(2 / 2**4)
    assert smallest["p_mcnemar_holm"] == pytest.approx(4 * 2 / 2**4)
    assert all(row["p_mcnemar_holm"] is None for row in rows if row["set"] == "mean of sets")


def test_only_common_inputs_are_paired_and_the_lenient_reading_can_be_asked_for(tmp_path):
    first = evaluated(tmp_path / "a", meld([SILENT, RIGHT], dialogues=6))
    second = evaluated(tmp_path / "b", meld([RIGHT, RIGHT], dialogues=4))
    strict = compared(tmp_path, first, second)
    assert strict["significance"][0]["n"] == 8 and strict["significance"][0]["won"] == 4
    lenient = compared(tmp_path, first, second, words=["--lenient"])
    assert lenient["reading"] == "lenient" and lenient["significance"][0]["won"] == 0


def fails(capsys, *words) -> str:
    assert main(["compare", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_mistakes_are_named(tmp_path, capsys):
    run = evaluated(tmp_path / "a", meld([RIGHT]))
    assert "name two or more" in fails(capsys, run)
    assert "selfemo_jax.evaluate" in fails(capsys, run, tmp_path / "none")
    assert "dev_predictions.jsonl" in fails(capsys, run, run, "--split", "dev")
    assert "2 runs" in fails(capsys, run, run, "--names", "one")
    other = evaluated(tmp_path / "b", predictions("meld", {"d0": [("fear", "joy")]}))
    assert "different data" in fails(capsys, run, other)
    apart = evaluated(tmp_path / "c", predictions("meld", {"elsewhere": [RIGHT]}))
    assert "no input in common" in fails(capsys, run, apart)


def of_dev(folder, lines):
    """Predictions for dev; the scores of dev and of test beside them list different labels."""
    folder.mkdir()
    path = folder / "dev_predictions.jsonl"
    changed = [line | {"id": line["id"].replace("/test/", "/dev/")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    for split, label in (("dev", "anger"), ("test", "surprise")):
        sets = {"meld": {"per_class": {"joy": {}, "fear": {}, label: {}}}}
        (folder / f"{split}.json").write_text(json.dumps({"note": f"scores of {split}", "sets": sets}))
    return path


def test_a_file_is_of_the_split_that_its_name_or_its_ids_say(tmp_path, capsys):
    files = [of_dev(tmp_path / name, meld([RIGHT, WRONG])) for name in "ab"]
    found = compared(tmp_path, *files)
    assert found["split"] == "dev" and found["note"] == "scores of dev"
    assert "dev, strict: scores in percent" in capsys.readouterr().out
    assert read_predictions(files[0], split=None, name="a").labels["meld"] == ("joy", "fear", "anger")
    renamed = files[0].rename(tmp_path / "a" / "mine.jsonl")
    assert compared(tmp_path, renamed, files[1], words=["--split", "dev"])["split"] == "dev"
    said = fails(capsys, renamed, files[1], "--split", "test")
    assert f"{renamed} holds answers to the dev split, but test was asked for" in said
    # A folder is read for test, unless --split says otherwise.
    run = evaluated(tmp_path / "run", meld([RIGHT, WRONG]))
    assert "answered the dev split and run the test split" in fails(capsys, run, files[1])
    renamed.write_text(json.dumps(meld([RIGHT])[0] | {"id": "elsewhere/0"}) + "\n")
    assert "neither its name nor the ids" in fails(capsys, renamed, files[1])


def test_damaged_predictions_are_named_by_file_and_line(tmp_path):
    folder = evaluated(tmp_path / "a", meld([RIGHT], dialogues=2))
    path = folder / "eval" / "test_predictions.jsonl"
    lines = path.read_text()
    path.write_text(lines + lines)
    with pytest.raises(ValueError, match="a second time"):
        read_predictions(folder, split="test", name="a")
    path.write_text(lines + "{cut")
    with pytest.raises(ValueError, match="jsonl:3"):
        read_predictions(folder, split="test", name="a")
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="record 1 lacks"):
        read_predictions(folder, split="test", name="a")
    for key in ("prediction", "part"):
        path.write_text(json.dumps(meld([RIGHT])[0] | {key: ["joy"]}) + "\n")
        with pytest.raises(
            ValueError, match=rf"jsonl: record 1 has {key} \['joy'\]; expected a word or null"
        ):
            read_predictions(folder, split="test", name="a")
    path.write_text(lines)
    for text in ("{cut", "[]", '{"sets": {"meld": []}}'):
        (folder / "eval" / "test.json").write_text(text)
        with pytest.raises(ValueError, match=r"test\.json: not the scores of an evaluation"):
            read_predictions(folder, split="test", name="a")


def test_predictions_that_are_not_those_of_the_final_scores_are_refused(tmp_path, capsys):
    """An evaluation under other settings has written over them: they are no answers of the run as it is."""
    runs = [evaluated(tmp_path / name, meld([RIGHT, WRONG])) for name in "ab"]
    other = evaluated(tmp_path / "other", meld([RIGHT, RIGHT]))
    written = runs[1] / "eval" / "test_predictions.jsonl"
    written.write_text((other / "eval" / "test_predictions.jsonl").read_text())
    said = fails(capsys, *runs)
    assert str(written) in said and "100.00 %, and 50.00 % in final.json" in said
    assert "another evaluation" in said
    # Named itself, the file is what is asked for.
    assert compared(tmp_path, runs[0], written)["scores"][1]["accuracy"] == 100.0
    # A set less, and a set more.
    more = [*meld([RIGHT, WRONG]), *predictions("emo", {"d0": [RIGHT]})]
    written.write_text("".join(json.dumps(line) + "\n" for line in more))
    assert "accuracy on emo is 100.00 %, and none in final.json" in fails(capsys, *runs)
    # Of a split that the run did not score there are no final scores.
    dev = [{**line, "id": line["id"].replace("test", "dev")} for line in meld([RIGHT])]
    (runs[0] / "eval" / "dev_predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dev))
    assert read_predictions(runs[0], split="dev", name="a").sets
    (runs[0] / "eval" / "final.json").write_text("{}")
    assert "it is damaged" in fails(capsys, *runs)


def test_names_are_as_short_as_tells_runs_apart(tmp_path):
    assert short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]

"""The judge: blind, in both orders, with ties as they are told, and people's sheets that come back whole."""

import csv
import json
from collections import Counter

import pytest

from selfemo_jax.study.__main__ import main
from selfemo_jax.study.judge import (
    Judged,
    agreement_rows,
    check_once,
    outcome_of,
    recognition_rows,
    result_rows,
    sheet_names,
    wilson,
)
from selfemo_jax.study.judge_prompt import TASKS, question, read_verdict
from selfemo_jax.study.judge_sheet import export_sheet, key_of, read_sheet
from tests.experts.chat_server import requests, serving

A, B, TIE = "answer_A better than answer_B", "answer_B better than answer_A", "tie"


def answer(response: str, **changes) -> dict:
    emotions = {"emotion": {"joy": 1.0}, "self_emotion": {"joy": 0.6, "fear": 0.2}}
    return {
        "valid": True,
        "codes": [],
        "think": "",
        "response": response,
        "r1": 0.5,
        "text": "",
        **emotions,
        **changes,
    }


def pair(number: int, first: str, second: str, **changes) -> dict:
    return {
        "id": f"s/test/d{number}/1",
        "dataset": "s",
        "history": [["Ana", "We lost\nthe key."], ["Ben", "=Again?"]],
        "target_speaker": "Ben",
        "responder": "Ana",
        "persona": "Ana is patient.",
        "gold": {"joy": 1.0},
        "first": answer(first),
        "second": answer(second),
        "note": "plumbing run, not a result",
    } | changes


def pairs_file(tmp_path, pairs):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return path


def test_a_question_tells_nothing_of_who_answered_and_swaps_only_the_candidates():
    one = pair(1, "SIDE-ONE speaks.", "SIDE-TWO speaks.")
    for task in TASKS:
        plain, swapped = (question(one, task, first_is_a=order, ties=True) for order in (True, False))
        for asked in (plain, swapped):
            words = f"{asked.system} {asked.user}".lower()
            assert not any(word in words for word in ("before", "after", "checkpoint", "policy", "s/test/d1"))
        back = swapped.user.replace("SIDE-ONE", "X").replace("SIDE-TWO", "SIDE-ONE").replace("X", "SIDE-TWO")
        assert back == plain.user
        assert plain.user.index("SIDE-ONE") < plain.user.index("SIDE-TWO")
        assert ("feels: joy 0.60, fear 0.20" in plain.user) == task.with_emotions
        assert "1. Ana: We lost the key." in plain.user and "Ana is patient." in plain.user
    assert "\ntie" not in question(one, TASKS[0], first_is_a=True, ties=False).user


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (f"1. x\n5. y\n{A}", "A"),
        (f"long\n\n**{B}**\n", "B"),
        (f"{A}\nNo, after all: {B}", None),
        ("Tie.", "tie"),
        ("answer_A is better than answer_B", None),
        (f"{A} and {B}", None),
        (f"> `{A}`.", "A"),
        ("", None),
        ("...", None),
    ],
)
def test_only_an_exact_last_line_is_a_verdict(text, verdict):
    assert read_verdict(text, ties=True) == verdict


def test_a_tie_is_no_verdict_where_ties_are_off():
    assert read_verdict("tie", ties=False) is None
    assert read_verdict(A, ties=False) == "A"


def test_only_a_side_preferred_in_both_orders_wins():
    assert outcome_of("A", "B") == "first"
    assert outcome_of("B", "A") == "second"
    # The same place twice is the place's doing.
    assert outcome_of("A", "A") == outcome_of("B", "B") == "tie"
    assert outcome_of("A", "tie") == outcome_of("tie", "tie") == "tie"
    assert outcome_of("A", None) is None


def judged(judge, outcomes, task="expression"):
    swapped = {"first": ("A", "B"), "second": ("B", "A"), "tie": ("A", "A"), None: (None, "A")}
    return [
        Judged(judge=judge, task=task, pair=str(place), verdicts=swapped[outcome], outcome=outcome)
        for place, outcome in enumerate(outcomes)
    ]


def test_shares_signs_and_consistency_by_hand():
    (row,) = result_rows(judged("one", ["second"] * 5 + ["first", "tie", "tie", None]))
    assert (row["n"], row["unread"], row["second wins"], row["tie"]) == (8, 1, 62.5, 25.0)
    # Of 6 decided pairs 5: 2 (6 + 1) / 64.
    assert row["p_sign"] == pytest.approx(14 / 64) == row["p_sign_holm"]
    assert row["orders agree"] == 75.0
    # Place A: once in each decided pair, twice in each of the two others, of 16 verdicts.
    assert row["place A preferred"] == pytest.approx(100 * 10 / 16)
    # Wilson (1927) for 5 of 8 with z = 1.959964.
    assert row["second wins ci"] == [pytest.approx(30.57, abs=0.01), pytest.approx(86.32, abs=0.01)]
    assert wilson(0, 0) is None


def test_the_gain_in_r1_is_held_against_the_outcome():
    pairs = [
        {"id": str(place), "first": answer("x", r1=0.5), "second": answer("y", r1=0.5 + gain)}
        for place, gain in enumerate((0.5, 0.25, 0.0, -0.25))
    ]
    (row,) = recognition_rows(judged("one", ["second", "tie", "tie", "first"]), pairs)
    # Ranks 4 3 2 1 and 4 2.5 2.5 1: 4.5 / sqrt(5 * 4.5). Of 24 orders 2 are as far up, and 2 as far down.
    assert row["n"] == 4 and row["spearman"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert row["p"] == pytest.approx(4 / 24)
    (row,) = recognition_rows(judged("one", ["second", None, "second"]), pairs)
    assert (row["n"], row["spearman"]) == (2, None)
    del pairs[0]["first"]["r1"]
    assert recognition_rows(judged("one", ["second"]), pairs) == []


def test_kappa_by_hand():
    one = judged("one", ["second", "second", "first", "tie", None])
    other = judged("two", ["second", "first", "first", "tie", "tie"])
    (row,) = agreement_rows([*one, *other])
    # 3 of 4 equal; by chance (2 x 1 + 1 x 2 + 1 x 1) / 16.
    assert (row["n"], row["equal"]) == (4, 75.0)
    assert row["kappa"] == pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))
    same = [judged(name, ["tie", "tie"]) for name in ("one", "two")]
    assert agreement_rows([*same[0], *same[1]])[0]["kappa"] is None


def test_ties_without_a_question_are_no_agreement_and_no_point_of_a_correlation():
    automatic = [
        Judged(judge=judge, task="expression", pair=str(n), verdicts=(None, None), outcome="tie", asked=False)
        for judge in ("one", "two")
        for n in range(4, 20)
    ]
    one = judged("one", ["second", "second", "first", "tie"])
    other = judged("two", ["second", "first", "first", "tie"])
    (row,) = agreement_rows([*one, *other, *automatic])
    assert (row["n"], row["equal"], row["kappa"]) == (4, 75.0, pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16)))
    assert agreement_rows(automatic) == []
    pairs = [{"id": str(n), "first": {"r1": 0.5}, "second": {"r1": 0.5 + n}} for n in range(20)]
    assert [row["n"] for row in recognition_rows([*one, *other, *automatic], pairs)] == [4, 4]
    assert result_rows([*one, *automatic[:16]])[0]["n"] == 20, "the shares are of all pairs"


def test_two_judges_are_asked_in_both_orders_once_and_the_table_is_theirs(tmp_path, capsys):
    pairs = [pair(n, f"bad words {n}", f"good words {n}") for n in range(3)]
    pairs.append(pair(3, "same", "same"))
    pairs.append(pair(4, "", "good words") | {"first": answer("", valid=False)})
    path = pairs_file(tmp_path, pairs)
    feels = "feels: joy 0.60, fear 0.20\\n"
    prefers_good = [
        [f'Candidate {place}\\n{emotions}says: \\"good', line]
        for place, line in (("A", A), ("B", B))
        for emotions in ("", feels)
    ]
    (tmp_path / "fair.json").write_text(json.dumps(prefers_good))
    (tmp_path / "lazy.json").write_text(json.dumps([["bad words 0", "I cannot say."], ["Candidate", A]]))
    logs = {name: tmp_path / f"{name}.log" for name in ("fair", "lazy")}
    with (
        serving(logs["fair"], "--answers", str(tmp_path / "fair.json")) as fair,
        serving(logs["lazy"], "--answers", str(tmp_path / "lazy.json")) as lazy,
    ):
        config = tmp_path / "judges.yaml"
        endpoints = [
            {"name": name, "base_url": url, "model": name} for name, url in (("fair", fair), ("lazy", lazy))
        ]
        config.write_text(json.dumps({"expert": {"endpoints": endpoints, "temperature": 0}}))
        words = ["judge", "--pairs", str(path), "--config", str(config), "--out", str(tmp_path / "out")]
        assert main(words) == 0
        counts = {name: len(requests(log)) for name, log in logs.items()}
        # 3 pairs x 2 tasks x 2 orders; what could not be read is asked once more, the equal pair never.
        assert counts == {"fair": 12, "lazy": 12 + 4}
        assert main(words) == 0
        assert {name: len(requests(log)) for name, log in logs.items()} == counts
    found = json.loads((tmp_path / "out" / "judge.json").read_text())
    rows = {(row["judge"], row["task"]): row for row in found["judges"]}
    for task in ("understanding", "expression"):
        assert rows["fair", task]["second wins"] == 75.0 and rows["fair", task]["tie"] == 25.0
        assert rows["fair", task]["orders agree"] == 100.0 and rows["fair", task]["place A preferred"] == 50.0
        assert (rows["lazy", task]["n"], rows["lazy", task]["unread"]) == (3, 1)
        assert rows["lazy", task]["tie"] == 100.0 and rows["lazy", task]["place A preferred"] == 100.0
    assert (found["without reply: first"], found["without reply: second"]) == (1, 0)
    assert [(row["judges"], row["n"]) for row in found["agreement"]] == [("fair and lazy", 2)] * 2
    assert [row["n"] for row in found["recognition"]] == [3, 3, 2, 2]
    assert found["ties without a question: expression"] == 1
    printed = capsys.readouterr().out
    assert "plumbing run, not a result" in printed and "without a readable reply: first 1" in printed
    assert "ties without a question, both answers being equal, of 4 pairs: 1 in understanding" in printed
    assert (tmp_path / "out" / "judge.png").stat().st_size > 1000


def filled(sheet, change=lambda row: None, verdict="A"):
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["verdict"] = verdict
        change(row)
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_is_blind_seeded_and_comes_back(tmp_path):
    pairs = [pair(n, f"old {n}", f"new {n}") for n in range(20)]
    sheets = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for sheet, seed in zip(sheets, (1, 1, 2), strict=True):
        assert export_sheet(sheet, pairs, seed=seed) == 40
    texts = [sheet.read_text() for sheet in sheets]
    assert texts[0] == texts[1] != texts[2]
    assert "first" not in texts[0] and "s/test/" not in texts[0]
    key = json.loads(key_of(sheets[0]).read_text())["items"]
    assert 10 <= Counter(item["A"] for item in key.values())["first"] <= 30
    filled(sheets[0], verdict=" a ")
    found = read_sheet(sheets[0])
    assert len(found) == 40
    assert all(found[item["id"], item["task"]] == item["A"] for item in key.values())
    with pytest.raises(ValueError, match="verdicts in it would be lost"):
        export_sheet(sheets[0], pairs, seed=1)


def test_what_a_spreadsheet_program_changes_is_no_change_and_cells_are_no_formulas(tmp_path):
    sheet = tmp_path / "sheet.csv"
    export_sheet(sheet, [pair(1, "old", "new", history=[["=SUM(A1)", "hi"]], responder="+Ana")], seed=0)
    assert "'=SUM(A1): hi" in sheet.read_text() and ",'+Ana" in sheet.read_text()

    def program(row):
        row["item"] = row["item"].lstrip("0")
        row["conversation"] = row["conversation"].removeprefix("'").replace("\n", "\r\n")
        row["person"] = row["person"].removeprefix("'")

    filled(sheet, program, verdict="Tie")
    assert set(read_sheet(sheet).values()) == {"tie"}


def test_a_sheet_with_mistakes_is_refused_with_all_of_them(tmp_path):
    sheet = tmp_path / "sheet.csv"
    pairs = [pair(n, f"old {n}", f"new {n}") for n in range(3)]
    export_sheet(sheet, pairs, seed=0)
    with pytest.raises(ValueError, match="item 0001: the verdict is empty"):
        read_sheet(sheet)

    def spoil(row):
        if row["item"] == "0001":
            row["candidate_A"] += " and more"
        if row["item"] == "0002":
            row["verdict"] = "both"
        if row["item"] == "0003":
            row["item"] = "0004"

    filled(sheet, spoil)
    with pytest.raises(ValueError) as caught:
        read_sheet(sheet)
    for words in (
        "item 0001: what was to be judged has changed",
        "'both'",
        "item 0004 occurs twice",
        "item 0003 is missing",
    ):
        assert words in str(caught.value)
    for text in ("{cut", "[]", '{"items": {"0001": {"id": "x"}}}'):
        key_of(sheet).write_text(text)
        with pytest.raises(ValueError, match=r"sheet_key\.json: .* damaged\. Put back a copy"):
            read_sheet(sheet)
    key_of(sheet).unlink()
    with pytest.raises(ValueError, match="lay beside the sheet"):
        read_sheet(sheet)


def test_a_person_is_one_judge_more(tmp_path, capsys):
    pairs = [pair(n, f"old {n}", f"new {n}") for n in range(4)]
    path, sheet = pairs_file(tmp_path, pairs), tmp_path / "ann.csv"
    assert main(["judge", "--pairs", str(path), "--export-sheet", str(sheet), "--sheet-items", "6"]) == 0
    filled(sheet)
    assert main(["judge", "--pairs", str(path), "--sheets", str(sheet)]) == 0
    rows = json.loads((tmp_path / "judge.json").read_text())["judges"]
    assert sum(row["n"] for row in rows) == 6 and {row["judge"] for row in rows} == {"ann"}
    assert all(row["orders agree"] is None for row in rows)
    others = pairs_file(tmp_path, [pair(9, "x", "y")])
    assert main(["judge", "--pairs", str(others), "--sheets", str(sheet)]) == 2
    assert "not among these pairs" in capsys.readouterr().err


def test_two_people_whose_sheets_have_one_name_are_two_judges(tmp_path, capsys):
    same = pair(4, "same", "same")
    path = pairs_file(tmp_path, [*(pair(n, f"old {n}", f"new {n}") for n in range(4)), same])
    sheets = [tmp_path / who / "sheet.csv" for who in ("an1", "an2")]
    for sheet, verdict in zip(sheets, ("A", "tie"), strict=True):
        sheet.parent.mkdir()
        assert main(["judge", "--pairs", str(path), "--export-sheet", str(sheet)]) == 0
        filled(sheet, verdict=verdict)
    words = ["judge", "--pairs", str(path), "--sheets", *map(str, sheets)]
    assert main(words) == 0
    found = json.loads((tmp_path / "judge.json").read_text())
    assert {(row["judge"], row["n"]) for row in found["judges"]} == {("an1/sheet", 5), ("an2/sheet", 5)}
    assert [row["judges"] for row in found["agreement"]] == ["an1/sheet and an2/sheet"] * 2
    assert all((row["n"], row["equal"]) == (4, 0.0) for row in found["agreement"])
    assert sheet_names([tmp_path / "ann.csv"], {"ann"}) == {tmp_path / "ann.csv": "ann (sheet)"}
    assert main([*words, str(sheets[0])]) == 2
    assert "a sheet is named twice" in capsys.readouterr().err
    # The same questions twice, by way of the pairs, of the key, or of two judges with one name.
    path.write_text(path.read_text() * 2)
    assert main(words) == 2
    assert "record 6 answers s/test/d0/1 a second time" in capsys.readouterr().err
    key = json.loads(key_of(sheets[0]).read_text())
    one, other = (name for name, item in key["items"].items() if item["id"] == "s/test/d0/1")
    key["items"][other] |= {"task": key["items"][one]["task"]}
    key_of(sheets[0]).write_text(json.dumps(key))
    with pytest.raises(ValueError, match="of s/test/d0/1 a second time"):
        read_sheet(sheets[0])
    with pytest.raises(ValueError, match="judge one answers twice on expression of 0"):
        check_once([*judged("one", ["tie"]), *judged("one", ["first"])])


def test_it_is_said_where_judges_read_nothing_of_the_person(tmp_path, capsys):
    pairs = [pair(n, "old", "new", **({} if n else {"persona": None})) for n in range(3)]
    path, sheet = pairs_file(tmp_path, pairs), tmp_path / "ann.csv"
    assert main(["judge", "--pairs", str(path), "--export-sheet", str(sheet)]) == 0
    filled(sheet)
    words = ["judge", "--pairs", str(path), "--sheets", str(sheet)]
    assert main(words) == 0
    assert "judges read who the person is in 2 of 3 pairs" in capsys.readouterr().out
    assert json.loads((tmp_path / "judge.json").read_text())["pairs with a persona"] == 2
    path.write_text("".join(json.dumps(one | {"persona": "Ana is patient."}) + "\n" for one in pairs))
    assert main(words) == 0
    assert "who the person is" not in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, capsys):
    path = pairs_file(tmp_path, [pair(1, "a", "b")])
    assert main(["judge"]) == 2
    assert "two checkpoints" in capsys.readouterr().err
    assert main(["judge", "--pairs", str(path)]) == 2
    assert "no judge" in capsys.readouterr().err
    (tmp_path / "none.yaml").write_text("expert: {}\n")
    assert main(["judge", "--pairs", str(path), "--config", str(tmp_path / "none.yaml")]) == 2
    assert "expert.endpoints is empty" in capsys.readouterr().err
    path.write_text('{"id": "x"}\n')
    assert main(["judge", "--pairs", str(path)]) == 2
    assert "record 1 lacks" in capsys.readouterr().err

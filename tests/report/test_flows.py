"""Confusions from phase to phase: counts, exact tests, the corrected family and the alarm, by hand."""

import pytest

from selfemo_jax.reporting.flows import (
    PhaseAnswers,
    changes,
    label_lists,
    phase_answers,
    steps_between,
)
from tests.report.folders import write_changes, write_phase, write_run

ORDER = {"tiny": ("joy", "anger", "fear")}


def answered(phase: str, **sets) -> PhaseAnswers:
    return PhaseAnswers(
        phase=phase,
        answers={
            name: {f"{name}/{place}": pair for place, pair in enumerate(pairs)}
            for name, pairs in sets.items()
        },
    )


def rows(found: list, kind: str, *keys: str) -> dict[tuple[str, str], tuple]:
    names = ("gold", "read as") if kind == "pairs" else ("out of", "into")
    return {
        (row[names[0]], row[names[1]]): tuple(row[key] for key in keys) for one in found for row in one[kind]
    }


def test_a_confusion_that_grew_is_an_alarm_with_its_counts():
    before = answered("rl_1", tiny=[("anger", "anger")] * 8 + [("anger", "joy")] * 2 + [("joy", None)])
    after = answered("rl_final", tiny=[("anger", "anger")] + [("anger", "joy")] * 9 + [("joy", "fear")])
    (one,) = found = changes(before, after, ORDER)
    assert (one["from"], one["to"], one["inputs"]) == ("rl_1", "rl_final", 11)
    assert one["before"] == [[0, 0, 0, 1], [2, 8, 0, 0], [0, 0, 0, 0]]
    assert one["after"] == [[0, 0, 1, 0], [9, 1, 0, 0], [0, 0, 0, 0]]
    # Seven came and none went: 2 / 2^7; one change alone says nothing and is not in the family.
    counted = rows(found, "pairs", "before", "after", "came", "went", "p_holm", "alarm")
    assert counted["anger", "joy"] == (2, 9, 7, 0, pytest.approx(2 / 128), True)
    assert counted["joy", "fear"] == (0, 1, 1, 0, None, False)
    assert ("anger", "fear") not in counted
    assert rows(found, "flows", "moved", "back", "p") == {("anger", "joy"): (7, 0, pytest.approx(2 / 128))}


def test_answers_that_came_and_went_alike_and_errors_that_fell_are_none():
    gold = [("anger", "joy")] * 6 + [("anger", "anger")] * 6
    swapped = answered("b", tiny=gold[6:] + gold[:6])
    found = changes(answered("a", tiny=gold), swapped, ORDER)
    assert rows(found, "pairs", "came", "went", "p", "alarm") == {("anger", "joy"): (6, 6, 1.0, False)}
    fell = changes(answered("a", tiny=gold), answered("b", tiny=[("anger", "anger")] * 12), ORDER)
    assert rows(fell, "pairs", "went", "p_holm", "alarm") == {("anger", "joy"): (6, 2 / 64, False)}


def test_one_correction_is_over_the_pairs_of_all_sets():
    names = {"one": 8, "two": 7, "three": 6}
    before = answered("a", **{name: [("anger", "anger")] * number for name, number in names.items()})
    after = answered("b", **{name: [("anger", "joy")] * number for name, number in names.items()})
    found = changes(before, after, dict.fromkeys(names, ("joy", "anger")))
    # 2/256, 2/128 and 2/64 times 3, 2 and 1; the largest so far counts.
    corrected = [row["p_holm"] for one in found for row in one["pairs"]]
    assert corrected == pytest.approx([6 / 256, 4 / 128, 2 / 64])
    assert all(row["alarm"] for one in found for row in one["pairs"])
    four = {f"set{place}": ("joy", "anger") for place in range(2)}
    before = answered("a", **{name: [("anger", "anger")] * 6 for name in four})
    after = answered("b", **{name: [("anger", "joy")] * 6 for name in four})
    rows_of_two = [row for one in changes(before, after, four) for row in one["pairs"]]
    assert [row["p_holm"] for row in rows_of_two] == [4 / 64, 4 / 64] and not rows_of_two[0]["alarm"]


def test_only_inputs_that_both_answered_are_compared():
    before, after = answered("a", tiny=[("joy", "joy")] * 3), answered("b", tiny=[("joy", "joy")] * 2)
    assert changes(before, after, ORDER)[0]["inputs"] == 2
    assert changes(before, answered("b", other=[("joy", "joy")]), ORDER | {"other": ("joy",)}) == []


def test_phases_follow_each_other_and_the_rounds_are_told_from_first_to_last():
    names = ["cold", "rl_1", "rl_2", "rl_final"]
    found = [(a.phase, b.phase) for a, b in steps_between([answered(name) for name in names])]
    assert found == [("cold", "rl_1"), ("rl_1", "rl_2"), ("rl_2", "rl_final"), ("rl_1", "rl_final")]
    assert len(steps_between([answered(name) for name in names[:3]])) == 2


def test_only_finished_phases_are_read_and_labels_are_in_the_order_of_the_scores(tmp_path):
    run = write_run(tmp_path / "run")
    write_changes(run)
    write_phase(run, "02_rl_final", [("joy", "joy")])
    (run / "phases" / "02_rl_final" / "DONE").unlink()
    found = phase_answers(run, notices := [])
    assert [one.phase for one in found] == ["cold", "rl_1"] and notices == []
    assert label_lists(run, found, notices) == {"tiny": ["joy", "anger"]}
    write_phase(run, "00_cold", [("fear", "glee")], dataset="own")
    assert label_lists(run, phase_answers(run, notices), notices)["own"] == ["fear", "glee"]

"""The paper's rows are copied right: the means that it prints are those of the numbers here."""

import pytest

from selfemo_jax.evaluation.published import AVERAGES, ROWS, rows_for


def test_the_printed_means_of_the_unified_rows_are_those_of_their_numbers():
    unified = [row for row in ROWS if row.group == "unified"]
    assert {row.name for row in unified} == set(AVERAGES)
    for row in unified:
        for place, printed in enumerate(AVERAGES[row.name]):
            mean = sum(scores[place] for scores in row.scores) / 3
            assert mean == pytest.approx(printed, abs=0.011), row.name


def test_two_systems_of_one_set_each_have_means_too():
    by_name = {row.name: row for row in ROWS}
    for name, printed in (("DialogueRNN", 50.49), ("COSMIC", 56.20), ("DAG-ERC", 56.89)):
        assert sum(wf1 for _, wf1 in by_name[name].scores) / 3 == pytest.approx(printed, abs=0.011)


def test_only_the_papers_sets_have_rows():
    assert rows_for(["sample_meld"]) == ()
    assert len(rows_for(["meld"])) == len([row for row in ROWS if any(row.of("meld"))])
    assert "PRC-Emo (Qwen2.5/3)" not in {row.name for row in rows_for(["emorynlp"])}
    assert len(ROWS) == 22

"""The paper's rows are copied right: the means that it prints are those of the numbers here."""

import pytest

from selfemo_jax.evaluation.published import ROWS, rows_for


def test_the_printed_means_are_those_of_the_numbers():
    unified = [row for row in ROWS if row.group == "unified"]
    assert len(unified) == 8 and all(None not in row.average for row in unified)
    assert {row.name for row in ROWS if row.average[1] and row not in unified} == {
        "DialogueRNN", "COSMIC", "DAG-ERC"
    }  # fmt: skip
    for row in ROWS:
        for place, printed in enumerate(row.average):
            if printed is not None:
                mean = sum(scores[place] for scores in row.scores) / 3
                assert mean == pytest.approx(printed, abs=0.011), row.name


def test_only_the_papers_sets_have_rows():
    assert rows_for(["sample_meld"]) == ()
    assert len(rows_for(["meld"])) == len([row for row in ROWS if any(row.of("meld"))])
    assert "PRC-Emo (Qwen2.5/3)" not in {row.name for row in rows_for(["emorynlp"])}
    assert len(ROWS) == 22

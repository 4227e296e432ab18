"""The tables of an evaluation as they are printed."""

import pytest

from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, LabelSet
from selfemo_jax.data.grammar import parse
from selfemo_jax.evaluation.samples import score_samples
from selfemo_jax.evaluation.tables import print_all, speed_words
from selfemo_jax.scores import Prediction, prediction_of, score
from tests.fabricated import run_data, sample, settings, text

SPEED = {"inputs_per_s": 1.0, "unasked": 0, "completion_tokens": 1, "latency": None}


def predictions(labels: LabelSet, right: int, *, of: int = 4) -> list[Prediction]:
    """So many answers of which the first `right` are; the first half lies in dialogue 1."""
    gold, wrong = labels.labels[0], labels.labels[1]
    found = []
    for number in range(of):
        one = sample(number, labels=labels, dialogue=str(1 + 2 * number // of), gold={gold: 1.0})
        said = text([(gold if number < right else wrong, 1.0)])
        answer = parse(said, inventory=labels.labels)
        found.append(
            prediction_of(
                one, said, answer, settings(), finished=True, num_prompt_tokens=1, num_tokens=1, seconds=None
            )
        )
    return found


@pytest.fixture
def shown(capsys):
    """Rows of the last table: first cell -> the others."""

    def show(right: dict[LabelSet, int], *, parts=None, yardsticks=None) -> dict[str, list[str]]:
        data = run_data({labels.name: () for labels in right})
        answers = [p for labels, number in right.items() for p in predictions(labels, number)]
        scored = score(
            answers,
            data.label_sets,
            {labels.name: labels.labels[0] for labels in right},
            parts or {p.sample.root_id: "clean" for p in answers},
        )
        result = {"note": "", "sets": scored, "speed": SPEED, "yardsticks": yardsticks}
        capsys.readouterr()
        print_all("test", result, data)
        lines = capsys.readouterr().out.split("side by side")[1].splitlines()
        cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if "│" in line]
        return {first: rest for first, *rest in cells}

    return show


def test_the_mean_over_the_papers_sets_stands_beside_its_printed_means(shown):
    rows = shown({MELD: 1, EMORYNLP: 2, IEMOCAP: 4})
    # Accuracies 1/4, 2/4, 4/4; of the one gold label F1 is 2 hits by (gold + named): 2/5, 4/6, 1.
    assert rows["this policy"][-2:] == ["58.33", "68.89"]
    assert rows["unified: SELF-EMO (Qwen3-8B)"][-2:] == ["61.97", "60.91"]
    assert rows["traditional: COSMIC"][-2:] == ["-", "56.20"]
    # One system is printed twice: trained for each set, and as one model of all.
    assert rows["llm: BiosERC (LLaMA2-13B)"][-2:] == ["-", "-"]
    assert rows["unified: BiosERC (LLaMA2-13B)"][-2:] == ["36.83", "36.99"]


def test_a_mean_is_of_all_three_sets_or_none(shown):
    rows = shown({MELD: 1, EMORYNLP: 2})
    assert rows["this policy"] == ["25.00", "40.00", "50.00", "66.67", "-", "-"]


def test_parts_of_the_policy_stand_beside_those_of_the_yardsticks(shown):
    half = {"accuracy": 0.5, "weighted_f1": 0.25}
    yardsticks = {"meld": {"majority": {**half, "parts": {"shared": half, "clean": half}}}}
    parts = {"meld/train/1": "shared", "meld/train/2": "clean"}
    rows = shown({MELD: 3}, parts=parts, yardsticks=yardsticks)
    # The rows of both systems have the same names: those shown here are of the last one, the majority.
    assert rows["shared"][:2] == rows["clean"][:2] == rows["majority"][:2] == ["50.00", "25.00"]
    rows = shown({MELD: 3}, parts=parts)
    assert rows["this policy"][0] == "75.00"
    assert (rows["shared"][0], rows["clean"][0]) == ("100.00", "50.00")


def test_sampled_answers_are_told_by_part_too(capsys):
    answers = predictions(MELD, 3)
    parts = {"meld/train/1": "shared", "meld/train/2": "clean"}
    drawn = score_samples([(answer,) for answer in answers], {"meld": MELD}, parts)
    print_all("test", {"note": "", "sets": {}, "samples": drawn}, run_data({"meld": ()}))
    lines = capsys.readouterr().out.split("side by side")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if "│" in line]
    # Name, n and mean accuracy: of four answers the first three are right, the first two lie in dialogue 1.
    assert [row[:3] for row in cells] == [
        ["meld", "1", "75.00"],
        ["shared", "1", "100.00"],
        ["clean", "1", "50.00"],
    ]


def test_time_in_a_batch_is_not_called_latency_and_cached_answers_have_no_rate():
    latency = {"p50": 1.5, "p95": 4.0, "n": 3, "of": "batch"}
    assert speed_words(SPEED | {"latency": latency}) == (
        "1.00 inputs/s, 1 tokens, time in batch p50 1.50 s, p95 4.00 s (n=3)"
    )
    speed = SPEED | {"unasked": 2, "latency": latency | {"of": "request"}}
    assert speed_words(speed) == (
        "1.00 inputs/s (2 more were not asked now), 1 tokens, latency p50 1.50 s, p95 4.00 s (n=3)"
    )
    assert speed_words(SPEED | {"inputs_per_s": None, "unasked": 5}) == "nothing asked now, 1 tokens"

"""Yardsticks by hand on a few lines, and on the real test splits."""

import numpy as np
import pytest

from selfemo_jax.config import Config, DataSection
from selfemo_jax.data.dialogues import MELD
from selfemo_jax.evaluation.yardsticks import NAMES, learn, of_set, yardsticks
from selfemo_jax.run_data import load_data
from tests.fabricated import sample

HAPPY, CROSS = "we won the cup", "leave me alone"


def asked(*lines: tuple[str, str, str]):
    return [
        sample(n, gold={gold: 1.0}, root_id=root, history=(("Ada", "Well."), ("Bo", text)))
        for n, (root, text, gold) in enumerate(lines)
    ]


def test_the_linear_model_reads_words_and_the_majority_does_not():
    learned = ([HAPPY, f"{HAPPY} today", CROSS, f"{CROSS} now", f"oh {CROSS}"], ["joy"] * 2 + ["anger"] * 3)
    inputs = asked(("a", HAPPY, "joy"), ("a", CROSS, "anger"), ("b", HAPPY, "joy"), ("b", "hm", "fear"))
    found = of_set(learn(*learned, MELD), inputs, {"a": "shared", "b": "clean"}, seed=0)
    assert tuple(found) == NAMES
    assert found["majority"]["accuracy"] == 0.25
    # anger: 1 hit of 4 answers and 1 gold, F1 2/5, weighted by 1 of 4.
    assert found["majority"]["weighted_f1"] == pytest.approx(0.1)
    assert found["TF-IDF + LR"]["accuracy"] == 0.75
    assert found["TF-IDF + LR"]["parts"]["shared"]["accuracy"] == 1.0
    assert found["TF-IDF + LR"]["parts"]["clean"]["accuracy"] == 0.5
    # Drawn with shares .4 and .6: the expected accuracy is (.4 + .6 + .4) / 4.
    assert found["stratified random"]["accuracy"] == pytest.approx(0.35, abs=0.15)


def test_a_draw_is_the_same_for_the_same_seed_and_ties_go_to_the_first_label_of_the_list():
    learned = ([HAPPY, CROSS], ["joy", "anger"])
    inputs = asked(*[("a", HAPPY, label) for label in ("joy", "anger")] * 10)
    known = learn(*learned, MELD)
    first, again, other = (of_set(known, inputs, {}, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["stratified random"] != other["stratified random"]
    assert first["majority"]["weighted_f1"] == pytest.approx(1 / 3) and first["majority"]["parts"] == {}


def test_they_learn_from_training_dialogues_alone():
    data = load_data(Config(data=DataSection(sets=["sample"])))
    both = yardsticks(data, ["test", "dev"])
    found = both["dev"]
    assert found == yardsticks(data, ["dev"])["dev"] and set(both) == {"test", "dev"}
    assert set(found) == set(data.label_sets)
    for name, scores in found.items():
        majority = np.mean(
            [max(s.gold, key=s.gold.get) == data.majority[name] for s in data.evaluation["dev"][name]]
        )
        assert scores["majority"]["accuracy"] == pytest.approx(float(majority))


@pytest.mark.slow
def test_real_test_splits_have_the_known_yardsticks(selfemo_data):
    """Measured before by other code (60.88 / 54.64 and 37.80 / 30.53): majority to the digit; the linear
    model to the few utterances that the choice of its tokens moves."""
    data = load_data(Config(data=DataSection(sets=["meld", "emorynlp"], root=str(selfemo_data))))
    found = yardsticks(data, ["test"])["test"]
    percent = {
        name: {key: round(100 * value["accuracy"], 2) for key, value in scores.items()}
        for name, scores in found.items()
    }
    wf1 = {
        name: {key: round(100 * value["weighted_f1"], 2) for key, value in scores.items()}
        for name, scores in found.items()
    }
    assert (percent["meld"]["majority"], wf1["meld"]["majority"]) == (48.12, 31.27)
    assert (percent["emorynlp"]["majority"], wf1["emorynlp"]["majority"]) == (29.27, 13.25)
    assert percent["meld"]["TF-IDF + LR"] == pytest.approx(60.88, abs=0.2)
    assert wf1["meld"]["TF-IDF + LR"] == pytest.approx(54.64, abs=0.06)
    assert percent["emorynlp"]["TF-IDF + LR"] == pytest.approx(37.80, abs=0.06)
    assert wf1["emorynlp"]["TF-IDF + LR"] == pytest.approx(30.53, abs=0.06)
    assert 25 < percent["meld"]["stratified random"] < 33

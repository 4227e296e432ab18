"""Watch on the labels of self-play: divergences by hand, the report of a harvest, alarm and stop."""

from dataclasses import replace

import numpy as np
import pytest

from selfemo_jax.selfplay.drift import (
    DriftError,
    check_drift,
    distinct,
    divergence,
    harvest_report,
    largest_ratio,
    mean_divergence,
    reply_statistics,
)
from selfemo_jax.selfplay.selection import Selection, choose, label_shares
from tests.fabricated import sample, settings, synthetic

HUMAN = {"meld": {"joy": 0.5, "fear": 0.5}}


def test_divergence_is_zero_for_equal_one_for_disjoint_and_known_between():
    assert divergence({"joy": 3, "fear": 1}, {"joy": 0.75, "fear": 0.25}) == pytest.approx(0.0, abs=1e-9)
    assert divergence({"joy": 1.0}, {"fear": 1.0}) == pytest.approx(1.0)
    # p = (1, 0), q = (1/2, 1/2), mean (3/4, 1/4): (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2.
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + 1) / 2) / 2
    assert divergence({"joy": 1.0}, {"joy": 0.5, "fear": 0.5}) == pytest.approx(expected)
    assert divergence({"joy": 0.5, "fear": 0.5}, {"joy": 1.0}) == pytest.approx(expected)
    assert divergence({}, {"joy": 1.0}) == 0.0


def declared(label: str, number: int, *, dataset_root: str = "d"):
    parent = sample(number, dialogue=f"{dataset_root}{number}", gold={"joy": 1.0})
    reply = f"We row {number} miles and then {number} more."
    return replace(
        synthetic(parent, iteration=1),
        gold={label: 0.5},
        history=(*parent.history, ("Cy", reply)),
        target_speaker="Cy",
        responder="Bo",
    )


def record(child, *, reason="accepted") -> dict:
    accepted = reason == "accepted"
    return {
        "dataset": child.dataset,
        "depth": child.depth,
        "accepted": accepted,
        "reason": reason,
        "emotion": {"joy": 1.0},
        "declared": dict(child.gold),
        "sample": child.to_json() if accepted else None,
    }


def test_the_mean_over_data_sets_is_weighted_by_their_inputs():
    from selfemo_jax.data.dialogues import IEMOCAP

    other = [
        replace(declared("joy", n), dataset="iemocap", inventory=IEMOCAP.labels, gold={"sad": 1.0})
        for n in range(3)
    ]
    human = HUMAN | {"iemocap": {"sad": 1.0}}
    found = mean_divergence([declared("joy", 9), *other], human)
    assert found == pytest.approx(divergence({"joy": 1.0}, HUMAN["meld"]) / 4)
    assert mean_divergence([], human) == 0.0


def report_of(children, *, rejected=(), config=None, originals=None):
    config = config or settings()
    chosen = choose(children, n_syn=100, heldout=0.0, seed=0)
    records = [record(child) for child in children] + [record(c, reason=why) for c, why in rejected]
    originals = originals or [sample(n, gold={"joy" if n % 2 else "fear": 1.0}) for n in range(40)]
    return harvest_report(records, chosen, HUMAN, originals, config)


def test_a_report_counts_by_reason_and_depth_and_shows_labels_before_and_after():
    children = [declared("joy", n) for n in range(3)] + [declared("fear", 3)]
    deeper = replace(declared("joy", 7), depth=2)
    report = report_of(
        children, rejected=[(deeper, "copy"), (deeper, "copy"), (declared("fear", 8), "language")]
    )
    assert (report["proposed"], report["accepted"], report["training"]) == (7, 4, 4)
    assert report["rejected"] == {"copy": 2, "language": 1}
    assert report["by_depth"] == {"1": {"proposed": 5, "accepted": 4}, "2": {"proposed": 2, "accepted": 0}}
    assert report["labels"]["human"] == HUMAN
    assert report["labels"]["accepted"] == {"meld": {"fear": 0.25, "joy": 0.75}}
    assert report["labels"]["declared"]["meld"]["joy"] == pytest.approx(5 / 7)
    assert report["labels"]["recognised"] == {"meld": {"joy": 1.0}}
    assert report["largest_label_ratio"] == 1.5
    assert report["divergence"]["training"] == pytest.approx(
        divergence({"fear": 0.25, "joy": 0.75}, HUMAN["meld"])
    )
    assert report["replies"]["num"] == 4 and report["human_replies"]["num"] == 4


def test_an_empty_harvest_has_a_report_too():
    report = report_of([], rejected=[(declared("joy", 1), "low_reward")])
    assert (report["accepted"], report["training"], report["divergence"]["training"]) == (0, 0, 0.0)
    assert check_drift(report, settings()) == ""


def drifting(number: int, **drift) -> tuple[dict, object]:
    """A harvest of nothing but fear, 0.311 bits from the human labels."""
    config = settings(flywheel={"drift": drift, "retrain": {"init": "cold"}})
    return report_of([declared("fear", n) for n in range(number)], config=config), config


def test_drift_is_an_alarm_from_its_bound_on_and_a_stop_only_when_asked_for():
    report, config = drifting(60)
    assert report["divergence"]["training"] == pytest.approx(0.311, abs=1e-3)
    assert "0.311 bits" in check_drift(report, config)
    assert check_drift(*drifting(60, alarm=0.32)) == ""
    assert check_drift(*drifting(60, stop=0.32)).startswith("alarm")
    with pytest.raises(DriftError, match="flywheel.drift.stop is 0.3.*--resume"):
        check_drift(*drifting(60, stop=0.3))


def test_a_small_harvest_neither_alarms_nor_stops():
    assert check_drift(*drifting(49, stop=0.3)) == ""
    assert check_drift(*drifting(49, stop=0.9, least=49)) != ""


@pytest.mark.parametrize(
    ("shares", "left", "bits"),
    # The other label has 1/20 among humans, joy 19/20. All fear: (log2(40/21) + log2(2/21) / 20
    # + 19/20) / 2, with the mean at 21/40 and 19/40.
    [({"fear": 200}, 1, 0.855), ({"fear": 180, "joy": 20}, 23, None)],
)
def test_a_collapse_is_seen_though_the_balance_leaves_fair_shares_of_it(shares, left, bits):
    human = {"meld": {"joy": 0.95, "fear": 0.05}}
    labels = [label for label, count in shares.items() for _ in range(count)]
    children = [declared(label, n) for n, label in enumerate(labels)]
    chosen = choose(children, n_syn=8000, heldout=0.0, seed=0, human=human, max_label_ratio=2.0)
    config = settings(flywheel={"drift": {"stop": 0.2}, "retrain": {"init": "cold"}})
    report = harvest_report([record(child) for child in children], chosen, human, [], config)
    assert report["training"] == left < config.flywheel.drift.least
    if bits is not None:
        expected = (np.log2(40 / 21) + np.log2(2 / 21) / 20 + 19 / 20) / 2
        assert report["divergence"]["accepted"] == pytest.approx(expected)
        assert expected == pytest.approx(bits, abs=1e-3)
    with pytest.raises(DriftError, match=f"bits for the 200 .* accepted and .* the {left} .* to train on"):
        check_drift(report, config)


def test_a_small_rest_to_train_on_is_noise_where_what_was_accepted_is_fair():
    children = [declared("joy" if n % 2 else "fear", n) for n in range(60)]
    config = settings(flywheel={"drift": {"stop": 0.2}, "retrain": {"init": "cold"}})
    report = harvest_report(
        [record(child) for child in children],
        Selection(training=children[1:2], heldout=()),
        HUMAN,
        [],
        config,
    )
    assert report["divergence"]["training"] > 0.3 and report["divergence"]["accepted"] < 1e-9
    assert check_drift(report, config) == ""


def test_replies_are_measured_by_their_words():
    replies = ["We row far.", "we row FAR", "Home"]
    found = reply_statistics(replies)
    # Pairs: we-row, row-far, twice; words: we, row, far twice and home.
    assert (found["median_words"], found["distinct_2"]) == (3, 0.5)
    assert found["distinct_1"] == pytest.approx(4 / 7)
    assert distinct(["Home"], 2) == 0.0
    assert reply_statistics([])["median_words"] == 0.0


def test_a_label_that_no_human_gave_has_no_ratio():
    assert largest_ratio({"meld": {"joy": 0.75, "fear": 0.25}}, HUMAN) == 1.5
    assert largest_ratio({"meld": {"anger": 1.0}}, HUMAN) is None
    assert largest_ratio({}, HUMAN) == 0.0


def test_a_selection_and_its_shares_agree_with_the_bound_of_the_settings():
    children = [declared("joy", n) for n in range(200)] + [declared("fear", 200 + n) for n in range(40)]
    human = {"meld": {"joy": 0.3, "fear": 0.7}}
    chosen: Selection = choose(children, n_syn=500, heldout=0.0, seed=0, human=human, max_label_ratio=2.0)
    assert largest_ratio(label_shares(chosen.training), human) <= 2.0
    assert len(chosen.training) == 100 and len(chosen.left_out["label_share"]) == 140

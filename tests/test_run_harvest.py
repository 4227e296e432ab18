"""Around a harvest: what the verifier reads, the report that is left behind, and a stop before training."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from selfemo_jax import run_harvest
from selfemo_jax.data.grammar import parse
from selfemo_jax.run_harvest import Verifier, close_harvest, open_verifier
from selfemo_jax.selfplay.drift import DriftError
from tests.fabricated import LABEL_SETS, codec, run_data, sample, settings, synthetic, text

MELD = LABEL_SETS["meld"].labels


class Engine:
    """Takes weights, and says whether it was closed."""

    def __init__(self, *parts, max_rows):
        self.weights, self.closed = None, False

    def update_policy(self, params, *, version):
        self.weights = params

    def close(self):
        self.closed = True


def parts_of(config):
    return SimpleNamespace(config=config, model=None, compute=None, mesh=None, codec=codec())


def answering(monkeypatch, *texts):
    """The verifier's engine is a stand-in whose policy writes these answers; the inputs it was shown."""
    shown = []

    def greedy(engine, samples, codec_, config):
        assert engine.weights == "frozen"
        shown.extend(samples)
        return [SimpleNamespace(answer=parse(one, inventory=MELD)) for one in texts]

    monkeypatch.setattr(run_harvest, "JaxEngine", Engine)
    monkeypatch.setattr(run_harvest, "greedy_answers", greedy)
    return shown


def child(number: int, **gold):
    return synthetic(sample(number, dialogue=f"d{number}", gold={"joy": 1.0}), iteration=1, gold=gold)


def test_a_verdict_is_the_overlap_of_the_answer_with_the_declared_emotions(monkeypatch):
    children = [child(0, joy=1.0), child(1, joy=0.85, sadness=0.4), child(2, joy=1.0), child(3, fear=0.5)]
    answers = (
        text([("joy", 0.5), ("fear", 0.5)]),  # half of it: 0.5 / 1.5
        text([("joy", 0.6), ("sadness", 0.4)]),
        "no answer",
        text([("fear", 0.9), ("glee", 0.1)]),  # a label that is not in the list is no gold
    )
    shown = answering(monkeypatch, *answers)
    with Verifier("frozen", parts_of(settings()), num_classes=8) as verify:
        found = verify(children)
    assert shown == children and verify._engine.closed
    np.testing.assert_allclose([v.agreement for v in found], [1 / 3, 0.851852, 0.0, 0.9 / 1.1], atol=1e-5)
    assert [v.emotion for v in found] == [
        {"joy": 0.5, "fear": 0.5},
        {"joy": 0.6, "sadness": 0.4},
        {},
        {"fear": 0.9},
    ]


@pytest.mark.parametrize(
    ("wheel", "source", "asked"),
    [
        ({}, "human", None),
        ({"verifier": {"weights": "cold"}}, "human", "cold"),
        ({"control": "verifier_labels"}, "human", "cold"),
        ({"control": "verifier_labels"}, "none", "base"),
    ],
)
def test_the_settings_name_whose_weights_verify(monkeypatch, wheel, source, asked):
    monkeypatch.setattr(run_harvest, "JaxEngine", Engine)
    trained = {"model": {"path": "somewhere"}} if source == "none" else {}
    config = settings(flywheel=wheel | {"retrain": {"init": "cold" if not trained else "base"}},
                      cold_start={"source": source}, **trained)  # fmt: skip
    names = []
    found = open_verifier(parts_of(config), lambda name: names.append(name) or "frozen", num_classes=8)
    assert (found is None) == (asked is None) and names == ([asked] if asked else [])


def record(one, *, reason="accepted") -> dict:
    return {
        "dataset": one.dataset,
        "depth": one.depth,
        "accepted": reason == "accepted",
        "reason": reason,
        "emotion": {"joy": 1.0},
        "declared": dict(one.gold),
        "sample": one.to_json() if reason == "accepted" else None,
    }


def closed(tmp_path, **wheel) -> tuple[dict, list[str], str]:
    """The report of a harvest of 60 fears and 20 joys after human data of half and half."""
    config = settings(flywheel=wheel | {"heldout": 0.2, "retrain": {"init": "cold"}})
    originals = [sample(n, dialogue=f"h{n}", gold={"joy" if n % 2 else "fear": 1.0}) for n in range(10)]
    children = [child(n, fear=0.5) for n in range(60)] + [child(60 + n, joy=0.5) for n in range(20)]
    said: list[str] = []
    console = Console(record=True, width=160, file=io.StringIO())
    log = SimpleNamespace(say=said.append, show=console.print)
    try:
        close_harvest(
            [*map(record, children), record(child(99, joy=1.0), reason="copy")],
            run_data({"meld": originals}), config, name="harvest_1", folder=tmp_path, log=log,
        )  # fmt: skip
    finally:
        report = json.loads((tmp_path / "harvest.json").read_text())
    return report, said, console.export_text()


def test_a_harvest_leaves_its_report_and_its_places(tmp_path):
    report, said, printed = closed(tmp_path)
    assert (report["proposed"], report["accepted"], report["rejected"]) == (81, 80, {"copy": 1})
    places = report["places"]
    assert len(places["training"]) == report["training"] and len(places["heldout"]) == report["heldout"] > 0
    assert sum(map(len, places.values())) == 80
    assert said[-1] == f"harvest_1: {report['training']} synthetic inputs, {report['heldout']} held out"
    assert "81 proposed, 80 accepted, 1 copy" in printed and "fear" in printed


def test_a_drifted_harvest_is_reported_and_stops_the_run(tmp_path):
    with pytest.raises(DriftError):
        closed(tmp_path, drift={"alarm": 0.01, "stop": 0.01})
    assert json.loads((tmp_path / "harvest.json").read_text())["accepted"] == 80
    report, said, _ = closed(tmp_path, drift={"alarm": 0.01})
    assert report["alarm"].startswith("alarm") and "far from the human" in said[0]

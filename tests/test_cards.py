"""Cards beside exported policies: what they say, what they must not say, and that nothing is exported
without."""

import json
import shutil

import pytest
import yaml

from selfemo_jax.cards import DATA_CARD, MODEL_CARD, run_above, write_cards, write_cards_of_copy

SCORED = {
    "num": 4,
    "accuracy": 0.5,
    "weighted_f1": 0.4567,
    "invalid_rate": 0.25,
    "majority": {"weighted_f1": 0.1},
}


@pytest.fixture
def run(tmp_path):
    """The files of a run on real sets that the cards read."""
    root = tmp_path / "secret_place" / "run"
    (root / "eval").mkdir(parents=True)
    (root / "phases" / "02_harvest_1").mkdir(parents=True)
    (root / "metrics.jsonl").write_text("")
    config = {
        "seed": 3, "note": "", "phases": "all", "model": {"path": "/secret_place/smol"},
        "data": {"sets": ["meld", "emorynlp"], "decontaminate": True, "root": "/secret_place/data"},
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "env.json").write_text(json.dumps({"commit": "abc", "backend": "cpu", "data": {"inputs": "d1"}}))
    parts = {"shared": SCORED, "clean": SCORED}
    splits = {"test": {"sets": {"meld": SCORED | {"parts": parts}}}}
    final = {"global_step": 9, "best": {"global_step": 7}, "splits": splits}
    (root / "eval" / "final.json").write_text(json.dumps(final))
    harvest = {"proposed": 20, "accepted": 12, "training": 11}
    (root / "phases" / "02_harvest_1" / "harvest.json").write_text(json.dumps(harvest))
    return root


def weights(run, name, *, step, note=""):
    folder = run / name
    folder.mkdir(parents=True)
    certificate = {"source": {"kind": "trained", "phase": "rl_final", "global_step": step}}
    (folder / "certificate.json").write_text(json.dumps(certificate | ({"note": note} if note else {})))
    return folder


def cards(folder, run):
    write_cards(folder, run)
    return (folder / MODEL_CARD).read_text(), (folder / DATA_CARD).read_text()


def test_the_scored_policy_carries_its_scores_and_others_say_that_they_have_none(run):
    best, _ = cards(weights(run, "best", step=7), run)
    assert "| test | meld | 4 | 50.00 | 45.67 | 25.00 | 10.00 |" in best
    assert "| test | meld, shared | 4 |" in best
    header = yaml.safe_load(best.split("---")[1])
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == 45.67
    other, _ = cards(weights(run, "other", step=9), run)
    assert "Not known" in other and "45.67" not in other


def test_weights_of_licensed_scripts_are_not_to_be_published(run):
    model, data = cards(weights(run, "w", step=7), run)
    for text in (model, data):
        assert "Not to be published by default" in text
    assert "harvest_1: 20 proposed, 12 accepted, 11 used for training" in data
    assert "GPL-3.0" in data and "left out of training" in data and "`d1`" in data
    assert "secret_place" not in model + data, "paths of a machine are nobody's business"


def test_plumbing_says_so_and_states_no_result_in_its_header(run):
    note = "plumbing run, not a result"
    model, _ = cards(weights(run, "w", step=7, note=note), run)
    assert f"> **{note}**" in model and "Plumbing run, not a result." in model
    assert "model-index" not in model.split("---")[1]


def test_the_same_files_give_the_same_cards(run):
    folder = weights(run, "w", step=7)
    assert cards(folder, run) == cards(folder, run)


def test_converted_weights_of_others_are_said_to_be_that(tmp_path):
    (tmp_path / "certificate.json").write_text(
        json.dumps({"source": {"kind": "safetensors", "name": "some-model"}})
    )
    model, data = cards(tmp_path, run_above(tmp_path))
    assert (
        "Converted weights" in model and "`some-model`" in model and "That of the original weights." in model
    )
    assert "trained them on nothing" in data


def test_converted_weights_have_cards_whatever_they_come_from(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from tests.model.checkpoints import hf_config, save_checkpoint
    from tests.model.test_gguf import write_gguf
    from tools import convert_hf

    source = save_checkpoint(tmp_path / "some-model", hf_config("qwen3"), dtype=torch.float32)
    (source / MODEL_CARD).write_text("# Of others\n")
    assert convert_hf.main(["to-flax", str(source), str(tmp_path / "flax")]) == 0
    card = (tmp_path / "flax" / MODEL_CARD).read_text()
    assert "The weights of `some-model`, converted" in card and "every bit equal" in card
    assert "SELF-EMO policy" not in card and "scripted English" not in card
    assert "trained them on nothing" in (tmp_path / "flax" / DATA_CARD).read_text()
    write_gguf(tmp_path / "model.gguf")
    capsys.readouterr()
    assert convert_hf.main(["from-gguf", str(tmp_path / "model.gguf"), str(tmp_path / "read")]) == 0
    assert f"{MODEL_CARD}, {DATA_CARD}" in capsys.readouterr().out
    card = (tmp_path / "read" / MODEL_CARD).read_text()
    assert "> **8-bit quantised copy" in card and "every bit equal" not in card
    assert "trained them on nothing" in (tmp_path / "read" / DATA_CARD).read_text()


def test_cards_of_trained_weights_travel_with_them(run, tmp_path):
    exported, back, again = (tmp_path / name for name in ("hf", "flax", "hf_again"))
    trained = weights(run, "best", step=7)
    foreign = {"source": {"kind": "safetensors", "name": "hf"}}
    for folder, certificate in ((exported, None), (back, foreign), (again, foreign)):
        folder.mkdir()
        copied = (
            (trained / "certificate.json").read_text() if certificate is None else json.dumps(certificate)
        )
        (folder / "certificate.json").write_text(copied)
    write_cards_of_copy(trained, exported, library="transformers")
    write_cards_of_copy(exported, back, library="selfemo_jax")
    write_cards_of_copy(back, again, library="transformers")
    first, last = ((folder / MODEL_CARD).read_text() for folder in (exported, again))
    assert "| test | meld | 4 | 50.00 | 45.67 |" in first and last == first
    assert "library_name: selfemo_jax" in (back / MODEL_CARD).read_text()
    assert "Not to be published by default" in (again / DATA_CARD).read_text()


def test_trained_weights_far_from_their_run_are_not_called_free(run, tmp_path):
    alone = weights(tmp_path / "elsewhere", "w", step=7)
    model, data = cards(alone, None)
    for text in (model, data):
        assert "The run that trained these weights is not at hand" in text
        assert "Not to be published by default" in text
    for wrong in ("Apache-2.0", "random weights", "trained them on nothing"):
        assert wrong not in model + data


def test_every_weight_folder_of_a_run_and_its_export_have_both_cards(tmp_path):
    from tests import micro
    from tools import convert_hf

    run = micro.base_run()
    folders = [*run.glob("phases/*/weights"), run / "checkpoints" / "best"]
    assert len(folders) >= 3
    for folder in folders:
        assert (folder / MODEL_CARD).is_file() and (folder / DATA_CARD).is_file()
    best = (run / "checkpoints" / "best" / MODEL_CARD).read_text()
    assert micro.NOTE in best and "| dev | sample_meld |" in best
    assert run_above(run / "checkpoints" / "best") == run.resolve()
    assert convert_hf.main(["to-hf", str(run / "checkpoints" / "best"), str(tmp_path / "hf")]) == 0
    exported = (tmp_path / "hf" / MODEL_CARD).read_text()
    assert "library_name: transformers" in exported and "| dev | sample_meld |" in exported
    assert (tmp_path / "hf" / DATA_CARD).is_file()
    shutil.rmtree(tmp_path / "hf")

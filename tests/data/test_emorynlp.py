import csv
import io
import json

import pytest

from selfemo_jax.data.dialogues import load_corpus
from selfemo_jax.data.emorynlp import read_emorynlp

HEADER = [
    "Utterance",
    "Speaker",
    "Emotion",
    "Scene_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "Start_Time",
    "End_Time",
]
NUMBER = {"train": 1, "dev": 2, "test": 3}


def rows_of(split):
    """A scene of episode 1, 2 or 3, so that no two splits share one."""
    episode = NUMBER[split]
    return [
        ("Is the boat ready?", "['Ada Moor']", "Neutral", 4, 2, 1, episode),
        ("It sank!", "['Bo Lind', 'Cy Park']", "Scared", 4, 5, 1, episode),
    ]


def write_csv(folder, split, rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([*row, "00:00:01.000", "00:00:02.000"] for row in rows)
    (folder / f"emorynlp_{split}_final.csv").write_text(out.getvalue(), encoding="utf-8")


def write_json(folder, split, scenes):
    mark = {"train": "trn", "dev": "dev", "test": "tst"}[split]
    entries = [
        {
            "scene_id": scene,
            "utterances": [
                {"utterance_id": f"{scene}_u{i:03d}", "speakers": names, "transcript": text, "emotion": label}
                for i, names, text, label in turns
            ],
        }
        for scene, turns in scenes.items()
    ]
    release = {"season_id": mark, "episodes": [{"episode_id": "s01_e01", "scenes": entries}]}
    (folder / f"emotion-detection-{mark}.json").write_text(json.dumps(release), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "emorynlp"
    path.mkdir()
    for split in NUMBER:
        write_csv(path, split, rows_of(split))
    return path


def test_a_scene_is_keyed_by_season_episode_and_scene(folder):
    rows = rows_of("train") + [("Another day.", "['Ada Moor']", "Sad", 4, 1, 2, 1)]
    write_csv(folder, "train", rows)
    dialogues = read_emorynlp(folder).splits["train"]
    assert [d.dialogue_id for d in dialogues] == ["s01_e01_c04", "s02_e01_c04"]
    assert [(t.speaker, t.text, t.labels, t.turn_id) for t in dialogues[0].turns] == [
        ("Ada Moor", "Is the boat ready?", {"neutral": 1.0}, "2"),
        ("Bo Lind and Cy Park", "It sank!", {"scared": 1.0}, "5"),
    ]


@pytest.mark.parametrize("speaker", ["Ada Moor", "[]", "['Ada', 3]", "__import__('os').getcwd()", "['Ada'"])
def test_speaker_must_be_a_list_literal_and_is_never_evaluated(folder, speaker):
    write_csv(folder, "dev", [("Hello.", speaker, "Neutral", 1, 1, 1, 2)])
    with pytest.raises(ValueError) as caught:
        read_emorynlp(folder)
    assert str(caught.value) == (
        f'emorynlp/emorynlp_dev_final.csv:2: Speaker "{speaker}" is not a list literal such as '
        "\"['Ross Geller']\"."
    )


def test_label_of_the_other_friends_set_gets_a_suggestion(folder):
    write_csv(folder, "test", [("Hello.", "['Ada']", "Joy", 1, 1, 1, 3)])
    with pytest.raises(ValueError) as caught:
        read_emorynlp(folder)
    assert str(caught.value) == (
        "emorynlp/emorynlp_test_final.csv:2: unknown emotion 'Joy' (did you mean 'Joyful'?). "
        "EmoryNLP has: Joyful, Mad, Peaceful, Neutral, Sad, Powerful, Scared."
    )


def test_json_context_adds_unlabelled_turns_and_scores_the_same_ones(folder):
    turns = [
        (1, ["Cy Park"], "Long ago we had a boat.", "Peaceful"),
        (2, ["Ada Moor"], "Is the boat ready?", "Neutral"),
        (5, ["Bo Lind", "Cy Park"], "It sank!", "Scared"),
    ]
    write_json(folder, "dev", {"s01_e02_c04": turns, "s01_e02_c09": turns[:1]})
    write_json(folder, "test", {"s01_e03_c04": turns})
    corpus = read_emorynlp(folder, context="json")
    (dialogue,) = corpus.splits["dev"]
    assert [(t.text, t.labels) for t in dialogue.turns] == [
        ("Long ago we had a boat.", None),
        ("Is the boat ready?", {"neutral": 1.0}),
        ("It sank!", {"scared": 1.0}),
    ]
    assert corpus.report.rows["dev"] == 3 and corpus.report.labelled["dev"] == 2
    assert corpus.report.skipped == {
        "scenes of emorynlp/emotion-detection-dev.json without a scored utterance": 1
    }
    assert any("emotion-detection-trn.json does not exist: train" in w for w in corpus.report.warnings)
    assert len(read_emorynlp(folder).splits["dev"][0].turns) == 2


def test_json_without_csv_is_the_full_release_all_labelled(folder):
    (folder / "emorynlp_dev_final.csv").unlink()
    write_json(folder, "dev", {"s01_e02_c04": [(1, ["Cy"], "Ahoy.", "Joyful")]})
    corpus = read_emorynlp(folder, context="json")
    assert corpus.splits["dev"][0].turns[0].labels == {"joyful": 1.0}
    assert any("every utterance of dev is labelled" in w for w in corpus.report.warnings)


def test_json_of_another_release_than_the_csv_is_an_error(folder):
    write_json(folder, "dev", {"s01_e02_c04": [(2, ["Ada Moor"], "Is the car ready?", "Neutral")]})
    with pytest.raises(ValueError, match="utterance 2 of scene s01_e02_c04 differs from the CSV file's"):
        read_emorynlp(folder, context="json")
    write_json(folder, "dev", {"s01_e02_c05": [(2, ["Ada Moor"], "Is the boat ready?", "Neutral")]})
    with pytest.raises(ValueError, match="scene s01_e02_c04 of the CSV file is missing"):
        read_emorynlp(folder, context="json")


def test_full_release_is_recognised_by_its_size(folder):
    rows = [(f"Line {i}.", "['Ada']", "Neutral", i // 100, i % 100, 1, 3) for i in range(1328)]
    write_csv(folder, "test", rows)
    warnings = read_emorynlp(folder).report.warnings
    assert any(
        "1,328 rows: this is the full emotion-detection release; published ERC results use the 7,551/954/984 "
        "subset in declare-lab/MELD." in w
        for w in warnings
    )


def test_a_scene_in_two_splits_is_an_error(folder):
    write_csv(folder, "test", rows_of("train"))
    with pytest.raises(ValueError, match=r"EmoryNLP: train and test share dialogue 's01_e01_c04'\."):
        read_emorynlp(folder)


def test_unknown_context_is_named(folder):
    with pytest.raises(ValueError, match="context is 'both'; expected 'csv' or 'json'"):
        read_emorynlp(folder, context="both")


def test_real_files_have_exactly_the_published_counts(selfemo_data):
    corpus = load_corpus("emorynlp", selfemo_data)
    report = corpus.report
    assert report.rows == report.labelled == {"train": 7551, "dev": 954, "test": 984}
    assert report.dialogues == {"train": 659, "dev": 89, "test": 79}
    order = ("neutral", "joyful", "scared", "mad", "peaceful", "powerful", "sad")
    counts = {split: tuple(report.labels[split][label] for label in order) for split in report.labels}
    assert counts == {
        "train": (2485, 1677, 941, 785, 638, 551, 474),
        "dev": (322, 205, 127, 97, 82, 70, 51),
        "test": (288, 217, 116, 86, 111, 96, 70),
    }
    several = {s: sum(" and " in t.speaker for d in corpus.splits[s] for t in d.turns) for s in corpus.splits}
    assert several == {"train": 50, "dev": 4, "test": 7}
    assert report.warnings == () and report.repairs == ()


def test_real_json_agrees_with_the_csv_and_only_adds_context(selfemo_data):
    report = load_corpus("emorynlp", selfemo_data, context="json").report
    assert report.labelled == {"train": 7551, "dev": 954, "test": 984}
    # Inside the scenes of the CSV files: 390 and 344 dropped utterances less those of whole dropped scenes.
    assert report.rows == {"train": 7551, "dev": 1202, "test": 1234}
    assert sorted(report.skipped.values()) == [6, 10]

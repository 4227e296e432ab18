import json
from importlib.resources import as_file

import pytest

from selfemo_jax import sample
from selfemo_jax.data.checks import Notes
from selfemo_jax.data.dialogues import index_speakers, load_corpora, load_corpus
from selfemo_jax.data.jsonl import read_lines

DIALOGUE = {
    "dialogue_id": "d1",
    "turns": [
        {"speaker": "Ann", "text": "Good morning.", "label": "calm"},
        {"speaker": "Ben", "text": "At last!", "labels": {"Glad": 0.8, "calm": 0.2}},
        {"speaker": "Ann", "text": "So."},
    ],
    "personas": {"Ann": "Ann is a patient nurse."},
    "theme": "a morning at the clinic",
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clinic"
    path.mkdir()
    write_labels(path, {"name": "clinic", "labels": ["calm", "tense", "Glad"]})
    write(path, "train", DIALOGUE)
    write(path, "test", DIALOGUE | {"dialogue_id": "d2"})
    return path


def write_labels(path, record):
    (path / "dataset.json").write_text(json.dumps(record), encoding="utf-8")


def write(path, split, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def error(folder, *records):
    write(folder, "train", *records)
    with pytest.raises(ValueError) as caught:
        load_corpus(str(folder))
    return str(caught.value)


def turn(**changes):
    return DIALOGUE | {"turns": [{"speaker": "Ann", "text": "Hello."} | changes]}


def test_own_labels_weights_context_personas_and_theme_are_read(folder):
    corpus = load_corpus(str(folder))
    assert (corpus.name, corpus.label_set.labels) == ("clinic", ("calm", "tense", "glad"))
    assert corpus.label_set.display == ("calm", "tense", "Glad")
    (dialogue,) = corpus.splits["train"]
    assert [t.labels for t in dialogue.turns] == [{"calm": 1.0}, {"glad": 0.8, "calm": 0.2}, None]
    assert dialogue.personas == {"Ann": "Ann is a patient nurse."}
    assert dialogue.theme == "a morning at the clinic"
    assert corpus.splits["dev"] == ()
    assert "clinic/dev.jsonl does not exist: dev is empty." in corpus.report.infos
    assert corpus.report.rows["train"] == 3 and corpus.report.labelled["train"] == 2
    assert corpus.report.labels["train"] == {"calm": 1, "tense": 0, "glad": 1}


def test_a_relative_folder_is_looked_for_under_the_root(folder):
    assert load_corpus("clinic", folder.parent).splits == load_corpus(str(folder)).splits


def test_index_style_renames_speakers_and_their_personas(folder):
    (dialogue,) = load_corpus(str(folder), speaker_style="index").splits["train"]
    assert [t.speaker for t in dialogue.turns] == ["Speaker 1", "Speaker 2", "Speaker 1"]
    assert dialogue.personas == {"Speaker 1": "Ann is a patient nurse."}
    assert index_speakers(index_speakers(dialogue)) == dialogue


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (DIALOGUE | {"turns": []}, "dialogue 'd1' has no utterances."),
        (turn(text=" "), "utterance 1 of 'd1' is empty."),
        (turn(speaker=" "), "utterance 1 of 'd1': speaker is empty"),
        (turn(text=3), "utterance 1 of 'd1': text is 3; expected a string."),
        (turn(label="Glda"), "unknown emotion 'Glda' (did you mean 'Glad'?). clinic has: calm, tense, Glad."),
        (turn(lable="calm"), "unknown key 'lable' (did you mean 'label'?). The keys are speaker, text, "),
        (turn(label="calm", labels={"calm": 1}), "has both 'label' and 'labels'; keep one."),
        (turn(labels={"calm": 1.5}), "'calm' has weight 1.5; expected a number above 0 and at most 1."),
        (turn(labels={"calm": 0}), "'calm' has weight 0; expected"),
        (turn(labels={"calm": True}), "'calm' has weight True; expected"),
        (turn(labels={"calm": 0.5, "Calm": 0.5}), "label 'calm' is given twice."),
        (turn(labels={}), "labels is {}; expected an object"),
        (turn(labels=["calm"]), "labels is ['calm']; expected an object"),
        (turn(text="It\u00e2\u20ac\u2122s"), "contains 'â€™': the file was decoded with the wrong encoding"),
        (turn(text="a" * 2001), "has 2,001 characters (limit 2,000)"),
        (turn() | {"personas": {"An": "x"}}, "persona for 'An' (did you mean 'Ann'?), who does not speak in"),
        (turn() | {"personas": ["x"]}, "personas of 'd1' is not an object of speaker -> sentence."),
        (turn() | {"theme": 5}, "theme of 'd1' is 5; expected a string."),
        (turn() | {"dialogue_id": " "}, "dialogue_id is ' '; expected a string."),
        ({"turns": []}, "missing key 'dialogue_id' (found: turns)."),
        ("[1]", "found list; expected an object with dialogue_id, turns."),
        ('{"dialogue_id": "d9",', "not valid JSON (Expecting property name enclosed in double quotes"),
    ],
)
def test_each_fault_names_its_line_and_what_was_found(folder, record, message):
    other = DIALOGUE | {"dialogue_id": "d0"}
    found = error(folder, other, "", record)
    assert found.startswith("clinic/train.jsonl:3: ") and message in found


def test_duplicate_and_shared_dialogue_ids_are_errors(folder):
    assert error(folder, DIALOGUE, DIALOGUE).startswith(
        "clinic/train.jsonl:1 and :2: dialogue 'd1' occurs twice."
    )
    assert error(folder, DIALOGUE | {"dialogue_id": "d2"}).startswith(
        "clinic: train and test share dialogue 'd2'."
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "x", "labels": ["one"]}, "label set 'x' has 1 labels; expected 2 to 32."),
        ({"name": "x", "labels": ["so so", "one"]}, "label 'so so' is not one word"),
        ({"name": "x/y", "labels": ["a", "b"]}, "name is 'x/y'; expected letters, digits"),
        ({"name": "x", "labels": "ab"}, "labels is 'ab'; expected a list of strings."),
        ({"name": "x"}, "missing key 'labels' (found: name)."),
        ({"name": "x", "label": []}, "unknown key 'label' (did you mean 'labels'?)"),
    ],
)
def test_faults_of_the_label_list_name_dataset_json(folder, record, message):
    write_labels(folder, record)
    with pytest.raises(ValueError) as caught:
        load_corpus(str(folder))
    assert str(caught.value).startswith("clinic/dataset.json") and message in str(caught.value)


def test_missing_files_say_what_to_write(folder):
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has none of train.jsonl, dev.jsonl, test.jsonl"):
        load_corpus(str(folder))
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match='write {"name": "clinic", "labels"'):
        load_corpus(str(folder))
    with pytest.raises(ValueError, match="is a file; give the folder"):
        (folder / "x.jsonl").write_text("")
        load_corpus(str(folder / "x.jsonl"))


def test_lines_without_a_label_list_are_read_unlabelled():
    lines = [json.dumps(DIALOGUE)]
    (dialogue,) = read_lines(lines, "stdin", dataset="x", split="test", label_set=None, notes=Notes())
    assert [t.labels for t in dialogue.turns] == [None, None, None]


def test_bundled_corpora_have_the_three_label_lists_and_all_splits():
    corpora = load_corpora(["sample"])
    assert [corpus.name for corpus in corpora] == [f"sample_{name}" for name in sorted(sample.NAMES)]
    assert [len(corpus.label_set.labels) for corpus in corpora] == [7, 6, 7]
    assert all(corpus.splits[split] for corpus in corpora for split in ("train", "dev", "test"))
    with pytest.raises(
        ValueError, match="'sample/mled' is no bundled corpus; expected one of sample/emorynlp"
    ):
        load_corpus("sample/mled")
    with as_file(sample.dataset("meld")) as folder:
        assert load_corpus("sample/meld").splits == load_corpus(str(folder)).splits

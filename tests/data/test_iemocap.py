"""Every form of IEMOCAP, on invented dialogues in its layout."""

import json
import os
import pickle

import numpy as np
import pytest

from selfemo_jax.data.dialogues import load_corpus
from selfemo_jax.data.iemocap import read_iemocap, split_ids
from selfemo_jax.data.restricted_pickle import load_pickle

TRAIN, DEV, TEST = "Ses01F_impro01", "Ses02F_impro02", "Ses05M_script01_1b"


def transcript(dialogue_id):
    return [
        f"{dialogue_id}_F000 [006.2901-008.2357]: Where did the ferry go?",
        "M: (mumbles)",
        f"{dialogue_id}_F001 [014.0000-016.0000]: That was the last one!",
        "",
        f"{dialogue_id}_M000 [010.0100-011.3925]: It left a minute ago.",
        f"{dialogue_id}_MXX0 [017.0000-018.0000]: So it goes.",
    ]


def evaluation(dialogue_id):
    lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for start, end, turn, code in (
        (6.2901, 8.2357, "F000", "neu"),
        (14.0, 16.0, "F001", "fru"),
        (10.01, 11.3925, "M000", "xxx"),
    ):
        lines.append(f"[{start:.4f} - {end:.4f}]\t{dialogue_id}_{turn}\t{code}\t[2.5000, 2.5000, 2.5000]")
        lines += ["C-E2:\tNeutral;\t()", "A-E3:\tval 3; act 2; dom  2;\t()"]
    return lines


@pytest.fixture
def release(tmp_path):
    root = tmp_path / "iemocap" / "IEMOCAP_full_release"
    for dialogue_id in (TRAIN, DEV, TEST):
        write(root, dialogue_id, transcript(dialogue_id), evaluation(dialogue_id))
    mac = root / "Session1" / "dialog" / "transcriptions" / f"._{TRAIN}.txt"
    mac.write_bytes(b"\x00\x05\x16\x07\xff")
    return root


def write(root, dialogue_id, transcription, labels):
    dialog = root / f"Session{dialogue_id[4]}" / "dialog"
    for kind, lines in (("transcriptions", transcription), ("EmoEvaluation", labels)):
        (dialog / kind).mkdir(parents=True, exist_ok=True)
        (dialog / kind / f"{dialogue_id}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def error(path, **options):
    with pytest.raises(ValueError) as caught:
        read_iemocap(path, **options)
    return str(caught.value)


def test_release_joins_text_and_labels_by_time_and_names_the_speaker_of_the_turn(release):
    corpus = load_corpus("iemocap", release.parents[1])
    assert {s: [d.dialogue_id for d in ds] for s, ds in corpus.splits.items()} == {
        "train": [TRAIN], "dev": [DEV], "test": [TEST],
    }  # fmt: skip
    (dialogue,) = corpus.splits["test"]
    assert dialogue.split == "test"
    # The dialogue is the man's by name (M wears the markers); F turns are the woman's all the same.
    assert [(t.speaker, t.text, t.labels) for t in dialogue.turns] == [
        ("Elizabeth", "Where did the ferry go?", {"neutral": 1.0}),
        ("William", "It left a minute ago.", None),
        ("Elizabeth", "That was the last one!", {"frustrated": 1.0}),
        ("William", "So it goes.", None),
    ]
    report = corpus.report
    assert report.skipped == {"transcription lines without a turn id": 6}
    assert report.rows["test"] == 4 and report.labelled["test"] == 2
    assert (
        "IEMOCAP release: 12 turns transcribed, 9 in EmoEvaluation, 3 without an entry (48 in the full "
        "release)." in report.infos
    )
    assert "IEMOCAP release: 6 turns are unlabelled context (xxx 3, absent 3)." in report.infos
    assert "IEMOCAP test has 2 utterances, the published split has 1,622." in report.warnings


def test_labelled_context_deletes_unscored_turns_and_counts_them(release):
    corpus = read_iemocap(release, context="labelled")
    assert [t.turn_id[-4:] for t in corpus.splits["train"][0].turns] == ["F000", "F001"]
    assert corpus.report.skipped["turns without one of the six labels"] == 6


def test_speaker_table_and_index_style(release):
    names = load_corpus("iemocap", release.parents[1]).splits
    assert [{t.speaker for t in names[s][0].turns} for s in ("train", "dev")] == [
        {"Mary", "James"}, {"Patricia", "John"},
    ]  # fmt: skip
    indexed = load_corpus("iemocap", release.parents[1], speaker_style="index").splits
    assert [t.speaker for t in indexed["train"][0].turns] == ["Speaker 1", "Speaker 2"] * 2


def test_release_of_the_known_size_explains_the_53_extra_happy(release):
    lines = [f"{TEST}_F{i:03d} [{i:03d}.0000-{i:03d}.5000]: Line {i}." for i in range(400)]
    labels = [f"[{i}.0000 - {i}.5000]\t{TEST}_F{i:03d}\thap\t[2.5, 2.5, 2.5]" for i in range(400)]
    write(release, TEST, lines, labels)
    for number, dialogue_id in enumerate(sorted(set(split_ids()["test"]) - {TEST})[:4]):
        count = 400 if number < 3 else 22
        moved = [line.replace(TEST, dialogue_id) for line in lines[:count]]
        write(release, dialogue_id, moved, [line.replace(TEST, dialogue_id) for line in labels[:count]])
    assert (
        "IEMOCAP test has 1,622 utterances, not the 1,623 of the COSMIC pickles: see docs (53 extra 'happy')."
        in read_iemocap(release).report.warnings
    )


def test_label_without_text_is_an_error_with_its_line(release):
    lost = [line for line in transcript(DEV) if "_M000" not in line]
    write(release, DEV, lost, evaluation(DEV))
    assert error(release).startswith(
        f"Session2/dialog/EmoEvaluation/{DEV}.txt:9: turn '{DEV}_M000' has a label but no line in "
        f"transcriptions/{DEV}.txt."
    )


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        (
            "labels",
            "\tneu\t",
            "\tnue\t",
            ":3: unknown emotion 'nue' (did you mean 'neu'?). IEMOCAP has: hap, sad",
        ),
        ("labels", "\tneu\t", " neu ", ":3: found '[6.2901 - 8.2357]"),
        ("labels", "F001", "F000", ":3 and :6: turn 'Ses01F_impro01_F000' occurs twice."),
        ("text", "F001 ", "F000 ", ":1 and :3: turn 'Ses01F_impro01_F000' occurs twice."),
        ("text", " [006.2901-", " (006.2901-", ":1: found 'Ses01F_impro01_F000 (006"),
        (
            "text",
            "Where did the ferry go?",
            "",
            ":1: utterance Ses01F_impro01_F000 of 'Ses01F_impro01' is empty.",
        ),
        ("text", "impro01_F000 ", "impro02_F000 ", ":1: turn 'Ses01F_impro02_F000' is not of dialogue"),
    ],
)
def test_damaged_lines_of_the_release_are_errors_with_their_line(release, kind, old, new, message):
    lines = {"text": transcript(TRAIN), "labels": evaluation(TRAIN)}
    lines[kind] = [line.replace(old, new, 1) for line in lines[kind]]
    write(release, TRAIN, lines["text"], lines["labels"])
    found = error(release)
    folder = {"text": "transcriptions", "labels": "EmoEvaluation"}[kind]
    assert found.startswith(f"Session1/dialog/{folder}/{TRAIN}.txt") and message in found


def test_unknown_dialogue_of_the_release_is_an_error(release):
    write(release, "Ses01F_impro99", transcript("Ses01F_impro99"), evaluation("Ses01F_impro99"))
    assert "dialogue 'Ses01F_impro99' is not one of IEMOCAP's 151" in error(release)


def test_the_shipped_ids_are_the_usual_partition():
    ids = split_ids()
    assert {split: len(names) for split, names in ids.items()} == {"train": 108, "dev": 12, "test": 31}
    assert len({name for names in ids.values() for name in names}) == 151
    assert {name[:5] for name in ids["test"]} == {"Ses05"}
    assert "Ses05" not in {name[:5] for name in (*ids["train"], *ids["dev"])}


def tables(*dialogue_ids):
    speakers = {i: ["M", "F"] for i in dialogue_ids}
    labels = {i: [5, 0] for i in dialogue_ids}
    sentences = {i: ["The tide is out.", "Then we walk!"] for i in dialogue_ids}
    return speakers, labels, sentences


def cosmic(path, *, order=("train", "test", "dev"), **changes):
    ids = {"train": [TRAIN, "Ses01F_impro02"], "test": [TEST], "dev": [DEV]} | changes
    content = [*tables(*{i for names in ids.values() for i in names}), *(ids[split] for split in order)]
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def test_cosmic_pickle_is_read_in_its_order_train_test_valid(tmp_path):
    corpus = read_iemocap(cosmic(tmp_path / "iemocap.pkl"))
    assert [len(corpus.splits[s]) for s in ("train", "dev", "test")] == [2, 1, 1]
    (dialogue,) = corpus.splits["dev"]
    assert [(t.speaker, t.text, t.labels) for t in dialogue.turns] == [
        ("John", "The tide is out.", {"frustrated": 1.0}),
        ("Patricia", "Then we walk!", {"happy": 1.0}),
    ]
    assert "IEMOCAP dev has 2 utterances, the published split has 647." in corpus.report.warnings


def test_features_pickle_is_split_by_the_fixed_dev_dialogues(tmp_path):
    speakers, labels, sentences = tables(TRAIN, DEV, TEST)
    arrays = {i: np.zeros((2, 3), np.float32) for i in speakers}
    ids = {i: [f"{i}_0", f"{i}_1"] for i in speakers}
    content = (ids, speakers, labels, arrays, arrays, arrays, sentences, {TRAIN, DEV}, {TEST})
    (tmp_path / "IEMOCAP_features.pkl").write_bytes(pickle.dumps(content, protocol=2))
    splits = read_iemocap(tmp_path).splits
    assert {s: [d.dialogue_id for d in ds] for s, ds in splits.items()} == {
        "train": [TRAIN], "dev": [DEV], "test": [TEST],
    }  # fmt: skip


def test_swapped_and_shared_splits_of_a_pickle_are_errors(tmp_path):
    path = cosmic(tmp_path / "iemocap.pkl", order=("test", "train", "dev"))
    assert error(path) == (
        "iemocap.pkl: element 3 has 1 dialogues and element 4 has 2: train and test look swapped "
        "(COSMIC order is train, test, valid)."
    )
    cosmic(path, train=[TRAIN, TEST])
    assert error(path).startswith(f"IEMOCAP: train and test share dialogue '{TEST}'.")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, {TRAIN: ["M"]}, "1 speakers, 2 labels and 2 sentences"),
        (0, {TRAIN: ["M", "X"]}, "no speaker 'X' in dialogue"),
        (
            1,
            {TRAIN: [5, 6]},
            "label is 6; expected 0 to 5 (happy, sad, neutral, angry, excited, frustrated).",
        ),
        (2, {TRAIN: ["The tide is out.", ""]}, "is empty"),
        (2, {}, f"dialogue '{TRAIN}' of train has no sentences."),
        (2, [], "sentences is a list; expected a dict keyed by dialogue."),
    ],
)
def test_damaged_tables_of_a_pickle_name_the_dialogue(tmp_path, position, value, message):
    content = [*tables(TRAIN), [TRAIN], [], []]
    content[position] = value
    path = tmp_path / "iemocap.pkl"
    path.write_bytes(pickle.dumps(content))
    found = error(path)
    assert found.startswith("iemocap.pkl: ") and message in found


class Call:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_global_but_containers_and_numpy_is_ever_called(tmp_path, protocol):
    target = tmp_path / "made"
    path = tmp_path / "iemocap.pkl"
    path.write_bytes(pickle.dumps([Call(os.mkdir, str(target))], protocol=protocol))
    assert error(path) == (
        f"iemocap.pkl: refused global '{os.mkdir.__module__}.mkdir'; only plain containers and numpy "
        f"arrays are read."
    )
    assert not target.exists()


def test_refused_global_is_named_as_it_stands_in_the_file():
    with pytest.raises(ValueError, match="iemocap.pkl: refused global 'os.system'; only plain containers"):
        load_pickle(b"cos\nsystem\n(S'true'\ntR.", "iemocap.pkl")
    for name in (b"eval", b"getattr", b"__import__"):
        with pytest.raises(ValueError, match="refused global 'builtins."):
            load_pickle(b"cbuiltins\n" + name + b"\n.", "x.pkl")


def test_numpy_side_doors_are_shut():
    hidden = pickle.dumps(np.array([Call(os.getcwd)], dtype=object), protocol=2)
    with pytest.raises(ValueError, match=r"refused global '.*getcwd'"):
        load_pickle(hidden, "x.pkl")
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'AAAAAAAA'\ntR."
    with pytest.raises(ValueError, match="refused a numpy scalar of objects"):
        load_pickle(scalar, "x.pkl")
    with pytest.raises(ValueError, match="refused the codec 'zip'"):
        load_pickle(b"c_codecs\nencode\n(Vx\nVzip\ntR.", "x.pkl")


def test_plain_pickles_with_numpy_are_read_at_every_old_protocol():
    content = {"a": [1, 2.5, None], "b": {3}, "c": (np.int32(4), b"x")}
    for protocol in range(5):
        assert load_pickle(pickle.dumps(content, protocol=protocol), "x.pkl") == content
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(load_pickle(pickle.dumps(array, protocol=protocol), "x.pkl"), array)


def test_what_is_no_pickle_or_of_another_shape_says_what_was_expected(tmp_path):
    path = tmp_path / "iemocap.pkl"
    path.write_bytes(b"hello")
    assert error(path).startswith("iemocap.pkl: not a readable pickle")
    path.write_bytes(pickle.dumps([1, 2]))
    assert "found a list of 2; expected the tuple of 9 of IEMOCAP_features.pkl or the list of 6" in error(
        path
    )


def test_json_by_dialogue_with_letters_or_one_hot_speakers(tmp_path):
    record = {"labels": [5, 0], "sentences": ["The tide is out.", "Then we walk!"], "genders": ["M", "F"]}
    one_hot = record | {"genders": [[1, 0], [0, 1]], "speakers": ["JAMES", "MARY"]}
    for split, content in (("train", {TRAIN: one_hot}), ("valid", {DEV: record}), ("test", {TEST: record})):
        (tmp_path / f"iemocap.{split}.json").write_text(json.dumps(content))
    corpus = read_iemocap(tmp_path)
    speakers = [[t.speaker for t in corpus.splits[s][0].turns] for s in ("train", "dev", "test")]
    assert speakers == [["James", "Mary"], ["John", "Patricia"], ["William", "Elizabeth"]]
    (tmp_path / "iemocap.valid.json").write_text(json.dumps({DEV: {"labels": [0]}}))
    assert f"{DEV}: expected labels, sentences and genders (found: labels)." in error(tmp_path)
    (tmp_path / "iemocap.valid.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no .json file for dev"):
        read_iemocap(tmp_path)


def test_json_turn_lists_keep_unlabelled_turns_as_context(tmp_path):
    def turns(dialogue_id):
        return [
            {"text": "The tide is out.", "speaker": f"{dialogue_id}_M", "label": "fru", "cls": []},
            {"text": "Hm.", "speaker": f"{dialogue_id}_F"},
            {"text": "Then we walk!", "speaker": f"{dialogue_id}_F", "label": "excited"},
        ]

    for split, dialogue_id in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        (tmp_path / f"{split}_data.json").write_text(json.dumps([turns(dialogue_id)]))
    corpus = read_iemocap(tmp_path)
    (dialogue,) = corpus.splits["test"]
    assert dialogue.dialogue_id == TEST
    assert [(t.speaker, t.labels) for t in dialogue.turns] == [
        ("William", {"frustrated": 1.0}), ("Elizabeth", None), ("Elizabeth", {"excited": 1.0}),
    ]  # fmt: skip
    assert "IEMOCAP dev has 2 utterances, the published split has 980." in corpus.report.warnings
    mixed = [turns(DEV)[0], turns(TRAIN)[1]]
    (tmp_path / "dev_data.json").write_text(json.dumps([mixed]))
    assert "dialogue 1, utterance 2: speaker is 'Ses01F_impro01_F'; expected the dialogue's id" in error(
        tmp_path
    )


def test_an_empty_folder_and_an_unknown_option_say_what_is_expected(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected Session1..5 of the IEMOCAP release, one .pkl, or one .json"
    ):
        read_iemocap(tmp_path)
    assert "context is 'some'; expected 'all' or 'labelled'" in error(tmp_path, context="some")

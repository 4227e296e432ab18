"""Checks that every reader shares, seen through the MELD reader: each error with its text."""

import csv
import io
import json

import pytest

from selfemo_jax.data.checks import did_you_mean
from selfemo_jax.data.dialogues import IngestReport, label_set, load_corpora, load_corpus
from selfemo_jax.data.meld import read_meld

HEADER = ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
ROWS = [("The kettle is on.", "Ada", "neutral", 0, 0), ("At last, tea!", "Bo", "joy", 0, 1)]


def encoded(rows, encoding="utf-8"):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([HEADER, *rows])
    return out.getvalue().encode(encoding)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "meld"
    path.mkdir()
    for split in ("train", "dev", "test"):
        (path / f"{split}_sent_emo.csv").write_bytes(encoded(ROWS))
    return path


def error(folder, data, split="train", **options):
    (folder / f"{split}_sent_emo.csv").write_bytes(data if isinstance(data, bytes) else encoded(data))
    with pytest.raises(ValueError) as caught:
        read_meld(folder, **options)
    return str(caught.value)


def test_missing_column_names_the_near_one_and_what_was_found(folder):
    data = encoded(ROWS).replace(b"Emotion", b"Emotoin")
    assert error(folder, data) == (
        "meld/train_sent_emo.csv:1: missing column 'Emotion' (did you mean 'Emotoin'?) (found: Utterance, "
        "Speaker, Emotoin, Dialogue_ID, Utterance_ID). Use data/MELD/train_sent_emo.csv."
    )
    assert "missing column 'Utterance' (found: )" in error(folder, b"")


def test_unknown_label_has_line_suggestion_and_the_list(folder):
    assert error(folder, [ROWS[0], ("Hm.", "Bo", "angre", 0, 1)]) == (
        "meld/train_sent_emo.csv:3: unknown emotion 'angre' (did you mean 'anger'?). "
        "MELD has: neutral, surprise, fear, sadness, joy, disgust, anger."
    )
    assert "unknown emotion 'xyz'. MELD has" in error(folder, [("Hm.", "Bo", "xyz", 0, 0)])


def test_labels_that_differ_in_case_are_accepted_and_counted(folder):
    (folder / "dev_sent_emo.csv").write_bytes(
        encoded([("A b.", "Bo", "Joy", 0, 0), ("C.", "Bo", " ANGER", 0, 1)])
    )
    corpus = read_meld(folder)
    assert [t.labels for t in corpus.splits["dev"][0].turns] == [{"joy": 1.0}, {"anger": 1.0}]
    assert any("meld/dev_sent_emo.csv: 2 x labels differ from the list" in r for r in corpus.report.repairs)


def test_physical_lines_are_counted_through_a_quoted_line_break(folder):
    rows = [("Two\nphysical lines.", "Ada", "neutral", 0, 0), ("x", "Bo", "wrong", 0, 1)]
    assert error(folder, rows).startswith("meld/train_sent_emo.csv:4: unknown emotion 'wrong'")


def test_line_break_inside_an_utterance_becomes_a_blank_and_is_counted(folder):
    (folder / "dev_sent_emo.csv").write_bytes(encoded([("Two\nlines.\u00a0End ", "Ada", "joy", 0, 0)]))
    corpus = read_meld(folder)
    assert corpus.splits["dev"][0].turns[0].text == "Two lines. End"
    kinds = ("1 x U+00A0 replaced", "1 x line breaks or control", "1 x blanks at the ends")
    assert all(any(kind in r for r in corpus.report.repairs) for kind in kinds)


def test_bytes_that_are_not_utf8_name_byte_offset_and_remedy(folder):
    data = encoded([("It\u2019s hot.", "Ada", "joy", 0, 0)], "cp1252")
    offset = data.index(b"\x92")
    assert error(folder, data) == (
        f"meld/train_sent_emo.csv: byte 0x92 at offset {offset} is not UTF-8. The file is probably "
        "Windows-1252; re-save as UTF-8 or pass encoding='cp1252'."
    )
    for split in ("dev", "test"):
        (folder / f"{split}_sent_emo.csv").write_bytes(data)
    assert read_meld(folder, encoding="cp1252").splits["dev"][0].turns[0].text == "It\u2019s hot."
    assert "the file is UTF-16; re-save as UTF-8" in error(folder, encoded(ROWS, "utf-16"))


def test_utf8_read_as_cp1252_fails_with_its_byte(folder):
    message = error(folder, [("\u201cTea\u201d", "Ada", "joy", 0, 0)], encoding="cp1252")
    assert "byte 0x9D at offset" in message and "is not CP1252. Leave `encoding` out" in message


@pytest.mark.parametrize("good", ["\u2019", "\u2026", "\u2014", "\u00e9", "\u00f3"])
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_is_an_error_for_every_kind_of_wrong_decoding(folder, good, wrong):
    bad = good.encode().decode(wrong)
    message = error(folder, [ROWS[0], (f"It{bad}s hot.", "Ada", "joy", 0, 1)])
    assert message == (
        f"meld/train_sent_emo.csv:3: utterance contains {bad!r}: the file was decoded with the wrong "
        f"encoding before it was saved. Take a fresh copy of the file."
    )


def test_accented_letters_and_typographic_marks_are_not_mojibake(folder):
    text = "Ch\u00e2teau, \u00c2ge, S\u00c3O, na\u00efve \u2018caf\u00e9\u2019 \u2014 \u00bfqu\u00e9?"
    (folder / "dev_sent_emo.csv").write_bytes(encoded([(text, "Zo\u00eb", "joy", 0, 0)]))
    assert read_meld(folder).splits["dev"][0].turns[0].text == text


def test_lost_characters_and_undefined_control_codes_are_errors(folder):
    assert "utterance contains U+FFFD: characters were lost" in error(
        folder, [("a\ufffdb", "A", "joy", 0, 0)]
    )
    assert "control code U+0081, which is no cp1252 character" in error(
        folder, [("a\u0081", "A", "joy", 0, 0)]
    )


def test_bom_is_removed_and_said(folder):
    (folder / "test_sent_emo.csv").write_bytes(b"\xef\xbb\xbf" + encoded(ROWS))
    assert "BOM removed from meld/test_sent_emo.csv." in read_meld(folder).report.repairs


def test_duplicate_id_names_both_lines(folder):
    rows = [*ROWS, ("Again.", "Ada", "joy", 0, 1)]
    assert error(folder, rows).startswith(
        "meld/train_sent_emo.csv:3 and :4: (Dialogue_ID 0, Utterance_ID 1) occurs twice."
    )


def test_dialogue_that_resumes_names_the_one_between(folder):
    rows = [("a", "A", "joy", 41, 0), ("b", "A", "joy", 42, 0), ("c", "A", "joy", 41, 1)]
    assert error(folder, rows, "test").startswith(
        "meld/test_sent_emo.csv:4: dialogue 41 resumes after dialogue 42 started."
    )


def test_empty_utterance_and_speaker_are_errors_but_a_lone_mark_is_not(folder):
    (folder / "dev_sent_emo.csv").write_bytes(encoded([("!", "Ada", "joy", 7, 0)]))
    assert read_meld(folder).splits["dev"][0].turns[0].text == "!"
    message = error(folder, [("a", "A", "joy", 7, 0), ("  ", "A", "joy", 7, 1)])
    assert message.startswith("meld/train_sent_emo.csv:3: utterance 2 of 'dialogue 7' is empty.")
    assert "meld/train_sent_emo.csv:2: Speaker is empty" in error(folder, [("a", "", "joy", 7, 0)])


def test_limits_point_at_an_unbalanced_quote(folder):
    long = [("word " * 401, "A", "joy", 0, 0)]
    assert error(folder, long).startswith(
        "meld/train_sent_emo.csv:2: a field has 2,005 characters (limit 2,000); an unbalanced quote is "
        "suspected."
    )
    swallowed = encoded(ROWS) + b'"stray,A,joy,1,0\r\n' + b"line,A,joy,1,1\r\n" * 200
    assert "meld/train_sent_emo.csv:4: a field has" in error(folder, swallowed)
    huge = encoded(ROWS) + b'"stray,A,joy,1,0\r\n' + b"line,A,joy,1,1\r\n" * 20000
    assert "an unbalanced quote is suspected" in error(folder, huge)
    turns = [(f"t{i}", "A", "joy", 3, i) for i in range(501)]
    assert "dialogue '3' has 501 turns (limit 500)" in error(folder, turns)


def test_row_of_another_length_and_bad_number_name_their_line(folder):
    ragged = encoded(ROWS) + b"Yes, indeed,A,joy,1,0\r\n"
    assert "meld/train_sent_emo.csv:4: 6 fields, expected 5" in error(folder, ragged)
    assert "meld/train_sent_emo.csv:2: Dialogue_ID is '1.0'; expected a whole number" in error(
        folder, [("a", "A", "joy", "1.0", 0)]
    )


def test_missing_file_says_which_and_fewer_splits_can_be_read(folder):
    (folder / "train_sent_emo.csv").unlink()
    with pytest.raises(FileNotFoundError, match="train_sent_emo.csv does not exist"):
        read_meld(folder)
    corpus = read_meld(folder, splits=("dev", "test"))
    assert corpus.splits["train"] == () and len(corpus.splits["dev"]) == 1


def test_report_is_saved_as_json_with_every_count(folder, tmp_path):
    report = read_meld(folder).report
    report.save(tmp_path / "deep" / "report.json")
    saved = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert saved == report.to_json()
    assert saved["rows"] == {"train": 2, "dev": 2, "test": 2} and saved["labels"]["train"]["joy"] == 1
    assert set(saved) == set(IngestReport.__dataclass_fields__)


def test_other_bytes_than_the_published_file_are_a_warning(folder):
    warnings = read_meld(folder).report.warnings
    digests = [w for w in warnings if w.startswith("meld/train_sent_emo.csv: SHA-256 ")]
    assert len(digests) == 1 and "is not the published file's (d2fa2d6529cf...)" in digests[0]


def test_label_sets_have_2_to_32_distinct_words():
    assert label_set("two", ["Up", "down"]).labels == ("up", "down")
    letters = [a + b for a in "abcd" for b in "abcdefghi"]
    assert len(label_set("many", letters[:32]).labels) == 32
    for words, complaint in (
        (["one"], "has 1 labels; expected 2 to 32"),
        (letters[:33], "has 33 labels"),
        (["Up", "up"], "repeats up"),
        (["very sad", "up"], "'very sad' is not one word"),
    ):
        with pytest.raises(ValueError, match=complaint):
            label_set("x", words)


def test_unknown_data_set_is_named_with_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data set 'mled' \(did you mean 'meld'\?\) is none of meld"):
        load_corpus("mled", tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the meld files in it"):
        load_corpus("meld", tmp_path)
    with pytest.raises(ValueError, match="'meld' needs data.root"):
        load_corpus("meld")
    with pytest.raises(ValueError, match="speaker_style is 'id'; expected 'name' or 'index'"):
        load_corpus("sample/meld", speaker_style="id")
    with pytest.raises(ValueError, match="'sample_meld' twice"):
        load_corpora(["sample", "sample/meld"])


def test_did_you_mean_keeps_the_spelling_and_stays_silent_when_far():
    assert did_you_mean("joyfull", ["Joyful", "Mad"]) == " (did you mean 'Joyful'?)"
    assert did_you_mean("zzz", ["Joyful", "Mad"]) == ""

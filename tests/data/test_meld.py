import csv
import io
from pathlib import Path

import pytest

from selfemo_jax.data.dialogues import MELD, load_corpus
from selfemo_jax.data.meld import read_meld

HEADER = [
    "Sr No.",
    "Utterance",
    "Speaker",
    "Emotion",
    "Sentiment",
    "Dialogue_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "StartTime",
    "EndTime",
]
ROWS = [
    ("The kettle is on.", "Ada", "neutral", 0, 0, "0:00:01,000"),
    ("You found it, how lovely!", "Bo", "joy", 0, 1, "0:00:03,000"),
    ("Who is at the door?", "Cy", "fear", 2, 0, "0:01:00,000"),
]


def csv_text(rows, header=HEADER, newline="\r\n"):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=newline)
    writer.writerow(header)
    for number, (text, speaker, label, dialogue, utterance, start) in enumerate(rows, start=1):
        full = dict.fromkeys(HEADER, "0") | {
            "Sr No.": number, "Utterance": text, "Speaker": speaker, "Emotion": label, "StartTime": start,
            "Dialogue_ID": dialogue, "Utterance_ID": utterance,
        }  # fmt: skip
        writer.writerow([full.get(name, "0") for name in header])
    return out.getvalue()


def folder(tmp_path: Path, **splits: object) -> Path:
    """A MELD folder; each split is a list of rows, text or bytes."""
    path = tmp_path / "meld"
    path.mkdir()
    for split in ("train", "dev", "test"):
        content = splits.get(split, ROWS)
        if isinstance(content, list):
            content = csv_text(content)
        data = content if isinstance(content, bytes) else content.encode()
        (path / f"{split}_sent_emo.csv").write_bytes(data)
    return path


def error(path: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        read_meld(path, **options)
    return str(caught.value)


def test_rows_become_dialogues_in_order_with_ids_that_restart_in_each_split(tmp_path):
    corpus = read_meld(folder(tmp_path))
    for split in ("train", "dev", "test"):
        first, second = corpus.splits[split]
        assert (first.dialogue_id, second.dialogue_id) == ("0", "2")
        assert [(t.speaker, t.text, t.labels, t.turn_id) for t in first.turns] == [
            ("Ada", "The kettle is on.", {"neutral": 1.0}, "0"),
            ("Bo", "You found it, how lovely!", {"joy": 1.0}, "1"),
        ]
    assert corpus.label_set is MELD
    assert corpus.report.labels["dev"]["fear"] == 1 and corpus.report.labels["dev"]["anger"] == 0


def test_utterance_id_orders_turns_and_never_time(tmp_path):
    rows = [
        ("Later in time.", "Ada", "neutral", 0, 0, "0:00:09,000"),
        ("Earlier in time.", "Bo", "neutral", 0, 1, "00:00:03,000"),
        ("Third.", "Bo", "neutral", 1, 1, "0:00:01,000"),
        ("Second.", "Bo", "neutral", 1, 0, "0:00:02,000"),
    ]
    corpus = read_meld(folder(tmp_path, train=rows))
    assert [[t.text for t in d.turns] for d in corpus.splits["train"]] == [
        ["Later in time.", "Earlier in time."],
        ["Second.", "Third."],
    ]
    order = "meld/train_sent_emo.csv: 1 turns have a StartTime earlier than the turn before; "
    assert any(w.startswith(order) for w in corpus.report.warnings)
    assert any("1 dialogues were not in order of Utterance_ID" in w for w in corpus.report.warnings)


def test_gaps_count_missing_first_utterances(tmp_path):
    rows = [("One.", "Ada", "joy", 0, 1, "0:00:01,000"), ("Three.", "Ada", "joy", 0, 4, "0:00:02,000")]
    infos = read_meld(folder(tmp_path, test=rows)).report.infos
    assert (
        "meld/test_sent_emo.csv: 1 dialogues have gaps in Utterance_ID (3 utterances absent from the "
        "release)." in infos
    )


def test_dyadic_variant_is_refused_by_its_header(tmp_path):
    header = [name for name in HEADER if name not in ("Sr No.", "Utterance_ID")] + ["Old_Dialogue_ID"]
    message = error(folder(tmp_path, train=csv_text(ROWS, header)))
    assert message.startswith("meld/train_sent_emo.csv:1: missing column 'Utterance_ID'")
    assert "(found: Utterance, Speaker, Emotion, " in message
    assert message.endswith(
        "This looks like the dyadic variant (data/MELD_Dyadic); use data/MELD/train_sent_emo.csv."
    )
    complete = csv_text(ROWS, [*HEADER, "Old_Dialogue_ID"])
    (tmp_path / "second").mkdir()
    assert "dyadic variant" in error(folder(tmp_path / "second", dev=complete))


def test_known_missing_clip_is_named(tmp_path):
    rows = [(f"Line {i}.", "Ada", "joy", 0, i, "0:00:01,000") for i in range(4)]
    many = [(f"Line {i}.", "Ada", "joy", 1 + i // 300, i % 300, "") for i in range(1104)]
    warnings = read_meld(folder(tmp_path, dev=rows + many)).report.warnings
    assert (
        "MELD dev has 1,108 utterances, the published split has 1,109: 'dia110_utt7' is missing "
        "(dropped by multimodal preprocessing)." in warnings
    )
    assert "MELD test has 3 utterances, the published split has 2,610." in warnings


def test_c1_controls_are_repaired_and_counted_by_character(tmp_path):
    rows = [("It\u0092s mine\u0085", "Bo\u0092s twin", "joy", 0, 0, ""), ("Fine.", "Cy", "joy", 0, 1, "")]
    corpus = read_meld(folder(tmp_path, train=rows))
    turn = corpus.splits["train"][0].turns[0]
    assert (turn.text, turn.speaker) == ("It\u2019s mine\u2026", "Bo\u2019s twin")
    expected = (
        "meld/train_sent_emo.csv: 2 utterances contain U+0080-U+009F (cp1252 punctuation stored as control "
        "codes, MELD copies older than 2020-11); repaired: 2 x U+0092 -> U+2019, 1 x U+0085 -> U+2026."
    )
    assert expected in corpus.report.warnings and expected in corpus.report.repairs


def test_real_files_have_exactly_the_published_counts(selfemo_data):
    corpus = load_corpus("meld", selfemo_data)
    report = corpus.report
    assert report.rows == report.labelled == {"train": 9989, "dev": 1109, "test": 2610}
    assert report.dialogues == {"train": 1038, "dev": 114, "test": 280}
    order = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    counts = {split: tuple(report.labels[split][label] for label in order) for split in report.labels}
    assert counts == {
        "train": (4710, 1743, 1205, 1109, 683, 271, 268),
        "dev": (470, 163, 150, 153, 111, 22, 40),
        "test": (1256, 402, 281, 345, 208, 68, 50),
    }
    assert "60" not in {dialogue.dialogue_id for dialogue in corpus.splits["train"]}
    backwards = [w.split(": ")[1].split()[0] for w in report.warnings if "StartTime" in w]
    assert backwards == ["23", "4", "4"] and len(report.warnings) == 3
    gaps = [info.split(": ")[1] for info in report.infos if "gaps" in info]
    assert [gap.split()[0] for gap in gaps] == ["72", "2", "2"]
    assert [gap.split("(")[1].split()[0] for gap in gaps] == ["100", "4", "5"]
    assert report.repairs == ()
    assert {len(digest) for digest in report.files.values()} == {64}


def test_old_copies_of_the_real_files_are_repaired_to_the_current_text(selfemo_data, tmp_path):
    path = tmp_path / "meld"
    path.mkdir()
    old = str.maketrans({c: chr(c.encode("cp1252")[0]) for c in "\u2019\u2026\u2014\u2018\u201c\u201d"})
    for split in ("train", "dev", "test"):
        name = f"{split}_sent_emo.csv"
        text = (selfemo_data / "meld" / name).read_bytes().decode()
        (path / name).write_bytes(text.translate(old).encode())
    assert read_meld(path).splits == load_corpus("meld", selfemo_data).splits

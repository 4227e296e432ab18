"""Overlap counted line by line: by hand, and the known numbers of the real files."""

import pickle

import pytest

from selfemo_jax.data.audit import decontaminate
from selfemo_jax.data.dialogues import EMORYNLP, MELD, Dialogue, Turn, load_corpora, make_corpus
from selfemo_jax.data.leakage import (
    CrossOverlap,
    OwnOverlap,
    cross_overlap,
    num_aligned,
    own_overlap,
    tables,
    words_of,
)

A = ("Ada", "The ferry leaves at nine in the morning.")
B = ("Bo", "I packed seven coats and one umbrella!")
C = ("Ada", "Nobody told me about the storm tonight.")


def corpus(labels, full_names=False, **splits):
    made = {
        split: [
            Dialogue(
                dataset=labels.name,
                split=split,
                dialogue_id=str(number),
                turns=tuple(
                    Turn(speaker=f"{name} Smith" if full_names else name, text=text, labels={"neutral": 1.0})
                    for name, text in dialogue
                ),
            )
            for number, dialogue in enumerate(dialogues)
        ]
        for split, dialogues in splits.items()
    }
    return make_corpus(labels, made)


def test_words_drop_apostrophes_and_part_at_everything_else():
    assert words_of("Don\u2019t say 'caf\u00e9'\u2014I'm OK!") == ("dont", "say", "cafe", "im", "ok")
    assert words_of("!") == ()


def test_own_overlap_by_hand():
    hm = ("Bo", "Hm, yes.")
    meld = corpus(
        MELD,
        train=[[A, hm, B], [hm, A], [hm]],
        test=[[hm, A], [hm], [A, ("Bo", "No."), ("Ada", B[1])]],
        dev=[],
    )
    assert own_overlap(meld, "test") == OwnOverlap(
        rows=6,
        exact=5,
        long=3,
        long_exact=3,
        informative=3,
        verbatim=3,
        near=3,
        dialogues=3,
        identical=1,
        shared=2,
    )


def test_rows_nearly_those_of_own_training_are_counted_whoever_says_them():
    near = ("Bo", "The ferry leaves at nine in the evening.")  # 6 of 8 words
    part = ("Cy", "Well, I packed seven coats and one umbrella, you know.")
    far = ("Ada", "The ferry leaves on Monday with the captain.")  # 3 of 11 words
    again, short = ("Bo", A[1]), ("Ada", "The ferry.")
    meld = corpus(MELD, train=[[A, B]], test=[[near, far], [part, again, short]], dev=[])
    found = own_overlap(meld, "test")
    assert (found.informative, found.verbatim, found.near) == (4, 1, 3)


def test_scripted_and_improvised_dialogues_of_iemocap_are_also_counted_apart(tmp_path):
    said = {
        "Ses01F_script01_1": ["I never wanted to leave this island.", "Why do you always come back late?"],
        "Ses01F_impro01": ["The baggage desk is closed today, sorry."],
        "Ses03F_impro01": ["Sit down!"],
        "Ses02F_impro02": ["Good morning."],
        "Ses05M_script01_1": ["I never wanted to leave this island!", "Why do you always come home late?"],
        "Ses05M_script02_1": ["Then we walk.", "Nobody here has seen the postman today."],
        "Ses05F_impro01": ["Somebody took my passport at the gate.", "The tide is out."],
    }
    speakers = {name: ["M", "F"][: len(lines)] for name, lines in said.items()}
    labels = {name: [2] * len(lines) for name, lines in said.items()}
    names = list(said)
    (tmp_path / "iemocap").mkdir()
    content = [speakers, labels, said, names[:3], names[4:], names[3:4]]
    (tmp_path / "iemocap" / "iemocap.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (corpus,) = load_corpora(["iemocap"], tmp_path)
    own = tables({"iemocap": corpus})["own"]
    counts = {
        where: tuple(found[what] for what in ("dialogues", "rows", "informative", "verbatim", "near"))
        for where, found in own.items()
    }
    assert counts == {
        "iemocap/dev": (1, 1, 0, 0, 0),
        "iemocap/dev improvised": (1, 1, 0, 0, 0),
        "iemocap/test": (3, 6, 4, 1, 2),
        "iemocap/test scripted": (2, 4, 3, 1, 2),  # the near row shares 6 of 8 words
        "iemocap/test improvised": (1, 2, 1, 0, 0),
    }


def test_cross_overlap_by_hand_compares_first_names():
    near = ("Ada", "The ferry leaves at nine in the evening.")  # 7 of 9 words
    part = ("Bo", "Well, I packed seven coats and one umbrella, you know.")
    meld = corpus(MELD, train=[[A, ("Bo", "Hm."), B], [C]], test=[], dev=[])
    other = ("Cy", C[1])
    emory = corpus(
        EMORYNLP, full_names=True, train=[], dev=[], test=[[near, ("Bo", "Hm."), part, other], [A, other]]
    )
    assert cross_overlap(emory, "test", meld) == CrossOverlap(
        dialogues=2, shared=1, rows=6, rows_in_shared=4, rows_aligned=3, informative=5, verbatim=1, near=3
    )


def test_alignment_keeps_the_order_and_pairs_a_row_once():
    a, b, c = (words_of(text) for _, text in (A, B, C))
    assert num_aligned([a, b, c], [a, c]) == 2
    assert num_aligned([a, b], [b, a]) == 1
    assert num_aligned([a], [a, a]) == 1
    assert num_aligned([a, ()], [(), a]) == 1, "rows without words pair with nothing"
    said = ("oh", "no", "not", "you")
    assert num_aligned([said], [said]) == 1, "equal rows pair however short they are"
    assert num_aligned([said], [(*said, "again", "please")]) == 0, "four words are not enough"
    assert num_aligned([(*said, "again")], [(*said, "again", "please")]) == 1


@pytest.fixture(scope="module")
def real(selfemo_data):
    return {c.name: c for c in load_corpora(["meld", "emorynlp"], selfemo_data)}


@pytest.mark.parametrize(
    ("name", "split", "percent", "long", "long_exact", "verbatim", "near", "shared"),
    [
        ("meld", "dev", 15.3, 644, 0, 2, 25, 0),
        ("meld", "test", 15.5, 1506, 5, 9, 62, 3),
        ("emorynlp", "dev", 23.4, 449, 12, 18, 45, 4),
        ("emorynlp", "test", 19.6, 499, 0, 0, 9, 0),
    ],
)
def test_real_overlap_of_a_set_with_itself(
    real, name, split, percent, long, long_exact, verbatim, near, shared
):
    found = own_overlap(real[name], split)
    assert round(100 * found.exact / found.rows, 1) == percent
    assert (found.long, found.long_exact, found.identical, found.shared) == (long, long_exact, 0, shared)
    assert (found.verbatim, found.near) == (verbatim, near)


# By another implementation of the same words all of these are the same, but near rows of MELD: 290 and 69.
@pytest.mark.parametrize(
    ("name", "split", "other", "shared", "in_shared", "aligned", "informative", "verbatim", "near"),
    [
        ("emorynlp", "test", "meld", 16, 199, 145, 573, 92, 101),
        ("emorynlp", "dev", "meld", 27, 248, 190, 529, 115, 130),
        ("meld", "test", "emorynlp", 63, 559, 385, 1705, 248, 294),
        ("meld", "dev", "emorynlp", 15, 149, 100, 718, 55, 70),
    ],
)
def test_real_overlap_across_sets(
    real, name, split, other, shared, in_shared, aligned, informative, verbatim, near
):
    found = cross_overlap(real[name], split, real[other])
    assert (found.shared, found.rows_in_shared, found.rows_aligned) == (shared, in_shared, aligned)
    assert (found.informative, found.verbatim, found.near) == (informative, verbatim, near)


@pytest.fixture(scope="module")
def cleaned(real):
    return decontaminate(real)[0]


# The other implementation has 0.7 % and 0.6 %. Before decontamination too it finds four near rows less in
# MELD's test split; four less here are 11 rows, which is 0.6 %.
@pytest.mark.parametrize(
    ("name", "other", "verbatim", "near", "percent"),
    [("emorynlp", "meld", 0, 4, 0.7), ("meld", "emorynlp", 4, 15, 0.9)],
)
def test_real_rows_left_after_decontamination(cleaned, name, other, verbatim, near, percent):
    found = cross_overlap(cleaned[name], "test", cleaned[other])
    assert (found.shared, found.verbatim, found.near) == (0, verbatim, near)
    assert round(100 * found.near / found.informative, 1) == percent

import json
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfemo_jax import run_data
from selfemo_jax.config import Config, DataSection
from selfemo_jax.data import audit
from selfemo_jax.data.audit import (
    decontaminate,
    eval_parts,
    leakage_warnings,
    scored_parts,
    shared_dialogues,
)
from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, Dialogue, Turn, load_corpora, make_corpus
from selfemo_jax.run_data import load_data
from tools import data

A = "The ferry leaves at nine in the morning."
B = "I packed seven coats and one umbrella!"
C = "Nobody told me about the storm tonight."
D = "Let us ask the captain for a cabin."
ACTED = [
    *("Ses01F_script01_1", "Ses01F_impro01", "Ses03F_impro01"),
    "Ses02F_impro02",
    *("Ses05M_script01_1", "Ses05F_impro01", "Ses05F_impro02"),
]


def dialogue(*texts, name="0", split="train", dataset="meld"):
    turns = tuple(Turn(speaker="Ada", text=text, labels={"neutral": 1.0}) for text in texts)
    return Dialogue(dataset=dataset, split=split, dialogue_id=name, turns=turns)


def is_shared(one, other, rule="strict"):
    pairs = shared_dialogues([dialogue(*one)], [dialogue(*other, split="test")], rule=rule)
    return len(pairs) == 1


def test_two_informative_lines_in_the_same_order_make_a_pair():
    (pair,) = shared_dialogues([dialogue(A, "Hm.", B, C)], [dialogue(D, A, C, name="9", split="dev")])
    assert (pair.first, pair.second) == ("meld/train/0", "meld/dev/9")
    assert (pair.num_matches, pair.longest) == (2, 8)


def test_order_and_number_of_matches_matter():
    assert is_shared([A, B], [A, "So.", B])
    assert not is_shared([A, B], [B, A])
    assert not is_shared([A, C], [A, D])
    assert not is_shared([A, C], [A, A]), "one line cannot be two matches"


def test_a_dialogue_with_one_informative_line_is_shared_by_it_alone():
    assert is_shared(["Hm.", A], [D, A, C]) and is_shared([D, A, C], ["Oh?", A])
    assert not is_shared([C], [D, C]), "seven words are not enough"
    assert not is_shared([C, A], [D, A])


def test_lines_below_five_words_say_nothing():
    short = ["What is that noise?", "Come in, sit down."]
    assert not is_shared(short, short) and not is_shared(short, short, "wide")
    assert is_shared([f"{line} Now" for line in short], [f"{line} Now" for line in short])


def test_case_punctuation_apostrophes_and_accents_do_not_hide_a_match():
    one = ["He\u2019s gone to the caf\u00e9 again", "WE ARE \u2014 all of us \u2014 late"]
    other = ["he's gone, to the cafe again!", "we are all of us late"]
    assert is_shared(one, other)


def test_near_means_jaccard_at_least_six_tenths():
    one = ["a b c d e", "p q r s t"]
    assert is_shared(one, ["a b c x d", "p q r y s"])  # 4 of 6 words
    assert not is_shared(one, ["a b c x y", "p q r y z"])  # 3 of 7 words
    ten = [" ".join("abcdefghij"), " ".join("klmnopqrst")]
    assert is_shared(ten, ["a b c d e f x y z w v".replace(" z w v", " g h i"), "k l m n o p q r s z"])
    # Exactly 6 of 10.
    assert is_shared(["a b c d e f g h", "k l m n o p q r"], ["a b c d e f x y", "k l m n o p x y"])


def test_containment_is_word_for_word():
    long = "well you see we never wanted to leave the old house by the sea"
    assert is_shared([A, long], [A, "we never wanted to leave"])
    assert not is_shared([A, long], [A, "we wanted never to leave"])


def test_wide_rule_adds_verbatim_lines_and_long_parts():
    assert is_shared([A, C], [D, A], "wide") and not is_shared([A, C], [D, A])  # eight words verbatim
    seven = "Nobody told me about the storm tonight."
    assert not is_shared([seven, A], [seven, D], "wide")
    assert is_shared([seven, B], [B, seven], "wide")  # two lines verbatim, in any order
    part = "one two three four five six seven eight nine ten eleven twelve"
    longer = f"{part} and then many other words that nobody ever heard before"
    assert is_shared([longer, A], [part, D], "wide") and not is_shared([longer, A], [part, D])
    assert not is_shared([longer, A], [part.removesuffix(" twelve"), D], "wide")


def test_the_index_finds_exactly_what_comparing_all_lines_finds():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(12)]

    def invented(split):
        return [
            dialogue(
                *(" ".join(rng.choices(words, k=rng.randint(5, 9))) for _ in range(4)),
                name=str(i),
                split=split,
            )
            for i in range(25)
        ]

    first, second = invented("train"), invented("test")
    found = audit._matches(audit._lines(first), audit._lines(second))
    pairs = {(k, m.turns) for k, matches in found.items() for m in matches}
    expected = set()
    for one in audit._lines(first):
        for other in audit._lines(second):
            common = len(one.unique & other.unique)
            jaccard = common / len(one.unique | other.unique)
            texts = sorted((" ".join(one.words), " ".join(other.words)), key=len)
            if jaccard >= 0.6 - 1e-12 or f" {texts[0]} " in f" {texts[1]} ":
                expected.add(((one.dialogue, other.dialogue), (one.turn, other.turn)))
    assert pairs == expected and len(pairs) > 100


def corpus(labels, **splits):
    made = {
        split: [
            dialogue(*texts, name=name, split=split, dataset=labels.name) for name, texts in content.items()
        ]
        for split, content in splits.items()
    }
    return make_corpus(labels, made)


@pytest.fixture
def corpora():
    return {
        "meld": corpus(
            MELD, train={"0": [A, B], "1": [C, D], "2": ["Short."]}, test={"0": ["Other words here."]}
        ),
        "emorynlp": corpus(EMORYNLP, train={"x": [D, C]}, dev={"y": [A, B]}, test={"z": ["None of it."]}),
    }


def test_decontaminate_drops_training_dialogues_and_says_so(corpora):
    cleaned, report = decontaminate(corpora)
    assert [d.dialogue_id for d in cleaned["meld"].splits["train"]] == ["1", "2"]
    assert cleaned["emorynlp"].splits == corpora["emorynlp"].splits
    assert cleaned["meld"].splits["test"] == corpora["meld"].splits["test"]
    message = (
        "unified training: 1 of 3 MELD train dialogues repeat scenes of EmoryNLP dev/test; dropped "
        "(decontaminate=True)."
    )
    assert report["messages"] == [message] and cleaned["meld"].report.leakage == (message,)
    assert (report["dropped"], report["rows"]) == (["meld/train/0"], 2)
    assert cleaned["meld"].report.skipped == {"train dialogues dropped by decontamination": 1}
    assert json.loads(json.dumps(report)) == report
    again, nothing = decontaminate(cleaned)
    assert nothing["dropped"] == [] and again["meld"].splits == cleaned["meld"].splits


def test_parts_tell_shared_dialogues_from_clean_ones(corpora):
    assert eval_parts(corpora) == {
        "meld/test/0": "clean",
        "emorynlp/dev/y": "shared",
        "emorynlp/test/z": "clean",
    }


def test_own_overlap_is_dropped_but_for_sets_that_repeat_scripts_by_design():
    meld = corpus(MELD, train={"0": [A, B]}, test={"1": [A, B]})
    acted = corpus(IEMOCAP, train={"Ses01": [C, D]}, test={"Ses05": [C, D]})
    cleaned, report = decontaminate({"meld": meld, "iemocap": acted})
    assert report["dropped"] == ["meld/train/0"]
    assert report["messages"][0].startswith("training: 1 of 1 MELD train dialogues repeat scenes of MELD")
    assert cleaned["iemocap"].splits == acted.splits
    assert eval_parts({"iemocap": acted}) == {"iemocap/test/Ses05": "shared"}
    assert decontaminate({"iemocap": acted}, keep_own=())[1]["dropped"] == ["iemocap/train/Ses01"]


def test_scored_parts_of_iemocap_are_scripted_and_improvised_whatever_training_repeats():
    acted = corpus(
        IEMOCAP,
        train={"Ses01F_script01_1": [C, D]},
        test={"Ses05F_script01_1": [C, D], "Ses05M_impro02": [A, B], "odd": [C, D]},
    )
    meld = corpus(MELD, train={"0": [A, B]}, test={"1": [A, B], "2": [C]})
    assert scored_parts({"iemocap": acted, "meld": meld}) == {
        "iemocap/test/Ses05F_script01_1": "scripted",
        "iemocap/test/Ses05M_impro02": "improvised",
        "iemocap/test/odd": "shared",
        "meld/test/1": "shared",
        "meld/test/2": "clean",
    }


def test_overlap_inside_a_set_is_a_warning_or_an_error_by_policy():
    meld = corpus(MELD, train={"51": [A, B]}, test={"155": [A, B]})
    assert leakage_warnings(meld) == (
        "test dialogue 155 shares 2 long utterances with train dialogue 51 (official split: allowed by "
        "policy 'official').",
    )
    with pytest.raises(
        ValueError, match="meld: test dialogue 155 shares 2 long utterances with train dialogue 51"
    ):
        leakage_warnings(meld, policy="strict")
    with pytest.raises(ValueError, match="policy is 'lax'; expected 'official' or 'strict'"):
        leakage_warnings(meld, policy="lax")
    with pytest.raises(ValueError, match="rule is 'loose'; expected one of strict, wide"):
        shared_dialogues([], [], rule="loose")


@pytest.fixture(scope="session")
def real(selfemo_data):
    return {c.name: c for c in load_corpora(["meld", "emorynlp"], selfemo_data)}


def test_real_training_dialogues_dropped_are_48_meld_and_80_emorynlp(real):
    start = time.perf_counter()
    cleaned, report = decontaminate(real)
    assert time.perf_counter() - start < 20
    hit = {}
    for pair in report["pairs"]:
        hit.setdefault((pair["first"].split("/")[0], pair["second"].split("/")[0]), set()).add(pair["first"])
    # The published list has a fourth MELD dialogue, 831, which no rule on the text alone gives.
    assert {key: len(ids) for key, ids in hit.items()} == {
        ("meld", "emorynlp"): 48,
        ("emorynlp", "meld"): 80,
        ("meld", "meld"): 3,
        ("emorynlp", "emorynlp"): 5,
    }
    assert {i.split("/")[2] for i in hit["meld", "meld"]} == {"12", "51", "776"}
    episodes = {i.split("/")[2] for i in hit["emorynlp", "emorynlp"]}
    assert episodes == {"s01_e05_c15", "s01_e07_c11", "s02_e07_c11", "s03_e15_c07", "s03_e16_c01"}
    rows = {
        key: sum(len(d.turns) for d in real[key[0]].splits["train"] if audit.root_id(d) in ids)
        for key, ids in hit.items()
    }
    assert rows["meld", "emorynlp"] == 528 and rows["emorynlp", "meld"] == 881
    assert len(report["dropped"]) == sum(
        len(real[n].splits["train"]) - len(cleaned[n].splits["train"]) for n in real
    )


def test_real_evaluation_dialogues_by_the_strict_rule(real):
    counts = {}
    for side, split, source in (
        ("emorynlp", "test", "meld"),
        ("emorynlp", "dev", "meld"),
        ("meld", "test", "emorynlp"),
        ("meld", "dev", "emorynlp"),
    ):
        pairs = shared_dialogues(real[side].splits[split], real[source].splits["train"])
        counts[side, split] = len({pair.first for pair in pairs})
    assert list(counts.values()) == [16, 27, 63, 15]


def test_real_overlap_inside_meld_is_the_known_three(real):
    lines = leakage_warnings(real["meld"])
    assert [line.split(" (")[0] for line in lines] == [
        "test dialogue 84 shares 1 long utterance with train dialogue 12",
        "test dialogue 85 shares 4 long utterances with train dialogue 12",
        "test dialogue 155 shares 2 long utterances with train dialogue 51",
    ]


def tool(*args):
    script = Path(__file__).resolve().parents[2] / "tools" / "data.py"
    return subprocess.run(
        [sys.executable, str(script), *args],
        capture_output=True,
        text=True,
        cwd=script.parents[1],
        timeout=60,
    )


def test_tool_prints_stats_and_audit_and_saves_them(tmp_path):
    stats = tool("stats", "sample", "--json", str(tmp_path / "stats.json"))
    assert stats.returncode == 0 and "sample_emorynlp: " in stats.stdout
    saved = json.loads((tmp_path / "stats.json").read_text())
    assert saved["sample_meld"]["rows"]["train"] > 0
    result = tool("audit", "sample", "--json", str(tmp_path / "audit.json"))
    assert result.returncode == 0 and "decontaminate=True drops 0 training dialogues" in result.stdout
    assert set(json.loads((tmp_path / "audit.json").read_text())["parts"].values()) == {"clean"}
    (tmp_path / "meld").mkdir()
    (tmp_path / "meld" / "dev_sent_emo.csv").write_text("x")
    fetched = tool("fetch", "--list", "--root", str(tmp_path)).stdout.splitlines()
    states = {line.split()[0]: line.split(maxsplit=1)[1] for line in fetched if line.startswith("    ")}
    assert (
        states["dev_sent_emo.csv"] == "not the published bytes" and states["test_sent_emo.csv"] == "missing"
    )
    wrong = tool("stats", "mled")
    assert (
        wrong.returncode == 2 and "did you mean 'meld'?" in wrong.stderr and "Traceback" not in wrong.stderr
    )
    # A root that was misspelt must not be answered with the bundled sample.
    empty = tool("stats", "--root", str(tmp_path / "dtaa"))
    assert (empty.returncode, empty.stdout) == (2, "") and empty.stderr.startswith("error: ")


def test_tool_tells_the_parts_of_iemocap_that_evaluation_scores(tmp_path):
    lines = {name: ["Where is the ferry?"] for name in ACTED}
    content = [{name: ["F"] for name in ACTED}, {name: [2] for name in ACTED}, lines, ACTED[:3], ACTED[4:]]
    (tmp_path / "iemocap").mkdir()
    (tmp_path / "iemocap" / "iemocap.pkl").write_bytes(pickle.dumps([*content, ACTED[3:4]], protocol=2))
    result = tool("audit", "iemocap", "--root", str(tmp_path), "--json", str(tmp_path / "audit.json"))
    scored = "dialogues by the part they are scored in"
    assert f"IEMOCAP dev, {scored}: 1 improvised\n" in result.stdout
    assert f"IEMOCAP test, {scored}: 1 scripted, 2 improvised\n" in result.stdout
    assert json.loads((tmp_path / "audit.json").read_text())["parts"] == {
        "iemocap/dev/Ses02F_impro02": "improvised",
        "iemocap/test/Ses05M_script01_1": "scripted",
        "iemocap/test/Ses05F_impro01": "improvised",
        "iemocap/test/Ses05F_impro02": "improvised",
    }


def test_tool_tells_what_decontamination_leaves(tmp_path, monkeypatch, capsys):
    meld = corpus(MELD, train={"0": [A, B], "1": [D, "We never ate the cake there."]}, test={"0": [C]})
    emory = corpus(EMORYNLP, train={"x": ["Hm."]}, test={"z": [A, B], "y": [D, C, "Yes."]})
    monkeypatch.setattr(data, "load_corpora", lambda names, root: (meld, emory))
    data.main(["audit", "meld", "emorynlp", "--json", str(tmp_path / "audit.json")])
    # The wide rule drops D too, eight words in a dialogue that shares no other line; the strict one does not.
    left = "left after that, emorynlp/test < meld: of 4 rows with five words or more the same speaker says"
    assert f"{left} 0 word for word, 0 nearly" in capsys.readouterr().out
    data.main(["audit", "meld", "emorynlp", "--rule", "strict"])
    line = f"{left} 1 word for word, 1 nearly (25.0 %, was 75.0 %)\n"
    assert line in capsys.readouterr().out
    residual = json.loads((tmp_path / "audit.json").read_text())["residual"]
    assert residual["emorynlp/test < meld"]["near"] == 0


def test_tool_scores_one_set_alone_as_beside_its_sister(tmp_path, monkeypatch, capsys):
    there = {
        "meld": corpus(MELD, train={"0": [A, B]}, test={"0": [C]}),
        "emorynlp": corpus(EMORYNLP, train={"x": ["Hm."]}, test={"z": [A, B], "y": [D]}),
    }

    def read(names, root):
        for name in names:
            if name not in there:
                raise FileNotFoundError(f"{root}/{name} does not exist")
        return tuple(there[name] for name in names)

    monkeypatch.setattr(data, "load_corpora", read)
    monkeypatch.setattr(run_data, "load_corpora", read)

    def audited():
        data.main(["audit", "emorynlp", "--root", "DIR", "--json", str(tmp_path / "audit.json")])
        saved = json.loads((tmp_path / "audit.json").read_text())
        return capsys.readouterr().out, saved

    told, saved = audited()
    assert "MELD: not named, but its training decides shared and clean too, as in scores\n" in told
    assert "EmoryNLP test, dialogues by the part they are scored in: 1 shared, 1 clean\n" in told
    assert saved["parts"] == {"emorynlp/test/z": "shared", "emorynlp/test/y": "clean"}
    assert (saved["parts_from"], saved["unread"]) == (["emorynlp", "meld"], {})
    assert saved["dropped"] == [] and saved["overlap"]["cross"] == {}, "the other set is not trained on"
    del there["meld"]
    told, saved = audited()
    assert "MELD cannot be read: shared and clean are not those of scores that have it (DIR/meld " in told
    assert "EmoryNLP test, dialogues by the part they are scored in: 2 clean\n" in told
    assert (saved["parts_from"], saved["unread"]) == (["emorynlp"], {"meld": "DIR/meld does not exist"})


def test_real_emorynlp_alone_has_the_parts_that_evaluation_scores(selfemo_data, tmp_path, capsys):
    data.main(["audit", "emorynlp", "--root", str(selfemo_data), "--json", str(tmp_path / "audit.json")])
    assert "EmoryNLP test, dialogues by the part they are scored in: 16 shared, 63 clean\n" in (
        capsys.readouterr().out
    )
    scored = load_data(Config(data=DataSection(sets=["emorynlp"], root=str(selfemo_data))))
    assert json.loads((tmp_path / "audit.json").read_text())["parts"] == scored.parts


def test_real_utterances_in_shared_parts(real):
    parts = scored_parts(real)
    counts = {
        (name, split): sum(len(d.turns) for d in c.splits[split] if parts[audit.root_id(d)] == "shared")
        for name, c in real.items()
        for split in ("dev", "test")
    }
    assert counts == {
        ("meld", "dev"): 149,
        ("meld", "test"): 568,
        ("emorynlp", "dev"): 271,
        ("emorynlp", "test"): 199,
    }

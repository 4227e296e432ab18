"""The labelled inputs of a run: which, how many, in which order, and their fingerprint."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from selfemo_jax import evaluate, run_data
from selfemo_jax.config import Config, DataSection, Reward
from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, Corpus, Dialogue, Turn, make_corpus
from selfemo_jax.run_data import by_dataset, doubts, fixed_subset, load_data
from selfemo_jax.settings.experts import Persona
from tests.fabricated import sample

UNTOLD = Config(data=DataSection(persona=False))
"""Settings under which nobody misses a persona."""


def dialogue(number: int, split: str, labels=MELD, *, told=("neutral", "sadness", "neutral")) -> Dialogue:
    """Ada, Bo, Ada: the second turn alone has a context and an answer by somebody else."""
    turns = zip(("Ada", "Bo", "Ada"), ("One.", "Two.", "Three."), told, strict=True)
    return Dialogue(
        dataset=labels.name,
        split=split,
        dialogue_id=str(number),
        turns=tuple(
            Turn(speaker=speaker, text=f"{text} {number}", labels={label: 1.0} if label else None)
            for speaker, text, label in turns
        ),
        personas={"Ada": f"Ada has {number} cats."},
    )


def corpora(*, changed: str = "sadness") -> dict[str, Corpus]:
    meld = {
        "train": [
            *(dialogue(n, "train") for n in range(29)),
            dialogue(29, "train", told=("joy", changed, None)),
        ],
        "dev": [dialogue(n, "dev") for n in range(4)],
        "test": [dialogue(n, "test", told=("anger", None, "fear")) for n in range(3)],
    }
    happy = ("happy", "sad", "happy")
    iemocap = {
        split: [dialogue(n, split, IEMOCAP, told=happy) for n in range(number)]
        for split, number in (("train", 10), ("dev", 2))
    }
    return {"meld": make_corpus(MELD, meld), "iemocap": make_corpus(IEMOCAP, iemocap)}


@pytest.fixture
def loaded(monkeypatch):
    """Loads the corpora above under data settings; `given` are their changes."""

    def load(*, given=None, seed=0, **data):
        found = given or corpora()
        monkeypatch.setattr(run_data, "load_corpora", lambda names, root, **options: tuple(found.values()))
        return load_data(Config(seed=seed, data=DataSection(sets=list(found), **data)))

    return load


SCENE = ("The ferry leaves at nine in the morning.", "I packed seven coats and one umbrella.", "Good.")


def aboard(labels, split: str) -> Dialogue:
    told = {"labels": {labels.labels[0]: 1.0}}
    turns = tuple(Turn(speaker=s, text=text, **told) for s, text in zip("ABA", SCENE, strict=True))
    return Dialogue(dataset=labels.name, split=split, dialogue_id="x", turns=turns)


def test_parts_are_those_of_the_data_before_decontamination(loaded):
    found = corpora()["meld"].splits
    same = [aboard(MELD, split) for split in ("train", "test")]
    meld = make_corpus(
        MELD,
        {"train": [*found["train"], same[0]], "dev": found["dev"], "test": [*found["test"], same[1]]},
    )
    for decontaminate in (False, True):
        data = loaded(given={"meld": meld}, decontaminate=decontaminate)
        kept = any(s.root_id == "meld/train/x" for s in data.train["meld"])
        assert kept != decontaminate
        assert data.parts["meld/test/x"] == "shared"
        assert {s.root_id for split in ("dev", "test") for s in data.split(split)} == data.parts.keys()
        assert set(data.parts.values()) == {"shared", "clean"}


@pytest.fixture
def there(monkeypatch):
    """The sets that can be read, of which one test dialogue of MELD is a training dialogue of EmoryNLP."""
    meld = corpora()["meld"].splits
    found = {
        "meld": make_corpus(MELD, {**meld, "test": [*meld["test"], aboard(MELD, "test")]}),
        "emorynlp": make_corpus(
            EMORYNLP, {split: [aboard(EMORYNLP, split)] for split in ("train", "dev", "test")}
        ),
    }

    def read(names, root, **options):
        missing = [name for name in names if name not in found]
        if missing:
            raise FileNotFoundError(f"{missing[0]} does not exist")
        return tuple(found[name] for name in names)

    monkeypatch.setattr(run_data, "load_corpora", read)
    return found


def test_a_run_of_one_set_is_scored_on_the_parts_of_a_run_of_both(there):
    def load(*names):
        return load_data(Config(data=DataSection(sets=list(names))))

    both, one = load("meld", "emorynlp"), load("meld")
    assert one.parts["meld/test/x"] == both.parts["meld/test/x"] == "shared"
    assert one.parts == {root: part for root, part in both.parts.items() if root.startswith("meld/")}
    assert one.parts_from == both.parts_from == ("emorynlp", "meld")
    assert set(one.train) == {"meld"} and doubts(one, UNTOLD) == ()
    del there["emorynlp"]
    there["iemocap"] = corpora()["iemocap"]
    alone = load("meld", "iemocap")
    # Named as in a run of both they would be paired with parts that are others.
    assert alone.parts["meld/test/x"] == "clean (without emorynlp)"
    assert {part for root, part in alone.parts.items() if root.startswith("iemocap")} == {"clean"}
    assert alone.parts_from == ("iemocap", "meld")
    (line,) = doubts(alone, UNTOLD)
    assert line.startswith("data: emorynlp cannot be read: the parts shared and clean are not those of runs")


def test_an_evaluation_says_that_its_parts_are_not_those_of_runs_of_both_sets(there, tmp_path, capsys):
    words = ["--yardsticks", "--data.sets=[meld]", "--split", "test", "--out", str(tmp_path)]
    said = "data: emorynlp cannot be read: the parts shared and clean are not those of runs that have it"
    assert evaluate.main(words) == 0
    assert said not in capsys.readouterr().out
    del there["emorynlp"]
    assert evaluate.main(words) == 0
    assert f"{said}, and say so in their names (emorynlp does not exist)\n" in capsys.readouterr().out


def test_real_meld_alone_has_the_shared_dialogues_of_both_sets(selfemo_data):
    data = load_data(Config(data=DataSection(sets=["meld"], root=str(selfemo_data))))
    shared = [root for root, part in data.parts.items() if part == "shared" and "/test/" in root]
    # Of MELD's own training dialogues 3, of EmoryNLP's 63, and 1 is of both.
    assert len(shared) == 65


def test_a_similarity_of_labels_that_no_set_has_is_refused(monkeypatch):
    monkeypatch.setattr(run_data, "load_corpora", lambda names, root, **options: tuple(corpora().values()))

    def load(pair):
        reward = Reward(primary="similarity", similarity={pair: 0.5})
        return load_data(Config(reward=reward, data=DataSection(sets=["meld", "iemocap"])))

    load("happy/excited")
    with pytest.raises(ValueError, match="'joy/happy', but no data set has both labels"):
        load("joy/happy")


def test_training_inputs_follow_the_rule_and_evaluation_takes_every_labelled_turn(loaded):
    data = loaded()
    assert {name: len(samples) for name, samples in data.train.items()} == {"iemocap": 10, "meld": 30}
    assert {s.target_speaker for s in data.all_train()} == {"Bo"}
    counts = {split: {name: len(s) for name, s in sets.items()} for split, sets in data.evaluation.items()}
    assert counts == {"dev": {"iemocap": 6, "meld": 12}, "test": {"iemocap": 0, "meld": 6}}
    assert data.report["train_inputs"] == {"iemocap": 10, "meld": 30}
    assert data.report["evaluation_inputs"] == counts
    assert len(loaded(rule="all").train["meld"]) == 89


def test_inputs_come_set_after_set(loaded):
    data = loaded()
    assert [s.dataset for s in data.all_train()] == ["iemocap"] * 10 + ["meld"] * 30
    assert [s.dataset for s in data.split("dev")] == ["iemocap"] * 6 + ["meld"] * 12


def test_a_split_that_is_not_there_is_named_with_those_that_are(loaded):
    with pytest.raises(ValueError, match="no split 'validation'; the data has dev, test"):
        loaded().split("validation")


def test_classes_are_the_longest_list_and_a_slot_for_the_unknown(loaded):
    assert loaded().num_classes == 8
    assert loaded(given={"iemocap": corpora()["iemocap"]}).num_classes == 7


def test_the_majority_is_counted_over_all_training_turns(loaded):
    # Among the inputs of the rule it would be sadness and sad.
    assert loaded().majority == {"meld": "neutral", "iemocap": "happy"}


def test_equal_counts_go_to_the_label_that_the_list_names_first(loaded):
    even = [dialogue(n, "train", told=("joy", "surprise", None)) for n in range(3)]
    assert loaded(given={"meld": make_corpus(MELD, {"train": even})}).majority == {"meld": "surprise"}


def test_a_set_without_any_training_label_is_refused(loaded):
    blank = make_corpus(MELD, {"train": [dialogue(0, "train", told=(None,) * 3)]})
    with pytest.raises(ValueError, match="data set meld: no turn of its train split has a label"):
        loaded(given={"meld": blank})


def test_personas_are_those_of_training_dialogues_by_root(loaded):
    data = loaded()
    assert data.personas["meld/train/7"] == {"Ada": "Ada has 7 cats."}
    assert {root.split("/")[1] for root in data.personas} == {"train"}
    assert {s.root_id for s in data.all_train()} <= set(data.personas)


def test_max_items_keeps_the_shares_of_the_sets_and_is_fixed_by_the_seed(loaded):
    data = loaded(max_items=8)
    assert {name: len(samples) for name, samples in data.train.items()} == {"iemocap": 2, "meld": 6}
    ids = [s.id for s in data.all_train()]
    assert ids == [s.id for s in loaded(max_items=8).all_train()]
    assert ids != [s.id for s in loaded(max_items=8, seed=1).all_train()]
    whole = [s.id for s in loaded().all_train()]
    assert ids == [one for one in whole if one in ids]
    assert loaded(max_items=8).evaluation == loaded().evaluation


def test_max_items_above_the_data_takes_all(loaded):
    assert loaded(max_items=40).train == loaded().train == loaded(max_items=1000).train


def test_shuffled_gold_keeps_the_inputs_and_the_label_counts_of_each_set(loaded):
    told = [("neutral", label, "neutral") for label in MELD.labels[:6] for _ in range(5)]
    given = corpora() | {
        "meld": make_corpus(MELD, {"train": [dialogue(n, "train", told=t) for n, t in enumerate(told)]})
    }
    plain, shuffled = loaded(given=given), loaded(given=given, shuffle_gold=True)
    for name in plain.train:
        before, after = plain.train[name], shuffled.train[name]
        assert [replace(s, gold={}) for s in after] == [replace(s, gold={}) for s in before]
        counts = [Counter(label for s in samples for label in s.gold) for samples in (before, after)]
        assert counts[0] == counts[1]
    moved = sum(a.gold != b.gold for a, b in zip(plain.train["meld"], shuffled.train["meld"], strict=True))
    assert moved > 15
    assert shuffled.train == loaded(given=given, shuffle_gold=True).train
    assert shuffled.train != loaded(given=given, shuffle_gold=True, seed=1).train
    assert shuffled.evaluation == plain.evaluation


def test_the_fingerprint_changes_with_one_label_and_only_with_the_data(loaded):
    data = loaded()
    assert loaded().fingerprint == data.fingerprint and len(data.fingerprint) == 64
    others = {
        "one training label": loaded(given=corpora(changed="fear")),
        "a subset": loaded(max_items=39),
        "another rule": loaded(rule="any_responder"),
        "shuffled": loaded(given=corpora(changed="fear"), shuffle_gold=True),
    }
    dev = corpora()
    dev["iemocap"] = make_corpus(IEMOCAP, {**dev["iemocap"].splits, "dev": []})
    others["a smaller dev split"] = loaded(given=dev)
    found = {name: other.fingerprint for name, other in others.items()}
    assert len({data.fingerprint, *found.values()}) == 6, found
    assert loaded(seed=5).fingerprint == data.fingerprint


def test_what_the_readers_doubt_and_what_was_dropped_is_told_and_kept(loaded):
    scene = ("The ferry leaves at nine in the morning.", "I packed seven coats and one umbrella.", "Good.")
    turns = tuple(Turn(speaker=s, text=t, labels={"joy": 1.0}) for s, t in zip("ABA", scene, strict=True))
    found = corpora()["meld"].splits
    same = [Dialogue(dataset="own", split=split, dialogue_id="x", turns=turns) for split in ("train", "test")]
    own = make_corpus(
        replace(MELD, name="own"),
        {"train": [*found["train"], same[0]], "dev": found["dev"], "test": [same[1]]},
        warnings=("own test has 3 utterances",),
    )
    data = loaded(given={"own": own}, decontaminate=True)
    warned, dropped = doubts(data, UNTOLD)
    assert warned == "data: own test has 3 utterances"
    assert dropped.startswith("data: training: 1 of 31 ") and dropped.endswith(
        "dropped (decontaminate=True)."
    )
    assert json.loads(json.dumps(data.report))["readers"]["own"]["warnings"] == ["own test has 3 utterances"]
    assert doubts(loaded(), UNTOLD) == ()


def test_data_without_a_dev_split_is_told(loaded):
    meld = corpora()["meld"]
    (line,) = doubts(loaded(given={"meld": make_corpus(MELD, {**meld.splits, "dev": ()})}), UNTOLD)
    assert "no labelled dev utterance" in line


def test_playing_roles_without_a_persona_is_told(loaded):
    config, meld = Config(), corpora()["meld"].splits
    nobody = [replace(one, personas={}) for one in meld["train"]]
    # Ada answers in each of them.
    known = [*nobody[1:], meld["train"][0]]
    data = loaded(given={"meld": make_corpus(MELD, {**meld, "train": nobody})})
    (line,) = doubts(data, config)
    assert "no training input has a persona" in line and "persona.source expert" in line
    for source in ("expert", "none"):
        assert doubts(data, replace(config, persona=Persona(source=source))) == ()
    assert doubts(data, UNTOLD) == doubts(data, replace(config, phases="none")) == ()
    assert doubts(loaded(given={"meld": make_corpus(MELD, {**meld, "train": known})}), config) == ()


def test_decontamination_comes_before_the_inputs(loaded, monkeypatch):
    def half(given):
        return {
            name: make_corpus(c.label_set, {**c.splits, "train": c.splits["train"][::2]})
            for name, c in given.items()
        }, {"meld": 15}

    monkeypatch.setattr(run_data, "decontaminate", half)
    assert len(loaded().train["meld"]) == 30
    data = loaded(decontaminate=True)
    assert len(data.train["meld"]) == 15 and data.report["decontaminated"] == {"meld": 15}


def test_the_root_of_the_data_is_the_setting_before_the_environment(monkeypatch):
    seen = []

    def load(names, root, **options):
        seen.append((names, root and str(root), options))
        return tuple(corpora().values())

    monkeypatch.setattr(run_data, "load_corpora", load)
    monkeypatch.setenv("SELFEMO_DATA", "from/environment")
    load_data(Config(data=DataSection(sets=["meld"], root="from/setting", speaker_style="index")))
    load_data(Config(data=DataSection(sets=["meld"])))
    monkeypatch.delenv("SELFEMO_DATA")
    load_data(Config(data=DataSection(sets=["meld"])))
    # MELD itself, then EmoryNLP, which decides what of it is shared.
    roots = ["from/setting", "from/environment", None]
    assert [root for _, root, _ in seen[::2]] == roots == [root for _, root, _ in seen[1::2]]
    assert seen[0][2] == {"speaker_style": "index"}


def test_a_fixed_subset_depends_on_seed_and_purpose_and_keeps_the_order():
    samples = [sample(n, gold={"joy": 1.0}) for n in range(50)]
    chosen = fixed_subset(samples, 12, seed=0, purpose="dev")
    assert len(set(s.id for s in chosen)) == 12
    assert [samples.index(s) for s in chosen] == sorted(samples.index(s) for s in chosen)
    assert chosen == fixed_subset(samples, 12, seed=0, purpose="dev")
    assert chosen != fixed_subset(samples, 12, seed=1, purpose="dev")
    assert chosen != fixed_subset(samples, 12, seed=0, purpose="cold/meld")
    assert fixed_subset(samples, None, seed=0, purpose="dev") == tuple(samples)
    assert fixed_subset(samples, 99, seed=0, purpose="dev") == tuple(samples)


def test_samples_are_grouped_by_data_set_in_order():
    mixed = [sample(n, labels=labels, gold={}) for n, labels in enumerate((MELD, IEMOCAP, MELD))]
    assert by_dataset(mixed) == {"meld": (mixed[0], mixed[2]), "iemocap": (mixed[1],)}


def test_the_bundled_sample_is_three_sets_with_inputs_in_every_split():
    data = load_data(Config())
    assert len(data.train) == 3 and data.num_classes == 8
    assert set(data.evaluation) == {"dev", "test"}
    for sets in (data.train, *data.evaluation.values()):
        assert set(sets) == set(data.label_sets) and all(sets.values())
    for name, samples in data.train.items():
        assert {s.dataset for s in samples} == {name}
        assert all(
            s.inventory == data.label_sets[name].labels and set(s.gold) <= set(s.inventory) for s in samples
        )
    assert load_data(Config(seed=3)).fingerprint == data.fingerprint


def test_no_training_input_of_the_bundled_sample_is_evaluated_on():
    data = load_data(Config())
    train = {s.history for s in data.all_train()}
    assert train.isdisjoint(s.history for split in data.evaluation for s in data.split(split))

"""What stops a run before it begins: prompts that do not fit, sets that are not there, another verifier."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from selfemo_jax import run_checks
from selfemo_jax.data.dialogues import IEMOCAP, Dialogue, Turn
from selfemo_jax.data.prompts import PromptTooLong
from selfemo_jax.parts import build_parts, bundled_tokenizer
from selfemo_jax.run_checks import check_prompts, check_verifier
from selfemo_jax.scores import encode_prompt
from tests import micro
from tests.fabricated import codec, run_data, sample, settings

HARVESTS = {"retrain": {"init": "cold"}}


def long(number: int, words: int, **changes):
    history = (("Ada", "The ferry left without us."), ("Bo", "row " * words))
    return sample(number, gold={"joy": 1.0}, history=history, **changes)


def short(number: int = 0, **changes):
    return sample(number, gold={"joy": 1.0}, **changes)


def test_all_inputs_that_cannot_be_asked_are_named_with_what_they_need():
    train = [*(short(n) for n in range(40)), *(long(n, 100 + n) for n in range(50, 58))]
    with pytest.raises(PromptTooLong) as alone:
        encode_prompt(train[-1], codec(), settings(), persona=True)
    with pytest.raises(ValueError) as found:
        check_prompts(settings(), codec(), run_data({"meld": train}))
    message = str(found.value)
    needed = alone.value.num_tokens
    assert needed > 128 and f"meld/train/d1/57 ({needed} tokens), meld/train/d1/56 (" in message
    assert "meld/train/d1/53 (" in message and "meld/train/d1/52" not in message
    assert "at least 3 more" in message and f"raise it to {needed} or more" in message
    # What it says is enough.
    enough = settings(data={"max_prompt": needed}, batch={"row_tokens": 512, "micro_rows": 1})
    check_prompts(enough, codec(), run_data({"meld": train}))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_inputs_that_are_scored_are_looked_at(split):
    data = run_data({"meld": [short()]})
    data = replace(data, evaluation={split: {"meld": (short(1), long(7, 150, split=split))}})
    with pytest.raises(ValueError, match="meld/train/d1/7"):
        check_prompts(settings(), codec(), data)
    if split == "test":
        check_prompts(settings(eval={"final_splits": ["dev"]}), codec(), data)


def test_what_a_run_does_not_read_does_not_stop_it():
    unanswered = long(7, 150, reference=None)
    data = run_data({"meld": [short(), unanswered]})
    with pytest.raises(ValueError, match="meld/train/d1/7"):
        check_prompts(settings(), codec(), data)
    # Nobody's reply is learned, and nothing else is trained.
    check_prompts(settings(phases="cold"), codec(), data)
    check_prompts(settings(phases="none"), codec(), run_data({"meld": [long(7, 150)]}))
    # Its label is, where all lines are.
    turns = tuple(Turn(speaker="Bo", text=text, labels={"joy": 1.0}) for _, text in unanswered.history)
    dialogue = Dialogue(dataset="meld", split="train", dialogue_id="d1", turns=turns)
    data = replace(data, dialogues={"meld/train/d1": dialogue})
    check_prompts(settings(phases="cold"), codec(), data)
    with pytest.raises(ValueError, match="meld/train/d1/1"):
        check_prompts(
            settings(phases="cold", cold_start={"rows": "dialogues", "lines": "all"}), codec(), data
        )


def test_a_persona_counts_where_it_is_told():
    data = run_data({"meld": [short(persona="Cy is " + "very " * 150 + "calm.")]})
    with pytest.raises(ValueError, match="meld/train/d1/0"):
        check_prompts(settings(), codec(), data)
    check_prompts(settings(data={"persona": False}), codec(), data)


@pytest.mark.parametrize("words", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.max_prompt": 40}, "with their last turn alone the prompts of these inputs are longer"),
        ({"data.mixture.kind": "weights", "data.mixture.weights": "{sample_meld: 1}"}, "the run has ["),
        ({"flywheel.iterations": 1, "flywheel.verifier.weights": "no/such"}, "weights: no/such: no such"),
    ],
)
def test_a_run_and_a_dry_run_stop_before_anything_is_written(tmp_path, capsys, changes, told, words):
    assert micro.run(tmp_path / "run", *micro.random_settings(), *micro.flags(changes), *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_of_the_mixture_are_looked_at_only_where_they_are_used():
    data = run_data({"meld": [short()], "iemocap": [short(labels=IEMOCAP)]})
    run_checks.check_mixture(settings(), data)
    weights = {"kind": "weights", "weights": {"meld": 1.0, "iemocap": 2.0}}
    run_checks.check_mixture(settings(data={"sets": ["meld", "iemocap"], "mixture": weights}), data)


@pytest.fixture
def folder(tmp_path):
    """A verifier's folder: the shape and the tokenizer of the policy of `settings`, and no arrays."""
    parts = build_parts(settings(flywheel=HARVESTS))
    shutil.copytree(bundled_tokenizer(), tmp_path / "verifier")
    config = parts.model.to_hf() | {"torch_dtype": "bfloat16"}
    (tmp_path / "verifier" / "config.json").write_text(json.dumps(config))
    (tmp_path / "verifier" / "model.safetensors").touch()
    return tmp_path / "verifier"


def opened(folder):
    config = settings(flywheel=HARVESTS | {"verifier": {"weights": str(folder)}})
    check_verifier(build_parts(config))


def test_a_verifier_of_the_policys_shape_and_tokenizer_is_taken(folder):
    opened(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    opened(folder)


def test_a_verifier_of_another_shape_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0}))
    with pytest.raises(ValueError, match=r"rope_theta 777.0 \(10000.0\)"):
        opened(folder)


def test_a_verifier_with_other_tokens_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its tokenizer has other tokens than the policy's"):
        opened(folder)


def test_a_folder_that_no_harvest_will_ask_is_not_looked_at():
    config = settings(
        flywheel={"iterations": 0, "verifier": {"weights": "no/such"}, "retrain": {"init": "cold"}}
    )
    check_verifier(SimpleNamespace(config=config))

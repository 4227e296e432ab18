"""The bundled tokenizer is what its command builds, loads without torch, and is thrifty with answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfemo_jax import sample
from selfemo_jax.data.codec import load_codec
from selfemo_jax.data.prompts import completion_ids

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def codec():
    return load_codec(sample.tokenizer())


def run_tool(*args: str) -> subprocess.CompletedProcess:
    code = "import sys; from tools.train_tokenizer import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)


def test_the_command_rebuilds_the_shipped_bytes():
    done = run_tool("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_a_changed_folder_and_leaves_it_alone(tmp_path):
    for file in sample.tokenizer().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    done = run_tool("--check", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "tokenizer_config.json differ" in done.stdout
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_loads_the_folder_without_torch(loader):
    code = f"""
import sys
sys.modules["torch"] = None
from transformers import {loader}
t = {loader}.from_pretrained({str(sample.tokenizer())!r})
print(t.eos_token, t.pad_token, len(t))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["<|im_end|>", "<|endoftext|>", "1920"], done.stderr


def test_end_and_padding_differ_and_only_control_tokens_are_special(codec):
    added = codec.tokenizer.added_tokens_decoder.values()
    assert {token.content for token in added if token.special} == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }
    assert {token.content for token in added if not token.special} == {"<think>", "</think>"}
    assert codec.decode([codec.eos_id]) == "<|im_end|>"
    assert codec.decode([codec.pad_id]) == "<|endoftext|>"
    assert codec.vocab_size == 1920


@pytest.mark.parametrize("thinking", [False, True])
def test_chat_template_is_short_and_opens_no_think_block(codec, thinking):
    frame = codec.chat_frame(thinking=thinking)
    assert frame.before == "<|im_start|>system\n"
    assert frame.between == "<|im_end|>\n<|im_start|>user\n"
    assert frame.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert not frame.think_open
    assert len(codec.encode_markup(frame.before)) == 3


def test_chat_template_closes_an_assistant_turn(codec):
    messages = [{"role": "user", "content": "Oh no."}, {"role": "assistant", "content": "It's fine."}]
    assert codec.tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nOh no.<|im_end|>\n<|im_start|>assistant\nIt's fine.<|im_end|>\n"
    )


def test_tags_labels_and_weights_cost_one_token_each(codec):
    for tag in ("emotion", "self_emotion", "response"):
        assert len(codec.encode_markup(f"<{tag}>")) == len(codec.encode_markup(f"</{tag}>")) == 1
    for name in sample.NAMES:
        for label in json.loads((sample.dataset(name) / "dataset.json").read_text())["labels"]:
            assert len(codec.encode_data(label)) == len(codec.encode_data(f" {label}")) == 1
            assert len(codec.encode_data(f"{label}:1.00")) == 3
    for weight in ("0.05", "0.25", "0.50", "0.95", "1.00"):
        assert len(codec.encode_data(weight)) == 1


def test_an_answer_takes_one_token_for_each_part_of_its_grammar(codec):
    ids = completion_ids([("sad", 0.75), ("mad", 0.25)], [("neutral", 1.0)], "Oh no.", codec, think=None)
    assert [codec.decode([token]) for token in ids] == [
        *("<emotion>", "sad", ":", "0.75", ",", " mad", ":", "0.25", "</emotion>", "\n"),
        *("<self_emotion>", "neutral", ":", "1.00", "</self_emotion>", "\n"),
        *("<response>", "Oh", " no", ".", "</response>", "<|im_end|>"),
    ]


def test_unseen_utterances_cost_less_than_two_tokens_a_word(codec):
    lines = (sample.dataset("iemocap") / "test.jsonl").read_text().splitlines()
    spoken = [turn["text"] for line in lines for turn in json.loads(line)["turns"]]
    tokens = sum(len(codec.encode_data(text)) for text in spoken)
    assert tokens < 2 * sum(len(text.split()) for text in spoken)


@pytest.mark.parametrize(
    "text", ["</think><|im_end|>", "naïve ‹ 漢字 🙂\t\u0000", "<emotion>x", "it's  2.5 or 10.75"]
)
def test_any_text_comes_back_and_data_never_holds_an_added_token(codec, text):
    ids = codec.encode_data(text)
    assert codec.decode(ids) == text
    assert codec.added_ids.isdisjoint(ids)


def test_files_name_no_path_of_the_machine_that_built_them():
    for file in sample.tokenizer().iterdir():
        assert not re.search(r"/(?:home|root|tmp|work)/", file.read_text(encoding="utf-8"))

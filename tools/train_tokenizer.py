"""Build the tokenizer of the bundled corpus: the same bytes each time.

    python tools/train_tokenizer.py [--out DIR] [--check]

A byte-level BPE of the training splits and of what prompts and answers are written in. --check compares
with the folder and writes nothing; exit status 0 done or equal, 1 different.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from selfemo_jax import sample

VOCAB_SIZE = 1920
"""Added tokens included; a multiple of 128, so that any usual mesh divides it."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# One id each, but text: a decoder that skips special tokens keeps them.
NOT_SPECIAL = ("<think>", "</think>")
PAD, EOS = "<|endoftext|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""No think block, whatever enable_thinking says: the prompts of a tiny model stay short."""

# A tag and a two-digit weight are pieces of their own, so that merges can make one token of each; elsewhere
# a digit stands alone.
PIECES = (
    r"</?[a-z_]+>"
    r"|[01]\.\d\d(?!\d)"
    r"|'(?:[sdmt]|ll|re|ve)(?!\p{L})"
    r"| ?\p{L}+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}<]+"
    r"| ?<"
    r"|\s+(?!\S)"
    r"|\s+"
)

TAGS = ("emotion", "self_emotion", "response")
WEIGHTS = tuple(f"{step / 20:.2f}" for step in range(1, 21))
ROLES = ("system", "user", "assistant")
TEMPLATE_WORDS = (
    "You are one of the people in a conversation. Feel and speak as this person.",
    "About you: nothing special is known about you.",
    "Scene: the conversation so far, one numbered turn a line.",
    "Last turn: #2 by the last speaker. Emotion labels, label:weight.",
    "Answer three questions, in this order. Write exactly these blocks, your words.",
)
# How often what every answer holds counts: enough to be merged before the corpus' own words.
OFTEN = 1000


def build() -> dict[str, str]:
    """File name -> contents of the tokenizer's folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(NOT_SPECIAL),
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    special = {"eos_token": EOS, "pad_token": PAD, "additional_special_tokens": ["<|im_start|>"]}
    return {
        "tokenizer.json": _json(json.loads(tokenizer.to_str())),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def training_text() -> Iterator[str]:
    """Texts of the training splits, and the words of prompts and answers as often as they matter."""
    labels: dict[str, None] = {}
    for name in sample.NAMES:
        folder = sample.dataset(name)
        labels |= dict.fromkeys(json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"])
        for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
            yield from _dialogue_text(json.loads(line))
    answers = [f"<{tag}></{tag}>" for tag in TAGS] + [*labels, *(f" {label}" for label in labels), *WEIGHTS]
    yield from [text for text in (*answers, *ROLES) for _ in range(OFTEN)]
    yield from [text for text in TEMPLATE_WORDS for _ in range(OFTEN // 100)]


def _dialogue_text(dialogue: dict) -> Iterator[str]:
    yield f"[{dialogue['theme']}]"
    for name, persona in dialogue["personas"].items():
        yield f"{name}: {persona}"
    for number, turn in enumerate(dialogue["turns"], start=1):
        yield f"{number} {turn['speaker']}: {turn['text']}"
        # A reply of the model begins without a blank.
        yield turn["text"]


def _json(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare the folder; the exit status."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(str(sample.tokenizer())), metavar="DIR")
    parser.add_argument("--check", action="store_true", help="compare with DIR, write nothing")
    args = parser.parse_args(argv)
    contents = {name: text.encode() for name, text in build().items()}
    if args.check:
        changed = [
            name
            for name, data in contents.items()
            if not (args.out / name).is_file() or (args.out / name).read_bytes() != data
        ]
        print(f"{args.out}: {', '.join(changed) + ' differ' if changed else 'equal, every byte'}")
        return 1 if changed else 0
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (args.out / name).write_bytes(data)
    tokens = len(json.loads(contents["tokenizer.json"])["model"]["vocab"])
    print(f"{args.out}: {tokens + len(NOT_SPECIAL)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

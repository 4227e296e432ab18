"""A small byte-level BPE tokenizer folder with the added tokens and a Qwen-like template, trained here."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "1. Mona: Did you hear about the garden party? It rains again, I am so sad about it.",
    "2. Tarek: You are joking. We carried forty chairs up the hill this morning!",
    "Last turn: #2 by Tarek Emotion labels: neutral, joy, sadness, anger, fear, surprise, disgust",
    "<emotion>joy:0.80, surprise:0.30</emotion>\n<self_emotion>sadness:0.50</self_emotion>\n",
    "<response>Then let us dance under the roof of the old barn.</response>\n",
    "You are Mona, one of the people in a conversation. Feel and speak as this person.",
    "system user assistant think tool_call im_start im_end endoftext",
] * 3

ADDED = [
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<think>", False),
    ("</think>", False),
]

# In the form of Qwen3's: thinking off puts an empty block into the prompt, thinking on leaves it out.
TEMPLATE = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + (m.content | trim) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
OPEN_TEMPLATE = TEMPLATE.replace(
    "    {%- endif %}\n{%- endif %}", "    {%- else %}{{- '<think>\\n' }}{%- endif %}\n{%- endif %}"
)
assert OPEN_TEMPLATE != TEMPLATE


def write_folder(folder, *, template=TEMPLATE, in_vocabulary=False, added=ADDED, alphabet=True, nfc=True):
    """in_vocabulary: the vocabulary itself holds the added tokens, and whole words are looked up first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=in_vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not in_vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[content for content, _ in added] if in_vocabulary else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(
        [AddedToken(content, special=special, normalized=False) for content, special in added]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]}
        )
    )
    return folder


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    return lambda name="tokenizer", **options: write_folder(tmp_path_factory.mktemp(name), **options)


@pytest.fixture(scope="session")
def tokenizer_folder(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def open_think_folder(make_tokenizer):
    return make_tokenizer(template=OPEN_TEMPLATE)


@pytest.fixture(scope="session")
def codec(tokenizer_folder):
    from selfemo_jax.data.codec import load_codec

    return load_codec(tokenizer_folder)

"""Text to token ids and back, with a wall between template text and what people said.

A fast tokenizer turns `</think>` or `<|im_end|>` into one id wherever it stands, so a line of dialogue
could close a turn. `TextCodec` therefore holds two tokenizers made of one vocabulary: `encode_markup` knows
the added tokens, `encode_data` does not, special or not, and spells them in ordinary tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

CACHE_SIZE = 1 << 16
"""Texts whose ids are kept, for each of the two encoders."""

_SYSTEM, _USER, _REPLY = "PLACEHOLDERxSYSTEMxQ", "PLACEHOLDERxUSERxQ", "PLACEHOLDERxREPLYxQ"

# Characters that a vocabulary may be unable to spell: control characters, and planes without any characters.
_RARE_RANGES = (
    *((chr(i), chr(i)) for i in (*range(9), 11, 12, *range(14, 32), 127)),
    ("\U00040000", "\U0007ffff"),
    ("\U00080000", "\U000bffff"),
    ("\U00100000", "\U0010ffff"),
)

# Every byte of UTF-8: ASCII, each continuation byte, each leading byte of 2, 3 and 4 byte characters.
_ALL_BYTES = (
    "".join(map(chr, range(128)))
    + "".join(chr(0xC0 + i) for i in range(64))
    + "".join(chr(i << 6 | 0x21) for i in range(2, 32))
    + "".join(chr(i << 12 | 0x801) for i in range(16) if i != 13)
    + "\ud7a3"
    + "".join(chr(i) for i in (0x1F642, 0x4E2D5, 0x8F3A1, 0xC1234, 0x10ABCD))
)


@dataclass(frozen=True, kw_only=True)
class ChatFrame:
    """What the chat template puts round a system and a user message, up to where the answer begins."""

    before: str
    between: str | None
    """None where the template takes no system message; the user message then begins with it."""
    after: str
    think_open: bool
    """`after` ends inside an open think block."""


class TextCodec:
    """The tokenizer of one model folder; immutable (its caches aside). Made by `load_codec`.

    tokenizer: the transformers tokenizer. eos_id: the token that ends an assistant turn. stop_ids: eos_id
    first, then the folder's other end tokens. pad_id; vocab_size: largest id + 1. added_ids: ids that
    `encode_data` never returns.
    """

    def __init__(self, tokenizer: Any, *, folder: str, generation_config: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self._made_with = {"folder": folder, "generation_config": dict(generation_config)}
        self._markup = tokenizer.backend_tokenizer
        self._data = _without_added_tokens(self._markup)
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        self.vocab_size = max(self._markup.get_vocab(with_added_tokens=True).values()) + 1
        self._unspelled = self._find_unspelled()
        self._encode_markup = lru_cache(maxsize=CACHE_SIZE)(self._encode_markup_now)
        self._encode_data = lru_cache(maxsize=CACHE_SIZE)(self._encode_data_now)
        self._frames = {thinking: _chat_frame(tokenizer, thinking, folder) for thinking in (False, True)}
        self.stop_ids = self._find_stop_ids(folder, generation_config)
        self.eos_id = self.stop_ids[0]
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        self._check_spelling(folder)

    def __reduce__(self):
        # A reader process gets the tokenizer and makes its own caches.
        return partial(TextCodec, **self._made_with), (self.tokenizer,)

    def encode_data(self, text: str) -> list[int]:
        """Ids of what a person or a model said: none is an added token, and they decode to the text.

        Up to the tokenizer's own normaliser (NFC in Qwen); lone surrogates become U+FFFD, and so do control
        characters and unassigned planes that the vocabulary has no bytes for (SmolLM2's lacks U+0004).
        """
        return list(self._encode_data(text))

    def encode_markup(self, text: str) -> list[int]:
        """Ids of template or tag text, in which added tokens are one id each; nothing is put round it."""
        return list(self._encode_markup(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, added tokens written out."""
        return self._markup.decode(list(ids), skip_special_tokens=False)

    def chat_frame(self, *, thinking: bool) -> ChatFrame:
        return self._frames[thinking]

    def normalise(self, text: str) -> str:
        """The text as `decode` gives it back."""
        text = self._unspelled.sub("\ufffd", text)
        return self._data.normalizer.normalize_str(text) if self._data.normalizer else text

    def _encode_markup_now(self, text: str) -> tuple[int, ...]:
        return tuple(self._markup.encode(text, add_special_tokens=False).ids)

    def _encode_data_now(self, text: str) -> tuple[int, ...]:
        encoding = self._data.encode(self._unspelled.sub("\ufffd", text), add_special_tokens=False)
        if self.added_ids.isdisjoint(encoding.ids):
            return tuple(encoding.ids)
        # The vocabulary itself holds an added token and spelled it; cut the text inside that token.
        hit = next(i for i, token_id in enumerate(encoding.ids) if token_id in self.added_ids)
        start, end = encoding.offsets[hit]
        if not 0 <= start < end - 1:
            start, end = 0, len(text)
        if end - start < 2:
            raise ValueError(
                f"the vocabulary cannot spell {text!r} without the added token {encoding.ids[hit]}"
            )
        middle = (start + end) // 2
        return self._encode_data_now(text[:middle]) + self._encode_data_now(text[middle:])

    def _find_stop_ids(self, folder: str, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        tail = rendered.rpartition(_REPLY)[2]
        of_turn = [i for i in self._encode_markup(tail) if i in self.added_ids][:1]
        listed = generation_config.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        known = [i for i in [*of_turn, self.tokenizer.eos_token_id, *listed] if i is not None]
        if not known:
            raise ValueError(
                f"{folder}: no token ends an assistant turn; the chat template closes none, and neither "
                "tokenizer_config.json nor generation_config.json names an eos token"
            )
        return tuple(dict.fromkeys(known))

    def _find_unspelled(self) -> re.Pattern[str]:
        def spelled(char: str) -> bool:
            return self.decode(self._data.encode(char, add_special_tokens=False).ids) == char

        lacking = [f"{first}-{last}" for first, last in _RARE_RANGES if not spelled(first)]
        return re.compile(f"[\ud800-\udfff{''.join(lacking)}]")

    def _check_spelling(self, folder: str) -> None:
        contents = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        for probe in [_ALL_BYTES, *contents, *(f"a {content}{content} b" for content in contents)]:
            try:
                ids = self._encode_data_now(probe)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}; use a tokenizer with a byte alphabet") from error
            if self.decode(ids) != self.normalise(probe):
                raise ValueError(
                    f"{folder}: the vocabulary cannot spell {probe[:80]!r}: it comes back as "
                    f"{self.decode(ids)[:80]!r}. Use a tokenizer with a byte alphabet (byte-level BPE)"
                )


def load_codec(folder: Path | Traversable) -> TextCodec:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a model folder (no code from it
    is run).

    ValueError if a file is missing, the chat template drops a message, or the vocabulary cannot spell every
    text without its added tokens.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(str(folder))
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: no tokenizer.json; a folder with a fast tokenizer is needed")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        generation_config = {}
        if (path / "generation_config.json").is_file():
            generation_config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    # The library raises whatever its parsers raise, bare `Exception` from tokenizer.json among them.
    except Exception as error:
        raise ValueError(
            f"{path}: its tokenizer cannot be read: {error}; copy tokenizer.json, tokenizer_config.json and "
            "generation_config.json anew from where the model came from"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: no chat template; add chat_template.jinja or use an instruct model's tokenizer"
        )
    return TextCodec(tokenizer, folder=str(path), generation_config=generation_config)


def _without_added_tokens(markup: Tokenizer) -> Tokenizer:
    spec = json.loads(markup.to_str())
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        # A blank put before the text would be part of what comes back.
        if part.get("add_prefix_space"):
            part["add_prefix_space"] = False
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(spec))


def _parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [part for child in node[key] for part in _parts(child, key)] if key in node else [node]


def _chat_frame(tokenizer: Any, thinking: bool, folder: str) -> ChatFrame:
    from jinja2 import TemplateError

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
            # Llama 3's template would print today's date; this is its own fallback.
            date_string="26 Jul 2024",
        )

    try:
        rendered = render([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    except TemplateError:
        rendered = ""
    between: str | None
    if rendered.count(_SYSTEM) == 1 and rendered.count(_USER) == 1:
        before, _, rest = rendered.partition(_SYSTEM)
        between, _, after = rest.partition(_USER)
    else:
        rendered = render([{"role": "user", "content": _USER}])
        if rendered.count(_USER) != 1:
            raise ValueError(
                f"{folder}: the chat template prints a user message {rendered.count(_USER)} times"
            )
        before, _, after = rendered.partition(_USER)
        between = None
    return ChatFrame(
        before=before,
        between=between,
        after=after,
        think_open=after.rfind("<think>") > after.rfind("</think>"),
    )

"""Find a tokenizer offline and encode with it; without one, estimate tokens from characters.

Only the `tokenizers` library is used, so that a laptop counts tokens without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sftplan.errors import NotReadyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

CHARACTERS_PER_TOKEN = 3.3
"""Characters per token of instruction data: what an estimate divides by.

Measured on 2026-11-23 with GPT-2's vocabulary on the turns of three public sets, characters over
tokens: alpaca_en_demo 787,446 / 170,677 = 4.61, glaive_toolcall_en_demo 506,350 / 111,945 = 4.52,
gpteacher_codegen (code) 1,808,423 / 650,993 = 2.78; together 3.32. By

    turns = [t.spoken for c in read_instructions(FILE).conversations for t in c.turns]
    sum(map(len, turns)) / sum(map(len, tokenizer.encode(turns, special=False, first=True)))
"""

_EOS_NAMES = ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "<|end_of_text|>")
_ANCHOR = "\n"  # never merges with the text after it, so its tokens can be taken off again


class Tokenizer(Protocol):
    """What the data path needs of a tokenizer. Ids of an `estimated` one mean nothing."""

    @property
    def name(self) -> str:
        """Where it is from."""

    @property
    def estimated(self) -> bool:
        """Whether tokens are only estimated from characters."""

    @property
    def eos_id(self) -> int:
        """The end-of-text token."""

    @property
    def bos_id(self) -> int | None:
        """The token that the tokenizer itself puts first, if any."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template."""

    @property
    def special_texts(self) -> dict[str, str]:
        """Special tokens by role (`bos_token`, `eos_token`, ...), as chat templates see them."""

    @property
    def end_tokens(self) -> dict[int, str]:
        """Special tokens by id: one of them ends an answer."""

    def encode(self, texts: Sequence[str], *, special: bool, first: bool) -> list[array[int]]:
        """Token ids of each text.

        `special`: special tokens written in the text count as such. `first`: the texts begin a
        sequence; otherwise nothing is put before them (SentencePiece's leading space).
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedTokenizer:
    """Stands in where no tokenizer is at hand; counts are right on average only."""

    name: str = f"estimated at {CHARACTERS_PER_TOKEN} characters per token"
    estimated: bool = True
    eos_id: int = 0
    bos_id: int | None = None
    chat_template: str | None = None

    @property
    def special_texts(self) -> dict[str, str]:
        """None."""
        return {}

    @property
    def end_tokens(self) -> dict[int, str]:
        """None."""
        return {}

    def encode(self, texts: Sequence[str], *, special: bool, first: bool) -> list[array[int]]:
        """As many zeros as tokens are estimated.

        >>> EstimatedTokenizer().encode(["Name three prime numbers."], special=False, first=True)
        [array('i', [0, 0, 0, 0, 0, 0, 0, 0])]
        """
        del special, first
        return [array("i", bytes(4 * math.ceil(len(t) / CHARACTERS_PER_TOKEN))) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """A dot per token."""
        return "".join("·" for _ in ids)


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library with what its configuration files say about it."""

    estimated = False

    def __init__(
        self,
        backend: Any,
        *,
        name: str,
        special_texts: dict[str, str],
        chat_template: str | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.name = name
        self.chat_template = chat_template
        self.special_texts = special_texts
        self.eos_id = self._eos_id()
        leading = list(backend.encode("", add_special_tokens=True).ids)[:1]
        self.bos_id = leading[0] if leading and leading[0] != self.eos_id else None

    def _eos_id(self) -> int:
        for text in (self.special_texts.get("eos_token"), *_EOS_NAMES):
            found = self._backend.token_to_id(text) if text else None
            if isinstance(found, int):
                self.special_texts.setdefault("eos_token", str(text))
                return found
        message = f"the tokenizer {self.name} has no end-of-text token"
        raise UsageError(message, "name it in tokenizer_config.json as eos_token")

    @cached_property
    def max_id(self) -> int:
        """The largest id that text can become; added tokens that only images use do not count."""
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return max(max(vocabulary.values(), default=0), self.eos_id)

    @cached_property
    def end_tokens(self) -> dict[int, str]:
        """Special tokens by id."""
        added = self._backend.get_added_tokens_decoder()
        special = {i: str(token.content) for i, token in added.items() if token.special}
        return special | {self.eos_id: self.special_texts["eos_token"]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides on the ids of a conversation."""
        settings = [self._backend.to_str(), self.chat_template, sorted(self.special_texts.items())]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @cached_property
    def _anchor_length(self) -> int:
        """Tokens of the anchor, or 0 where texts need none because nothing is put before them."""
        joined = self._ids([_ANCHOR + "a", _ANCHOR, "a"])
        return 0 if joined[0] == joined[1] + joined[2] else len(joined[1])

    def _ids(self, texts: Sequence[str]) -> list[array[int]]:
        encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        return [array("i", e.ids) for e in encode(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str], *, special: bool, first: bool) -> list[array[int]]:
        """Token ids of each text; see `Tokenizer`."""
        self._backend.encode_special_tokens = not special
        if first or not self._anchor_length:
            return self._ids(texts)
        return [ids[self._anchor_length :] for ids in self._ids([_ANCHOR + t for t in texts])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= self.special_texts
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# Embeddings are padded for the tiles of products: phi-2 has 51,200 rows for 50,295 ids, 1.8 % more.
OWN_VOCABULARY_FRACTION = 0.9


def check_vocabulary(tokenizer: Tokenizer, *, vocab_size: int, model: str) -> str | None:
    """What makes one doubt that the tokenizer is the model's, or None.

    Raises:
        UsageError: It makes ids that the model has no row for.
    """
    if not isinstance(tokenizer, BpeTokenizer):
        return None
    if tokenizer.max_id >= vocab_size:
        message = (
            f"the tokenizer {tokenizer.name} makes ids up to {tokenizer.max_id:,}, "
            f"{model} has {vocab_size:,} rows of vocabulary"
        )
        raise UsageError(message, "give the model's own tokenizer with --tokenizer DIR")
    if tokenizer.max_id + 1 >= OWN_VOCABULARY_FRACTION * vocab_size:
        return None
    return (
        f"the tokenizer {tokenizer.name} makes {tokenizer.max_id + 1:,} ids, {model} has "
        f"{vocab_size:,} rows of vocabulary: is it the model's own?"
    )


def tokenizers_library() -> Any:
    """The `tokenizers` module, or NotReadyError with the command that installs it."""
    try:
        import tokenizers
    except ImportError:
        message = "counting tokens needs the library `tokenizers`"
        raise NotReadyError(message, "pip install tokenizers") from None
    return tokenizers

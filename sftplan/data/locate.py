"""Where a model's tokenizer lies: a folder, or the hub's cache on this machine; never the network.

A folder counts with tokenizer.json, or with GPT-2's vocab.json and merges.txt.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.data.tokenizer import BpeTokenizer, EstimatedTokenizer, tokenizers_library
from sftplan.errors import NotReadyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftplan.data.tokenizer import Tokenizer


def find_tokenizer(*models: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `folder`, else that of the first name of `models` which has one here.

    Args:
        models: Names of one model: a folder, a file in it, or hub ids.
        folder: A folder that was asked for; it must hold a tokenizer.

    Returns:
        An estimate where no tokenizer or no `tokenizers` library is at hand.

    Raises:
        UsageError: The files are no tokenizer.
        NotReadyError: `folder` is given and the library is missing.
    """
    if folder is not None:
        return load_tokenizer(Path(folder))
    for candidate in _folders(models):
        if _holds_tokenizer(candidate):
            try:
                return load_tokenizer(candidate)
            except NotReadyError:
                break
    return EstimatedTokenizer()


def load_tokenizer(folder: Path) -> BpeTokenizer:
    """The tokenizer of a folder."""
    if not _holds_tokenizer(folder):
        message = f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt"
        raise UsageError(message, "save one with tokenizer.save_pretrained(DIR)")
    library = tokenizers_library()
    file = folder / "tokenizer.json"
    try:
        backend = (
            library.Tokenizer.from_file(str(file)) if file.is_file() else _gpt2(folder, library)
        )
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception
        message = f"{folder} holds no tokenizer that can be read: {error}"
        raise UsageError(message) from None
    template, special = _settings(folder)
    return BpeTokenizer(backend, name=str(folder), special_texts=special, chat_template=template)


def _holds_tokenizer(folder: Path) -> bool:
    gpt2 = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return gpt2 or (folder / "tokenizer.json").is_file()


def _gpt2(folder: Path, library: Any) -> Any:
    """Byte-level BPE from GPT-2's two files."""
    vocabulary = _json_object(folder / "vocab.json")
    if not any(token.startswith("Ġ") for token in vocabulary):
        message = f"{folder / 'vocab.json'} is no byte-level vocabulary as GPT-2's"
        raise UsageError(message, "save it as tokenizer.json with save_pretrained")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = library.Tokenizer(library.models.BPE.from_file(*files))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    special = [token for token in ("<|endoftext|>",) if token in vocabulary]
    backend.add_special_tokens(special)
    return backend


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{file} cannot be read: {error}"
        raise UsageError(message) from None
    if not isinstance(value, dict):
        message = f"{file} holds no object"
        raise UsageError(message)
    return value


def _settings(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Chat template and special tokens, from the files that transformers writes."""
    special: dict[str, str] = {}
    template: object = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = _json_object(folder / name)
            template = values.get("chat_template", template)
            for key, value in values.items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    special[key] = text
    if isinstance(template, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        template = separate.read_text(encoding="utf-8")
    return (template if isinstance(template, str) else None), special


def _folders(models: tuple[str, ...]) -> Iterator[Path]:
    for model in models:
        path = Path(model).expanduser()
        yield path if path.is_dir() else path.parent
    for model in models:
        yield from _cached(model)


def _cached(model: str) -> Iterator[Path]:
    """Snapshots of a hub id in the local cache, the one that `main` names first."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = cache / ("models--" + model.replace("/", "--"))
    snapshots = repository / "snapshots"
    if model.count("/") > 1 or not snapshots.is_dir():
        return
    reference = repository / "refs" / "main"
    if reference.is_file():
        yield snapshots / reference.read_text(encoding="utf-8").strip()
    yield from sorted(snapshots.iterdir())

"""From what people write after --model to a shape: a name, a folder, a file or a hub id.

In this order: a built-in name or hub id, a local path, the local Hugging Face cache, the hub. A
bare word never reaches the network; a folder that is named like a built-in model is `./name`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sftplan.errors import UsageError
from sftplan.facts.catalogue import find_builtin, suggest_builtin
from sftplan.facts.config import shape_from_config
from sftplan.facts.fields import parse_object

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

MAX_CONFIG_BYTES = 4 * 1024 * 1024  # published ones hold a few KB; a weight file is told at once
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def resolve_model(reference: str) -> ModelShape:
    """The shape of the model that `reference` names.

    >>> resolve_model("gpt2-large").hidden_size
    1280
    >>> resolve_model("openai-community/gpt2-large").source
    'builtin'
    """
    reference = reference.strip()
    if not reference:
        message = "the model's name is empty"
        raise UsageError(message, suggest_builtin(""))
    path = _existing(reference)
    if path is None or "/" not in reference:
        shape = find_builtin(reference)
        if shape is not None:
            return shape
    if path is not None:
        return _from_path(path, reference)
    if _HUB_ID.fullmatch(reference) and not reference.endswith(".json"):
        return find_builtin(reference) or _from_hub(reference)
    if "/" in reference or "\\" in reference or reference.endswith(".json"):
        message = f"no file or folder {_shown(reference)}"
        raise UsageError(
            message, "a model is a built-in name, a folder or file with a config.json, or a hub id"
        )
    message = f"no model named {_shown(reference)}"
    raise UsageError(message, suggest_builtin(reference))


def _shown(reference: str) -> str:
    return repr(reference if len(reference) <= 100 else f"{reference[:97]}...")


def _existing(reference: str) -> Path | None:
    """The local path, or None; text that is no path at all, such as one with a NUL, is none."""
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _from_path(path: Path, reference: str) -> ModelShape:
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            message = f"{path}: the folder has no config.json"
            raise UsageError(message, _folder_hint(path))
        name = path.resolve().name
    else:
        file = path
        name = path.stem if path.name != "config.json" else path.resolve().parent.name
    text = _read(file)
    config = parse_object(text, str(file))
    return shape_from_config(config, name=name or reference, source=str(file), text=text)


def _folder_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter; give the base model that the adapter was trained on"
    return "a model's folder needs the config.json that transformers writes with `save_pretrained`"


def _read(file: Path) -> str:
    """The text of a configuration; what cannot be one is refused before it is read."""
    try:
        if not file.is_file():
            message = f"{file}: not a regular file"
            raise UsageError(message)
        if file.stat().st_size > MAX_CONFIG_BYTES:
            message = f"{file}: {file.stat().st_size:,} bytes is no configuration"
            raise UsageError(message, "give the config.json beside the weights, or their folder")
        content = file.read_bytes()
    except OSError as error:
        message = f"{file}: {error.strerror or error}"
        raise UsageError(message) from None
    return decode_config(content, str(file))


def decode_config(content: bytes, source: str) -> str:
    """UTF-8 text without a byte order mark, which transformers could not read either."""
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        message = f"{source}:1: starts with a byte order mark"
        raise UsageError(message, "save it as UTF-8 without a byte order mark")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{source}: not text (byte {error.start} is not UTF-8)"
        raise UsageError(message, "a configuration is a JSON file, usually config.json") from None


def _from_hub(hub_id: str) -> ModelShape:
    cached = _cached_config(hub_id)
    if cached is not None:
        text, source = _read(cached), str(cached)
    else:
        from sftplan.facts.hub import fetch_config

        content, source = fetch_config(hub_id, limit=MAX_CONFIG_BYTES)
        text = decode_config(content, source)
    config = parse_object(text, source)
    name = hub_id.rpartition("/")[2].lower()
    return shape_from_config(config, name=name, source=hub_id, hub_id=hub_id, text=text)


def _cached_config(hub_id: str) -> Path | None:
    """The config.json of the main revision in the local Hugging Face cache, if it is there."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface")).expanduser()
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = root / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        file = folder / "snapshots" / revision / "config.json"
        return file if file.is_file() else None
    except (OSError, ValueError):
        return None

"""Records in files, and how they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.data.read import read_instructions

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '{"instruction": "Say hello.", "output": "Hello."}'
CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}'


def write(folder: Path, text: str | bytes, name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def said(file: Path) -> list[list[tuple[str, str]]]:
    return [
        [(t.role.value, t.text) for t in c.turns] for c in read_instructions(file).conversations
    ]

"""Checkpoints: whole or not there, and no other run's."""

# ruff: noqa: TID253
from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftplan.errors import TrainingFailedError
from sftplan.train import checkpoint


def content(value: float = 1.0) -> checkpoint.Content:
    """A checkpoint of two small files."""
    tensors = {"model.safetensors": {"w": torch.full((64,), value)}}
    tensors["optimizer.safetensors"] = {"m": torch.arange(32.0)}
    return checkpoint.Content(tensors=tensors, state={"identity": {}})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, content())
    found = checkpoint.load(folder)

    assert found.state["step"] == 3
    assert torch.equal(found.tensors["model.safetensors"]["w"], torch.ones(64))
    assert checkpoint.newest(tmp_path) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-3"]


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "zeroed", "one bit"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_set_aside(file: str, damage: str, tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, content())
    path = checkpoint.save(tmp_path, 2, content(2.0)) / file
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    changed = {"empty": b"", "half": data[: len(data) // 2], "zeroed": bytes(len(data))}
    path.unlink()
    if damage != "gone":
        path.write_bytes(bytes(changed.get(damage, data)))
    said: list[str] = []

    assert checkpoint.newest(tmp_path, say=said.append) == first
    assert said[0].startswith("step-2 is not complete")
    assert list(tmp_path.glob(".bad-step-2-*"))
    assert checkpoint.steps_in(tmp_path) == [1]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_leaves_the_checkpoint_before(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(tmp_path, 1, content())

    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        TrainingFailedError, match=r"step-2 cannot be written, .* missing"
    ) as failed:
        checkpoint.save(tmp_path, 2, content())

    assert failed.value.hint is not None
    assert "what was saved before is whole" in failed.value.hint
    assert checkpoint.newest(tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-1"]


def test_a_disk_that_will_be_full_is_told_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=checkpoint.SPARE_BYTES + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    needed = 64 * 4 + 32 * 4

    with pytest.raises(TrainingFailedError, match=f"{needed - 100:,} bytes are missing"):
        checkpoint.save(tmp_path, 1, content())
    assert list(tmp_path.iterdir()) == []


def test_files_are_synced_before_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, then the manifest, then the folder; the rename; then the parent."""
    order: list[str] = []
    synced, renamed = checkpoint._sync, Path.rename

    def sync(path: Path) -> None:
        order.append(path.name if "part" not in path.name else "draft")
        synced(path)

    def rename(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return renamed(self, target)

    monkeypatch.setattr(checkpoint, "_sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.save(tmp_path, 1, content())
    data = {"model.safetensors", "optimizer.safetensors", "state.json"}

    assert set(order[:3]) == data
    assert order[3:] == ["manifest.json", "draft", "rename to step-1", tmp_path.name]


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, content())
    checkpoint.rotate(tmp_path, keep=2, best=1)

    assert checkpoint.steps_in(tmp_path) == [1, 4, 5]

"""Checkpoints that are complete or absent, and from which a run goes on to the same bits.

A folder is written under another name: every file synced, the manifest with all sizes and SHA-256
last, then the folder renamed and its parent synced. What has no manifest that matches is no
checkpoint; it is set aside under a name that says so, never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from sftplan.errors import TrainingFailedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = "sftplan.checkpoint"
FULL = (errno.ENOSPC, errno.EDQUOT)
SPARE_BYTES = 1 << 20  # beside the tensors: JSON and the folder itself
FILE_BYTES = 4 << 30  # of a stream: what is held in host memory while its file is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a checkpoint holds: tensors by file and name, and the rest as JSON.

    Streams are tensors too, that come one after the other and need not all fit into host memory;
    those of `model` lie in model.safetensors, model-2.safetensors and so on.
    """

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: Mapping[str, Any]
    streams: Mapping[str, Iterable[tuple[str, torch.Tensor]]] = field(default_factory=dict)
    streamed_bytes: int = 0


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step-{step}"


def save(root: Path, step: int, content: Content) -> Path:
    """Write the checkpoint after `step` steps; what was there before stays whole.

    Raises:
        TrainingFailedError: The disk is full; says how much is missing.
    """
    target = step_folder(root, step)

    def fill(folder: Path) -> None:
        for file, tensors in content.tensors.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file)
        for stem, stream in content.streams.items():
            _write_stream(folder, stem, stream)
        state = {"format": FORMAT, "step": step, **content.state}
        (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    needed = sum(t.nbytes for tensors in content.tensors.values() for t in tensors.values())
    write_folder(target, fill, needed_bytes=needed + content.streamed_bytes)
    point(root / "last", target)
    return target


def _write_stream(folder: Path, stem: str, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Tensors as they come, a file whenever there are enough."""
    held: dict[str, torch.Tensor] = {}
    size = files = 0

    def write() -> None:
        nonlocal size, files
        files += 1
        save_file(
            held, folder / (f"{stem}.safetensors" if files == 1 else f"{stem}-{files}.safetensors")
        )
        held.clear()
        size = 0

    for name, tensor in stream:
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= FILE_BYTES:
            write()
    if held or not files:
        write()


def write_folder(target: Path, fill: Callable[[Path], None], *, needed_bytes: int) -> None:
    """Replace the folder `target` by what `fill` writes, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    _clear_drafts(target)
    missing = needed_bytes + SPARE_BYTES - shutil.disk_usage(target.parent).free
    if missing > 0:
        raise _disk_full(target, missing)
    try:
        draft.mkdir()
        fill(draft)
        _seal(draft)
        if target.exists():
            trash(target)
        draft.rename(target)
        _sync(target.parent)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not _is_full(error):
            raise
        missing = needed_bytes + SPARE_BYTES - shutil.disk_usage(target.parent).free
        raise _disk_full(target, max(missing, 1)) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"os error {code}" in str(error) for code in FULL)  # safetensors' own error


def _disk_full(target: Path, missing: int) -> TrainingFailedError:
    message = f"the disk is full: {target} cannot be written, {missing:,} bytes are missing"
    return TrainingFailedError(
        message, "what was saved before is whole; free some space and go on with --resume"
    )


def _clear_drafts(target: Path) -> None:
    """Remove what a killed process left of this very folder."""
    for left in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Sync every file, then write and sync the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(_entry, files))
    named = {
        str(path.relative_to(folder)): entry for path, entry in zip(files, entries, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": named}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _entry(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: Path) -> None:
    """Let `link` name `target`, in one step."""
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    draft.replace(link)


def trash(folder: Path) -> None:
    """Remove a folder so that no half of it ever looks like one."""
    away = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def problem_of(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"].items()
        for name, entry in entries:
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def steps_in(root: Path) -> list[int]:
    """The steps of what look like checkpoints, ascending."""
    names = (path.name for path in root.glob("step-*") if path.is_dir())
    return sorted(int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit())


def newest(root: Path, *, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest complete checkpoint; incomplete ones before it are set aside and named."""
    for step in reversed(steps_in(root)):
        folder = step_folder(root, step)
        problem = problem_of(folder)
        if problem is None:
            return folder
        aside = folder.with_name(f".bad-{folder.name}-{os.getpid()}")
        folder.rename(aside)
        say(f"{folder.name} is not complete ({problem}): set aside as {aside.name}")
    return None


class Stored(Mapping[str, "torch.Tensor"]):
    """Tensors of some files, each read when it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load(folder: Path) -> Content:
    """What `save` was given; a stream is a file of its name and those that go on with it."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        parts.setdefault(f"{path.stem.partition('-')[0]}.safetensors", []).append(path)
    return Content(tensors={name: Stored(paths) for name, paths in parts.items()}, state=state)


def rotate(root: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for step in steps_in(root)[:-keep]:
        if step != best:
            with contextlib.suppress(OSError):  # an old one that stays does no harm
                trash(step_folder(root, step))


def check_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Iterable[str] = ()
) -> None:
    """Refuse to go on where something that decides on the numbers has changed."""
    for name, value in now.items():
        before = saved.get(name)
        if before != value and name not in allowed:
            message = f"--resume: {name} was {before}, now it is {value}"
            raise UsageError(message, "go on with the same options, or start into another --out")


def clear_leftovers(root: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    for pattern in (".step-*.part", ".final.*.part", ".trash-*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for link in ("last", "best"):
        for left in root.glob(f".{link}.*"):
            left.unlink(missing_ok=True)

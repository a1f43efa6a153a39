"""Data sets of the Hugging Face hub, through the library `datasets`: fetched once, then mapped.

`org/name` is its split `train`, `org/name:split` another one, `org/name:configuration:split` one of
a data set that has several configurations.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.data.conversation import Place
from sftplan.data.records import SUFFIXES
from sftplan.errors import NotReadyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftplan.data.records import Record

BATCH_ROWS = 4096  # converted from Arrow together
_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[^:/]+){0,2}")


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may name a data set of the hub.

    >>> is_hub_name("org/name:test"), is_hub_name("data/trian.jsonl"), is_hub_name("./org/name")
    (True, False, False)
    """
    if not _NAME.fullmatch(path) or Path(path).parent.is_dir():
        return False
    return Path(path.partition(":")[0]).suffix.lower() not in SUFFIXES


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split, as a source of records."""

    name: str
    table: Any  # datasets.Dataset, whose Arrow files are mapped into memory

    def digest(self) -> bytes:
        """SHA-256 of the Arrow files."""
        found = hashlib.sha256()
        for file in self.table.cache_files:
            with Path(file["filename"]).open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.digest()

    def records(self) -> Iterator[Record]:
        """The rows, from the first on."""
        row = 0
        for batch in self.table.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for record in batch.to_pylist():
                row += 1
                yield Place(file=self.name, row=row), record


def hub_split(name: str) -> HubSplit:
    """The split that `name` means, fetched or from the cache of `datasets`.

    Raises:
        UsageError: There is no such data set, or no network to look for it.
        NotReadyError: The library is not installed.
    """
    repository, *rest = name.split(":")
    configuration = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        message = f"no file or folder {name}; a data set of the hub needs the library `datasets`"
        raise NotReadyError(message, "`pip install 'sftplan[train]'`") from None
    try:
        table = library.load_dataset(repository, configuration, split=split)
    except Exception as error:  # of many libraries: the network's, the hub's, pyarrow's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"no file or folder {name}, and the hub gives no such data set: {reason}"
        hint = f"with a network, `hf download --repo-type dataset {repository}`; or name a file"
        raise UsageError(message, hint) from None
    return HubSplit(name, table)

"""Rows of examples to the arrays of one forward pass, all of a fixed shape."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.mask import Example

IGNORED = -100  # torch's default ignore_index of the cross-entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a micro-batch's arrays, the same for every micro-batch of a run."""

    rows: int
    row_len: int
    target_capacity: int
    document_capacity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass; rows follow each other in flat arrays of 64-bit integers.

    `torch.frombuffer(batch.input_ids, dtype=torch.int64)` shares the memory.
    """

    shape: Shape
    input_ids: array[int]  # rows · row_len
    positions: array[int]  # rows · row_len; from 0 in every document
    cu_seqlens: array[int]  # 32-bit; document_capacity + 1 boundaries, the last one repeated
    keep: array[int]  # target_capacity flat positions whose next token is a target; then 0
    targets: array[int]  # target_capacity token ids; then IGNORED
    num_targets: int
    num_tokens: int  # without padding
    num_documents: int  # with the padding of each row as a document of its own
    max_document_tokens: int
    examples: tuple[int, ...]  # whose tokens these are

    def labels(self) -> array[int]:
        """Per position the next token if it is a target, else IGNORED: already shifted."""
        labels = array("q", [IGNORED]) * len(self.input_ids)
        for position, target in zip(
            self.keep[: self.num_targets], self.targets[: self.num_targets], strict=True
        ):
            labels[position] = target
        return labels


def collate(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    shape: Shape,
    *,
    pad_id: int = 0,
    train_on_prompt: bool = False,
) -> MicroBatch:
    """The arrays of some rows; rows that are missing are all padding."""
    ids, positions = array("q"), array("q")
    boundaries = array("i", [0])
    keep, targets = array("q"), array("q")
    num_tokens = longest = 0
    counting = array("q", range(shape.row_len))
    for number in range(shape.rows):
        for index in rows[number] if number < len(rows) else ():
            example = examples[index]
            begin, length = len(ids), len(example)
            ids.extend(example.input_ids.tolist())
            positions.extend(counting[:length])
            boundaries.append(begin + length)
            for at in _target_positions(example, train_on_prompt=train_on_prompt):
                keep.append(begin + at - 1)
                targets.append(example.input_ids[at])
            num_tokens += length
            longest = max(longest, length)
        padding = (number + 1) * shape.row_len - len(ids)
        if padding:
            ids.extend(array("q", [pad_id]) * padding)
            positions.extend(counting[:padding])
            boundaries.append(len(ids))
            longest = max(longest, padding)
    num_targets, num_documents = len(targets), len(boundaries) - 1
    unused = shape.target_capacity - num_targets
    boundaries.extend(array("i", [len(ids)]) * (shape.document_capacity - num_documents))
    return MicroBatch(
        shape=shape,
        input_ids=ids,
        positions=positions,
        cu_seqlens=boundaries,
        keep=keep + array("q", [0]) * unused,
        targets=targets + array("q", [IGNORED]) * unused,
        num_targets=num_targets,
        num_tokens=num_tokens,
        num_documents=num_documents,
        max_document_tokens=longest,
        examples=tuple(index for row in rows for index in row),
    )


def _target_positions(example: Example, *, train_on_prompt: bool) -> Sequence[int]:
    """Positions within the example that are predicted from the one before."""
    if train_on_prompt:
        return range(1, len(example))
    return [at for at, counts in enumerate(example.trained) if counts]

"""Token ids with their mask, and how one example is cut to the sequence length."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.conversation import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training sequence; `trained` has one byte per token, 1 where its loss counts."""

    input_ids: array[int]
    trained: bytes
    place: Place

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens whose loss counts."""
        return self.trained.count(1)


def masked(pieces: Sequence[tuple[Sequence[int], bool]], place: Place) -> Example:
    """An example from pieces of ids that are trained on or not.

    The first token is never trained on: nothing stands before it.

    >>> from sftplan.data.conversation import Place
    >>> example = masked([([5, 6], False), ([7, 0], True)], Place(file="a.jsonl", row=1, line=1))
    >>> list(example.input_ids), list(example.trained)
    ([5, 6, 7, 0], [0, 0, 1, 1])
    """
    ids = array("i")
    trained = bytearray()
    for piece, counts in pieces:
        ids.extend(piece)
        trained.extend(bytes([counts]) * len(piece))
    if trained:
        trained[0] = 0
    return Example(input_ids=ids, trained=bytes(trained), place=place)


def cut(example: Example, seq_len: int, *, bos_id: int | None = None) -> Example | None:
    """The example in at most `seq_len` tokens, or None if that cannot be.

    The oldest tokens go first: the prompt's beginning, then whole early turns. An answer stays
    whole or goes as a whole, and at least one token stays before it. A leading `bos_id` stays.
    A last answer that is too long by itself goes with its prompt; what stands before it is kept.
    """
    if len(example) <= seq_len:
        return example
    keeps_bos = bos_id is not None and example.input_ids[0] == bos_id
    start = len(example) - seq_len + keeps_bos
    if example.trained[start]:
        start = example.trained.find(0, start)  # not into an answer: on to the next prompt
    if start < 0 or 1 not in example.trained[start:]:
        earlier = _without_last_answer(example)
        return None if earlier is None else cut(earlier, seq_len, bos_id=bos_id)
    head = slice(0, 1 if keeps_bos else 0)
    return Example(
        input_ids=example.input_ids[head] + example.input_ids[start:],
        trained=example.trained[head] + example.trained[start:],
        place=example.place,
    )


def _without_last_answer(example: Example) -> Example | None:
    """The conversation up to the end of its last answer but one."""
    last = example.trained.rfind(b"\0\1")
    end = example.trained.rfind(1, 0, last + 1) + 1
    if end == 0:
        return None
    return Example(
        input_ids=example.input_ids[:end], trained=example.trained[:end], place=example.place
    )

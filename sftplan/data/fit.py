"""Examples cut to the sequence length; what cannot be kept is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.data.mask import cut
from sftplan.data.store import Selected, counts
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.mask import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Examples of at most `seq_len` tokens, and what fitting them cost."""

    seq_len: int
    examples: Selected
    dropped: tuple[Example, ...]  # whose answers are longer than the sequence, uncut
    num_cut: int  # examples whose oldest tokens were cut
    num_cut_tokens: int
    num_cut_answers: int  # answers among what was cut: the early turns of long conversations


def fitted(examples: Sequence[Example], seq_len: int, *, bos_id: int | None = None) -> Fitted:
    """All examples cut to `seq_len`; what cannot be kept is counted, not forgotten.

    Raises:
        UsageError: No example keeps an answer.
    """
    lengths, trained = counts(examples)
    short: dict[int, Example] = {}
    dropped: list[Example] = []
    kept: list[int] = []
    num_cut_tokens = num_cut_answers = 0
    for index, length in enumerate(lengths):
        if length > seq_len:
            example = examples[index]
            found = cut(example, seq_len, bos_id=bos_id)
            if found is None:
                dropped.append(example)
                continue
            short[index] = found
            num_cut_tokens += length - len(found)
            num_cut_answers += _num_answers(example) - _num_answers(found)
        kept.append(index)
    if not any(trained[index] for index in kept):
        longest = max(trained, default=0)
        message = f"no answer fits into {seq_len:,} tokens: there is nothing to train on"
        raise UsageError(message, f"the longest answer has {longest:,} tokens; raise --seq")
    return Fitted(
        seq_len=seq_len,
        examples=Selected(examples, kept, short),
        dropped=tuple(dropped),
        num_cut=len(short),
        num_cut_tokens=num_cut_tokens,
        num_cut_answers=num_cut_answers,
    )


def _num_answers(example: Example) -> int:
    """Runs of trained tokens."""
    return (b"\0" + example.trained).count(b"\0\1")

"""Cutting keeps answers whole, and what is lost is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.data.conversation import Place
from sftplan.data.fit import fitted
from sftplan.data.mask import Example, cut, masked
from sftplan.errors import UsageError

PLACE = Place(file="data.jsonl", row=1, line=1)


def example(*lengths: int, bos: bool = False) -> Example:
    """Prompt and answer in turn; ids count up, so that each token is known."""
    pieces: list[tuple[list[int], bool]] = [([1], False)] if bos else []
    at = 10
    for number, length in enumerate(lengths):
        pieces.append((list(range(at, at + length)), number % 2 == 1))
        at += length
    return masked(pieces, PLACE)


def ids(cut_example: Example | None) -> list[int]:
    assert cut_example is not None
    return list(cut_example.input_ids)


def test_the_prompts_beginning_goes_first() -> None:
    assert ids(cut(example(6, 4), 7)) == list(range(13, 20))
    assert ids(cut(example(6, 4), 10)) == list(range(10, 20))


def test_bos_stays() -> None:
    assert ids(cut(example(6, 4, bos=True), 7, bos_id=1)) == [1, *range(14, 20)]


def test_early_turns_go_whole() -> None:
    assert ids(cut(example(3, 4, 3, 4), 10)) == list(range(17, 24))
    assert ids(cut(example(3, 4, 3, 4), 11)) == list(range(17, 24))


def test_one_token_stays_before_the_answer() -> None:
    assert ids(cut(example(6, 4), 5)) == list(range(15, 20))
    assert cut(example(6, 4), 4) is None


def test_a_last_answer_that_is_too_long_leaves_the_earlier_ones() -> None:
    assert ids(cut(example(3, 2, 3, 20), 8)) == list(range(10, 15))
    assert cut(example(3, 20, 3, 20), 8) is None


def test_the_first_token_is_never_a_target() -> None:
    assert masked([([5, 6], True)], PLACE).trained == b"\0\1"


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8),
    seq_len=st.integers(2, 30),
    bos=st.booleans(),
)
def test_what_is_cut_fits_and_keeps_answers_whole(
    lengths: list[int], seq_len: int, *, bos: bool
) -> None:
    whole = example(*lengths, bos=bos)
    short = cut(whole, seq_len, bos_id=1 if bos else None)
    if short is None:
        return
    assert 2 <= len(short) <= seq_len
    assert short.num_trained > 0
    assert short.trained[0] == 0
    kept = {i for i, t in zip(short.input_ids, short.trained, strict=True) if t}
    at = 10
    for number, length in enumerate(lengths):
        if number % 2:
            answer = set(range(at, at + length))
            assert not answer & kept or answer <= kept
        at += length


def test_losses_are_counted() -> None:
    result = fitted([example(6, 4), example(1, 9), example(3, 4, 3, 4)], 8)
    assert [len(e) for e in result.examples] == [8, 7]
    assert [len(e) for e in result.dropped] == [10]
    assert (result.num_cut, result.num_cut_tokens, result.num_cut_answers) == (2, 9, 1)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UsageError, match="no answer fits into 4 tokens") as refusal:
        fitted([example(6, 9)], 4)
    assert refusal.value.hint == "the longest answer has 9 tokens; raise --seq"

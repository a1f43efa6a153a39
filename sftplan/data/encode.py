"""Conversations to examples: render, tokenise in batches, mask; and look at the seams."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sftplan.data.conversation import BadExampleError
from sftplan.data.mask import masked
from sftplan.data.template import sequences_of
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Sequence

    from sftplan.data.conversation import Conversation, Place, Problem
    from sftplan.data.mask import Example
    from sftplan.data.template import Segment, Template
    from sftplan.data.tokenizer import Tokenizer

BATCH_CONVERSATIONS = 2048  # enough to keep all cores of the tokenizer busy
SEAM_CHARACTERS = 80  # looked at on each side of a seam; longer than any token of natural text


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """A prompt and a response that would have become other ids, tokenised as one text."""

    place: Place
    before: str  # the prompt's last characters
    after: str  # the response's first characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Examples of any length, what the template refused, and the seams that merged."""

    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]
    num_seams: int
    merged_seams: tuple[Seam, ...]


class _Sequence(NamedTuple):
    place: Place
    segments: list[Segment]
    bos_id: int | None


def encode(
    conversations: Iterable[Conversation],
    *,
    template: Template,
    tokenizer: Tokenizer,
    seams: bool = False,
) -> Encoded:
    """Tokenise conversations, all at once; see `encoded_batches`."""
    batches = list(
        encoded_batches(conversations, template=template, tokenizer=tokenizer, seams=seams)
    )
    return Encoded(
        examples=tuple(example for batch in batches for example in batch.examples),
        problems=tuple(problem for batch in batches for problem in batch.problems),
        num_seams=sum(batch.num_seams for batch in batches),
        merged_seams=tuple(seam for batch in batches for seam in batch.merged_seams),
    )


def encoded_batches(
    conversations: Iterable[Conversation],
    *,
    template: Template,
    tokenizer: Tokenizer,
    seams: bool = False,
) -> Iterator[Encoded]:
    """Tokenise conversations batch by batch, on all cores: the tokenizer's own threads.

    Args:
        conversations: Read as far as they are needed.
        template: How they become text.
        tokenizer: How text becomes ids.
        seams: Also tokenise across each seam and report where ids would differ.
    """
    source = iter(conversations)
    while chosen := list(itertools.islice(source, BATCH_CONVERSATIONS)):
        problems: list[Problem] = []
        batch: list[_Sequence] = []
        for conversation in chosen:
            try:
                sequences = sequences_of(conversation, template)
            except BadExampleError as error:
                problems.append(error.at(conversation.place))
                continue
            # A chat template writes the first token itself, or wants none.
            bos = None if template.writes_bos and not conversation.verbatim else tokenizer.bos_id
            batch += [_Sequence(conversation.place, segments, bos) for segments in sequences]
        found: list[tuple[Seam, bool]] = []
        if seams and not tokenizer.estimated:
            found = [seam for sequence in batch for seam in _seams(sequence)]
        yield Encoded(
            examples=tuple(_examples(batch, tokenizer)),
            problems=tuple(problems),
            num_seams=len(found),
            merged_seams=tuple(_merged(found, tokenizer)),
        )


def check_ids(examples: Iterable[Example], *, vocab_size: int, model: str) -> None:
    """Raise UsageError for the first example with an id that the model has no row for."""
    for example in examples:
        largest = max(example.input_ids)
        if largest >= vocab_size:
            message = f"{example.place}: token {largest:,} is beyond the {vocab_size:,} of {model}"
            raise UsageError(message, "give the model's own tokenizer with --tokenizer DIR")


def _examples(batch: Sequence[_Sequence], tokenizer: Tokenizer) -> Iterator[Example]:
    """Tokenise all segments of a batch, in one call per way of tokenising."""
    ways: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for row, sequence in enumerate(batch):
        for column, segment in enumerate(sequence.segments):
            # After an end-of-text token a text begins as at the start of a sequence.
            first = column == 0 or sequence.segments[column - 1].ends
            ways.setdefault((segment.special, first), []).append((row, column))
    ids: dict[tuple[int, int], array[int]] = {}
    for (special, first), keys in ways.items():
        texts = [batch[row].segments[column].text for row, column in keys]
        ids.update(zip(keys, tokenizer.encode(texts, special=special, first=first), strict=True))
    for row, (place, segments, bos_id) in enumerate(batch):
        pieces: list[tuple[Sequence[int], bool]] = []
        if bos_id is not None and ids[row, 0][:1].tolist() != [bos_id]:
            pieces.append(([bos_id], False))
        for column, segment in enumerate(segments):
            piece = ids[row, column]
            if segment.ends and not _is_ended(piece, segment, tokenizer):
                piece.append(tokenizer.eos_id)
            pieces.append((piece, segment.trained))
        yield masked(pieces, place)


def _is_ended(ids: Sequence[int], segment: Segment, tokenizer: Tokenizer) -> bool:
    """Whether the text itself brought a token that ends it, as chat templates do."""
    return bool(ids) and segment.special and ids[-1] in tokenizer.end_tokens


def _seams(sequence: _Sequence) -> Iterator[tuple[Seam, bool]]:
    """Windows around each seam from a prompt to its response; whether special tokens count."""
    for prompt, answer in itertools.pairwise(sequence.segments):
        if answer.trained and not prompt.trained:
            before, after = prompt.text[-SEAM_CHARACTERS:], answer.text[:SEAM_CHARACTERS]
            yield Seam(place=sequence.place, before=before, after=after), answer.special


def _merged(seams: Sequence[tuple[Seam, bool]], tokenizer: Tokenizer) -> Iterator[Seam]:
    """The seams whose ids differ when prompt and response are tokenised as one text."""
    for special in (False, True):
        found = [seam for seam, is_special in seams if is_special is special]
        joint = tokenizer.encode([s.before + s.after for s in found], special=special, first=True)
        before = tokenizer.encode([s.before for s in found], special=special, first=True)
        after = tokenizer.encode([s.after for s in found], special=special, first=False)
        for seam, together, left, right in zip(found, joint, before, after, strict=True):
            if together != left + right:
                yield seam

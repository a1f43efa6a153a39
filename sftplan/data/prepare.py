"""From a file to examples in one call: read, render, tokenise, mask, cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftplan.data.cache import Tokenised, cache_key, header_of, in_memory, load, save
from sftplan.data.conversation import refuse_beyond
from sftplan.data.encode import check_ids, encoded_batches
from sftplan.data.fit import fitted
from sftplan.data.read import Reader, sources_of
from sftplan.data.statistics import length_statistics
from sftplan.data.template import template_of
from sftplan.data.tokenizer import BpeTokenizer, check_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sftplan.data.conversation import Conversation, Problem
    from sftplan.data.encode import Seam
    from sftplan.data.fit import Fitted
    from sftplan.data.store import Selected, Writer
    from sftplan.data.tokenizer import Tokenizer
    from sftplan.facts.workload import LengthStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The examples of a file and everything that became of the rest."""

    source: str
    template: str
    fitted: Fitted
    lengths: LengthStatistics
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]
    num_seams: int
    merged_seams: tuple[Seam, ...]

    @property
    def examples(self) -> Selected:
        """What is trained on."""
        return self.fitted.examples


def prepare(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    skip_bad: int = 0,
    vocab_size: int | None = None,
    model: str = "the model",
    seams: bool = False,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """The examples of a file or folder in at most `seq_len` tokens each.

    Args:
        path: A file or a folder.
        tokenizer: From `find_tokenizer`.
        seq_len: Longest example, in tokens.
        skip_bad: How many bad examples may be left out.
        vocab_size: Rows of the model's embedding; ids beyond them are refused.
        model: Its name, for messages.
        seams: Also look for seams that would merge; goes past the cache.
        cache: Folder for tokenised examples, such as `default_cache_folder()`; None is without.
        progress: Called with the number of conversations that are tokenised.

    Raises:
        UsageError: A file, its examples or the tokenizer cannot be used.
    """
    doubt = None
    if vocab_size is not None:
        doubt = check_vocabulary(tokenizer, vocab_size=vocab_size, model=model)
    work = _Work(path, tokenizer, skip_bad, seams=seams, progress=progress)
    tokenised = _tokenised(work, None if seams else cache)
    refuse_beyond(tokenised.skipped, skip_bad=skip_bad, num_examples=tokenised.num_read)
    if vocab_size is not None and tokenised.largest_id >= vocab_size:
        check_ids(tokenised.examples, vocab_size=vocab_size, model=model)
    kept = fitted(tokenised.examples, seq_len, bos_id=tokenizer.bos_id)
    return Prepared(
        source=str(path),
        template=tokenised.template,
        fitted=kept,
        lengths=length_statistics(
            kept,
            source=str(path),
            tokenizer=tokenizer.name,
            estimated=tokenizer.estimated,
            num_skipped=len(tokenised.skipped),
        ),
        skipped=tokenised.skipped,
        notes=(*([doubt] if doubt else []), *tokenised.notes),
        num_seams=work.num_seams,
        merged_seams=tuple(work.merged_seams),
    )


class _Work:
    """Reading and tokenising a data set into a writer, batch by batch."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        skip_bad: int,
        *,
        seams: bool,
        progress: Callable[[int], None],
    ) -> None:
        self.path, self.tokenizer, self.skip_bad = path, tokenizer, skip_bad
        self.seams, self.progress = seams, progress
        self.num_seams = 0
        self.merged_seams: list[Seam] = []

    def key(self) -> str | None:
        """Under what the cache knows the data, or None where it cannot; reading then says why."""
        if not isinstance(self.tokenizer, BpeTokenizer):
            return None
        try:
            return cache_key(sources_of(self.path)[0], self.tokenizer)
        except OSError:
            return None

    def __call__(self, writer: Writer) -> dict[str, Any]:
        """Fill the writer; what to say beside the examples."""
        reader = Reader(self.path, skip_bad=self.skip_bad)
        template = template_of(self.tokenizer)
        refused: list[Problem] = []
        all_verbatim = True

        def conversations() -> Iterator[Conversation]:
            nonlocal all_verbatim
            for conversation in reader:
                all_verbatim &= conversation.verbatim
                yield conversation

        for batch in encoded_batches(
            conversations(), template=template, tokenizer=self.tokenizer, seams=self.seams
        ):
            writer.add(batch.examples)
            refused += batch.problems
            self.num_seams += batch.num_seams
            self.merged_seams += batch.merged_seams
            self.progress(reader.num_read)
        return header_of(
            skipped=[*reader.problems, *refused],
            notes=reader.notes,
            num_read=reader.num_read,
            template="none: prompt and completion as they are" if all_verbatim else template.name,
        )


def _tokenised(work: _Work, cache: Path | None) -> Tokenised:
    """From the cache, else by reading: into the cache, or into memory where that cannot be."""
    key = None if cache is None else work.key()
    if cache is None or key is None:
        return in_memory(work)
    return load(cache, key) or save(cache, key, work) or in_memory(work)

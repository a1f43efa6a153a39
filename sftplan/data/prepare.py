"""From a file to examples in one call: read, render, tokenise, mask, cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftplan.data.cache import Tokenised, cache_key, load, save
from sftplan.data.conversation import refuse_beyond
from sftplan.data.encode import check_ids, encode
from sftplan.data.mask import fitted
from sftplan.data.read import files_of, read_instructions
from sftplan.data.statistics import length_statistics
from sftplan.data.template import template_of
from sftplan.data.tokenizer import BpeTokenizer, check_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.data.conversation import Problem
    from sftplan.data.encode import Encoded, Seam
    from sftplan.data.mask import Example, Fitted
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
    def examples(self) -> tuple[Example, ...]:
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
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size=vocab_size, model=model)
    found: tuple[Seam, ...] = ()
    num_seams = 0
    key = None if seams or cache is None else _key(path, tokenizer)
    tokenised = load(cache, key) if cache is not None and key is not None else None
    if tokenised is None:
        tokenised, encoded = _tokenised(path, tokenizer, skip_bad, progress, seams=seams)
        num_seams, found = encoded.num_seams, encoded.merged_seams
        if cache is not None and key is not None:
            save(cache, key, tokenised)
    refuse_beyond(tokenised.skipped, skip_bad=skip_bad, num_examples=tokenised.num_read)
    if vocab_size is not None:
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
        notes=tokenised.notes,
        num_seams=num_seams,
        merged_seams=found,
    )


def _key(path: str | Path, tokenizer: Tokenizer) -> str | None:
    """Under what the cache knows the data, or None where it cannot; reading then says why."""
    if not isinstance(tokenizer, BpeTokenizer):
        return None
    try:
        return cache_key(files_of(Path(path))[0], tokenizer)
    except OSError:
        return None


def _tokenised(
    path: str | Path,
    tokenizer: Tokenizer,
    skip_bad: int,
    progress: Callable[[int], None],
    *,
    seams: bool,
) -> tuple[Tokenised, Encoded]:
    """Read and tokenise; refuses before tokenising what reading alone finds bad."""
    instructions = read_instructions(path, skip_bad=skip_bad)
    conversations = instructions.conversations
    template = template_of(tokenizer)
    encoded = encode(
        conversations, template=template, tokenizer=tokenizer, seams=seams, progress=progress
    )
    all_verbatim = all(conversation.verbatim for conversation in conversations)
    tokenised = Tokenised(
        examples=encoded.examples,
        skipped=instructions.skipped + encoded.problems,
        notes=instructions.notes,
        num_read=len(conversations) + len(instructions.skipped),
        template="none: prompt and completion as they are" if all_verbatim else template.name,
    )
    return tokenised, encoded

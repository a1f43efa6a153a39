"""From a file to examples in one call: read, render, tokenise, mask, cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.data.conversation import refuse_beyond
from sftplan.data.encode import check_ids, encode
from sftplan.data.mask import fitted
from sftplan.data.read import read_instructions
from sftplan.data.statistics import length_statistics
from sftplan.data.template import template_of
from sftplan.data.tokenizer import check_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sftplan.data.conversation import Problem
    from sftplan.data.encode import Seam
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
        seams: Also look for seams that would merge.
        progress: Called with the number of conversations that are tokenised.

    Raises:
        UsageError: A file, its examples or the tokenizer cannot be used.
    """
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size=vocab_size, model=model)
    instructions = read_instructions(path, skip_bad=skip_bad)
    template = template_of(tokenizer)
    encoded = encode(
        instructions.conversations,
        template=template,
        tokenizer=tokenizer,
        seams=seams,
        progress=progress,
    )
    skipped = instructions.skipped + encoded.problems
    num_examples = len(instructions.conversations) + len(instructions.skipped)
    refuse_beyond(skipped, skip_bad=skip_bad, num_examples=num_examples)
    if vocab_size is not None:
        check_ids(encoded.examples, vocab_size=vocab_size, model=model)
    kept = fitted(encoded.examples, seq_len, bos_id=tokenizer.bos_id)
    all_verbatim = all(c.verbatim for c in instructions.conversations)
    return Prepared(
        source=str(path),
        template="none: prompt and completion as they are" if all_verbatim else template.name,
        fitted=kept,
        lengths=length_statistics(
            kept,
            source=str(path),
            tokenizer=tokenizer.name,
            estimated=tokenizer.estimated,
            num_skipped=len(skipped),
        ),
        skipped=skipped,
        notes=instructions.notes,
        num_seams=encoded.num_seams,
        merged_seams=encoded.merged_seams,
    )

"""Instruction data for people and for programs: lengths, masks token by token, what is left out."""

from __future__ import annotations

import dataclasses
import re
from itertools import groupby
from typing import TYPE_CHECKING

from sftplan.data.lengths import EPSILON, generalisation_ratio
from sftplan.data.read import first_lines
from sftplan.data.statistics import percentile
from sftplan.facts.workload import padded_row_len

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sftplan.data.encode import Seam
    from sftplan.data.mask import Example
    from sftplan.data.prepare import Prepared
    from sftplan.data.tokenizer import Tokenizer
    from sftplan.report.style import Style

_SHOWN = 10  # dropped examples and merged seams; the rest is counted
_BAR_COLUMNS = 40
# What a terminal would obey instead of show: controls, and marks that turn the writing direction.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
)


def describe_data(
    prepared: Prepared, *, tokenizer: Tokenizer, model: str, num_parameters: int, num_shown: int
) -> dict[str, object]:
    """The data as `--json` shows it; lengths are tokens."""
    lengths, fitted = prepared.lengths, prepared.fitted
    ratio, warning = generalisation_ratio(lengths.num_examples, num_parameters)
    prompt, response, _ = _kinds(prepared).values()
    return {
        "format": "sftplan.data",
        "format_version": 1,
        "file": prepared.source,
        "model": model,
        "seq_len": fitted.seq_len,
        "template": prepared.template,
        "num_tokens": sum(fitted.examples.lengths),
        "num_response_tokens": sum(fitted.examples.trained),
        "lengths": dataclasses.asdict(lengths),
        "prompt_lengths": summary_of(prompt),
        "response_lengths": summary_of(response),
        "num_cut": fitted.num_cut,
        "num_cut_tokens": fitted.num_cut_tokens,
        "num_cut_answers": fitted.num_cut_answers,
        "dropped": [
            {**_place(example), "num_tokens": len(example), "reason": _why_dropped(example)}
            for example in fitted.dropped
        ],
        "skipped": [dataclasses.asdict(problem) for problem in prepared.skipped],
        "num_seams": None if lengths.estimated else prepared.num_seams,
        "merged_seams": [dataclasses.asdict(seam) for seam in prepared.merged_seams],
        "notes": list(prepared.notes),
        "generalisation": {"ratio": ratio, "epsilon": EPSILON, "warning": warning},
        "examples": [
            {
                **_place(example),
                "tokens": [
                    {"id": token, "text": tokenizer.decode([token]), "trained": bool(counts)}
                    for token, counts in zip(example.input_ids, example.trained, strict=True)
                ],
            }
            for example in fitted.examples[:num_shown]
        ],
    }


def _place(example: Example) -> dict[str, object]:
    return dataclasses.asdict(example.place)


def _why_dropped(example: Example) -> str:
    return f"no answer fits: {example.num_trained:,} of its {len(example):,} tokens are answers"


def render_data(
    prepared: Prepared, *, tokenizer: Tokenizer, num_parameters: int, num_shown: int, style: Style
) -> str:
    """The screen of `data inspect`."""
    parts = [
        headline(prepared),
        "\n".join(_length_lines(prepared)),
        "\n".join(_histogram_lines(prepared, style)),
        "\n".join(_row_lines(prepared)),
        "\n".join(_loss_lines(prepared)),
    ]
    _, warning = generalisation_ratio(prepared.lengths.num_examples, num_parameters)
    if warning:
        remedy = "a smaller model, few epochs or adapters; watch the evaluation loss"
        parts.append(f"{style.paint('Warning', 'yellow')}   {warning}\n          {remedy}")
    if not tokenizer.estimated and num_shown:
        legend = (
            f"{_context('(context)', style)} conditions, {_answer('[answer]', style)} is trained on"
        )
        parts.append(f"Examples  {legend}; | is between tokens")
        parts += [
            render_example(example, tokenizer, style) for example in prepared.examples[:num_shown]
        ]
    return "\n\n".join(parts)


def headline(prepared: Prepared) -> str:
    """The verdict in one line."""
    lengths = prepared.lengths
    tokens = sum(prepared.examples.lengths)
    share = lengths.response_mean_tokens / lengths.total_mean_tokens
    about = "about " if lengths.estimated else ""
    return (
        f"{prepared.source}: {lengths.num_examples:,} examples, {about}{tokens:,} tokens, "
        f"{share:.0%} of them trained on"
    )


def _length_lines(prepared: Prepared) -> Iterator[str]:
    yield f"Tokenizer {prepared.lengths.tokenizer}"
    yield f"Template  {prepared.template}"
    yield ""
    yield "Tokens                  mean     max     p50     p95"
    for name, lengths in _kinds(prepared).items():
        shown = summary_of(lengths)
        yield (
            f"    {name:14}{shown['mean_tokens']:10.1f}{shown['max_tokens']:8,}"
            f"{shown['p50_tokens']:8,}{shown['p95_tokens']:8,}"
        )


def _kinds(prepared: Prepared) -> dict[str, list[int]]:
    """Lengths of each example's context, of its answers, and of both."""
    lengths, trained = prepared.examples.lengths, prepared.examples.trained
    return {
        "prompt E|Q|": [a - b for a, b in zip(lengths, trained, strict=True)],
        "response E|A|": list(trained),
        "both": list(lengths),
    }


def summary_of(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, largest, median and 95th percentile.

    >>> summary_of([1, 2, 3, 10])
    {'mean_tokens': 4.0, 'max_tokens': 10, 'p50_tokens': 2, 'p95_tokens': 10}
    """
    ordered = sorted(lengths)
    return {
        "mean_tokens": sum(ordered) / len(ordered),
        "max_tokens": ordered[-1],
        "p50_tokens": percentile(ordered, 0.50),
        "p95_tokens": percentile(ordered, 0.95),
    }


def _histogram_lines(prepared: Prepared, style: Style) -> Iterator[str]:
    bins = prepared.lengths.histogram
    most = max(count for _, count in bins)
    yield "Up to   examples"
    for edge, count in bins:
        yield f"{edge:5,}{count:11,}  {style.bar(count / most, _BAR_COLUMNS)}".rstrip()


def _row_lines(prepared: Prepared) -> Iterator[str]:
    lengths, seq_len = prepared.lengths, prepared.fitted.seq_len
    padded = padded_row_len(lengths.total_max_tokens, seq_len)
    fill = (
        f"{lengths.num_packed_rows:,} rows of {seq_len:,}, {lengths.packed_fill_fraction:.1%} full"
    )
    share = lengths.total_mean_tokens / padded
    yield f"Packed    {fill}"
    yield f"Padded    {lengths.num_examples:,} rows of {padded:,}, {share:.1%} full"


def _loss_lines(prepared: Prepared) -> Iterator[str]:
    """What is left out, cut or tokenised otherwise than one might think."""
    fitted = prepared.fitted
    if prepared.lengths.estimated:
        yield "Seams     not looked at: there is no tokenizer here"
    else:
        merged = len(prepared.merged_seams)
        what = f"{merged:,} would merge if tokenised as one text" if merged else "none merges"
        yield f"Seams     {prepared.num_seams:,} from prompt to response: {what}"
        yield from _seam_lines(prepared.merged_seams)
    if fitted.num_cut:
        answers = f" and {fitted.num_cut_answers:,} answers" if fitted.num_cut_answers else ""
        yield (
            f"Cut       {fitted.num_cut:,} examples lose {fitted.num_cut_tokens:,} tokens{answers} "
            f"to fit into {fitted.seq_len:,}"
        )
    room = f"{fitted.seq_len:,} tokens"
    yield f"Dropped   {len(fitted.dropped):,} whose answers do not fit into {room}"
    for example in fitted.dropped[:_SHOWN]:
        yield f"    {example.place}: {_why_dropped(example)}"
    if len(fitted.dropped) > _SHOWN:
        yield f"    and {len(fitted.dropped) - _SHOWN:,} more"
    yield f"Skipped   {len(prepared.skipped):,} bad examples"
    yield from (f"    {line}" for line in first_lines(prepared.skipped))
    yield from (f"Note      {_printable(note)}" for note in prepared.notes)


def _seam_lines(seams: Sequence[Seam]) -> Iterator[str]:
    for seam in seams[:_SHOWN]:
        yield f"    {seam.place}: {_short(seam.before[-16:])} + {_short(seam.after[:16])}"
    if len(seams) > _SHOWN:
        yield f"    and {len(seams) - _SHOWN:,} more"


def _short(text: str) -> str:
    return ascii(text) if _UNPRINTABLE.search(text) else repr(text)


def _context(text: str, style: Style) -> str:
    return style.paint(text, "dim")


def _answer(text: str, style: Style) -> str:
    return style.paint(text, "green", "bold")


def render_example(example: Example, tokenizer: Tokenizer, style: Style) -> str:
    """One example, token by token: context in round brackets, answers in square ones."""
    trained = example.num_trained
    lines = [f"{example.place}: {len(example) - trained:,} context + {trained:,} answer tokens"]
    pairs = zip(example.trained, example.input_ids, strict=True)
    for counts, group in groupby(pairs, key=lambda pair: pair[0]):
        text = "|".join(_printable(tokenizer.decode([token])) for _, token in group)
        shown = text.replace("\n", "↵\n" if style.unicode else "\\n\n")
        painted = [
            _answer(line, style) if counts else _context(line, style)
            for line in (f"[{shown}]" if counts else f"({shown})").split("\n")
        ]
        lines += painted
    return "\n".join(lines)


def _printable(text: str) -> str:
    r"""Text whose control characters are written out.

    >>> _printable("\x1b[31mred") == r"\x1b[31mred"
    True
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)

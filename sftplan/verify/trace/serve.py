"""`python -m sftplan.verify.trace.serve`: answers questions about models that only transformers knows.

A question and its answer are one line of JSON each, see `facts.tracing`. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from sftplan.errors import NotReadyError, SftplanError, UsageError
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.chip import Chip
from sftplan.verify.trace.anatomy import anatomy_of
from sftplan.verify.trace.configs import first_line, read_config, with_layers
from sftplan.verify.trace.passes import trace_passes


def main() -> None:
    """Answer until the input ends; what libraries print does not get between the answers."""
    answers = sys.stdout
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(json.loads(line))
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, or what is wrong."""
    try:
        return _answer(question)
    except SftplanError as error:
        usage = isinstance(error, UsageError)
        return {"error": error.message, "hint": error.hint, "usage": usage}


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    config = read_config(question["config"])
    try:
        if question["what"] == "anatomy":
            return anatomy_of(config)
        return {"passes": _passes(config, question)}
    except SftplanError:
        raise
    except Exception as error:  # whatever modelling code and fake kernels may raise
        message = f"{config.model_type} cannot be traced on fake tensors: {first_line(error)}"
        raise NotReadyError(message, "such a model cannot be planned yet") from error


def _passes(config: Any, question: dict[str, Any]) -> list[dict[str, Any]]:
    from sftplan.train.model import trained_config

    knobs, batch = question["strategy"], question["batch"]
    strategy = Strategy(
        precision=Precision(knobs["precision"]),
        checkpointing=Checkpointing(knobs["checkpointing"]),
        attention=Attention(knobs["attention"]),
        loss=Loss(knobs["loss"]),
        packing=knobs["packing"],
        attention_dropout=knobs["attention_dropout"],
        micro_batch=batch["rows"],
    )
    few = with_layers(config, question["num_layers"])
    return trace_passes(
        trained_config(few, attention_dropout=strategy.attention_dropout),
        strategy,
        Batch(**{**batch, "documents": tuple(batch["documents"])}),
        Chip(**question["chip"]),
        num_passes=question["num_passes"],
    )


if __name__ == "__main__":
    main()

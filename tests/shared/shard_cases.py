"""What ranks are run with, and what one process is held against."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import dataclass

import transformers
from tiny_step import VOCAB

from sftplan.facts.strategy import Checkpointing, Loss, Offload, Precision
from sftplan.train.settings import Settings

STEPS, SAVED_AFTER = 8, 4
ROWS_PER_STEP = 8  # of one row per pass: what ranks there are share them out
SEQ_LEN = 32
SMALL_BUCKET = 20_000  # elements: a step fills it several times, and the embedding is larger
EXAMPLES = 44
SETTINGS = Settings(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-5)
TIED = transformers.GPT2Config(
    n_layer=2, n_embd=32, n_head=2, vocab_size=1000, n_positions=64, bos_token_id=0,
    eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
UNTIED = transformers.LlamaConfig(
    hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64,
)  # fmt: skip  # sizes that two and four ranks do not divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to train; `like` names the single process that has to find the same."""

    zero: int = 0
    offload: Offload = Offload.NONE
    tied: bool = True
    precision: Precision = Precision.FP32
    loss: Loss = Loss.RESPONSE
    checkpointing: Checkpointing = Checkpointing.NONE
    checkpointed_layers: int | None = None
    scale: float | None = None
    resumes: bool = False
    like: str = "tied"


SINGLE = {
    "tied": Case(),
    "untied": Case(tied=False),
    "bf16": Case(precision=Precision.BF16_MASTER),
    "fp16": Case(precision=Precision.FP16_MIXED, scale=2.0**12),
}
CASES = {
    "0": Case(resumes=True),
    "0 chunked": Case(loss=Loss.CHUNKED),
    "0 untied chunked": Case(tied=False, loss=Loss.CHUNKED, like="untied"),
    "1": Case(zero=1, resumes=True),
    "2": Case(zero=2, resumes=True),
    "3": Case(zero=3, resumes=True),
    "1 optimizer": Case(zero=1, offload=Offload.OPTIMIZER),
    "2 optimizer": Case(zero=2, offload=Offload.OPTIMIZER, resumes=True),
    "3 optimizer": Case(zero=3, offload=Offload.OPTIMIZER),
    "3 all": Case(zero=3, offload=Offload.ALL, resumes=True),
    "1 untied": Case(zero=1, tied=False, like="untied"),
    "2 untied chunked": Case(zero=2, tied=False, loss=Loss.CHUNKED, like="untied"),
    "3 untied chunked checkpointed": Case(
        zero=3, tied=False, loss=Loss.CHUNKED, checkpointing=Checkpointing.FULL, like="untied",
        resumes=True,
    ),
    "3 untied half checkpointed": Case(
        zero=3, tied=False, checkpointing=Checkpointing.FULL, checkpointed_layers=1, like="untied"
    ),
    "3 all untied full": Case(
        zero=3, offload=Offload.ALL, tied=False, loss=Loss.FULL, like="untied"
    ),
    "2 bf16": Case(zero=2, precision=Precision.BF16_MASTER, like="bf16", resumes=True),
    "3 bf16": Case(zero=3, precision=Precision.BF16_MASTER, like="bf16", resumes=True),
    "2 fp16": Case(zero=2, precision=Precision.FP16_MIXED, scale=2.0**12, like="fp16"),
}  # fmt: skip
EXACT = [name for name, case in CASES.items() if case.precision is Precision.FP32]
OVERFLOWS = {
    stage: Case(zero=stage, precision=Precision.FP16_MIXED, scale=2.0**60, like="fp16")
    for stage in (1, 3)
}

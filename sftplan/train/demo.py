"""What `sftplan launch --demo` trains: a tiny model beside a tokenizer of its own, offline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sftplan.data.demo import DEMO_FILE, DEMO_VOCAB_SIZE, demo_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

DEMO_SEQ_LEN = 256
DEMO_KNOBS: dict[str, Any] = {
    "precision": "fp32",
    "zero": 0,
    "offload": "none",
    "checkpointing": "none",
    "attention": "sdpa",
    "loss": "response",
    "packing": True,
    "compile": False,
    "micro_batch": 2,
    "accumulation": 2,
    "epochs": 15.0,
    "data": str(DEMO_FILE),
}
DEMO_SETTINGS: dict[str, Any] = {
    "learning_rate": 4e-3,
    "min_learning_rate": 4e-4,
    "warmup": 0.05,
    "eval_split": 0.1,
    "save_every": 20,
    "eval_every": 20,
    "cpu": True,
    "random_weights": True,
}
_CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "n_embd": 128,
    "n_head": 4,
    "n_positions": DEMO_SEQ_LEN,
    "vocab_size": DEMO_VOCAB_SIZE,
    "activation_function": "gelu_new",
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.0,
}


def write_demo_model(folder: Path) -> None:
    """Write config.json and the tokenizer of the demo's model; it has no weights yet."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_tokenizer()
    tokenizer.save(folder)
    end = tokenizer.eos_id
    config = _CONFIG | {"bos_token_id": end, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""What `launch --demo` trains on, offline and on a CPU: about 200 examples of our own writing."""

from __future__ import annotations

from pathlib import Path

from sftplan.data.read import read_instructions
from sftplan.data.tokenizer import BpeTokenizer, tokenizers_library

DEMO_FILE = Path(__file__).with_name("demo.jsonl")
DEMO_VOCAB_SIZE = 512  # 256 bytes, the end of text, and the most frequent merges
END_OF_TEXT = "<|endoftext|>"


def demo_tokenizer(vocab_size: int = DEMO_VOCAB_SIZE) -> BpeTokenizer:
    """A byte-level BPE trained from the demo set, in well under a second; always the same."""
    library = tokenizers_library()
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [turn.text for c in read_instructions(DEMO_FILE).conversations for turn in c.turns]
    backend.train_from_iterator(texts, trainer)
    return BpeTokenizer(backend, name="demo", special_texts={"eos_token": END_OF_TEXT})

"""Conversations become the text and the ids that generation will see."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.data.conversation import Conversation, Place, Role, Turn
from sftplan.data.demo import DEMO_FILE, demo_tokenizer
from sftplan.data.encode import encode
from sftplan.data.locate import find_tokenizer, load_tokenizer
from sftplan.data.prepare import prepare
from sftplan.data.read import read_instructions
from sftplan.data.template import PlainTemplate, template_of
from sftplan.data.tokenizer import BpeTokenizer, EstimatedTokenizer, check_vocabulary
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.data.mask import Example
    from sftplan.data.tokenizer import Tokenizer

PLACE = Place(file="data.jsonl", row=1, line=1)
CHATML = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' -%}
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content }}<|im_end|>
{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen 3 does: only the last answer has its thoughts.
REWRITING = CHATML.replace("{{ m.content }}<|im_end|>{% endg", "{% if loop.last %}<think></think>"
                           "{% endif %}{{ m.content }}<|im_end|>{% endg")  # fmt: skip


def conversation(*texts: str, system: str = "", verbatim: bool = False) -> Conversation:
    """User and assistant in turn."""
    roles = [Role.USER, Role.ASSISTANT] * len(texts)
    turns = [Turn(role=role, text=text) for role, text in zip(roles, texts, strict=False)]
    first = [Turn(role=Role.SYSTEM, text=system)] if system else []
    return Conversation(turns=(*first, *turns), place=PLACE, verbatim=verbatim)


def chat_tokenizer(template: str) -> BpeTokenizer:
    """The demo tokenizer with ChatML's tokens."""
    tokenizer = demo_tokenizer()
    tokenizer._backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    special = {"eos_token": "<|im_end|>"}
    return BpeTokenizer(
        tokenizer._backend, name="chat", special_texts=special, chat_template=template
    )


def examples(tokenizer: Tokenizer, *conversations: Conversation) -> tuple[Example, ...]:
    """Their examples, none refused."""
    encoded = encode(conversations, template=template_of(tokenizer), tokenizer=tokenizer)
    assert not encoded.problems
    return encoded.examples


def parts(tokenizer: Tokenizer, example: Example) -> list[tuple[bool, str]]:
    """Text by runs of trained and untrained tokens."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if not runs or runs[-1][0] != bool(trained):
            runs.append((bool(trained), []))
        runs[-1][1].append(token)
    return [(trained, tokenizer.decode(ids)) for trained, ids in runs]


def test_plain_template_as_documented() -> None:
    tokenizer = demo_tokenizer()
    talk = conversation("Q1", "A1", "Q2", "A2", system="Be kind.")
    (example,) = examples(tokenizer, talk)
    assert parts(tokenizer, example) == [
        (False, "Be kind.\n\n### Instruction:\nQ1\n\n### Response:\n"),
        (True, "A1<|endoftext|>"),
        (False, "### Instruction:\nQ2\n\n### Response:\n"),
        (True, "A2<|endoftext|>"),
    ]


def test_an_answer_that_does_not_count_is_context() -> None:
    talk = conversation("Q1", "A1", "Q2", "A2")
    turns = (talk.turns[0], replace(talk.turns[1], trained=False), *talk.turns[2:])
    for tokenizer in (demo_tokenizer(), chat_tokenizer(CHATML)):
        (whole,) = examples(tokenizer, talk)
        (example,) = examples(tokenizer, replace(talk, turns=turns))
        trained = [text for counts, text in parts(tokenizer, example) if counts]
        assert list(example.input_ids) == list(whole.input_ids)
        assert trained == [text for counts, text in parts(tokenizer, whole) if counts][1:]


def test_plain_template_shows_tools_calls_and_results() -> None:
    turns = (
        Turn(role=Role.USER, text="Q"),
        Turn(role=Role.ASSISTANT, text="", calls='{"name": "f"}'),
        Turn(role=Role.TOOL, text="R"),
        Turn(role=Role.ASSISTANT, text="A"),
    )
    talk = Conversation(turns=turns, place=PLACE, tools='[{"name": "f"}]')
    (segments,) = PlainTemplate().sequences(talk)
    assert "".join(s.text for s in segments) == (
        '### Tools:\n[{"name": "f"}]\n\n### Instruction:\nQ\n\n### Response:\n{"name": "f"}'
        "### Result:\nR\n\n### Response:\nA"
    )


def test_prompt_ids_are_those_of_the_prompt_alone() -> None:
    """Also where one text would be tokenised otherwise: ": " + "Paris" has the token " Paris"."""
    tokenizer = demo_tokenizer()
    seam = conversation("Add the two numbers", " and that", verbatim=True)
    split = conversation("Add the two n", "umbers", verbatim=True)
    for talk in (seam, split):
        (example,) = examples(tokenizer, talk)
        prompt, answer = (
            tokenizer.encode([t.text], special=False, first=True)[0] for t in talk.turns
        )
        assert list(example.input_ids) == [*prompt, *answer, tokenizer.eos_id]
        assert list(example.trained) == [0] * len(prompt) + [1] * (len(answer) + 1)
    encoded = encode([seam, split], template=PlainTemplate(), tokenizer=tokenizer, seams=True)
    assert encoded.num_seams == 2
    assert [(s.before, s.after) for s in encoded.merged_seams] == [("Add the two n", "umbers")]


def test_special_tokens_in_the_data_are_text_under_the_plain_template() -> None:
    tokenizer = demo_tokenizer()
    (example,) = examples(tokenizer, conversation("<|endoftext|>", "A<|endoftext|>"))
    assert example.input_ids.count(tokenizer.eos_id) == 1
    (verbatim,) = examples(tokenizer, conversation("Q", "A<|endoftext|>", verbatim=True))
    assert verbatim.input_ids.count(tokenizer.eos_id) == 1


def test_chat_template_trains_each_answer_up_to_its_end() -> None:
    tokenizer = chat_tokenizer(CHATML)
    (example,) = examples(tokenizer, conversation("Q1", "A1", "Q2", "A2", system="S"))
    assert parts(tokenizer, example) == [
        (
            False,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "A1<|im_end|>"),
        (False, "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"),
        (True, "A2<|im_end|>"),
    ]


def test_template_that_rewrites_earlier_turns_gives_one_sequence_per_answer() -> None:
    tokenizer = chat_tokenizer(REWRITING)
    first, second = examples(tokenizer, conversation("Q1", "A1", "Q2", "A2"))
    assert parts(tokenizer, first)[1:] == [(True, "<think></think>A1<|im_end|>")]
    assert [trained for trained, _ in parts(tokenizer, second)] == [False, True]
    assert "A1<|im_end|>" in parts(tokenizer, second)[0][1]


def test_chat_templates_equal_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = conversation("Q1", "A1", "Q2", "A2", system="S")
    (example,) = examples(load_tokenizer(tmp_path), talk)
    messages = [{"role": t.role.value, "content": t.text} for t in talk.turns]
    prompt = theirs.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(example.input_ids)[: len(prompt)] == prompt
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    tail = tokenizer.encode(["\n"], special=True, first=True)[0]
    assert list(example.input_ids) + list(tail) == whole


MISTRAL = """\
{{ bos_token }}{% for m in messages %}
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}{% endfor %}"""


def test_template_that_ends_answers_with_end_of_text() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = BpeTokenizer(
        llama_like(), name="mistral", special_texts=special, chat_template=MISTRAL
    )
    (example,) = examples(tokenizer, conversation("Add", "Two", "More", "Three"))
    pairs = zip(example.input_ids, example.trained, strict=True)
    answer = "".join(tokenizer._backend.id_to_token(i) for i, trained in pairs if trained)
    assert answer == "▁Two</s>▁Three</s>"
    assert list(example.input_ids).count(1) == 1
    with_system = [conversation("Q", "A", system="S")]
    encoded = encode(with_system, template=template_of(tokenizer), tokenizer=tokenizer)
    assert "Only user and assistant roles" in str(encoded.problems[0])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses it"),
        ("{{ messages | length }}{{ add_generation_prompt }}", "generation prompt"),
    ],
)
def test_refusals_of_the_chat_template_are_problems_of_the_example(
    source: str, reason: str
) -> None:
    tokenizer = chat_tokenizer(source)
    encoded = encode([conversation("Q", "A")], template=template_of(tokenizer), tokenizer=tokenizer)
    assert reason in str(encoded.problems[0])


def test_broken_chat_template_is_refused() -> None:
    tokenizer = chat_tokenizer("{% if %}")
    with pytest.raises(UsageError, match="chat template is broken"):
        encode([conversation("Q", "A")], template=template_of(tokenizer), tokenizer=tokenizer)


def llama_like() -> Any:
    """A BPE that, like Llama 2's, puts a space before every text and a token first."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    texts = [t.text for c in read_instructions(DEMO_FILE).conversations for t in c.turns]
    lines = [line for text in texts for line in text.split("\n")] + ["###\n"]
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def test_no_space_is_put_before_an_answer_and_one_bos_first() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = BpeTokenizer(llama_like(), name="llama", special_texts=special)
    (example,) = examples(tokenizer, conversation("Say hello.", "Hello."))
    answer = [i for i, t in zip(example.input_ids, example.trained, strict=True) if t]
    token = tokenizer._backend.id_to_token
    assert "".join(token(i) for i in answer) == "Hello.</s>"
    assert tokenizer.bos_id == 1
    assert list(example.input_ids).count(1) == 1
    assert example.input_ids[0] == 1


def test_tokenizers_are_found_in_folders_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_tokenizer("some/model").estimated
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    demo_tokenizer().save(snapshot)
    found = find_tokenizer("builtin", "some/model")
    assert isinstance(found, BpeTokenizer)
    assert found.fingerprint == demo_tokenizer().fingerprint
    assert not find_tokenizer(str(snapshot)).estimated
    with pytest.raises(UsageError, match="neither"):
        find_tokenizer(folder=tmp_path)


def test_gpt2_files_give_the_same_ids(tmp_path: Path) -> None:
    tokenizer = demo_tokenizer()
    tokenizer._backend.model.save(str(tmp_path))
    found = load_tokenizer(tmp_path)
    text = ["Add the two numbers.\n\n  3 and 4 <|endoftext|>"]
    assert found.encode(text, special=True, first=True) == tokenizer.encode(
        text, special=True, first=True
    )
    assert found.eos_id == tokenizer.eos_id
    (tmp_path / "vocab.json").write_text(json.dumps({"a</w>": 0}))
    with pytest.raises(UsageError, match="no byte-level vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UsageError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_beyond_the_vocabulary_is_refused() -> None:
    tokenizer = demo_tokenizer()
    check_vocabulary(tokenizer, vocab_size=512, model="m")
    with pytest.raises(UsageError, match="makes ids up to 511, m has 511 rows"):
        check_vocabulary(tokenizer, vocab_size=511, model="m")


def test_a_tokenizer_of_far_fewer_ids_is_doubted() -> None:
    tokenizer = demo_tokenizer()
    said = check_vocabulary(tokenizer, vocab_size=50_257, model="gpt2")
    assert said is not None
    assert said.endswith(
        "makes 512 ids, gpt2 has 50,257 rows of vocabulary: is it the model's own?"
    )
    assert check_vocabulary(tokenizer, vocab_size=520, model="padded") is None
    notes = prepare(DEMO_FILE, tokenizer=tokenizer, seq_len=128, vocab_size=50_257).notes
    assert "is it the model's own?" in notes[0]


def test_added_tokens_count_only_where_they_are_used(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b<|im_start|>c"}\n')
    with pytest.raises(UsageError, match="beyond the 513"):
        prepare(file, tokenizer=demo_with_unused(), seq_len=64, vocab_size=513)
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    assert prepare(file, tokenizer=demo_with_unused(), seq_len=64, vocab_size=513).examples
    assert tokenizer.max_id == 513


def demo_with_unused() -> BpeTokenizer:
    tokenizer = demo_tokenizer()
    tokenizer._backend.add_special_tokens(["<|image|>", "<|im_start|>"])
    return tokenizer


def test_an_estimate_says_so_and_counts_characters(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 330, "completion": "b" * 33}))
    lengths = prepare(file, tokenizer=EstimatedTokenizer(), seq_len=1024).lengths
    assert lengths.estimated
    assert (lengths.prompt_mean_tokens, lengths.response_mean_tokens) == (100, 11)

"""The seam: prompt ids are those that generation will see, and answers follow them unmerged.

The oracle is the tokenizer as transformers loads it, which is what generates later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftplan.data.conversation import Conversation, Place, Role, Turn
from sftplan.data.demo import demo_tokenizer
from sftplan.data.encode import encode
from sftplan.data.template import template_of
from sftplan.data.tokenizer import BpeTokenizer

if TYPE_CHECKING:
    from sftplan.data.mask import Example

PLACE = Place(file="data.jsonl", row=1, line=1)
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Letters, digits, blanks and line ends side by side: there byte-level BPE would merge.
TEXTS = st.text(
    st.sampled_from("abehnot ,.:\n\t019éß中😀'\"#<|>") | st.characters(exclude_categories=["Cs"]),
    min_size=1, max_size=40,
)  # fmt: skip
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


class Both:
    """A tokenizer of ours, and the same one as transformers loads it."""

    def __init__(self, folder: Any, *, vocab_size: int, chat: bool) -> None:
        transformers = pytest.importorskip("transformers")
        made = demo_tokenizer(vocab_size)
        special = {"eos_token": "<|endoftext|>"}
        if chat:
            made._backend.add_special_tokens([START, END])
            special = {"eos_token": END}
        self.ours = BpeTokenizer(
            made._backend,
            name="both",
            special_texts=special,
            chat_template=CHATML if chat else None,
        )
        self.ours.save(folder)
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        """What generation sees of a text."""
        found: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        return found


@pytest.fixture(scope="module", params=[512, 3000], ids=["demo", "larger"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("chat"), vocab_size=request.param, chat=True)


@pytest.fixture(scope="module", params=[512, 3000], ids=["demo", "larger"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("plain"), vocab_size=request.param, chat=False)


def conversation(talk: list[tuple[str, str]], *, verbatim: bool = False) -> Conversation:
    turns = [
        Turn(role=role, text=text)
        for pair in talk
        for role, text in zip((Role.USER, Role.ASSISTANT), pair, strict=True)
    ]
    return Conversation(turns=tuple(turns), place=PLACE, verbatim=verbatim)


def answers_of(example: Example) -> list[tuple[list[int], list[int]]]:
    """Per answer: all ids before it, and its own."""
    found: list[tuple[list[int], list[int]]] = []
    marks = [0, *example.trained, 0]
    ids = example.input_ids.tolist()
    starts = [i for i in range(len(ids)) if (marks[i], marks[i + 1]) == (0, 1)]
    for start in starts:
        end = next(i for i in range(start, len(ids)) if not marks[i + 2])
        found.append((ids[:start], ids[start : end + 1]))
    return found


@settings(max_examples=60, deadline=None)
@given(talk=TALKS)
def test_a_chat_prompt_is_what_generation_will_see(chat: Both, talk: list[tuple[str, str]]) -> None:
    asked = conversation(talk)
    encoded = encode([asked], template=template_of(chat.ours), tokenizer=chat.ours, seams=True)
    (example,) = encoded.examples
    messages = [{"role": t.role.value, "content": t.text} for t in asked.turns]
    merged = {(seam.before, seam.after) for seam in encoded.merged_seams}
    found = answers_of(example)

    assert len(found) == len(talk) == encoded.num_seams
    for number, (prompt, answer) in enumerate(found):
        text = talk[number][1] + END
        expected = chat.theirs.apply_chat_template(
            messages[: 2 * number + 1], add_generation_prompt=True, return_dict=False
        )
        if not merged or number == 0:  # what an answer merged with is in the prompts after it
            assert prompt == expected
        assert answer == chat.ids(text)
        assert answer[-1] == chat.theirs.convert_tokens_to_ids(END)
        assert chat.theirs.decode(prompt + answer) == chat.theirs.decode(expected) + text


@settings(max_examples=60, deadline=None)
@given(talk=TALKS)
def test_the_plain_templates_prompt_is_what_generation_will_see(
    plain: Both, talk: list[tuple[str, str]]
) -> None:
    encoded = encode(
        [conversation(talk)], template=template_of(plain.ours), tokenizer=plain.ours, seams=True
    )
    (example,) = encoded.examples
    text, end = "", "<|endoftext|>"
    for (prompt, answer), (user, spoken) in zip(answers_of(example), talk, strict=True):
        text += f"### Instruction:\n{user}\n\n### Response:\n"
        if end not in user + spoken and (not encoded.merged_seams or end not in text):
            assert prompt == plain.ids(text)
            assert answer == [*plain.ids(spoken), plain.ours.eos_id]
        text += spoken + end


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_seams_that_merge_are_exactly_those_that_are_reported(
    plain: Both, prompt: str, completion: str
) -> None:
    """As one text they would have become other ids: the report says so, and the ids are not those."""
    asked = conversation([(prompt, completion)], verbatim=True)
    encoded = encode([asked], template=template_of(plain.ours), tokenizer=plain.ours, seams=True)
    (example,) = encoded.examples
    apart = [*plain.ids(prompt), *plain.ids(completion), plain.ours.eos_id]
    together = [*plain.ids(prompt + completion), plain.ours.eos_id]

    assert example.input_ids.tolist() == apart
    assert bool(encoded.merged_seams) == (together != apart)


def test_seams_do_merge_in_this_alphabet(plain: Both) -> None:
    """So that the property above is about something."""
    pairs = [("to ", " the"), ("fine. ", "fine")]
    merged = encode(
        [conversation([pair], verbatim=True) for pair in pairs],
        template=template_of(plain.ours), tokenizer=plain.ours, seams=True,
    ).merged_seams  # fmt: skip
    assert [(seam.before, seam.after) for seam in merged] == [("fine. ", "fine")]

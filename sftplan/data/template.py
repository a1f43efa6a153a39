"""Conversations to segments: pieces of text that are trained on or not.

Prompt and response are separate segments and are tokenised separately, so that the ids of the
prompt are the very ids that generation will see. The plain template, for models without a chat
template (tools and system only where a conversation has them):

    ### Tools:
    {JSON}

    {system}

    ### Instruction:
    {user}

    ### Response:
    {assistant}<end of text>

Further turns go on after the end-of-text token; a tool's result stands under `### Result:`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from sftplan.data.conversation import BadExampleError, Role
from sftplan.errors import NotReadyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.conversation import Conversation, Turn
    from sftplan.data.tokenizer import Tokenizer


# What a template's expressions raise on a conversation that they were not written for.
_TEMPLATE_BUGS = (TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of text.

    `ends`: the end-of-text token follows and belongs to it. `special`: special tokens written in
    the text count as such (a chat template writes them).
    """

    text: str
    trained: bool
    ends: bool = False
    special: bool = False


class Template(Protocol):
    """How a conversation becomes text."""

    @property
    def name(self) -> str:
        """For the reader: which template."""

    @property
    def writes_bos(self) -> bool:
        """Whether the template decides on a first token; otherwise the tokenizer's is put."""

    def sequences(self, conversation: Conversation) -> list[list[Segment]]:
        """The training sequences of a conversation, as a rule one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTemplate:
    """Headings of Alpaca's kind; see the module."""

    name: str = "plain"
    writes_bos: bool = False

    def sequences(self, conversation: Conversation) -> list[list[Segment]]:
        """One sequence; every assistant turn that counts is trained on; all end with end-of-text."""
        segments: list[Segment] = []
        prompt = f"### Tools:\n{conversation.tools}\n\n" if conversation.tools else ""
        for turn in conversation.turns:
            match turn.role:
                case Role.SYSTEM:
                    prompt += f"{turn.text}\n\n"
                case Role.USER:
                    prompt += f"### Instruction:\n{turn.text}\n\n"
                case Role.TOOL:
                    prompt += f"### Result:\n{turn.text}\n\n"
                case Role.ASSISTANT:
                    segments.append(Segment(text=f"{prompt}### Response:\n", trained=False))
                    segments.append(Segment(text=turn.spoken, trained=turn.trained, ends=True))
                    prompt = ""
        return [segments]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """The model's own Jinja template.

    The prompt of an answer is what the template renders for generation. Where the template
    rewrites earlier turns, so that such a prompt is not how the whole conversation begins,
    each answer becomes a sequence of its own.
    """

    source: str
    special_texts: tuple[tuple[str, str], ...]  # bos_token and so on, by name
    end_texts: tuple[str, ...]  # special tokens, one of which ends an answer
    name: str = "the model's chat template"
    writes_bos: bool = True

    def sequences(self, conversation: Conversation) -> list[list[Segment]]:
        """One sequence, or one per answer where the template rewrites earlier turns."""
        messages = [_message(turn) for turn in conversation.turns]
        tools = json.loads(conversation.tools) if conversation.tools else None
        answers = [
            i for i, t in enumerate(conversation.turns) if t.role is Role.ASSISTANT and t.trained
        ]
        spans = [self._span(messages, index, tools) for index in answers]
        whole = self._render(messages[: answers[-1] + 1], tools, generation=False)
        if all(whole.startswith(prompt + answer) for prompt, answer in spans):
            return [_between(whole, spans)]
        return [_between(prompt + answer, [(prompt, answer)]) for prompt, answer in spans]

    def _span(
        self, messages: Sequence[dict[str, Any]], index: int, tools: object
    ) -> tuple[str, str]:
        """What generation sees before answer `index`, and what it should then produce."""
        prompt = self._render(messages[:index], tools, generation=True)
        upto = self._render(messages[: index + 1], tools, generation=False)
        if not upto.startswith(prompt):
            reason = "the chat template's generation prompt is not how it writes an answer"
            raise BadExampleError(field="chat template", reason=reason)
        return prompt, self._without_tail(upto[len(prompt) :])

    def _without_tail(self, answer: str) -> str:
        """The answer up to its last special token: what follows it belongs to the next prompt."""
        ends = (answer.rfind(text) + len(text) for text in self.end_texts if text in answer)
        end = max(ends, default=len(answer))
        return answer[:end]

    def _render(self, messages: Sequence[Any], tools: object, *, generation: bool) -> str:
        compiled, failure = _compiled(self.source)
        values = {**dict(self.special_texts), "tools": tools, "documents": None}
        try:
            return str(
                compiled.render(messages=messages, add_generation_prompt=generation, **values)
            )
        except failure as error:
            reason = f"the chat template refuses it: {error}"
            raise BadExampleError(field="messages", reason=reason) from None


def template_of(tokenizer: Tokenizer) -> Template:
    """The model's chat template if its tokenizer has one, else the plain one."""
    if tokenizer.chat_template is None:
        return PlainTemplate()
    special = tuple(sorted(tokenizer.special_texts.items()))
    return ChatTemplate(
        source=tokenizer.chat_template,
        special_texts=special,
        end_texts=tuple(tokenizer.end_tokens.values()),
    )


def sequences_of(conversation: Conversation, template: Template) -> list[list[Segment]]:
    """The training sequences of a conversation; verbatim ones need no template."""
    if not conversation.verbatim:
        return template.sequences(conversation)
    prompt, answer = conversation.turns
    return [
        [
            Segment(text=prompt.text, trained=False, special=True),
            Segment(text=answer.text, trained=True, ends=True, special=True),
        ]
    ]


def _between(text: str, spans: Sequence[tuple[str, str]]) -> list[Segment]:
    """Segments of a rendered text whose answers stand after the given prompts."""
    segments: list[Segment] = []
    position = 0
    for prompt, answer in spans:
        end = len(prompt) + len(answer)
        segments.append(Segment(text=text[position : len(prompt)], trained=False, special=True))
        segments.append(Segment(text=answer, trained=True, ends=True, special=True))
        position = end
    return segments


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates expect it."""
    message: dict[str, Any] = {"role": turn.role.value, "content": turn.text}
    if turn.calls:
        calls = json.loads(turn.calls)
        listed = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [
            call if "function" in call else {"type": "function", "function": call}
            for call in listed
        ]
    return message


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """The template, compiled in Jinja's sandbox as transformers does, and what it may raise."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        message = "the model's chat template needs the library `jinja2`"
        raise NotReadyError(message, "pip install jinja2") from None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, indent: int | None = None, **_: object) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    class Generation(jinja2.ext.Extension):
        """The block `{% generation %}`, which says nothing that the prompts do not say."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            """The block's own body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: _date(pattern)
    try:
        return environment.from_string(source), (jinja2.TemplateError, *_TEMPLATE_BUGS)
    except jinja2.TemplateError as error:
        message = f"the chat template is broken: {error}"
        raise UsageError(message) from None


def _date(pattern: str) -> str:
    """A fixed date where a template writes today's: the same data gives the same tokens."""
    from datetime import date

    return date(2024, 7, 26).strftime(pattern)  # the default of Llama 3's template

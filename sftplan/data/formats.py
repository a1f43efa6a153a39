"""One record of an instruction file, in any of four layouts, to a conversation.

messages       {"messages": [{"role": "user", "content": ...}, ...]}, with optional "tools"
ShareGPT       {"conversations": [{"from": "human", "value": ...}, ...]}, "system", "tools"
prompt         {"prompt": text, "completion": text}, taken verbatim, or two lists of messages
Alpaca         {"instruction": text, "input": text, "output" | "response": text},
               with optional "system" and "history"

The first layout that a record has keys of counts. Further fields are ignored, and counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING

from sftplan.data.conversation import BadExampleError, Conversation, Role, Turn
from sftplan.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.data.conversation import Place

_INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {
    "system": Role.SYSTEM, "developer": Role.SYSTEM,
    "user": Role.USER, "human": Role.USER,
    "assistant": Role.ASSISTANT, "gpt": Role.ASSISTANT, "model": Role.ASSISTANT,
    "function_call": Role.ASSISTANT,
    "tool": Role.TOOL, "function": Role.TOOL, "observation": Role.TOOL,
}  # fmt: skip
_LAYOUTS = {
    "messages": {"messages", "tools", "system"},
    "conversations": {"conversations", "tools", "system"},
    "prompt": {"prompt", "completion", "tools"},
    "completion": {"prompt", "completion", "tools"},
    "instruction": {"instruction", "input", "output", "response", "system", "history"},
    "output": {"instruction", "input", "output", "response", "system", "history"},
}
_EXPECTED = "expected instruction/output, prompt/completion, messages or conversations"


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "an array"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"


def conversation_of(record: object, place: Place) -> tuple[Conversation, frozenset[str]]:
    """The conversation of one record, and the names of the fields that were not used."""
    if not isinstance(record, dict):
        reason = f"is {kind_of(record)}, expected an object"
        raise BadExampleError(field="example", reason=reason, hint=_EXPECTED)
    layout = next((key for key in _LAYOUTS if key in record), None)
    if layout is None:
        raise BadExampleError(
            field="example", reason="has no field that is known", hint=_unknown_hint(record)
        )
    verbatim = False
    if layout in ("messages", "conversations"):
        turns = _optional_system(record) + _turns(record[layout], layout)
    elif layout in ("prompt", "completion"):
        turns, verbatim = _prompt_completion(record)
    else:
        turns = _alpaca(record)
    conversation = Conversation(
        turns=_checked(turns, layout), place=place, tools=_tools(record), verbatim=verbatim
    )
    return conversation, frozenset(key for key in record if key not in _LAYOUTS[layout])


def _unknown_hint(record: Mapping[str, object]) -> str:
    close = (did_you_mean(str(key), _LAYOUTS) for key in record)
    return next((hint for hint in close if hint), _EXPECTED)


def _text(record: Mapping[str, object], field: str, *, path: str = "", empty: bool = False) -> str:
    """A text field; `path` is its full name in messages."""
    path = path or field
    if field not in record:
        raise BadExampleError(
            field=path, reason="is missing", hint=did_you_mean(field, map(str, record))
        )
    value = record[field]
    if isinstance(value, list):
        value = _joined_parts(value, path)
    if not isinstance(value, str):
        raise BadExampleError(field=path, reason=f"is {kind_of(value)}, expected text")
    if not value.isascii() and _SURROGATE.search(value):
        raise BadExampleError(
            field=path, reason="holds half of a surrogate pair, which is no character"
        )
    if "\0" in value:
        raise BadExampleError(field=path, reason="holds a NUL, which is no character of a text")
    if not empty and not value.strip():
        raise BadExampleError(field=path, reason="is empty")
    if not empty and not value.isascii() and all(map(_is_invisible, value)):
        raise BadExampleError(field=path, reason="holds nothing that can be seen")
    return value


def _is_invisible(character: str) -> bool:
    """Spaces, and what only formats or controls: zero-width spaces, byte order marks."""
    return unicodedata.category(character) in _INVISIBLE


def _joined_parts(parts: list[object], path: str) -> str:
    """The text of a content that is a list of parts, as the OpenAI layout allows."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        text = part.get("text") if is_text and isinstance(part, dict) else None
        if not isinstance(text, str):
            reason = "is no text part; only text can be trained on"
            raise BadExampleError(field=f"{path}[{index}]", reason=reason)
        texts.append(text)
    return "".join(texts)


def _optional(record: Mapping[str, object], field: str) -> str:
    return "" if record.get(field) is None else _text(record, field, empty=True)


def _optional_system(record: Mapping[str, object]) -> list[Turn]:
    system = _optional(record, "system")
    return [Turn(role=Role.SYSTEM, text=system)] if system.strip() else []


def _tools(record: Mapping[str, object]) -> str:
    """The offered functions as JSON text; an empty list is none."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadExampleError(field="tools", reason="is no JSON") from None
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise BadExampleError(field="tools", reason=f"is {kind_of(tools)}, expected an array")
    return json.dumps(tools, ensure_ascii=False)


def _turns(messages: object, path: str) -> list[Turn]:
    if isinstance(messages, str):  # a CSV cell
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BadExampleError(
                field=path, reason="is text, expected an array of messages"
            ) from None
    if not isinstance(messages, list):
        reason = f"is {kind_of(messages)}, expected an array of messages"
        raise BadExampleError(field=path, reason=reason)
    if not messages:
        raise BadExampleError(field=path, reason="is an empty array")
    turns = [_turn(message, f"{path}[{index}]") for index, message in enumerate(messages)]
    return [turn for turn in turns if turn.role is not Role.SYSTEM or turn.text.strip()]


def _turn(message: object, path: str) -> Turn:
    if not isinstance(message, dict):
        raise BadExampleError(field=path, reason=f"is {kind_of(message)}, expected an object")
    role_key = "role" if "role" in message or "from" not in message else "from"
    text_key = "content" if "content" in message or "value" not in message else "value"
    name = _text(message, role_key, path=f"{path}.{role_key}")
    role = _ROLES.get(name)
    if role is None:
        reason = f"unknown role {name[:40]!r}; expected system, user, assistant or tool"
        raise BadExampleError(
            field=f"{path}.{role_key}", reason=reason, hint=did_you_mean(name, _ROLES)
        )
    trained = _counts(message, path)
    calls = message.get("tool_calls")
    if calls and role is Role.ASSISTANT:
        said = message.get(text_key)
        text = "" if said is None else _text(message, text_key, path=path, empty=True)
        return Turn(role=role, text=text, calls=_calls(calls, path), trained=trained)
    may_be_empty = role in (Role.SYSTEM, Role.TOOL)
    text = _text(message, text_key, path=f"{path}.{text_key}", empty=may_be_empty)
    if name == "function_call" and _is_json_object(text):
        return Turn(role=role, text="", calls=text, trained=trained)
    return Turn(role=role, text=text, trained=trained)


def _counts(message: Mapping[str, object], path: str) -> bool:
    """Whether an answer is trained on: `weight` 0 (OpenAI) or `train` false (axolotl) leave it out."""
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (None, 0, 1):
        reason = "is neither 0 nor 1: an answer counts or does not"
        raise BadExampleError(field=f"{path}.weight", reason=reason)
    if train not in (None, True, False):
        raise BadExampleError(field=f"{path}.train", reason="is neither true nor false")
    return weight != 0 and train is not False


def _calls(calls: object, path: str) -> str:
    """The tool calls as JSON text: an array of objects, or the text of one."""
    path = f"{path}.tool_calls"
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise BadExampleError(field=path, reason="is text, expected an array") from None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadExampleError(field=path, reason="is no array of objects")
    return json.dumps(calls, ensure_ascii=False)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _prompt_completion(record: Mapping[str, object]) -> tuple[list[Turn], bool]:
    for field in ("prompt", "completion"):
        if field not in record:
            raise BadExampleError(
                field=field, reason="is missing", hint=did_you_mean(field, map(str, record))
            )
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        return [*_turns(prompt, "prompt"), *_turns(completion, "completion")], False
    turns = [
        Turn(role=Role.USER, text=_text(record, "prompt")),
        Turn(role=Role.ASSISTANT, text=_text(record, "completion")),
    ]
    return turns, True


def _alpaca(record: Mapping[str, object]) -> list[Turn]:
    if "output" in record and "response" in record:
        raise BadExampleError(
            field="response", reason="stands beside output: which one is the answer?"
        )
    turns = _optional_system(record) + _history(record.get("history"))
    instruction, context = _text(record, "instruction"), _optional(record, "input")
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    answer = _text(record, "response" if "response" in record else "output")
    return [*turns, Turn(role=Role.USER, text=asked), Turn(role=Role.ASSISTANT, text=answer)]


def _history(history: object) -> list[Turn]:
    """Earlier turns of LLaMA-Factory's Alpaca layout: pairs of instruction and answer."""
    if history is None:
        return []
    if not isinstance(history, list):
        raise BadExampleError(
            field="history", reason=f"is {kind_of(history)}, expected an array of pairs"
        )
    turns: list[Turn] = []
    for index, pair in enumerate(history):
        path = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadExampleError(field=path, reason="is no pair of instruction and answer")
        said = {"0": pair[0], "1": pair[1]}
        turns.append(Turn(role=Role.USER, text=_text(said, "0", path=f"{path}[0]")))
        turns.append(Turn(role=Role.ASSISTANT, text=_text(said, "1", path=f"{path}[1]")))
    return turns


def _checked(turns: list[Turn], path: str) -> tuple[Turn, ...]:
    """The turns, if they have an answer and their order makes sense."""
    if all(turn.role is not Role.ASSISTANT for turn in turns):
        raise BadExampleError(
            field=path, reason="has no assistant turn: there is nothing to train on"
        )
    if not any(turn.role is Role.ASSISTANT and turn.trained for turn in turns):
        raise BadExampleError(
            field=path, reason="has no answer that counts: all have weight 0 or train false"
        )
    if any(turn.role is Role.SYSTEM for turn in turns[1:]):
        raise BadExampleError(field=path, reason="has a system turn that is not the first")
    first = turns[0] if turns[0].role is not Role.SYSTEM else turns[1]
    if first.role is not Role.USER:
        raise BadExampleError(
            field=path, reason=f"begins with a turn of the {first.role}, expected the user"
        )
    return tuple(turns)

"""Instruction files in all layouts, and everything that must not be accepted without a word."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest

from sftplan.data.conversation import Role
from sftplan.data.read import read_instructions
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

from data_lines import CHAT, GOOD, said, write


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "Q", "output": "A"}, [("user", "Q"), ("assistant", "A")]),
        ({"instruction": "Q", "input": "", "response": "A"}, [("user", "Q"), ("assistant", "A")]),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
            [("system", "S"), ("user", "Q\n\nI"), ("assistant", "A")],
        ),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
            [("user", "q"), ("assistant", "a"), ("user", "Q"), ("assistant", "A")],
        ),
        ({"prompt": "P: ", "completion": " C"}, [("user", "P: "), ("assistant", " C")]),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            [("user", "Q"), ("assistant", "A")],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": "A"},
                ]
            },
            [("system", "S"), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                    {"from": "observation", "value": "R"},
                    {"from": "gpt", "value": "B"},
                ],
                "tools": "[]",
            },
            [("user", "Q"), ("assistant", "A"), ("tool", "R"), ("assistant", "B")],
        ),
    ],
)
def test_layouts(tmp_path: Path, record: object, turns: list[tuple[str, str]]) -> None:
    assert said(write(tmp_path, json.dumps(record))) == [turns]
    assert said(write(tmp_path, json.dumps([record], indent=2), "data.json")) == [turns]


def test_tool_calls_keep_their_json(tmp_path: Path) -> None:
    call = {"name": "search", "arguments": {"q": "x"}}
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "R"},
        {"from": "gpt", "value": "A"},
    ]
    tools = json.dumps([{"name": "search"}])
    file = write(tmp_path, json.dumps({"conversations": turns, "tools": tools}))
    (conversation,) = read_instructions(file).conversations
    assert conversation.turns[1].role is Role.ASSISTANT
    assert json.loads(conversation.turns[1].calls) == call
    assert json.loads(conversation.tools) == [{"name": "search"}]


def test_places_count_lines_and_rows_from_one(tmp_path: Path) -> None:
    lines = read_instructions(write(tmp_path, f"\n{GOOD}\n\n{GOOD}\n")).conversations
    assert [(c.place.row, c.place.line) for c in lines] == [(1, 2), (2, 4)]
    array = write(tmp_path, f"[\n{GOOD},\n\n{GOOD}]", "data.json")
    assert [c.place.line for c in read_instructions(array).conversations] == [2, 4]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n",
        '{"instruction": "a\u2028b", "output": "Ä 😀"}'.encode(),
        f"[{GOOD}]".encode(),
        b"\n\n" + GOOD.encode(),
    ],
    ids=["bom", "crlf", "line separator", "array", "blank lines"],
)
def test_unusual_but_good(tmp_path: Path, data: bytes) -> None:
    assert read_instructions(write(tmp_path, data)).conversations


DEEP = 100_000
BAD_LINES = {
    "truncated": GOOD[:-5],
    "trailing comma": GOOD[:-1] + ",}",
    "single quotes": "{'instruction': 'a', 'output': 'b'}",
    "bare word": "hello",
    "two objects": GOOD + GOOD,
    "two objects with comma": GOOD + ", " + GOOD,
    "pretty printed": '{\n  "instruction": "a",\n  "output": "b"\n}',
    "raw control character": '{"instruction": "a\x01", "output": "b"}',
    "raw NUL": '{"instruction": "a\x00", "output": "b"}',
    "latin-1 byte": b'{"instruction": "\xe9", "output": "b"}',
    "cut UTF-8": b'{"instruction": "\xf0\x9f", "output": "b"}',
    "lone surrogate": '{"instruction": "\\ud800", "output": "b"}',
    "NaN": '{"instruction": "a", "output": "b", "score": NaN}',
    "Infinity": '{"instruction": "a", "output": "b", "score": -Infinity}',
    "number too large": '{"instruction": "a", "output": "b", "score": 1e999}',
    "5000 digits": '{"instruction": "a", "output": "b", "n": ' + "1" * 5000 + "}",
    "duplicate key": '{"instruction": "a", "output": "b", "output": "c"}',
    "array line": '["a", "b"]x',
    "string line": '"a"',
    "number line": "17",
    "null line": "null",
    "empty object": "{}",
    "unknown fields": '{"question": "a", "answer": "b"}',
    "misspelt field": '{"instruction": "a", "ouput": "b"}',
    "prompt only": '{"prompt": "a"}',
    "completion only": '{"completion": "a"}',
    "instruction only": '{"instruction": "a", "input": ""}',
    "null response": '{"instruction": "a", "output": null}',
    "null completion": '{"prompt": "a", "completion": null}',
    "number completion": '{"prompt": "a", "completion": 3}',
    "boolean response": '{"instruction": "a", "output": true}',
    "list completion": '{"prompt": "a", "completion": ["b", "c"]}',
    "object response": '{"instruction": "a", "output": {"text": "b"}}',
    "empty response": '{"instruction": "a", "output": ""}',
    "blank response": '{"instruction": "a", "output": " \\n"}',
    "empty prompt": '{"prompt": "", "completion": "b"}',
    "two answers": '{"instruction": "a", "output": "b", "response": "c"}',
    "messages a string": '{"messages": "hello"}',
    "messages null": '{"messages": null}',
    "messages empty": '{"messages": []}',
    "messages of strings": '{"messages": ["hello"]}',
    "unknown role": CHAT.replace("assistant", "wizard"),
    "role missing": CHAT.replace('"role": "assistant", ', ""),
    "role a number": CHAT.replace('"assistant"', "3"),
    "content missing": CHAT.replace(', "content": "Ho"', ""),
    "content null": CHAT.replace('"Ho"', "null"),
    "content a number": CHAT.replace('"Ho"', "5"),
    "image part": CHAT.replace('"Hi"', '[{"type": "image_url", "image_url": "x"}]'),
    "no assistant": CHAT.replace("assistant", "user"),
    "assistant first": CHAT.replace('"user"', '"assistant"'),
    "system last": CHAT[:-2] + ', {"role": "system", "content": "S"}]}',
    "only a system turn": '{"messages": [{"role": "system", "content": "S"}]}',
    "broken tools": '{"tools": "[", ' + CHAT[1:],
    "NUL in a text": '{"instruction": "a", "output": "b\\u0000"}',
    "zero-width response": '{"instruction": "a", "output": "\u200b\ufeff"}',
    "tool calls a word": CHAT.replace('"Ho"', '"", "tool_calls": "x"'),
    "tool calls of words": CHAT.replace('"Ho"', '"", "tool_calls": ["x"]'),
    "no answer that counts": CHAT.replace('"Ho"', '"Ho", "weight": 0'),
    "half a weight": CHAT.replace('"Ho"', '"Ho", "weight": 0.5'),
    "train a word": CHAT.replace('"Ho"', '"Ho", "train": "no"'),
    "UTF-16 line": GOOD.encode("utf-16-le"),
    "byte order mark within": "\ufeff" + GOOD,
    "deep nesting": '{"instruction": "a", "output": ' + "[" * DEEP + "]" * DEEP + "}",
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_no_bad_line_is_accepted_without_a_word(tmp_path: Path, bad: str | bytes) -> None:
    raw = bad if isinstance(bad, bytes) else bad.encode()
    file = write(tmp_path, GOOD.encode() + b"\n" + raw + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(UsageError) as refusal:
        read_instructions(file)
    assert f"{file}:2:" in refusal.value.message
    assert len(refusal.value.message) < 4000
    read = read_instructions(file, skip_bad=4)
    assert len(read.conversations) == 2
    assert read.skipped[0].place.line == 2


BAD_FILES = {
    "empty": b"",
    "only newlines": b"\n\n\n",
    "empty array": b"[]",
    "utf-16": GOOD.encode("utf-16"),
    "gzip": gzip.compress(GOOD.encode()),
    "zip": b"PK\x03\x04rest",
    "web page": b"<!DOCTYPE html><html></html>",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "broken parquet": b"PAR1 and no more",
    "array without end": f"[{GOOD},\n{GOOD}".encode(),
    "array with trailing comma": f"[{GOOD},]".encode(),
    "array without comma": f"[{GOOD}\n{GOOD}]".encode(),
    "text after the array": f"[{GOOD}]\n{GOOD}".encode(),
    "array of strings": b'["a", "b"]',
    "array with latin-1": b'[{"instruction": "\xe9", "output": "b"}]',
    "deep array": b"[" * DEEP,
    "only prompts": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "wrapped": b'{"data": [{"instruction": "a", "output": "b"}]}',
}


@pytest.mark.parametrize("bad", BAD_FILES.values(), ids=BAD_FILES.keys())
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_no_bad_file_is_accepted(tmp_path: Path, bad: bytes, name: str) -> None:
    file = write(tmp_path, bad, name)
    with pytest.raises(UsageError, match="data"):
        read_instructions(file, skip_bad=1000)


def test_messages_name_line_field_reason_and_remedy(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "\n" + CHAT.replace("assistant", "assistent"))
    with pytest.raises(UsageError) as refusal:
        read_instructions(file)
    expected = (
        "messages[1].role: unknown role 'assistent'; expected system, user, assistant or tool"
    )
    assert refusal.value.message == f"{file}:2: {expected}"
    assert refusal.value.hint == "did you mean assistant?"


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (
            GOOD[:-5].encode(),
            "data.jsonl",
            "data.jsonl:1: broken JSON in column 41: Unterminated string",
        ),
        (
            f"[{GOOD},\n{GOOD[:-5]}".encode(),
            "data.json",
            "data.json:2: row 2: broken JSON: Unterminated",
        ),
        (f"[{GOOD},\n\0\0]".encode(), "data.json", "data.json:2: holds NUL bytes"),
        (b"instruction,output\na,b\0\n", "data.csv", "data.csv:2: holds NUL bytes"),
        (GOOD.encode("utf-32"), "data.jsonl", "is UTF-32, expected UTF-8"),
        (GOOD.encode("utf-16-le"), "data.jsonl", "holds NUL bytes"),
    ],
    ids=["cut line", "cut array", "NUL in an array", "NUL in CSV", "UTF-32", "UTF-16 unmarked"],
)
def test_what_is_broken_is_said_in_words(
    tmp_path: Path, data: bytes, name: str, words: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        read_instructions(write(tmp_path, data, name))
    assert words in refusal.value.message
    assert not refusal.value.message.endswith(" at")


def test_the_remedy_of_bad_examples_can_be_followed(tmp_path: Path) -> None:
    empty = '{"instruction": "a", "output": ""}\n'
    with pytest.raises(UsageError) as refusal:
        read_instructions(write(tmp_path, empty * 2))
    assert refusal.value.hint == "correct them: there is no other example"
    with pytest.raises(UsageError) as refusal:
        read_instructions(write(tmp_path, empty * 2 + GOOD))
    assert refusal.value.hint == "correct them, or leave them out with --skip-bad 2"


@pytest.mark.parametrize("mark", ['"weight": 0', '"train": false'])
def test_an_answer_that_is_marked_does_not_count(tmp_path: Path, mark: str) -> None:
    more = (
        f'{{"role": "assistant", "content": "Ho", {mark}}}, {{"role": "user", "content": "And"}}, '
    )
    text = CHAT.replace('{"role": "assistant"', f'{more}{{"role": "assistant"')
    (found,) = read_instructions(write(tmp_path, text)).conversations
    assert [turn.trained for turn in found.turns] == [True, False, True, True]


def test_duplicate_keys_and_nan_in_an_array_can_be_skipped(tmp_path: Path) -> None:
    text = f'[{GOOD},\n{{"instruction": "a", "output": "b", "output": "c"}},\n{GOOD}]'
    read = read_instructions(write(tmp_path, text, "data.json"), skip_bad=1)
    assert len(read.conversations) == 2
    assert "'output' twice" in str(read.skipped[0])


def test_skipping_is_bounded_and_all_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path, f"{GOOD}\n" + '{"prompt": "a"}\n' * 30)
    with pytest.raises(UsageError, match=r"30 of 31 examples cannot be used \(29 allowed\)") as e:
        read_instructions(file, skip_bad=29)
    assert "and 10 more" in e.value.message
    assert len(read_instructions(file, skip_bad=30).skipped) == 30


def test_data_never_appears_in_a_message(tmp_path: Path) -> None:
    file = write(tmp_path, '{"prompt": "my secret", "completion": 3}')
    with pytest.raises(UsageError) as refusal:
        read_instructions(file)
    assert "secret" not in refusal.value.message


def test_unused_fields_and_unanswered_turns_are_noted(tmp_path: Path) -> None:
    asked = CHAT[:-2] + ', {"role": "user", "content": "More"}], "id": 3}'
    notes = read_instructions(write(tmp_path, asked)).notes
    assert notes[0] == "field 'id' is not used (1 examples)"
    assert "nothing answers" in notes[1]

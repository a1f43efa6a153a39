"""What people write after --model: names, folders, files, hub ids with and without a network."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftplan.errors import UsageError
from sftplan.facts.catalogue import builtin, entries
from sftplan.facts.params import num_parameters
from sftplan.facts.resolve import MAX_CONFIG_BYTES, resolve_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = dict(next(entry.config for entry in entries() if entry.name == "qwen3-0.6b"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, content: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def error_of(reference: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve_model(reference)
    return caught.value


def test_a_folder_and_a_file_are_the_same_model(tmp_path: Path) -> None:
    file = write(tmp_path / "mine", json.dumps(CONFIG))
    folder_model, file_model = resolve_model(str(tmp_path / "mine")), resolve_model(str(file))

    assert folder_model == file_model
    assert (folder_model.name, folder_model.source) == ("mine", str(file))
    assert num_parameters(folder_model) == num_parameters(builtin("qwen3-0.6b"))


def test_a_name_means_the_built_in_model_and_a_path_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "gpt2", json.dumps(CONFIG))
    write(tmp_path / "openai-community" / "gpt2", json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)

    assert resolve_model("gpt2").model_type == "gpt2"
    assert resolve_model("./gpt2").model_type == "qwen3"
    assert resolve_model("openai-community/gpt2").model_type == "qwen3"  # as transformers has it


def test_a_folder_without_a_configuration_says_what_is_needed(tmp_path: Path) -> None:
    error = error_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")

    assert error.message == f"{tmp_path}: the folder has no config.json"
    assert "save_pretrained" in (error.hint or "")
    assert "adapter" in (error_of(str(tmp_path)).hint or "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf{}", ":1: starts with a byte order mark"),
        ("{}".encode("utf-16"), ":1: starts with a byte order mark"),
        (b"\x80\x02}q\x00", ": not text (byte 0 is not UTF-8)"),
        (b'{"model_type": \n "llama",}', ":2:"),
        (b"[" * 50_000, ": nested too deeply"),
        (b" " * (MAX_CONFIG_BYTES + 1), "bytes is no configuration"),
    ],
    ids=["utf-8 mark", "utf-16 mark", "pickle", "comma", "deep", "large"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    file = write(tmp_path, content)
    message = error_of(str(file)).message

    assert message.startswith(str(file))
    assert expected in message


def test_a_wrong_field_is_named_with_its_line(tmp_path: Path) -> None:
    text = json.dumps(CONFIG | {"num_hidden_layers": "28"}, indent=2)
    file = write(tmp_path, text)
    line = 1 + text[: text.index("num_hidden_layers")].count("\n")

    assert error_of(str(file)).message.startswith(f'{file}:{line}: num_hidden_layers is "28"')


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("", "the model's name is empty"),
        ("gpt2-larg", "no model named 'gpt2-larg'"),
        ("./nowhere", "no file or folder './nowhere'"),
        ("nowhere/config.json", "no file or folder 'nowhere/config.json'"),
        ("a\x00b", "no model named 'a\\x00b'"),
        ("x" * 5000, "no model named 'xxx"),
        ("/dev/null", "/dev/null: not a regular file"),
        (
            "someone/something",
            "someone/something: not in the local cache, and HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_what_cannot_be_found(reference: str, expected: str) -> None:
    assert expected in error_of(reference).message


def test_the_local_cache_needs_no_network(tmp_path: Path) -> None:
    cached = tmp_path / "hf" / "hub" / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    write(cached / "snapshots" / "abc123", json.dumps(CONFIG))
    model = resolve_model("someone/Something".lower())

    assert (model.source, model.hub_id) == ("someone/something", "someone/something")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_reference_is_a_model_or_a_usage_error(reference: str) -> None:
    try:
        resolve_model(reference)
    except UsageError:
        return


class Hub(BaseHTTPRequestHandler):
    """A hub with one public, one gated, one moved, one huge and one broken model."""

    def do_GET(self) -> None:
        owner = self.path.split("/")[1]
        moved = {"moved": "/public/x/resolve/main/config.json"}
        allowed = self.headers.get("Authorization") == "Bearer secret"
        status = {"missing": 404, "broken": 500, "moved": 307}.get(owner, 200)
        if owner == "gated" and not allowed:
            status = 401
        self.send_response(status)
        if owner in moved:
            self.send_header("Location", moved[owner])
        self.end_headers()
        if status == 200:
            size = MAX_CONFIG_BYTES + 10 if owner == "huge" else 0
            self.wfile.write(json.dumps(CONFIG).encode() + b" " * size)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests are silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("hub_id", ["public/Model-X", "moved/Model-X"])
def test_a_hub_id_is_fetched(hub_id: str) -> None:
    model = resolve_model(hub_id)

    assert (model.name, model.source, model.hub_id) == ("model-x", hub_id, hub_id)
    assert model.num_layers == 28


@pytest.mark.usefixtures("hub")
def test_gated_models_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set HF_TOKEN" in (error_of("gated/x").hint or "")

    monkeypatch.setenv("HF_TOKEN", "secret")
    assert resolve_model("gated/x").num_layers == 28


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [
        ("missing/gpt2-larg", "the hub has no such model"),
        ("broken/x", "the hub answered with status 500"),
        ("huge/x", "bytes is no configuration"),
    ],
)
def test_what_the_hub_refuses(hub_id: str, expected: str) -> None:
    assert expected in error_of(hub_id).message


def test_no_network_is_said_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    error = error_of("someone/qwen2.5-0.5")

    assert error.message.startswith("someone/qwen2.5-0.5: the hub cannot be reached")
    assert "did you mean qwen2.5-0.5b" in (error.hint or "")

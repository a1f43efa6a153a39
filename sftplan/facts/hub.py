"""One file from the Hugging Face Hub: a model's config.json. Imported only when it is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from sftplan.errors import UsageError
from sftplan.facts.catalogue import suggest_builtin

if TYPE_CHECKING:
    from http.client import HTTPMessage
    from typing import IO

TIMEOUT_S = 10


class _SameHostToken(HTTPRedirectHandler):
    """Follows redirects and takes the token along only within the host that it is for."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """The request that follows a redirect."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            following.remove_header("Authorization")
        return following


def fetch_config(hub_id: str, *, limit: int) -> tuple[bytes, str]:
    """The bytes of config.json and the address they are from; at most `limit` bytes."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        message = f"{hub_id}: not in the local cache, and HF_HUB_OFFLINE is set"
        raise UsageError(message, _offline_hint(hub_id))
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    address = f"{endpoint}/{hub_id}/resolve/main/config.json"
    if urlsplit(address).scheme not in {"http", "https"}:
        message = f"HF_ENDPOINT {endpoint!r} is not an http address"
        raise UsageError(message)
    request = Request(address, headers={"User-Agent": "sftplan"})
    token = _token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with build_opener(_SameHostToken).open(request, timeout=TIMEOUT_S) as response:
            content: bytes = response.read(limit + 1)
    except HTTPError as error:
        error.close()
        raise _refused(hub_id, error.code, has_token=bool(token)) from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        message = f"{hub_id}: the hub cannot be reached ({reason})"
        raise UsageError(message, _offline_hint(hub_id)) from None
    if len(content) > limit:
        message = f"{address}: more than {limit:,} bytes is no configuration"
        raise UsageError(message)
    return content, address


def _offline_hint(hub_id: str) -> str:
    return f"give a folder with its config.json; {suggest_builtin(hub_id.rpartition('/')[2])}"


def _token() -> str | None:
    """HF_TOKEN, or what `hf auth login` stored."""
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"].strip()
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface")).expanduser()
    stored = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return stored.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _refused(hub_id: str, status: int, *, has_token: bool) -> UsageError:
    if status == 404:
        message = f"{hub_id}: the hub has no such model, or it has no config.json"
        return UsageError(message, suggest_builtin(hub_id.rpartition("/")[2]))
    if status in {401, 403}:
        message = f"{hub_id}: the hub has no such model, or access to it is restricted"
        step = "accept its licence on the hub" if has_token else "set HF_TOKEN"
        return UsageError(message, f"{step}, or give a folder with its config.json")
    return UsageError(f"{hub_id}: the hub answered with status {status}", _offline_hint(hub_id))

"""JSON over HTTP for the rewards that ask a server: bounded, and retried where that can help.

Only http and https; no redirect is followed, since it could lead pictures, prompts or a key to
another server; the answer's size and every wait have a limit. A key comes from the environment
alone, with the address that it is meant for, so that settings from elsewhere, a shared workflow
say, cannot send it to another server.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from ..errors import RewardUnavailable

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""

OF_REQUEST = (400, 413, 415, 422)
"""HTTP statuses that blame the request."""

PAUSE_S = 0.5
"""Pause before the second try; it doubles with each further one."""

LONGEST_PAUSE_S = 20.0
"""Longest pause, even if the server asks for more."""

EXCERPT = 300
"""Characters of a server's own words that an error repeats."""

Answer = TypeVar("Answer")


class WebError(Exception):
    """A request without a usable answer; the text says what came instead.

    Args:
        text: what came.
        again: whether the same request may succeed later.
        pause: seconds that the server asks to wait before.
        is_of_request: whether the request is at fault, and another may well succeed.
    """

    def __init__(
        self,
        text: str,
        *,
        again: bool = False,
        pause: float = 0.0,
        is_of_request: bool = False,
    ) -> None:
        super().__init__(text)
        self.again, self.pause, self.is_of_request = again, pause, is_of_request


@dataclass(frozen=True)
class Link:
    """How requests are made.

    Attributes:
        timeout: seconds that an answer may take to begin, and then between its parts.
        limit: bytes of the largest answer that is read.
        retries: tries after the first one.
        key: prefix of the environment variables: NAME_KEY with NAME_URL.
    """

    timeout: float
    limit: int
    retries: int
    key: str

    def ask(
        self,
        url: str,
        body: Mapping[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Any:
        """Send one request, retry where that can help, and read the JSON answer.

        Args:
            url: the whole address.
            body: sent as JSON by POST; a GET if None.
            note: called with each failure that is followed by another try.

        Raises:
            WebError: if no try has a usable answer, with the outcome of each.
        """
        headers = key_header(url, self.key)
        failed: list[str] = []
        while True:
            try:
                return _once(url, body, headers, self.timeout, self.limit)
            except WebError as error:
                failed.append(str(error))
                if not error.again or len(failed) > self.retries:
                    raise WebError(
                        _summary(failed), again=error.again, is_of_request=error.is_of_request
                    ) from error
                if note:
                    note(str(error))
                wanted = max(error.pause, PAUSE_S * 2 ** (len(failed) - 1))
                time.sleep(min(wanted, LONGEST_PAUSE_S))


def checked_link(timeout_seconds: float, retries: int) -> None:
    """Refuse impossible settings of a link.

    Raises:
        ValueError: naming the setting and its value.
    """
    if isinstance(timeout_seconds, bool) or not 0 < timeout_seconds <= 3600:
        raise ValueError(
            f"timeout_seconds is {timeout_seconds}; it has to be above 0 and at most 3600"
        )
    if isinstance(retries, bool) or retries not in range(11):
        raise ValueError(f"retries is {retries}; it has to be a whole number from 0 to 10")


def checked_url(url: str) -> str:
    """A server's address without a slash at its end.

    Args:
        url: http or https, without a user, a password, a query or a fragment.

    Raises:
        ValueError: for any other kind of address; a password in it is not repeated.
    """
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        shown = repr(url) if "@" not in url else "given"
        raise ValueError(f"the url is {shown}; give one like 'http://127.0.0.1:8000'")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"the url of {parts.hostname} has a user name or a password in it; take them out, and "
            "give a key by the environment"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"the url is {url!r}; give it without what follows '?' or '#'")
    return url.rstrip("/")


def _split(url: str) -> SplitResult | None:
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port  # read here, where a wrong one is an error
    except ValueError:
        return None
    return parts


def origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port, which are equal for addresses of one server; None if malformed."""
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def key_header(url: str, key: str) -> dict[str, str]:
    """The header with the environment's key; empty if the address is of another server.

    Args:
        url: of the request.
        key: prefix of the two variables.

    Raises:
        RewardUnavailable: if the key cannot be put into a header; it is not repeated.
    """
    secret, home = os.environ.get(f"{key}_KEY", "").strip(), os.environ.get(f"{key}_URL", "")
    if not secret or origin(url) is None or origin(home.strip()) != origin(url):
        return {}
    if not secret.isascii() or not secret.isprintable():
        raise RewardUnavailable(f"{key}_KEY has characters that no key can have; set it anew")
    return {"Authorization": f"Bearer {secret}"}


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(  # None: urllib then reports the status as an error
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host's name or number always means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _once(
    url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str], timeout: float, limit: int
) -> Any:
    data = None if body is None else json.dumps(body, allow_nan=False).encode()
    sent = {"Accept": "application/json", "Content-Type": "application/json", **headers}
    own = [ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    try:
        with build_opener(_NoRedirect, *own).open(Request(url, data, sent), timeout=timeout) as got:
            raw = _read(got, limit, timeout)
    except HTTPError as error:
        with error:
            raise _of_status(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise _of_connection(error, timeout) from error
    return parse_json(raw)


def _read(answer: http.client.HTTPResponse, limit: int, timeout: float) -> bytes:
    received, ends = bytearray(), time.monotonic() + timeout
    while part := answer.read1(1 << 16):
        received += part
        if len(received) > limit:
            raise WebError(f"an answer of more than {limit} bytes")
        if time.monotonic() > ends:
            raise TimeoutError
    if answer.length:  # read1 says nothing of an answer that ends too early
        raise http.client.IncompleteRead(bytes(received), answer.length)
    return bytes(received)


def parse_json(raw: bytes | bytearray) -> Any:
    """Strict JSON of UTF-8 bytes, without NaN; `WebError` if it is not."""
    try:
        return json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        shown = excerpt(raw.decode("utf-8", "replace"))
        raise WebError(f"an answer that is no JSON: {shown!r}") from error


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def excerpt(text: str) -> str:
    """The start of a foreign text, fit for one line of an error."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * EXCERPT]).split())
    return line if len(line) <= EXCERPT else line[:EXCERPT] + "..."


def _of_status(error: HTTPError) -> WebError:
    """The error for an HTTP status other than success."""
    if 300 <= error.code < 400:
        return WebError(f"HTTP {error.code}, a redirect, which is not followed")
    try:
        said = _message(json.loads(error.read(1 << 16)))
    except (ValueError, OSError, RecursionError, http.client.HTTPException):
        said = ""
    words = f"HTTP {error.code}" + (f" ({excerpt(said)})" if said else f" ({error.reason})")
    after = str(error.headers.get("Retry-After", ""))
    pause = float(after) if after.isdecimal() and len(after) < 5 else 0.0
    own = error.code in OF_REQUEST
    return WebError(words, again=error.code in PASSING, pause=pause, is_of_request=own)


def _message(body: Any) -> str:
    """The error text in {"error": text} or {"error": {"message": text}}."""
    said = body.get("error", body.get("message", "")) if isinstance(body, dict) else ""
    said = said.get("message", "") if isinstance(said, dict) else said
    return said if isinstance(said, str) else ""


def _of_connection(error: Exception, timeout: float) -> WebError:
    """The error for a failure before or within the answer."""
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return WebError(f"no answer within {timeout:g} s", again=True)
    if isinstance(reason, ConnectionRefusedError):
        return WebError("connection refused", again=True)
    if isinstance(reason, ssl.SSLError):
        return WebError(f"no trusted connection ({excerpt(str(reason))})")
    if isinstance(reason, http.client.HTTPException | ConnectionError):
        return WebError("the connection broke off", again=True)
    return WebError(excerpt(str(reason)) or type(reason).__name__, again=True)


def _summary(failed: list[str]) -> str:
    """The outcome of each try, equal ones once.

    >>> _summary(["connection refused"] * 3 + ["HTTP 500 (no memory)"])
    'connection refused (3 tries), HTTP 500 (no memory)'
    """
    counts = Counter(failed)
    return ", ".join(f"{what} ({n} tries)" if n > 1 else what for what, n in counts.items())

"""Bytes behind an http(s) URL: bounded in time, size and hosts, by the standard library."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from jaxserve.media.limits import MIB, MediaLimits

WAIT = 3.0
"""Seconds for a connection, and for each piece that is read: SGLang's REQUEST_TIMEOUT."""
LONGEST = 30.0
"""Seconds of a whole answer, redirections included."""
PIECE = 1 << 18
"""Bytes that are read at a time."""
MOST_REDIRECTIONS = 5
SCHEMES = ("http", "https")


class FetchError(Exception):
    """What is behind a URL cannot be had; the message says why, and quotes nothing of it."""


def fetch(url: str, limits: MediaLimits) -> bytes:
    """What is behind `url`. Raises FetchError.

    Proxies are those of the environment. Only http and https are spoken, whatever a server
    redirects to, and each host is looked up among `limits.domains`.
    """
    if not limits.url_bytes:
        raise FetchError("URLs are not opened (media_url_max_file_size_mb=0)")
    _check_place(url, limits)
    deadline = time.monotonic() + LONGEST
    request = urllib.request.Request(url, headers={"User-Agent": "jaxserve", "Accept": "image/*"})
    try:
        with _opener(limits).open(request, timeout=WAIT) as answer:
            return _read(answer, limits.url_bytes, deadline)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"the server answers {error.code}") from None
    except urllib.error.URLError as error:
        raise FetchError(f"the server cannot be reached: {str(error.reason)[:200]}") from None
    except TimeoutError:
        raise FetchError(f"the server has sent nothing for {WAIT:g} s") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FetchError(f"the transfer failed: {type(error).__name__}") from None


def _read(answer: Any, most: int, deadline: float) -> bytes:
    pieces, size = [], 0
    while piece := answer.read1(PIECE):
        size += len(piece)
        if size > most:
            raise FetchError(
                f"it has more than {most // MIB} MiB (media_url_max_file_size_mb={most // MIB})"
            )
        if time.monotonic() > deadline:
            raise FetchError(f"it is not there after {LONGEST:g} s")
        pieces.append(piece)
    expected = answer.headers.get("Content-Length", "")
    if expected.isdecimal() and size != int(expected):
        raise FetchError(f"the transfer ended after {size} of {int(expected)} bytes")
    return b"".join(pieces)


def _check_place(url: str, limits: MediaLimits) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:  # brackets, or a port out of range
        raise FetchError("it is no URL") from None
    if parts.scheme not in SCHEMES or not host:
        raise FetchError("only http and https URLs with a host are opened")
    if limits.domains and host not in limits.domains:
        raise FetchError(f"the host {host[:100]!r} is not in allowed_media_domains")


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows a few, to places that may be asked."""

    max_redirections = MOST_REDIRECTIONS
    max_repeats = MOST_REDIRECTIONS

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        try:
            _check_place(newurl, self._limits)
        except FetchError:
            fp.close()  # nobody else would
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(limits: MediaLimits) -> urllib.request.OpenerDirector:
    """Without the handlers of files, FTP and data that urllib's usual one has."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirections(limits),
    ):
        opener.add_handler(handler)
    return opener

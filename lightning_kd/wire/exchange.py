"""One request over HTTP, and its reply, within a time."""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_SHOWN = 200
"""Characters of a reply that a message quotes."""

_BLOCK = 2**16

_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})
"""What OpenSSL says of a reply that is no TLS."""


class WireError(ValueError):
    """A server could not be reached, refused, or replied with something else than was expected.

    Args:
        message: Names the URL, what came and what was expected.
        passing: Whether the same request may succeed later, or on another server.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        method: ``GET`` or ``POST``.
        path: From the root of the server.
        body: Of a ``POST``.
        content_type: Of the body.
        most_bytes: Longest reply that is read.
    """

    method: str
    path: str
    body: bytes = b""
    content_type: str = "application/json"
    most_bytes: int = 2**24

    @classmethod
    def of_json(cls, path: str, value: Any, *, most_bytes: int = 2**24) -> "Request":
        """Return a ``POST`` of JSON."""
        return cls("POST", path, json.dumps(value).encode(), most_bytes=most_bytes)


@dataclass(frozen=True)
class Reply:
    """The reply to a request, read to its end."""

    url: str
    """Address that was asked, with the path."""
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Its beginning, for messages."""
        text = self.body[:_SHOWN].decode("utf-8", "replace")
        more = "..." if len(self.body) > _SHOWN else ""
        return repr(" ".join(text.split()) + more)

    def json(self) -> Any:
        """Return what it holds as JSON.

        Raises:
            WireError: If it is no JSON.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise self.nonsense("JSON") from error

    def nonsense(self, expected: str) -> WireError:
        """Return an error that says what came instead of what was expected."""
        kind = self.headers.get("content-type", "of no content type")
        return WireError(
            f"{self.url} has answered {len(self.body)} bytes ({kind}) where {expected} was expected; "
            f"they begin {self.shown}"
        )


def exchange(
    url: str, request: Request, *, timeout: float, headers: Mapping[str, str] | None = None
) -> Reply:
    """Send a request on a connection of its own, and read the reply.

    Args:
        url: Root of the server, such as ``http://127.0.0.1:8000``.
        request: The request.
        timeout: Seconds for all of it, however slowly bytes come.
        headers: Further headers.

    Raises:
        WireError: If the server cannot be reached, or has not replied in time, or at too great a
            length.

    Example:
        >>> exchange("http://127.0.0.1:9", Request("GET", "/health"), timeout=1.0)
        Traceback (most recent call last):
            ...
        lightning_kd.wire.exchange.WireError: http://127.0.0.1:9/health cannot be reached: ...
    """
    parts, full = urlsplit(url), f"{url}{request.path}"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    late = threading.Event()
    sockets: list[socket.socket] = []

    def give_up() -> None:
        late.set()
        for each in (*sockets, connection.sock):
            if each is not None:
                with suppress(OSError):  # it may have ended by itself
                    each.shutdown(socket.SHUT_RDWR)

    # A socket's own timeout begins anew with each byte that comes.
    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        connection.connect()
        # A reply that ends with its connection takes the socket away from it.
        sockets.append(connection.sock)
        connection.request(
            request.method,
            f"{parts.path}{request.path}",
            body=request.body or None,
            headers={"Content-Type": request.content_type, **(headers or {})},
        )
        response = connection.getresponse()
        body = _read(response, request.most_bytes, full)
        if late.is_set():
            raise TimeoutError
        kept = {name.lower(): value for name, value in response.getheaders()}
        return Reply(full, response.status, body, kept)
    except WireError:
        raise
    except ssl.SSLError as error:
        reason = f"cannot be reached by https: {_named(error)}"
        if error.reason in _NO_TLS:
            reason += ". The server speaks plain HTTP: write http:// in place of https://"
        raise WireError(f"{full} {reason}") from error
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            reason = f"has not answered within {timeout:g} s"
        elif isinstance(error, http.client.HTTPException):
            reason = f"has broken off, or answered something else than HTTP: {_named(error)}"
        else:
            reason = f"cannot be reached: {_named(error)}"
        raise WireError(f"{full} {reason}", passing=True) from error
    finally:
        watch.cancel()
        connection.close()


def _read(response: http.client.HTTPResponse, most: int, url: str) -> bytes:
    blocks, size = [], 0
    while block := response.read(_BLOCK):
        size += len(block)
        if size > most:
            raise WireError(
                f"{url} has answered more than {most} bytes, the most that an answer to this request "
                "can take"
            )
        blocks.append(block)
    body = b"".join(blocks)
    if response.length:  # what was announced and has not come
        raise http.client.IncompleteRead(body, response.length)
    return body


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""The server: connections, addresses, limits, and who may ask."""

import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lightning_kd.serving.batching import Batcher
from lightning_kd.serving.endpoints import Body, Endpoints
from lightning_kd.serving.limits import Limits, RefusedError
from lightning_kd.serving.service import TeacherService

_log = logging.getLogger(__name__)

_OPEN = frozenset({"/health"})
"""Paths that need no token: whoever looks after the server asks whether it is alive."""


class TeacherServer(ThreadingHTTPServer):
    """A server for one teacher.

    Args:
        service: The teacher.
        host: Address that it listens on; that of this machine alone by default.
        port: 0 takes a free one.
        token: Bearer token that requests must have; empty for none.
        name: The teacher's name.

    Raises:
        ValueError: If others could reach it without a token.
        OSError: If it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        service: TeacherService,
        limits: Limits,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        name: str = "teacher",
    ) -> None:
        if not token and host not in {"127.0.0.1", "localhost", "::1"}:
            raise ValueError(
                f"host is {host!r}, so that other machines could ask, and there is no token; put one "
                "into the environment variable LIGHTNING_KD_TOKEN, or keep to 127.0.0.1"
            )
        self.limits, self.token = limits, token
        self.request_queue_size = limits.connections
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)
        self.batcher = Batcher(service.compute, limits)
        self.endpoints = Endpoints(service, self.batcher, limits, name)
        self._places = threading.BoundedSemaphore(limits.connections)
        self._open, self._answered = 0, threading.Condition()

    @property
    def url(self) -> str:
        """Address that clients ask."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def start(self) -> None:
        """Serve in a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def end(self) -> bool:
        """Take no further requests, answer those that wait, and close.

        Returns:
            Whether all were answered within ``limits.drain_seconds``.
        """
        end = time.monotonic() + self.limits.drain_seconds
        drained = self.batcher.close()
        self.shutdown()
        with self._answered:
            left = max(0.0, end - time.monotonic())
            drained &= self._answered.wait_for(lambda: self._open == 0, left)
        self.server_close()
        return drained

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there is a place for it."""
        if not self._places.acquire(blocking=False):
            request.settimeout(1.0)
            with suppress(OSError):  # it may have gone already
                request.sendall(b"HTTP/1.1 503 Too many connections\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        with self._answered:
            self._open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()
            with self._answered:
                self._open -= 1
                self._answered.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a connection that broke."""
        _log.info("a connection of %s broke", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection, with one request."""

    server: TeacherServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lightning-kd", ""

    def setup(self) -> None:
        super().setup()
        seconds = self.server.limits.read_seconds
        self.connection.settimeout(seconds)
        # A socket's own timeout begins anew with each byte that comes.
        self._watch = threading.Timer(seconds, self._give_up)
        self._watch.daemon = True
        self._watch.start()

    def finish(self) -> None:
        self._watch.cancel()
        super().finish()

    def do_GET(self) -> None:
        self._answer(self.server.endpoints.reads)

    def do_POST(self) -> None:
        self._answer(self.server.endpoints.asks)

    def _answer(self, paths: Mapping[str, Callable[[bytes], Body]]) -> None:
        self.close_connection = True
        try:
            self._check_token()
            body = self._body()
            self._watch.cancel()
            self._send(200, self._endpoint(paths)(body))
        except RefusedError as error:
            self._refuse(error.status, str(error))
        except OSError:
            raise  # there is nobody to tell
        except Exception as error:
            _log.exception("the teacher has failed")
            self._refuse(500, f"the teacher has failed: {type(error).__name__}: {error}")

    def _endpoint(self, paths: Mapping[str, Callable[[bytes], Body]]) -> Callable[[bytes], Body]:
        path, known = self.path.split("?")[0], self.server.endpoints
        if path in paths:
            return paths[path]
        others = {*known.reads, *known.asks}
        if path in others:
            raise RefusedError(405, f"{path} does not take {self.command}")
        raise RefusedError(404, f"there is no {path!r:.80}; there are {', '.join(sorted(others))}")

    def _check_token(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (
            token
            and self.path not in _OPEN
            and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
        ):
            raise RefusedError(401, "the request has no bearer token, or another one")

    def _body(self) -> bytes:
        if self.command == "GET":
            return b""
        length, most = self.headers.get("Content-Length", ""), self.server.limits.body_bytes
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            raise RefusedError(411, "the request must have one Content-Length, and no encoding")
        if int(length) > most:
            raise RefusedError(413, f"the body has {length} bytes; at most {most} are taken")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RefusedError(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _refuse(self, status: int, reason: str) -> None:
        error = {"message": reason, "type": "refused" if status < 500 else "failed", "code": status}
        self._send(status, Body("application/json", json.dumps({"error": error}).encode()))

    def _send(self, status: int, body: Body) -> None:
        self.send_response(status)
        self.send_header("Content-Type", body.content_type)
        self.send_header("Content-Length", str(len(body.data)))
        self.send_header("Connection", "close")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body.data)

    def _give_up(self) -> None:
        with suppress(OSError):  # it may have ended by itself
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        _log.info("%s %s", self.address_string(), format % args)

"""Requests end in time, whatever the other side does."""

import socket
import threading
import time
from contextlib import suppress

import pytest
import torch

from lightning_kd.wire import Request, Servers, WireError, exchange, pack, unpack
from lightning_kd.wire.servers import token_from


@pytest.fixture
def behaves():
    """A server that does what it is told with each connection; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def start(behavior):
        def run():
            listening.settimeout(0.1)
            while not ended.is_set():
                try:
                    connection, _ = listening.accept()
                except OSError:
                    continue
                with connection:
                    connection.recv(2**16)
                    with suppress(OSError):
                        behavior(connection)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    ended.set()
    listening.close()


def drips(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


def drips_headers(connection):
    for number in range(100):
        connection.sendall(b"HTTP/1.1 200 OK\r\n" if number == 0 else b"X: 1\r\n")
        time.sleep(0.1)


def says(data):
    return lambda connection: connection.sendall(data)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


def drips_and_closes(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "behavior", [drips, drips_headers, drips_and_closes, lambda c: time.sleep(5)]
)
def test_a_time_is_kept_however_slowly_bytes_come(behaves, behavior):
    url, began = behaves(behavior), time.monotonic()
    with pytest.raises(WireError, match=rf"{url}/health has not answered within 0.5 s") as error:
        exchange(url, Request("GET", "/health"), timeout=0.5)
    assert time.monotonic() - began < 3
    assert error.value.passing


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has broken off, or answered something else than HTTP: RemoteDisconnected"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "something else than HTTP: BadStatusLine"),
        (OK + b"{", "has broken off, or answered something else than HTTP: IncompleteRead"),
    ],
)
def test_what_is_not_http_is_said(behaves, data, message):
    with pytest.raises(WireError, match=message):
        exchange(behaves(says(data)), Request("GET", "/health"), timeout=5)


def test_a_reply_that_is_too_long_is_not_read(behaves):
    url = behaves(says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 100))
    with pytest.raises(WireError, match="answered more than 10 bytes"):
        exchange(url, Request("GET", "/x", most_bytes=10), timeout=5)


@pytest.mark.slow
def test_passing_failures_are_tried_again_with_pauses(behaves):
    times = []

    def busy_twice(connection):
        times.append(time.monotonic())
        status = b"503 Busy" if len(times) < 3 else b"200 OK"
        connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")

    reply = Servers([behaves(busy_twice)], timeout=5, retries=2).ask(Request("GET", "/health"))
    assert reply.json() == {}
    first, second, third = times
    assert second - first >= 0.25
    assert third - second >= 0.5


def test_failures_are_listed_when_there_are_no_more_attempts(behaves):
    url = behaves(says(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"))
    with pytest.raises(WireError, match=f"has failed 2 times: {url}/health has answered"):
        Servers([url], timeout=5, retries=1).ask(Request("GET", "/health"))


def test_a_refusal_is_not_tried_again(behaves):
    asked = []

    def refuses(connection):
        asked.append(1)
        connection.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\n{}")

    with pytest.raises(WireError, match=r"status 401 .*another bearer token"):
        Servers([behaves(refuses)], timeout=5, retries=3).ask(Request("GET", "/health"))
    assert len(asked) == 1


def test_requests_go_to_servers_in_turn_and_around_one_that_is_gone(behaves):
    url = behaves(says(OK + b"{}"))
    servers = Servers(["http://127.0.0.1:9", url], timeout=5, retries=1)
    assert {servers.ask(Request("GET", "/health")).url for _ in range(4)} == {f"{url}/health"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"urls": ["localhost:80"]}, "write http://host:port"),
        ({"urls": ["ftp://x"]}, "the URL 'ftp://x' is none of a server"),
        ({"urls": ["http://x"], "timeout": 0}, "timeout is 0"),
        ({"urls": ["http://x"], "timeout": float("nan")}, "timeout is nan"),
        ({"urls": ["http://x"], "retries": -1}, "retries -1"),
    ],
)
def test_addresses_and_bounds_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Servers(**options)


def test_https_to_a_server_of_http_is_said_at_once(behaves):
    url = behaves(says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"))
    servers = Servers([url.replace("http:", "https:")], timeout=5, retries=3)
    began = time.monotonic()
    with pytest.raises(WireError, match="speaks plain HTTP: write http://"):
        servers.ask(Request("GET", "/health"))
    assert time.monotonic() - began < 2


def test_tensors_that_share_memory_arrive_each_by_itself():
    values = torch.arange(6.0)
    held, _ = unpack(pack({"a": values, "b": values, "c": values[2:], "d": values.view(2, 3)}, {}))
    for name, expected in {"a": values, "b": values, "c": values[2:]}.items():
        assert torch.equal(held[name], expected)
    assert torch.equal(held["d"], values.view(2, 3))


def test_a_token_that_breaks_a_header_is_refused(monkeypatch):
    monkeypatch.setenv("TOKEN", "a\r\nb")
    with pytest.raises(ValueError, match="the token in TOKEN must be printable ASCII"):
        token_from("TOKEN")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80\x04K\x01.",
        b"\xff" * 64,
        pack({"x": torch.ones(2)}, {})[:-3],
        b"<html>" * 20,
        (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ValueError, match="not safetensors"):
        unpack(body)

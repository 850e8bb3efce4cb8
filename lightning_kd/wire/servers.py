"""Several addresses of one service: turns, failures, further attempts."""

import math
import os
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from lightning_kd.wire.exchange import Reply, Request, WireError, exchange

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
"""Seconds between two rounds of attempts: doubled each time, up to the second."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""States that the same request may not find again."""


class Servers:
    """Servers that answer alike; each request goes to the next one, and to another if that fails.

    Args:
        urls: Their roots.
        timeout: Seconds that one attempt may take.
        retries: Further attempts after the first, over all of them, with growing pauses.
        token: Sent as a bearer token; empty for none.

    Raises:
        ValueError: If there are no URLs, or a value is out of its range.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout: float = 60.0, retries: int = 3, token: str = ""
    ) -> None:
        check_addresses(urls, timeout, retries)
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout, self.retries = timeout, retries
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._turn = 0

    def ask(self, request: Request) -> Reply:
        """Return the first reply that is no failure.

        Raises:
            WireError: If every attempt failed, or a server refused the request itself.
        """
        # Two threads may have one turn: it only spreads requests.
        first, self._turn = self._turn % len(self.urls), self._turn + 1
        return self.ask_until([*self.urls[first:], *self.urls[:first]], request)

    def ask_until(self, urls: Sequence[str], request: Request) -> Reply:
        """Return the first reply of these servers that is no failure, asked in their order.

        Raises:
            WireError: If every attempt failed, or a server refused the request itself.
        """
        failures: list[str] = []
        for attempt in range(self.retries + 1):
            rounds, place = divmod(attempt, len(urls))
            if rounds and place == 0:
                time.sleep(min(_FIRST_PAUSE * 2 ** (rounds - 1), _LONGEST_PAUSE))
            try:
                return self._ask_one(urls[place], request)
            except WireError as error:
                if not error.passing:
                    raise
                failures.append(str(error))
        raise WireError(
            f"the teacher's server has failed {len(failures)} times: "
            f"{'; '.join(dict.fromkeys(failures))}"
        )

    def _ask_one(self, url: str, request: Request) -> Reply:
        reply = exchange(url, request, timeout=self.timeout, headers=self._headers)
        if reply.status == 200:
            return reply
        hint = ""
        if reply.status in {401, 403}:
            hint = (
                "; it wants another bearer token, which is taken from the environment variable that "
                "token_variable names"
            )
        raise WireError(
            f"{reply.url} has answered status {reply.status} where 200 was expected, with "
            f"{reply.shown}{hint}",
            passing=reply.status in _PASSING,
        )


def check_addresses(urls: Sequence[str], timeout: float, retries: int) -> None:
    """Validate addresses and bounds, before anything is sent.

    Raises:
        ValueError: If there are no URLs, or a value is out of its range.
    """
    if not urls:
        raise ValueError("urls is empty; give one or more, such as http://127.0.0.1:8000")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"the URL {url!r} is none of a server; write http://host:port")
    if not (math.isfinite(timeout) and timeout > 0) or retries < 0:
        raise ValueError(
            f"timeout is {timeout} and retries {retries}; give a number of seconds above 0, and 0 "
            "attempts or more"
        )


def token_from(variable: str) -> str:
    """Return a bearer token from an environment variable; empty where there is none.

    It is no option, for options are saved beside a run.

    Raises:
        ValueError: If it cannot stand in a header.
    """
    token = os.environ.get(variable, "")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the token in {variable} must be printable ASCII without spaces")
    return token

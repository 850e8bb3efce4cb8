"""Several addresses of one service: turns, failures, further attempts."""

import os
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from lightning_kd.option_checks import is_number
from lightning_kd.wire.exchange import Reply, Request, WireError, exchange

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
"""Seconds between two rounds of attempts: doubled each time, up to the second."""

TOKEN_VARIABLE = "LIGHTNING_KD_TOKEN"
"""Environment variable with the bearer token, which need not be set."""

LONGEST_WAIT = 10**6
"""Seconds that a wait may be given: eleven days. Beyond some number clocks fail."""

_SUCH_AS = "such as http://127.0.0.1:8000"

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""States that the same request may not find again."""


class Servers:
    """Servers that answer alike; each request goes to the next one, and to another if that fails.

    Args:
        urls: Their roots.
        timeout: Seconds that one attempt may take.
        retries: Further attempts after the first, over all of them, with growing pauses.
        token: Sent as a bearer token; empty for none.
        token_variable: Environment variable that has it, for messages.

    Raises:
        ValueError: If there are no URLs, or a value is out of its range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float = 60.0,
        retries: int = 3,
        token: str = "",
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        check_addresses(urls, timeout, retries)
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout, self.retries = timeout, retries
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._variable = token_variable
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
            came = "the one in" if self._headers else "none, for nothing is in"
            hint = (
                f"; it wants another bearer token than {came} the environment variable "
                f"{self._variable}: put the server's there, or name another variable by token_variable"
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
    if isinstance(urls, str) or not isinstance(urls, Sequence):
        raise ValueError(f"urls is {urls!r}; give a list of them, {_SUCH_AS}")
    if not urls:
        raise ValueError(f"urls is empty; give one or more, {_SUCH_AS}")
    for url in urls:
        _check_address(url)
    sound = is_number(timeout) and 0 < timeout <= LONGEST_WAIT
    if not sound or not is_number(retries, whole=True) or retries < 0:
        raise ValueError(
            f"timeout is {timeout!r} and retries {retries!r}; give a number of seconds above 0 and up "
            f"to {LONGEST_WAIT:,}, and 0 attempts or more"
        )


def _check_address(url: object) -> None:
    if not isinstance(url, str):
        raise ValueError(f"a URL is {url!r}, of type {type(url).__name__}; give text, {_SUCH_AS}")
    parts = urlsplit(url)
    # Neither a password nor what may hold one stands in a message.
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        raise ValueError(
            f"the URL {shown!r} comes with a user name or a password, which is not sent; leave it out. "
            "A server that wants a bearer token gets the one in the variable of token_variable"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"the URL {shown!r} goes on with a query or a fragment, which is not sent; give the root "
            f"of a server, {_SUCH_AS}"
        )
    try:
        sound = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        sound = False
    if not sound:
        raise ValueError(f"the URL {url!r} is none of a server; write http://host:port")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(
            f"the URL {url!r} ends in /v1; give the root of the server, "
            f"{url.rstrip('/').removesuffix('/v1')!r}"
        )


def token_from(variable: str) -> str:
    """Return a bearer token from an environment variable; empty where the default one is not set.

    It is no option, for options are saved beside a run.

    Raises:
        ValueError: If another variable than the default has none, or it cannot stand in a header.
    """
    token = os.environ.get(variable, "")
    if not token and variable != TOKEN_VARIABLE:
        raise ValueError(
            f"token_variable is {variable!r}, and the environment variable {variable} is not set or "
            "empty; put the token there (not into the option), or leave token_variable out"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the token in {variable} must be printable ASCII without spaces")
    return token

"""Limits of a server, and what it says of a request that it does not take."""

from dataclasses import dataclass, fields

from lightning_kd.option_checks import is_number
from lightning_kd.wire.servers import LONGEST_WAIT

_MOST = 2**40
"""Of what is counted."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server: what is beyond them is refused, and every wait is bounded.

    Attributes:
        body_megabytes: Longest body of a request.
        rows: Rows of a request.
        tokens: Padded tokens of a request: its rows times the longest of them.
        batch_tokens: Padded tokens of several requests that are computed together.
        length: Longest row, in tokens; 0 for the longest that the teacher is made for.
        k: Most tokens at each position of a ``top_k`` answer.
        new_tokens: Longest completion.
        queue: Requests that wait; further ones are told to come again (503).
        connections: Requests that are read or answered at once.
        read_seconds: Time in which a request must have been sent.
        answer_seconds: Longest wait for an answer, after which the request is dropped (504).
        drain_seconds: Time for what is still waiting when the server is asked to end.

    Raises:
        ValueError: If a value is out of its range.
    """

    body_megabytes: int = 64
    rows: int = 4096
    tokens: int = 2**20
    batch_tokens: int = 2**15
    length: int = 0
    k: int = 1024
    new_tokens: int = 8192
    queue: int = 64
    connections: int = 128
    read_seconds: float = 30.0
    answer_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check the values."""
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "length" else 1e-3
            whole = isinstance(field.default, int)
            most = _MOST if whole else LONGEST_WAIT
            if not is_number(value, whole=whole) or not least <= value <= most:
                kind = "a whole number" if whole else "a number of seconds"
                bound = "0 or more" if least == 0 else "above 0"
                raise ValueError(
                    f"limits.{field.name} is {value!r}; it must be {bound}, and {kind} of {most:,} at "
                    "most"
                )

    @property
    def body_bytes(self) -> int:
        """Longest body of a request."""
        return self.body_megabytes * 2**20


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        reason: What came and what was expected.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

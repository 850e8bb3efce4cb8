"""What goes over HTTP between a served teacher and its server: requests, messages, addresses."""

from lightning_kd.wire.exchange import Reply, Request, WireError, exchange
from lightning_kd.wire.messages import Question, pack, unpack
from lightning_kd.wire.servers import Servers

__all__ = [
    "Question",
    "Reply",
    "Request",
    "Servers",
    "WireError",
    "exchange",
    "pack",
    "unpack",
]

"""What servers of a teacher speak: this library's own, vLLM, SGLang."""

from lightning_kd.teachers.servers.ahead import Ahead
from lightning_kd.teachers.servers.backend import Backend, Description
from lightning_kd.teachers.servers.handshake import handshake
from lightning_kd.teachers.servers.options import (
    BackendName,
    abilities_of,
    backend_of,
    check_payload,
)
from lightning_kd.teachers.servers.own import OwnServer
from lightning_kd.teachers.servers.sglang import SGLangServer
from lightning_kd.teachers.servers.shared import check_labels
from lightning_kd.teachers.servers.vllm import VLLMServer

__all__ = [
    "Ahead",
    "Backend",
    "BackendName",
    "Description",
    "OwnServer",
    "SGLangServer",
    "VLLMServer",
    "abilities_of",
    "backend_of",
    "check_labels",
    "check_payload",
    "handshake",
]

"""The command that serves a teacher."""

import signal
import threading
from types import FrameType

import torch

from lightning_kd.serving.http_server import TeacherServer
from lightning_kd.serving.limits import Limits
from lightning_kd.serving.service import TeacherService
from lightning_kd.teachers import LocalTeacher, Teacher
from lightning_kd.tokenization import load_tokenizer
from lightning_kd.wire.servers import TOKEN_VARIABLE, token_from

_LAST_PORT = 65535

_LIMITS = Limits()

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    teacher: LocalTeacher | Teacher,
    tokenizer: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    device: str = "auto",
    name: str = "teacher",
    token_variable: str = TOKEN_VARIABLE,
    limits: Limits = _LIMITS,
) -> None:
    """Serve a teacher to training runs in other processes, until SIGTERM or Ctrl-C.

    A run that trains elsewhere takes ``--model.teacher ServedTeacher --model.teacher.urls
    '[http://127.0.0.1:8765]'``. It gets hidden states and, once, the output head: so every
    divergence at every temperature is what it would be with the teacher in the process. The server
    also answers in the shape of vLLM's completions. On SIGTERM or Ctrl-C it answers what it has taken,
    and ends.

    Args:
        teacher: The teacher: one model by its name_or_path, or a class, such as TeacherEnsemble.
        tokenizer: Directory or hub name of the tokenizer. Defaults to that beside the first model.
        host: Address to listen on. Beyond 127.0.0.1 a token is needed.
        port: Port to listen on; 0 takes a free one, which is printed.
        device: Device of the teacher; auto takes an accelerator if there is one.
        name: Name of the teacher in /v1/models.
        token_variable: Environment variable with the bearer token that requests must have. None is
            asked for where the default one is not set; another one must be.
        limits: Limits of requests, queue and waits.

    Raises:
        ValueError: If the teacher cannot be served.
    """
    token = token_from(token_variable)
    if not 0 <= port <= _LAST_PORT:
        raise ValueError(
            f"port is {port}; give a number from 1 to {_LAST_PORT}, or 0 for a free one"
        )
    place = _place(device)
    if tokenizer is None:
        names = [spec.name_or_path for spec in teacher.model_specs if spec.name_or_path]
        if not names:
            raise ValueError("the teacher has no directory with a tokenizer; give --tokenizer")
        tokenizer = names[0]
    service = TeacherService(teacher, load_tokenizer(tokenizer), place, limits)
    try:
        server = TeacherServer(service, limits, host=host, port=port, token=token, name=name)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; give another --port (0 "
            "takes a free one), or an address of this machine as --host"
        ) from error
    ending = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        ending.set()
        for each in _SIGNALS:  # a second one ends the process at once
            signal.signal(each, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, handle)
    server.start()
    longest = "any length" if service.length is None else f"{service.length} tokens"
    print(
        f"{type(teacher).__name__} ({service.fingerprint}) answers "
        f"{', '.join(sorted(service.payloads))} on {place}, rows of {longest}, at {server.url}",
        flush=True,
    )
    ending.wait()
    print("ending, after what is waiting", flush=True)
    if not server.end():
        raise ValueError(
            f"not everything was answered within limits.drain_seconds, {limits.drain_seconds:g} s"
        )


def _place(device: str) -> torch.device:
    """Return the device of the teacher.

    Raises:
        ValueError: If this machine has none of that name.
    """
    accelerator = torch.accelerator.current_accelerator()
    if device == "auto":
        return accelerator or torch.device("cpu")
    known = ["auto", "cpu", *([] if accelerator is None else [accelerator.type])]
    try:
        place = torch.device(device)
    except RuntimeError:  # the name of none
        place = None
    if place is None or place.type not in known:
        raise ValueError(f"device is {device!r}; on this machine there are {', '.join(known)}")
    count = torch.accelerator.device_count() if place.type != "cpu" else 1
    if place.index is not None and place.index >= count:
        raise ValueError(f"device is {device!r}; this machine has {count} of them, from 0 on")
    return place

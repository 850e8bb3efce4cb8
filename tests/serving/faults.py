"""Faults of a server: what it answers, or does not, once it is told to."""

import time
from dataclasses import replace

import torch

from lightning_kd.serving.endpoints import Body
from lightning_kd.wire import pack, unpack

ANSWERS = "/v1/answers"


def changed(change):
    """A fault that changes the tensors of an answer."""

    def fault(server, answer):
        tensors, about = unpack(answer.data)
        return replace(answer, data=pack(change(tensors), about))

    return fault


def of_states(change):
    return changed(lambda t: {n: change(v) if n.startswith("states") else v for n, v in t.items()})


def nan(states):
    states = states.clone()
    states[-1, 0] = torch.nan
    return states


def frozen(server, answer):
    time.sleep(30)
    return answer


def of_another_teacher(server, answer):
    tensors, about = unpack(answer.data)
    return replace(answer, data=pack(tensors, about | {"fingerprint": "another"}))


def killed(server, answer):
    server.shutdown()
    server.server_close()
    raise ConnectionAbortedError


FAULTS = {
    "killed": (killed, "cannot be reached|broken off"),
    "frozen": (frozen, r"has not answered within 1 s"),
    "html": (
        lambda server, answer: Body("text/html", b"<html><body>Bad gateway</body></html>"),
        r"\(text/html\) where an answer of lightning-kd serve, as safetensors, was expected; they "
        "begin '<html><body>Bad gateway",
    ),
    "nan": (of_states(nan), "hidden states of which 1 of .* values are NaN or infinite"),
    "fewer positions": (of_states(lambda s: s[:-1]), r"where \d+ positions were asked about"),
    "a shifted list": (of_states(lambda s: s.roll(1, 0)), "do not belong to their positions"),
    "another width": (of_states(lambda s: s[:, :-1]), r"where \(\d+, 16\) of torch.float32 were"),
    "another teacher": (of_another_teacher, "'another', where '.*' was served when the run began"),
    "a pickle": (
        lambda server, answer: Body("application/octet-stream", b"\x80\x04K\x01."),
        "as safetensors, was expected",
    ),
    "nothing": (lambda server, answer: Body("text/plain", b""), "has answered 0 bytes"),
}
"""By name: what is done with an answer, and what the error says."""


def after(server, answers, fault):
    """Let a server answer some questions, and every later one with a fault.

    Returns:
        A list, which grows by one with each question.
    """
    asked, honest = [], server.endpoints.asks[ANSWERS]

    def answer(body):
        asked.append(time.monotonic())
        found = honest(body)
        return found if len(asked) <= answers else fault(server, found)

    server.endpoints.asks = {**server.endpoints.asks, ANSWERS: answer}
    return asked

"""A toy teacher, served from a thread."""

from contextlib import contextmanager

import pytest
import torch

from lightning_kd.serving import Limits, TeacherServer, TeacherService
from lightning_kd.teachers import LocalTeacher
from tests.support.toys import letter_tokenizer, tiny_llama


@contextmanager
def served(teacher=None, *, token="", tokenizer=None, **limits):
    """A server in a thread; its fields are what a test looks at."""
    limits = Limits(**({"drain_seconds": 5.0, "read_seconds": 5.0} | limits))
    teacher = teacher or LocalTeacher.of(tiny_llama(1))
    tokenizer = tokenizer or letter_tokenizer()
    service = TeacherService(teacher, tokenizer, torch.device("cpu"), limits)
    server = TeacherServer(service, limits, token=token)
    server.start()
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def server():
    """One server for all tests of a file that only ask it."""
    with served() as running:
        yield running

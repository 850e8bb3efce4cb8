import pytest
import torch

from lightning_kd.divergences import base


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.fixture
def logits():
    """Student and teacher, float64, with positions over two axes."""
    generator = torch.Generator().manual_seed(20)
    return tuple(2 * torch.randn(4, 16, 11, dtype=torch.float64, generator=generator) for _ in "st")


@pytest.fixture
def log_probs(logits):
    return tuple(side.log_softmax(-1) for side in logits)


@pytest.fixture
def many_log_probs():
    """Pairs of every sharpness, from nearly uniform to one-hot and from close to far apart."""
    generator = torch.Generator().manual_seed(21)
    sharpness = torch.logspace(-2, 1.5, 40, dtype=torch.float64)[:, None, None]
    noise = torch.logspace(-4, 1.5, 30, dtype=torch.float64)[:, None]
    teacher = sharpness * torch.randn(40, 30, 9, dtype=torch.float64, generator=generator)
    student = teacher + noise * torch.randn(40, 30, 9, dtype=torch.float64, generator=generator)
    return student.log_softmax(-1), teacher.log_softmax(-1)

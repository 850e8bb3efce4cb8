import pytest
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.modules.partition_grid import without_float32_islands


@pytest.fixture
def float64_norms(monkeypatch):
    """Llamas that compute in float64 throughout, for one test."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", LlamaRMSNorm.forward)
    without_float32_islands()

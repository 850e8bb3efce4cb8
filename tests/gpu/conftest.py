"""Every test here runs on the CPU, and on a CUDA device where there is one."""

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test each device; ``-m cuda`` selects those of the GPU."""
    if "device" in metafunc.fixturenames:
        devices = [pytest.param("cpu")]
        if torch.cuda.is_available():
            devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
        metafunc.parametrize("device", devices)

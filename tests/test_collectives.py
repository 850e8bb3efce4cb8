"""Collectives of one process; tests/callbacks/audit/test_gradient_audit.py gathers over two."""

import pytest
import torch

from lightning_kd.collectives import any_process, gather_objects, max_over_processes
from tests.support.scripts import free_port


@pytest.fixture(params=["without a group", "in a group of one"])
def alone(request):
    if request.param == "without a group":
        yield
        return
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_single_process_gets_its_own_values():
    cpu, value = torch.device("cpu"), {"rank": 0}
    assert gather_objects(value) == [value]
    assert [any_process(flag, cpu) for flag in (False, True)] == [False, True]
    assert [max_over_processes(number, cpu) for number in (-3, 0, 7)] == [-3, 0, 7]

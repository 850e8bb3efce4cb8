import pytest

from tests.fused.sharded_heads import CASES
from tests.support.scripts import written_by

pytestmark = pytest.mark.processes


def test_two_sharded_processes_equal_one(tmp_path):
    """FSDP2, tied and untied, the head in the root unit and as one of its own."""
    differences = written_by("fused/sharded_heads.py", tmp_path / "differences.pt")
    assert set(differences) == set(CASES)
    assert max(differences.values()) < 1e-6, differences

"""The mutation campaign itself: what it changes, and that its list of equivalents is up to date."""

import ast

import pytest

from tests.mutation.campaign import (
    EQUIVALENT,
    ROOT,
    TESTS,
    WIDE,
    core_tests,
    equivalents,
    places,
    sample,
)
from tests.mutation.mutants import mutants, mutated

PROGRAM = '''
"""A docstring 1."""
@dataclass(frozen=True)
class Point:
    """Another 2."""
    x: Annotated[int, 3] = 0

    def shift(self, by, *, back=False):
        if not back and by >= 0:
            self.seen[by] = by
            self.x += by
        else:
            raise ValueError(f"{by + 1} is wrong")
        return torch.where(back, self.values.sum(), -by / 2.0)
'''
CHANGES = [
    "True -> False",
    "0 -> 1",
    "False -> True",
    "if not back and by >= 0 -> if not (not back and by >= 0)",
    "not back and by >= 0 -> not back or by >= 0",
    "not back -> back",
    "by >= 0 -> by > 0",
    "0 -> 1",
    "self.seen[by] = by -> pass",
    "self.x += by -> self.x -= by",
    "self.x += by -> pass",
    "torch.where(back, self.values.sum(), -by / 2.0)"
    " -> torch.where(self.values.sum(), back, -by / 2.0)",
    "self.values.sum -> self.values.mean",
    "-by / 2.0 -> -by * 2.0",
    "-by -> by",
    "2.0 -> 3.0",
]


def test_what_runs_is_changed_and_nothing_else():
    assert sorted(mutant.change for mutant in mutants(PROGRAM)) == sorted(CHANGES)


def test_each_mutant_is_another_program_in_one_place():
    original = ast.unparse(ast.parse(PROGRAM)).splitlines()
    seen = set()
    for mutant in mutants(PROGRAM):
        changed = mutated(PROGRAM, mutant)
        seen.add(changed)
        lines = changed.splitlines()
        assert len(lines) == len(original)
        assert sum(a != b for a, b in zip(lines, original, strict=True)) == 1
    assert len(seen) == len(CHANGES)


def test_a_sample_is_the_same_for_the_same_seed():
    files = [name for name in core_tests() if name.endswith(("policy.py", "scoring.py"))]
    assert sample(files, 10, 3) == sample(files, 10, 3)
    assert sample(files, 10, 3) != sample(files, 10, 4)


@pytest.mark.parametrize("file", sorted({key.split(" :: ")[0] for key in equivalents()}))
def test_what_is_said_to_be_equivalent_is_there(file):
    """Code that has changed needs another look."""
    there = {place.key for place in places(file)}
    assert [key for key in equivalents() if key.startswith(f"{file} ::") and key not in there] == []


def test_every_file_and_its_tests_are_there():
    assert all([*ROOT.glob(pattern)] for pattern in TESTS)
    named = {test for tests in (*TESTS.values(), WIDE) for test in tests}
    assert all((ROOT / test.split("::")[0]).exists() for test in named)
    assert EQUIVALENT.exists()

"""Replaced attributes are restored, with and without an error."""

import ast
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_kd.callbacks import audit
from lightning_kd.callbacks.audit.replacements import replaced, replaced_item, restored
from tests.support.scripts import free_port


class Owner:
    of_class = 1

    def __init__(self):
        self.own, self._behind = 2, 3

    @property
    def managed(self):
        return self._behind

    @managed.setter
    def managed(self, value):
        self._behind = value

    def method(self):
        return "own"


@pytest.mark.parametrize("fails", [False, True])
def test_replaced_attributes_are_restored(fails):
    owner = Owner()
    before = dict(vars(owner))
    new = {"of_class": 10, "own": 20, "managed": 30, "method": lambda: "new", "absent": 40}
    try:
        with replaced(owner, **new):
            assert (owner.of_class, owner.own, owner._behind, owner.absent) == (10, 20, 30, 40)
            assert owner.method() == "new"
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert vars(owner) == before
    assert owner.method() == "own"
    assert Owner.of_class == 1


def test_attributes_set_or_deleted_inside_are_restored():
    owner = Owner()
    before = dict(vars(owner))
    with replaced(owner, of_class=10, own=20):
        del owner.of_class, owner.own
    with restored(owner, "own", "managed"):
        owner.own, owner.managed = 5, 6
    assert vars(owner) == before


def test_other_attributes_are_restored_if_one_cannot_be_set():
    class Fixed(Owner):
        @property
        def fixed(self):
            return 1

    owner = Fixed()
    before = dict(vars(owner))
    with pytest.raises(AttributeError), replaced(owner, own=20, fixed=2):
        raise AssertionError("entered")
    assert vars(owner) == before


def test_only_existing_items_are_replaced(monkeypatch):
    monkeypatch.setenv("PRESENT", "1")
    monkeypatch.delenv("ABSENT", raising=False)
    with replaced_item(os.environ, "PRESENT", "2"), replaced_item(os.environ, "ABSENT", "2"):
        assert os.environ["PRESENT"] == "2"
        assert "ABSENT" not in os.environ
    assert os.environ["PRESENT"] == "1"
    assert "ABSENT" not in os.environ


def test_the_default_process_group_is_replaced_and_restored():
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        world, other = dist.group.WORLD, dist.new_group([0])
        with replaced(dist.group, WORLD=other):
            assert dist.distributed_c10d._get_default_group() is other
        assert dist.distributed_c10d._get_default_group() is world
    finally:
        dist.destroy_process_group()


def replaced_names():
    """The names in all calls of the package that replace or restore something."""
    for path in Path(audit.__file__).parent.glob("*.py"):
        if path.name == "replacements.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(getattr(node, "func", None), ast.Name) else None
            if name in {"replaced", "restored", "replaced_item"}:
                yield from (keyword.arg for keyword in node.keywords)
            if name in {"restored", "replaced_item"}:
                yield from (part.value for part in node.args if isinstance(part, ast.Constant))


def test_the_package_documents_all_that_it_replaces():
    names = set(replaced_names()) - {"1"}
    assert len(names) == 14
    assert {name for name in names if f"{name}``" not in audit.__doc__} == set()

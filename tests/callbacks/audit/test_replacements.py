"""Attributes that are replaced are put back, whatever they belong to and however it ends."""

import os
import socket

import pytest
import torch.distributed as dist

from lightning_kd.callbacks.audit.replacements import replaced, replaced_item, restored


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
def test_attributes_are_what_they_were(fails):
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


def test_values_set_or_deleted_inside_are_put_back():
    owner = Owner()
    before = dict(vars(owner))
    with replaced(owner, of_class=10, own=20):
        del owner.of_class, owner.own
    with restored(owner, "own", "managed"):
        owner.own, owner.managed = 5, 6
    assert vars(owner) == before


def test_an_attribute_that_cannot_be_set_leaves_the_others_as_they_were():
    class Fixed(Owner):
        @property
        def fixed(self):
            return 1

    owner = Fixed()
    before = dict(vars(owner))
    with pytest.raises(AttributeError), replaced(owner, own=20, fixed=2):
        raise AssertionError("entered")
    assert vars(owner) == before


def test_an_item_is_replaced_only_where_there_is_one(monkeypatch):
    monkeypatch.setenv("PRESENT", "1")
    monkeypatch.delenv("ABSENT", raising=False)
    with replaced_item(os.environ, "PRESENT", "2"), replaced_item(os.environ, "ABSENT", "2"):
        assert os.environ["PRESENT"] == "2"
        assert "ABSENT" not in os.environ
    assert os.environ["PRESENT"] == "1"
    assert "ABSENT" not in os.environ


def test_the_default_process_group_is_replaced_and_put_back():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        world, other = dist.group.WORLD, dist.new_group([0])
        with replaced(dist.group, WORLD=other):
            assert dist.distributed_c10d._get_default_group() is other
        assert dist.distributed_c10d._get_default_group() is world
    finally:
        dist.destroy_process_group()

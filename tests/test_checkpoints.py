import os
import re

import pytest
import torch

from lightning_kd.checkpoints import (
    AtomicCheckpointIO,
    fresh_name,
    put_in_place,
    readable_checkpoint,
)
from lightning_kd.integrity import check_directory, checksums


def write(path, kind, content):
    if kind == "directory":
        path.mkdir()
        path /= "shard"
    path.write_text(content)


def content(path):
    return (path / "shard" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("before", ["file", "directory", None])
@pytest.mark.parametrize("after", ["file", "directory"])
def test_a_checkpoint_takes_the_place_of_any_other(tmp_path, before, after):
    """A run that goes on under another strategy writes the other kind under the same name."""
    place = tmp_path / "last.ckpt"
    if before is not None:
        write(place, before, "before")
    write(fresh_name(place), after, "after")
    put_in_place(fresh_name(place), place)
    assert content(place) == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_kill_left_behind_is_found_and_goes_with_the_next(tmp_path):
    place = tmp_path / "last.ckpt"
    write(tmp_path / "last.ckpt.old", "directory", "before")
    assert content(readable_checkpoint(place)) == "before"
    write(fresh_name(place), "directory", "after")
    put_in_place(fresh_name(place), place)
    assert readable_checkpoint(place) == place
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def checkpoint(path, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(20_000, generator=generator)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": weights}, "global_step": seed}, path)
    return path


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_is_found_and_the_newest_complete_checkpoint_named(tmp_path, share):
    for step in (1, 2, 3):
        path = checkpoint(tmp_path / f"step={step}.ckpt", step)
        os.utime(path, (step, step))
    flip_a_bit(path, int(share * path.stat().st_size))
    flip_a_bit(tmp_path / "step=2.ckpt", 5_000)
    with pytest.raises(ValueError, match="no checkpoint that can be read safely") as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert f"newest complete one beside it is {tmp_path / 'step=1.ckpt'}" in str(error.value)


@pytest.mark.parametrize("size", [0, 100, 40_000])
def test_a_truncated_checkpoint_names_a_complete_one(tmp_path, size):
    path = checkpoint(tmp_path / "last.ckpt")
    other = checkpoint(tmp_path / "step=3.ckpt")
    os.truncate(path, size)
    with pytest.raises(ValueError, match=re.escape(f"newest complete one beside it is {other}")):
        AtomicCheckpointIO().load_checkpoint(path)


def test_files_of_a_directory_are_compared_with_their_checksums(tmp_path):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for name in ("shard_0", "shard_1"):
        (folder / name).write_bytes(bytes(range(256)) * 100)
    written = checksums(folder)
    assert written == checksums(folder, slice(0, None, 2)) | checksums(folder, slice(1, None, 2))
    check_directory(folder, written)
    flip_a_bit(folder / "shard_1", 12_345)
    with pytest.raises(ValueError, match="not those that were written \\(shard_1\\)"):
        check_directory(folder, written)
    (folder / "shard_0").unlink()
    with pytest.raises(ValueError, match="shard_0 is missing"):
        check_directory(folder, written)

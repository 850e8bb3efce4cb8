import os
import re
import zipfile
from itertools import product

import pytest
import torch

from lightning_kd.checkpoints import (
    AtomicCheckpointIO,
    fresh_name,
    newest_complete,
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


def entry_of_a_tensor(content):
    """Where the entry of a tensor is in the central directory of an archive."""
    end = content.index(b"data/0", content.index(b"PK\x01\x02")) + len("data/0")
    return range(content.rindex(b"PK\x01\x02", 0, end), end)


def test_a_flipped_bit_of_the_central_directory_is_found(tmp_path):
    path, near = tmp_path / "damaged.ckpt", tmp_path / "last.ckpt"
    weights = torch.arange(1.0, 4.0)
    AtomicCheckpointIO().save_checkpoint({"w": weights}, path)
    written = path.read_bytes()
    accepted = []
    for place, bit in product(entry_of_a_tensor(written), range(8)):
        content = bytearray(written)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        found = newest_complete(near)
        assert found in {path, None}
        if found:
            assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["w"], weights)
            accepted.append(place - entry_of_a_tensor(written).start)
    assert set(accepted) <= {4, 6, 8, 9, *range(12, 16)}  # versions, flags, time, date


@pytest.mark.parametrize(
    "change", [{"external_attr": 0x10}, {"flag_bits": 0x809}, {"extra": b"UT\0\0"}]
)
def test_records_that_torch_does_not_write_are_refused(tmp_path, change):
    path = checkpoint(tmp_path / "last.ckpt")
    other = checkpoint(tmp_path / "step=3.ckpt")
    for damaged in (path, checkpoint(tmp_path / "step=4.ckpt")):
        with zipfile.ZipFile(damaged, "a") as archive:
            (record,) = (r for r in archive.infolist() if r.filename.endswith("data/0"))
            for name, value in change.items():
                setattr(record, name, value)
            archive._didModify = True  # the directory is written again
    with pytest.raises(ValueError, match=re.escape(f"newest complete one beside it is {other}")):
        AtomicCheckpointIO().load_checkpoint(path)


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

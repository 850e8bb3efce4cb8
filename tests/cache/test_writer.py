"""Files of a cache: complete or not there, whatever ends the writing."""

import errno
import json
import os
import random
import shutil
import signal

import pytest
import torch

from lightning_kd.cache import CacheReader, CacheWriter, MissingRowError, ShardRows

SHARDS, ROWS = 5, 7
ABOUT = {"kind": "test", "options": {"k": 2}}


def rows_of(number):
    """Rows of a shard, each of another length."""
    draws = torch.Generator().manual_seed(number)
    keys = [bytes([number, row] * 8) for row in range(ROWS)]
    lengths = [1 + (number + row) % 4 for row in range(ROWS)]
    rows = ShardRows()
    for key, length in zip(keys, lengths, strict=True):
        planes = {
            "states": torch.randn(length, 3, generator=draws).bfloat16(),
            "ids": torch.randint(9, (length, 2), generator=draws, dtype=torch.int32),
            "entropy": torch.rand(length, generator=draws),
        }
        rows.add([key], [length], planes)
    return keys, lengths, rows


def write(directory, about=ABOUT):
    with CacheWriter(directory, about, SHARDS) as writer:
        for number in range(SHARDS):
            if not writer.has(number):
                writer.write(number, rows_of(number)[2])
        writer.finish({"weight": torch.eye(3)})
    return directory


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def opened(directory):
    reader = CacheReader(directory)
    reader.open()
    return reader


def test_rows_come_back_in_any_order_from_any_shard(tmp_path):
    reader = opened(write(tmp_path / "cache"))
    everything = [(n, row) for n in range(SHARDS) for row in range(ROWS)]
    random.Random(0).shuffle(everything)
    wanted = everything[:9]
    keys = [rows_of(number)[0][row] for number, row in wanted]
    read = reader.planes_of([keys[0], None, *keys[1:]])
    for name in ("states", "ids", "entropy"):
        expected = []
        for number, row in wanted:
            rows = rows_of(number)[2]
            expected.append(rows._planes[row][name])
        assert torch.equal(read[name], torch.cat(expected))
        assert read[name].dtype == expected[0].dtype
    assert torch.equal(reader.head()["weight"], torch.eye(3))


def test_a_row_that_is_not_there_is_named_by_its_place(tmp_path):
    reader = opened(write(tmp_path / "cache"))
    there = rows_of(0)[0][0]
    with pytest.raises(MissingRowError) as error:
        reader.planes_of([there, None, b"\xff" * 16])
    assert error.value.place == 2
    with pytest.raises(MissingRowError):
        reader.check_keys([b"\xff" * 16])
    assert all(len(plane) == 0 for plane in reader.planes_of([None]).values())


def test_keys_that_share_their_first_half_are_different_rows(tmp_path):
    rows, keys = ShardRows(), [b"x" * 8 + bytes([n]) * 8 for n in (3, 1, 2)]
    for number, key in enumerate(keys):
        rows.add([key], [1], {"value": torch.tensor([number])})
    with CacheWriter(tmp_path, ABOUT, 1) as writer:
        writer.write(0, rows)
        writer.finish({})
    assert opened(tmp_path).planes_of(keys)["value"].tolist() == [0, 1, 2]


def test_a_shard_without_rows_is_read_past(tmp_path):
    with CacheWriter(tmp_path, ABOUT, 2) as writer:
        writer.write(0, ShardRows())
        writer.write(1, rows_of(1)[2])
        writer.finish({})
    assert len(opened(tmp_path).planes_of(rows_of(1)[0])["ids"]) == sum(rows_of(1)[1])


@pytest.mark.processes
def test_writing_that_is_killed_anywhere_is_continued_to_equal_files(tmp_path, monkeypatch):
    """SIGKILL at one of the calls that reach the disk; every one of them leaves a good beginning."""
    whole = files(write(tmp_path / "whole"))
    calls = {"seen": 0, "last": -1}

    def counted(function):
        def call(*arguments, **options):
            calls["seen"] += 1
            if calls["seen"] == calls["last"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr("pathlib.Path.rename", lambda self, place: os.rename(self, place))
    write(tmp_path / "counted")
    places = random.Random(0).sample(range(1, calls["seen"] + 1), 10)
    for number, last in enumerate(places):
        directory = tmp_path / f"killed {number}"
        child = os.fork()
        if child == 0:
            calls.update(seen=0, last=last)
            write(directory)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        calls["last"] = -1
        is_complete = (directory / "manifest.json").exists() and b'"complete": true' in (
            directory / "manifest.json"
        ).read_bytes()
        if not is_complete:
            with pytest.raises(ValueError, match=r"incomplete|no cache"):
                CacheReader(directory)
        assert files(write(directory)) == whole


def test_what_is_complete_is_not_written_again(tmp_path):
    write(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    write(tmp_path / "cache")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_writers_in_one_directory_are_refused(tmp_path):
    with (
        CacheWriter(tmp_path, ABOUT, SHARDS),
        pytest.raises(ValueError, match=r"another process is writing a cache"),
        CacheWriter(tmp_path, ABOUT, SHARDS),
    ):
        pass
    write(tmp_path)


def test_a_cache_of_something_else_is_neither_continued_nor_overwritten(tmp_path):
    cache = write(tmp_path / "cache")
    before = files(cache)
    with pytest.raises(ValueError, match=r"something else: options.k: 2 -> 3.*another directory"):
        write(cache, {"kind": "test", "options": {"k": 3}})
    assert files(cache) == before


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"no cache and not empty \(it has thesis.tex\)"):
        write(tmp_path)


def test_a_full_disk_loses_nothing_that_is_complete(tmp_path):
    cache = tmp_path / "cache"
    with CacheWriter(cache, ABOUT, SHARDS) as writer:
        writer.write(0, rows_of(0)[2])
        (cache / "shard-00001.safetensors.part").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"shard 1 .* 1 of 5 shards are complete") as error:
            writer.write(1, rows_of(1)[2])
    assert error.value.errno == errno.ENOSPC
    assert files(write(cache)) == files(write(tmp_path / "whole"))


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with CacheWriter(tmp_path, ABOUT, SHARDS) as writer:
        writer.check_space(0)
        with pytest.raises(OSError, match=r"MB are still to be written and .* MB are free"):
            writer.check_space(1e18)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def read_all(cache):
    reader = opened(cache)
    reader.head()
    for number in range(SHARDS):
        reader.planes_of(rows_of(number)[0])


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "head.safetensors", "manifest.json"])
def test_no_flipped_byte_is_read(name, tmp_path):
    cache = write(tmp_path / "cache")
    read_all(cache)
    path = cache / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 97)
    for place in range(0, len(whole), step):
        flip(path, place)
        with pytest.raises(ValueError, match=rf"{name}.*"):
            read_all(cache)
        path.write_bytes(whole)
    read_all(cache)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_shard_that_is_cut_short_is_named(kept, tmp_path):
    path = write(tmp_path / "cache") / "shard-00003.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"shard-00003.safetensors has .* bytes and was written with"
    ):
        opened(path.parent)


def test_a_missing_or_damaged_shard_is_written_again_by_the_same_command(tmp_path):
    cache = write(tmp_path / "cache")
    whole = files(cache)
    path = cache / "shard-00003.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00003.safetensors is missing"):
        opened(cache)
    assert files(write(cache)) == whole
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"delete the file"):
        write(cache)
    path.unlink()
    assert files(write(cache)) == whole


def test_no_cache_and_another_version_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"no cache of a teacher.*lightning-kd cache"):
        CacheReader(tmp_path)


# What stands in a directory when writing goes on there.


def begun(directory, about=ABOUT):
    """A cache whose first three shards are complete."""
    with CacheWriter(directory, about, SHARDS) as writer:
        for number in range(3):
            writer.write(number, rows_of(number)[2])
    return directory


def place_of(path, name):
    """Place of the first byte of a tensor in a file of safetensors."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("states", r"row 0"),
        ("row_keys", "its index of rows"),
        ("row_ends", "its index of rows"),
        ("row_checksums", "its index of rows"),
    ],
)
def test_what_is_complete_is_compared_before_writing_goes_on(name, said, tmp_path):
    path = begun(tmp_path / "cache") / "shard-00001.safetensors"
    flip(path, place_of(path, name))
    with pytest.raises(ValueError, match=rf"shard-00001.* not those that were written \({said}"):
        write(path.parent)
    path.unlink()
    assert files(write(path.parent)) == files(write(tmp_path / "whole"))


def test_a_shard_of_another_cache_is_refused(tmp_path):
    cache = begun(tmp_path / "cache")
    other = begun(tmp_path / "other", {"kind": "test", "options": {"k": 3}})
    shutil.copy(other / "shard-00001.safetensors", cache)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is of another cache"):
        write(cache)


def test_a_shard_of_other_rows_than_the_data_has_now_is_refused(tmp_path):
    with CacheWriter(begun(tmp_path), ABOUT, SHARDS) as writer:
        writer.check_keys(1, rows_of(1)[0])
        with pytest.raises(ValueError, match=r"shard-00001.safetensors has other rows than"):
            writer.check_keys(1, rows_of(2)[0])


def test_unfinished_files_of_others_are_left_alone(tmp_path):
    cache = begun(tmp_path / "cache")
    (cache / "thesis.part").write_text("mine")
    (cache / "shard-00004.safetensors.part").write_text("ours")
    assert "thesis.part" in files(write(cache))
    assert not list(cache.glob("shard-*.part"))
    (tmp_path / "thesis.part").write_text("mine")
    with pytest.raises(ValueError, match=r"no cache and not empty"):
        write(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "below a file"])
def test_a_place_that_is_no_directory_is_named(kind, tmp_path):
    place = tmp_path / "place"
    if kind == "link to nothing":
        place.symlink_to(tmp_path / "gone")
    else:
        place.write_text("a file")
    place = place / "cache" if kind == "below a file" else place
    with pytest.raises(ValueError, match=r"place is no directory; choose another"):
        write(place)

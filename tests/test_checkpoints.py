import pytest

from lightning_kd.checkpoints import fresh_name, put_in_place, readable_checkpoint


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

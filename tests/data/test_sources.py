import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from lightning_kd.data.readers import READERS
from lightning_kd.data.sources import WHERE, digests, load_rows

BOTH = {"prompt": str, "completion": str}
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")
    return name


def jsonl(name, *rows):
    return write(name, "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def plain(rows):
    return [{k: row[k] for k in ("prompt", "completion")} for row in rows]


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "parquet", "directory", "saved", "splits"]
)
def test_every_kind_of_file_gives_the_same_rows(kind):
    if kind == "jsonl":
        path = jsonl("rows.jsonl", ROWS[0], "", ROWS[1])
    elif kind == "json":
        path = write("rows.json", json.dumps(ROWS))
    elif kind == "csv":
        path = write("rows.csv", "prompt,completion\na,b\nc,d\n")
    elif kind == "parquet":
        path = "rows.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "directory":
        Path("folder").mkdir()
        jsonl("folder/train.jsonl", *ROWS)
        path = "./folder"
    elif kind == "saved":
        path = "./rows"
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        path = "./splits"
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path)
        with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]; .*splits/train"):
            load_rows(path, BOTH, split="test")
    assert plain(load_rows(path, BOTH)) == ROWS


def test_a_glob_joins_files_and_each_row_knows_its_line():
    jsonl("a.jsonl", ROWS[0])
    jsonl("b.jsonl", "", ROWS[1])
    rows = load_rows("[ab].jsonl", BOTH)
    assert plain(rows) == ROWS
    assert list(rows[WHERE]) == ["a.jsonl:1", "b.jsonl:2"]


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.parquet.gz", "rows"])
def test_a_file_of_an_unknown_ending_is_refused_with_the_known_ones(name):
    write(name, "x")
    with pytest.raises(
        ValueError, match=rf"cannot read '{name}'; known endings: \.jsonl, \.ndjson"
    ):
        load_rows(name, BOTH)


def test_a_list_of_messages_is_sent_to_the_chats():
    path = jsonl("a.jsonl", {"prompt": [{"role": "user", "content": "a"}], "completion": "b"})
    with pytest.raises(
        ValueError, match=r"must be text, got list .*; lists of messages are read by"
    ):
        load_rows(path, BOTH)


def test_a_compressed_file_is_found_by_name_and_by_glob():
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    assert plain(load_rows("rows.jsonl.gz", BOTH)) == ROWS
    rows = load_rows("*.jsonl.gz", BOTH)
    assert list(rows[WHERE]) == ["rows.jsonl.gz:1", "rows.jsonl.gz:2"]
    assert list(digests("rows.jsonl.gz", "train")) == ["rows.jsonl.gz"]


def test_a_text_file_is_one_document():
    rows = load_rows(write("a.txt", "one\ntwo\n"), {"text": str})
    assert [row["text"] for row in rows] == ["one\ntwo\n"]


def test_a_changed_file_is_read_again():
    path = jsonl("a.jsonl", ROWS[0])
    assert len(load_rows(path, BOTH)) == 1
    jsonl("a.jsonl", *ROWS)
    assert len(load_rows(path, BOTH)) == 2


def test_a_file_put_in_place_of_another_is_read_even_with_its_size_and_date():
    path = jsonl("a.jsonl", ROWS[0])
    date = os.stat(path)
    assert plain(load_rows(path, BOTH)) == [ROWS[0]]
    jsonl("a.jsonl", ROWS[1])
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert os.stat(path).st_size == date.st_size
    assert plain(load_rows(path, BOTH)) == [ROWS[1]]


def test_an_unchanged_file_is_not_read_again(monkeypatch):
    path = jsonl("a.jsonl", *ROWS)
    first = load_rows(path, BOTH)
    monkeypatch.setitem(READERS, ".jsonl", None)
    assert plain(load_rows(path, BOTH)) == plain(first)


def test_lists_come_as_json_whatever_else_is_in_them():
    messages = [[{"role": "user", "content": "\u00e4"}], [], [{"role": "user", "name": None}, 5]]
    path = jsonl("a.jsonl", *({"messages": m} for m in messages))
    rows = load_rows(path, {"messages": list})
    assert [json.loads(text) for text in rows["messages"]] == messages
    table = datasets.Dataset.from_dict({"messages": messages[:2]})
    for write_table, name in ((table.to_parquet, "m.parquet"), (table.save_to_disk, "./m")):
        write_table(name)
        texts = load_rows(name, {"messages": list})["messages"]
        assert [json.loads(text) for text in texts] == messages[:2]


def test_optional_columns_are_text_or_nothing():
    rows = [{"prompt": "a"}] * 2500 + [{"prompt": "b", "completion": "c"}]
    loaded = load_rows(jsonl("a.jsonl", *rows), {"prompt": str}, optional={"completion": str})
    assert [loaded[0]["completion"], loaded[2500]["completion"]] == [None, "c"]
    wrong = jsonl("b.jsonl", {"prompt": "a", "completion": 5})
    with pytest.raises(
        ValueError, match=r"b\.jsonl:1: column 'completion' must be text, got int 5"
    ):
        load_rows(wrong, {"prompt": str}, optional={"completion": str})


def test_a_directory_has_the_splits_of_its_files():
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        Path("rows").mkdir(exist_ok=True)
        jsonl(f"rows/{name}.jsonl", *rows)
    assert plain(load_rows("rows", BOTH)) == ROWS
    assert plain(load_rows("./rows", BOTH, split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"Unknown split .validation."):
        load_rows("./rows", BOTH, split="validation")
    with pytest.raises(ValueError, match=r"\./rows: column 'text' is missing; there are"):
        load_rows("./rows", {"text": str})


def test_home_and_brackets_in_a_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl("a[1].jsonl", ROWS[0])
    assert plain(load_rows("~/a[1].jsonl", BOTH)) == [ROWS[0]]


def test_numbers_in_a_csv_stay_text():
    rows = load_rows(write("a.csv", "prompt,completion\n1+1=,02\n"), BOTH)
    assert plain(rows) == [{"prompt": "1+1=", "completion": "02"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", "\n[1]", r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.jsonl", '{"prompt": "a"}', r"a\.jsonl:1: column 'completion' is missing.*'prompt'"),
        ("a.jsonl", '{"prompt": "a", "completion": null}', "must be text, got nothing"),
        (
            "a.jsonl",
            '{"prompt": ["a"], "completion": ""}',
            "column 'prompt' must be text, got list",
        ),
        ("a.json", '[{"prompt": "a", "completion": 7}]', r"a\.json: row 1: .* got int 7"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv:3: column 'completion' must be text"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv:2: more cells"),
        ("a.csv", "question,completion\na,b\n", r"a\.csv:2: column 'prompt' is missing"),
        (
            "a.jsonl",
            '{"prompt": "\\ud800", "completion": ""}',
            r"a\.jsonl:1: column 'prompt' cannot be written as text",
        ),
        ("a.jsonl", "", r"a\.jsonl has no rows"),
        ("a.csv", "prompt,completion\n", r"a\.csv has no rows"),
        ("a.xml", "<a/>", "cannot read 'a.xml'; known endings"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name, text, message):
    write(name, text)
    with pytest.raises(ValueError, match=message):
        load_rows(name, BOTH)


def test_parquet_names_rows():
    datasets.Dataset.from_list([*ROWS, {"prompt": None, "completion": "x"}]).to_parquet("a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: row 3: column 'prompt' must be text"):
        load_rows("a.parquet", BOTH)
    with pytest.raises(ValueError, match="'text' is missing"):
        load_rows("a.parquet", {"text": str})
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet("b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has no rows"):
        load_rows("b.parquet", BOTH)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.jsonl", "'no.jsonl' does not exist"),
        ("*.jsonl", "does not exist"),
        ("./nowhere", "give a file"),
        ("", "the data '' does not exist"),
        ("nobody/nothing", "cannot load the data set 'nobody/nothing'.*no file or directory"),
    ],
)
def test_missing_data_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        load_rows(path, BOTH)

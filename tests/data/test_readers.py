import gzip
import json
from pathlib import Path

import pytest

from lightning_kd.data.readers import READERS, ending, read_csv, read_json, read_parquet, read_text

ROW = '{"prompt": "a"}\n'


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def read(name):
    return list(READERS[ending(name)](name))


def test_a_json_file_is_a_list_or_lines():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    listed = write("list.json", "\n " + json.dumps(rows))
    lines = write("lines.json", "\n" + "\n".join(map(json.dumps, rows)))
    assert list(read_json(listed)) == [
        ("list.json: row 1", rows[0]),
        ("list.json: row 2", rows[1]),
    ]
    assert list(read_json(lines)) == [("lines.json:2", rows[0]), ("lines.json:3", rows[1])]


def test_line_separators_of_unicode_do_not_end_a_line():
    path = write("a.jsonl", '{"prompt": "a\u2028b\x85c"}\n' + ROW)
    assert list(read_json(path)) == [
        ("a.jsonl:1", {"prompt": "a\u2028b\x85c"}),
        ("a.jsonl:2", {"prompt": "a"}),
    ]


def test_a_csv_row_is_named_by_the_line_it_begins_on():
    path = write("a.csv", 'prompt,note\r\n"a\nb",\r\n\r\n"c ""d""",e\r\nf\r\n')
    assert list(read_csv(path)) == [
        ("a.csv:2", {"prompt": "a\nb", "note": ""}),
        ("a.csv:5", {"prompt": 'c "d"', "note": "e"}),
        ("a.csv:6", {"prompt": "f", "note": None}),
    ]


def test_a_cell_holds_a_document():
    path = write("a.csv", "prompt\n" + "x" * 200_000 + "\n")
    assert list(read_csv(path)) == [("a.csv:2", {"prompt": "x" * 200_000})]


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "prompt\na\n"), ("a.jsonl", ROW), ("a.json", f"[{ROW}]")]
)
def test_a_byte_order_mark_belongs_to_no_column(name, content):
    write(name, b"\xef\xbb\xbf" + content.encode())
    assert [row for _, row in read(name)] == [{"prompt": "a"}]


def test_text_is_one_document_with_plain_line_ends():
    assert list(read_text(write("a.txt", "one\r\ntwo\n"))) == [("a.txt", {"text": "one\ntwo\n"})]
    assert list(read_text(write("b.txt", " \n"))) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ROW * 2),
        ("a.ndjson", ROW * 2),
        ("a.json", f"[{ROW}, {ROW}]"),
        ("a.csv", "prompt\na\na\n"),
        ("a.tsv", "prompt\tb, c\na\t\na\t\n"),
    ],
)
def test_a_compressed_file_has_the_rows_and_lines_of_the_plain_one(name, content):
    write(name, content)
    write(f"{name}.gz", gzip.compress(content.encode()))
    plain = read(name)
    assert [row["prompt"] for _, row in plain] == ["a", "a"]
    assert read(f"{name}.gz") == [(w.replace(name, f"{name}.gz"), row) for w, row in plain]


def test_compressed_text_is_one_document_and_a_table_of_tabs_keeps_its_commas():
    write("a.txt.gz", gzip.compress(b"one\ntwo\n"))
    assert read("a.txt.gz") == [("a.txt.gz", {"text": "one\ntwo\n"})]
    assert read(write("a.tsv", "x\ty\n1,2\t3\n")) == [("a.tsv:2", {"x": "1,2", "y": "3"})]


def test_a_broken_compressed_file_is_named_with_its_line():
    whole = gzip.compress(ROW.encode() * 9)
    for content, message in (
        (ROW.encode(), r"a\.jsonl\.gz:1: not a whole gzip file: Not a gzipped file"),
        (whole[:-12], r"a\.jsonl\.gz:\d+: not a whole gzip file: .*end"),
        (gzip.compress(ROW.encode() + b"no"), r"a\.jsonl\.gz:2: not valid JSON"),
    ):
        write("a.jsonl.gz", content)
        with pytest.raises(ValueError, match=message):
            read("a.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROW.encode() + b'{"prompt": "\xff"}', r"a\.jsonl:2: not UTF-8 .* byte 13 of"),
        ("a.csv", b"prompt\na\n\xff\n", r"a\.csv:3: not UTF-8"),
        ("a.txt", b"one\n\xff", r"a\.txt:2: not UTF-8"),
        ("a.jsonl", ROW + '{"prompt": ', r"a\.jsonl:2: not valid JSON"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": ', r"a\.json:2: not valid JSON"),
        ("a.json", '[{"prompt": "a"}, 3]', r"a\.json: row 2: expected a JSON object, got int"),
        ("a.jsonl", ROW + "null", r"a\.jsonl:2: expected a JSON object, got NoneType"),
        ("a.csv", 'prompt\na\n"b\n', r"a\.csv:3: not valid CSV: unexpected end"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv:1: the header names a column twice"),
        ("a.csv", "prompt\na,b\n", r"a\.csv:2: more cells"),
        ("a.parquet", b"no table", r"a\.parquet: not valid Parquet"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(name, content, message):
    write(name, content)
    with pytest.raises(ValueError, match=message):
        read(name)


def test_a_missing_parquet_file_is_named():
    with pytest.raises(ValueError, match=r"none\.parquet: not valid Parquet"):
        list(read_parquet("none.parquet"))

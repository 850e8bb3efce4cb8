"""Tables between the marks of a document, with all that stands around them."""

import pytest

from lightning_kd.comparison.documents import check_marks, replace_between_marks

AROUND = (
    "# X\n<!-- t -->\nold\n<!-- end of t -->\n\nBy hand: tables end with <!-- end of t -->, here.\n"
)


def test_text_behind_that_mentions_the_end_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(AROUND)
    replace_between_marks(page, "t", "new \\1")
    assert page.read_text() == AROUND.replace("\nold\n", "\n\nnew \\1\n")


def test_line_ends_of_another_system_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(AROUND.replace("\n", "\r\n").encode())
    replace_between_marks(page, "t", "new\nlines")
    expected = AROUND.replace("\nold\n", "\n\nnew\nlines\n").replace("\n", "\r\n")
    assert page.read_bytes() == expected.encode()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- t -->\n<!-- end of t -->\n<!-- t -->\n<!-- end of t -->\n",
        "between <!-- t --> and the end\n\n<!-- t -->\n<!-- end of t -->\n",
    ],
)
def test_a_second_beginning_is_refused(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    for refused in (check_marks, lambda *given: replace_between_marks(*given, "new")):
        with pytest.raises(ValueError, match="has <!-- t --> 2 times; it must be there once"):
            refused(page, "t")
    assert page.read_text() == text


def test_a_link_to_a_document_stays_one(tmp_path):
    (tmp_path / "page.md").write_text(AROUND)
    link = tmp_path / "link.md"
    link.symlink_to("page.md")
    replace_between_marks(link, "t", "new")
    assert link.is_symlink()
    assert "new" in (tmp_path / "page.md").read_text()

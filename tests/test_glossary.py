"""docs/glossary.md is in order, short, and has no word that is not used."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
ENTRIES = dict(
    re.findall(
        r"^\*\*(.+?)\.\*\* (.+?)(?=\n\n|\Z)", (DOCS / "glossary.md").read_text(), re.M | re.S
    )
)
OTHERS = "\n".join(
    path.read_text().lower() for path in DOCS.rglob("*.md") if path.name != "glossary.md"
)


def test_the_words_are_in_order():
    assert len(ENTRIES) > 25
    assert list(ENTRIES) == sorted(ENTRIES, key=str.lower)


@pytest.mark.parametrize("word", ENTRIES)
def test_an_entry_is_short_and_of_a_word_that_pages_use(word):
    assert len(re.findall(r"[.;:](?:\s|$)", ENTRIES[word])) <= 4
    assert len(ENTRIES[word].split()) <= 50
    for name in word.split(", "):
        spelled = name.lower().replace("-", "[-_]")  # options have underscores
        assert re.search(rf"\b{spelled}", OTHERS), name

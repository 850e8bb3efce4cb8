"""The README and the pages of the documentation, and the blocks that they show."""

import re
import shlex
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?P<mark><!--[^\n]*-->\n)?(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.S | re.M,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Its page, from the root: ``docs/data.md``."""
    language: str
    text: str
    is_marked: bool
    """Whether a comment above it says what it needs: ``<!-- needs a hub -->``."""

    @property
    def lines(self):
        """The lines of a shell, those that go on put together."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page, language):
    """Return the blocks of a page in a language, in order."""
    found = _FENCE.finditer((ROOT / page).read_text())
    return [
        Block(
            page=str(page),
            language=language,
            text=block["text"],
            is_marked=(block["mark"] or "").startswith("<!-- needs "),
        )
        for block in found
        if block["language"] == language
    ]


def commands(page):
    """Return each command of ``lightning-kd`` on a page, in words."""
    lines = [line for block in blocks(page, "bash") for line in block.lines]
    return [shlex.split(line) for line in lines if line.startswith("lightning-kd ")]


def prose(page):
    """Return a page without its blocks and code."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", Path(ROOT, page).read_text(), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page):
    """Return the path and the anchor of each link of a page that stays in the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    inside = [link for link in found if not re.match(r"\w+:", link)]
    return [link.partition("#")[::2] for link in inside]


def headings(page):
    """Return the anchors that a code host gives to the headings of a page."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def toctree_entries(page):
    """Return what the toctrees of a page list, as paths from the root without their ending."""
    found = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    lines = [line for block in found for line in block.splitlines()]
    entries = [line for line in lines if line and not line.startswith(":")]
    return [normpath(f"{Path(page).parent}/{entry}") for entry in entries]

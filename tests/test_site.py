"""The site builds without a network and without a warning; its links, anchors and API pages hold."""

import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

from lightning_kd import TeacherModule, public
from tests.support.pages import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.slow]

PARTS = [
    f"lightning_kd.{path.parent.relative_to(ROOT / 'lightning_kd')}".replace("/", ".")
    for path in sorted((ROOT / "lightning_kd").rglob("__init__.py"))
    if path.parent != ROOT / "lightning_kd"
]
PUBLIC = {"lightning_kd": public.__all__} | {
    part: import_module(part).__all__ for part in PARTS if hasattr(import_module(part), "__all__")
}


class Page(HTMLParser):
    """What a page has: anchors, links, and files that a browser fetches to show it."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.shown = {"", "top"}, [], []
        self.mathematics = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.anchors |= {has[name] for name in ("id", "name") if has.get(name)}
        self.mathematics += "math" in (has.get("class") or "").split()
        if tag == "a" and has.get("href"):
            self.links.append(has["href"])
        elif tag in {"script", "img"} and has.get("src"):
            self.shown.append(has["src"])
        elif tag == "link" and has.get("rel") in {"stylesheet", "icon", "preload"}:
            self.shown.append(has["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The directory of the site, as ``make docs`` builds it."""
    built = tmp_path_factory.mktemp("site")
    (command,) = [
        line.split("-m ")[1].split()
        for line in (ROOT / "Makefile").read_text().splitlines()
        if "-m sphinx -b html" in line
    ]
    assert command[-2:] == ["docs", "build/docs"]
    command = [sys.executable, "-m", *command[:-2], str(ROOT / "docs"), str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built


@pytest.fixture(scope="module")
def pages(site):
    """The pages by their files, without what the theme keeps beside its styles."""
    found = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    return {path: Page(path.read_text()) for path in found}


def test_every_link_and_anchor_of_the_site_leads_somewhere(site, pages):
    missing = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file() or (
                there in pages and unquote(parts.fragment) not in pages[there].anchors
            ):
                missing.append((str(path.relative_to(site)), link))
    assert len(pages) > 50
    assert not missing


def test_nothing_that_a_page_shows_comes_from_a_network(site, pages):
    for path, page in pages.items():
        for shown in page.shown:
            parts = urlsplit(shown)
            assert parts.scheme in {"", "data"}, (path, shown)
            assert parts.scheme or (path.parent / unquote(parts.path)).is_file(), (path, shown)


def test_a_page_with_mathematics_brings_what_draws_it(site, pages):
    with_formulas = [page for page in pages.values() if page.mathematics]
    assert len(with_formulas) > 5
    for page in with_formulas:
        assert any("mathjax/tex-chtml.js" in shown for shown in page.shown)


@pytest.fixture(scope="module")
def entries(site):
    """Addresses of the entries of the API pages, by full names."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    kinds = [kind for kind in inventory if kind.startswith("py:")]
    return {name: item.uri for kind in kinds for name, item in inventory[kind].items()}


@pytest.mark.parametrize(
    "name", ["terms", "term_normalizations", "term_positions", "positions", "needs", "student"]
)
def test_what_a_method_of_ones_own_inherits_has_an_entry(entries, name):
    ends = tuple(f".{base.__name__}.{name}" for base in TeacherModule.__mro__)
    assert any(entry.startswith("lightning_kd.") and entry.endswith(ends) for entry in entries)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_entry(entries, package):
    for name in PUBLIC[package]:
        assert entries.get(f"{package}.{name}", "").startswith("api/"), f"{package}.{name}"

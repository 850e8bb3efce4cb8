"""Pages are in the site, links lead somewhere, and what is shown is run or says what it needs."""

import fnmatch
import re

import pytest

from tests.support.pages import PAGES, ROOT, blocks, headings, links, toctree_entries

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEST = "tests/test_readme.py"
EXPERIMENTS = "tests/comparison/test_experiments.py"
EVALUATION = "tests/test_student_evaluation.py"
# Page, language, what the line of a shell or the program begins with, and the test that runs it.
CLAIMS = [
    ("README.md", "bash", "lightning-kd ", TEST),
    ("docs/get_started.md", "bash", "lightning-kd ", TEST),
    ("docs/get_started.md", "python", "", TEST),
    ("docs/exporting.md", "bash", "lightning-kd export ", TEST),
    ("docs/preflight.md", "bash", "lightning-kd check ", TEST),
    ("docs/preflight.md", "python", "", "tests/preflight/test_report.py"),
    ("docs/resuming.md", "bash", "lightning-kd fit ", TEST),
    ("docs/resuming.md", "python", "", TEST),
    ("docs/scaling.md", "bash", "lightning-kd fit ", TEST),
    ("docs/scaling.md", "bash", "torchrun ", "tests/test_several_nodes.py"),
    ("docs/data.md", "bash", "lightning-kd validate ", TEST),
    ("docs/data.md", "python", "", TEST),
    ("docs/cache.md", "python", "", TEST),
    ("docs/on_policy.md", "python", "", TEST),
    ("docs/divergences.md", "python", "", TEST),
    ("docs/comparing.md", "bash", "lightning-kd compare --configs ", TEST),
    (
        "docs/comparing.md",
        "bash",
        "lightning-kd compare --config ",
        EXPERIMENTS,
    ),
    ("docs/results/*.md", "bash", "lightning-kd compare ", EXPERIMENTS),
    ("docs/variants.md", "bash", "lightning-kd fit ", "tests/test_variants.py"),
    ("docs/extending.md", "bash", "lightning-kd fit ", "tests/test_extending.py"),
    ("docs/extending.md", "python", "# my_lab/", "tests/test_extending.py"),
    (
        "docs/evaluation.md",
        "bash",
        "lightning-kd evaluate --student ",
        EVALUATION,
    ),
    ("docs/evaluation.md", "python", "", EVALUATION),
    ("docs/evaluation.md", "bash", ("head ", "tail "), "tests/test_gsm8k.py"),
    ("docs/evaluation.md", "bash", "lightning-kd fit ", "tests/test_gsm8k.py"),
    ("docs/evaluation.md", "bash", "lightning-kd evaluate --config ", "tests/test_gsm8k.py"),
    ("docs/from_trl.md", "python", "", "tests/test_from_trl.py"),
    ("docs/troubleshooting.md", "bash", "lightning-kd fit ", "tests/test_troubleshooting.py"),
    ("docs/methods/*.md", "bash", "lightning-kd ", "tests/test_method_pages.py"),
    ("docs/tutorials/*.md", "python", "", "tests/test_tutorials.py"),
    ("docs/served.md", "bash", "lightning-kd ", "tests/serving/test_command.py"),
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def shown():
    """Each line of a shell and each program that no comment excuses."""
    for page in NAMES:
        for block in blocks(page, "bash"):
            if not block.is_marked:
                yield from ((page, "bash", line) for line in block.lines if line)
        for block in blocks(page, "python"):
            if not block.is_marked:
                yield page, "python", block.text


def is_claimed(claim, page, language, text):
    pattern, of, start, _ = claim
    return fnmatch.fnmatch(page, pattern) and of == language and text.startswith(start)


def test_what_a_page_shows_is_run_by_a_test_or_says_what_it_needs():
    """Put ``<!-- needs a GPU -->`` above a block that cannot be, or make it ```text."""
    unclaimed = []
    for page, language, text in shown():
        if language == "bash" and text.startswith("make "):
            assert text.removeprefix("make ") in TARGETS, (page, text)
        elif not any(is_claimed(claim, page, language, text) for claim in CLAIMS):
            unclaimed.append((page, text))
    assert not unclaimed


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim[0]}-{claim[3]}")
def test_a_claim_is_of_something_and_its_test_reads_the_page(claim):
    """The test of an experiment reads its file, which all of these name."""
    claimed = [each for each in shown() if is_claimed(claim, *each)]
    source = (ROOT / claim[3]).read_text()
    assert claimed
    if claim[3] == EXPERIMENTS:
        files = [re.search(r"configs/experiments/(\w+)\.yaml", text) for *_, text in claimed]
        assert all(f'"{file[1]}"' in source for file in files)
    else:
        assert claim[0].removeprefix("docs/").partition(".")[0].removesuffix("/*") in source


def test_every_page_is_in_a_toctree():
    listed = {"docs/index.md"}
    for page in NAMES:
        for entry in toctree_entries(page):
            found = fnmatch.filter(NAMES, f"{entry}.md")
            assert found, f"{page} lists {entry}, which is not there"
            listed |= set(found)
    assert {name for name in NAMES if name.startswith("docs/")} == listed


@pytest.mark.parametrize("page", NAMES)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    for path, anchor in links(page):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        assert target.is_relative_to(ROOT), path
        if anchor:
            assert anchor in headings(target), f"{path}#{anchor}"


def rows(page, header):
    """The rows of the table whose first line begins so, as lists of cells."""
    text = (ROOT / page).read_text().partition(f"\n{header}")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_table_has_the_numbers_of_the_demonstration(page):
    """Mean and deviation over the seeds, to whole percents."""
    measured = {cells[0]: cells[1] for cells in rows("docs/demo.md", "| | exact match |")}
    shown = {cells[0].split(",")[0]: cells[-1] for cells in rows(page, "| student |")}
    assert len(shown) == 5
    for student, said in shown.items():
        assert re.fullmatch(r"\d+ ± \d+ %", said)
        for short, long in zip(numbers(said), numbers(measured[student]), strict=True):
            assert abs(short - long) <= 0.5


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]

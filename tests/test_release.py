"""What a release needs beside the code says what is so: targets, versions, links, names."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import lightning_kd
from lightning_kd.divergences import available_divergences
from lightning_kd.modules import DistillationModule
from tests.support.lower_bounds import lower_bounds

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]


def calls():
    """The commands of the workflow, once for each row of a job's matrix."""
    for job in WORKFLOW["jobs"].values():
        for row in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
            for step in job["steps"]:
                text = step.get("run", "")
                yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, row=row: row[m[1]], text)


def test_the_workflow_calls_targets_and_scripts_that_there_are():
    found = [call for call in calls() if call]
    targets = {target for call in found for target in re.findall(r"make ([\w-]+)", call)}
    assert targets <= TARGETS
    assert targets >= {"check", "test-quick", "test-lowest", "docs", "dist"}
    scripts = [call for call in found if not call.startswith("make ")]
    assert scripts == [".ci/run"]
    assert "make test " in (ROOT / ".ci" / "run").read_text()


def test_the_workflow_has_a_python_that_the_package_takes():
    least = re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)[1]
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    used = {int(number) for number in re.findall(r'python(?:-version)?: "3\.(\d+)"', text)}
    assert min(used) == int(least)


def test_no_job_may_write_to_the_repository():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_targets_and_files_that_there_are(page):
    text = (ROOT / page).read_text()
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)`", text)) <= TARGETS
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:configs|tests|docs|lightning_kd)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_version_has_one_home():
    project = tomllib.loads(PYPROJECT)
    assert project["project"]["dynamic"] == ["version"]
    where = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert where == "lightning_kd.version.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_kd.__version__
    assert lightning_kd.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_one():
    """Keys of the format 1.2.0 and what they must hold."""
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0"
    assert set(said) >= {"message", "title", "authors"}
    known = {"abstract", "authors", "cff-version", "keywords", "license", "message", "title"}
    assert set(said) <= known | {"type", "version"}
    assert all(isinstance(said[name], str) for name in set(said) - {"authors", "keywords"})
    assert said["authors"] == [{"name": author["name"]} for author in authors()]
    assert said["license"] == tomllib.loads(PYPROJECT)["project"]["license"]
    assert said["type"] == "software"


def authors():
    return tomllib.loads(PYPROJECT)["project"]["authors"]


def test_the_changelog_has_every_method_divergence_and_command():
    from lightning_kd.cli.commands import COMMANDS

    text = (ROOT / "CHANGELOG.md").read_text()
    public = [getattr(lightning_kd, name) for name in lightning_kd.__all__]
    abstract = {"DistillationModule", "DivergenceModule", "PolicyGradientModule", "TeacherModule"}
    methods = {
        each.__name__
        for each in public
        if isinstance(each, type) and issubclass(each, DistillationModule)
    }
    for name in [*(methods - abstract), *available_divergences(), *COMMANDS]:
        assert f"`{name}`" in text, name


def test_lower_bounds_are_those_of_what_is_imported():
    found = dict(line.split("==") for line in lower_bounds(PYPROJECT))
    needed = tomllib.loads(PYPROJECT)["project"]["dependencies"]
    assert len(found) > len(needed)
    for requirement in needed:
        name = re.match(r"[\w-]+", requirement)[0]
        assert f">={found[name]}" in requirement


def test_a_requirement_without_a_lower_bound_is_refused():
    text = PYPROJECT.replace('"rich>=14"', '"rich"')
    with pytest.raises(ValueError, match=r"'rich' of pyproject\.toml has no lower bound"):
        list(lower_bounds(text))

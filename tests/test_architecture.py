"""Imports run one way, files stay short, and the README tells the truth."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"functions", "imports", "option_checks", "devices", "version"},
    {
        "batch",
        "collectives",
        "tokenization",
        "token_bytes",
        "seeding",
        "resuming",
        "processes",
        "integrity",
    },
    {"rebuilding", "own_batches", "alignment"},
    {"scoring", "normalization", "divergences", "policy", "rewards", "schedules"},
    {"checkpoints", "filesystem", "loops", "teacher_rows", "wire"},
    {"strategies", "named_checkpoints"},
    {"fused"},
    {"models", "evaluation"},
    {"generation", "cache"},
    {"teachers"},
    {"data", "modules", "serving"},
    {"callbacks"},
    {"preflight", "student_evaluation"},
    {"public"},
    {"run_directories", "cache_writing", "comparison"},
    {"cli", "__init__", "__main__"},
]
FILES = sorted({*(ROOT / "lightning_kd").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")})
FILES = [path for path in FILES if "lightning_kd/callbacks" not in str(path)]


def part(path):
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[0] if relative[0] == "callbacks" else relative[1]


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_kd"):
            yield [*node.module.split("."), "__init__"][1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lightning_kd"):
                    yield [*alias.name.split("."), "__init__"][1]


def layer(name):
    (found,) = [number for number, names in enumerate(LAYERS) if name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = part(path)
    for other in imported_parts(path):
        allowed = other == own or layer(other) < layer(own)
        assert allowed or own == "__main__", f"{path.name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_short(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_test_doubles_or_searches_live_objects(path):
    imported, named = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            named.add(node.attr)
    assert not imported & {"unittest", "mock"}
    assert not named & {"get_objects", "get_referrers", "get_referents"}


def test_no_code_of_a_model_repository_is_ever_run():
    for path in FILES:
        assert "trust_remote_code=True" not in path.read_text()


def test_every_config_is_shown_in_the_docs_and_run_by_a_test():
    """Those of a method are in the README's table too."""
    readme = (ROOT / "README.md").read_text()
    shown = (ROOT / "docs" / "configs.md").read_text()
    tests = "".join(
        (ROOT / "tests" / name).read_text() for name in ("test_cli.py", "support/command_line.py")
    )
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())
        name = str(path.relative_to(ROOT))
        assert f"{{literalinclude}} ../{name}\n" in shown
        if path.parent.name != "experiments":
            assert path.stem in tests
        if path.parent.name == "configs":
            assert name in readme


def test_every_experiment_is_named_in_its_document_and_run_by_a_test():
    """Also what it takes: a smaller size, and metrics that say which way is better."""
    document = (ROOT / "docs" / "comparing.md").read_text()
    tests = "".join(
        (ROOT / "tests" / name).read_text()
        for name in ("comparison/test_experiments.py", "test_demo.py")
    )
    for path in (ROOT / "configs" / "experiments").glob("*.yaml"):
        assert str(path.relative_to(ROOT)) in document
        assert f'"{path.stem}"' in tests
        said = yaml.safe_load(path.read_text())
        assert said["questions"]
        assert said["quick"]
        assert said["metrics"]


def test_the_readme_names_real_targets_configs_and_files():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^make ([a-z]+)", readme, flags=re.M)) <= targets
    for name in re.findall(r"configs/[\w/]+\.yaml", readme):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", readme):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_data_class_is_frozen(path):
    """What is passed around and shared stays what it was made as."""
    classes = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    decorators = [ast.unparse(line) for node in classes for line in node.decorator_list]
    assert {text for text in decorators if "dataclass" in text} <= {"dataclass(frozen=True)"}

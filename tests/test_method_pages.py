"""docs/methods: every method has a page; results are those of the files, and names are logged."""

import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import lightning_kd
from lightning_kd import DistillationModule, TeacherModule, arithmetic_tokenizer
from lightning_kd.data import train_tokenizer
from tests.benchmarks import method_results
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, QUIET, SMALL, scalars
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = CONFIGS.parent
FOLDER = ROOT / "docs" / "methods"
PAGES = {path.stem: path.read_text() for path in FOLDER.glob("*.md") if path.stem != "index"}
SECTIONS = [
    "Formula",
    "Config",
    "What the paper reports",
    "What came here",
    "In TensorBoard",
    "Common mistakes",
    "Related",
]
every_page = pytest.mark.parametrize("page", PAGES)


def section(page, name):
    return re.split(r"^## .+\n", PAGES[page], flags=re.M)[1 + SECTIONS.index(name)]


def links(text):
    return re.findall(r"\]\((?!http)([^)]+)\)", text)


def anchor(heading):
    """That of the code host."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_method_is_on_the_page_of_its_code():
    methods = {
        found
        for found in (getattr(lightning_kd, name) for name in lightning_kd.__all__)
        if inspect.isclass(found) and issubclass(found, DistillationModule)
    } - {DistillationModule, TeacherModule}
    assert len(methods) >= 10
    for method in methods:
        home = Path(inspect.getfile(method)).stem
        assert f"../../lightning_kd/modules/{home}.py" in links(PAGES[home])
        assert PAGES[home].startswith(f"# {method.__name__}\n")


def test_every_config_is_shown_on_the_page_of_its_name():
    configs = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert configs == {*PAGES} - {"uld"}  # which has the config of chunks
    for name in configs:
        path = f"../../configs/{name}.yaml"
        assert path in links(PAGES[name])
        assert f"```{{literalinclude}} {path}\n:language: yaml\n```" in PAGES[name]


def test_the_list_has_every_page_once():
    index = (FOLDER / "index.md").read_text()
    listed = links(index.split("**Which one?**")[0])
    assert sorted(listed) == sorted(f"{page}.md" for page in PAGES)
    (tree,) = re.findall(r"```{toctree}\n:hidden:\n\n(.*?)\n```", index, flags=re.S)
    assert [f"{page}.md" for page in tree.splitlines()] == listed


@every_page
def test_pages_have_one_shape(page):
    assert re.findall(r"^## (.+)$", PAGES[page], flags=re.M) == SECTIONS
    assert "$$" in section(page, "Formula")
    assert page == "sft" or "https://" in section(page, "What the paper reports")
    assert not [line for line in PAGES[page].splitlines() if len(line) > 120 and line[0] != "|"]


@pytest.mark.parametrize("page", [*PAGES, "index"])
def test_links_lead_somewhere(page):
    for link in links((FOLDER / f"{page}.md").read_text()):
        name, _, place = link.partition("#")
        target = FOLDER / name if name else FOLDER / f"{page}.md"
        assert target.is_file(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M)
            assert place in map(anchor, headings), link


def test_every_run_of_an_experiment_is_on_a_page():
    shown = {
        (rows.experiment, run)
        for of_page in method_results.SHOWN.values()
        for rows in of_page
        for run in (*rows.compared_with, *rows.own)
    }
    for experiment in {experiment for experiment, _ in shown}:
        made = {run["run"] for run in method_results.results(experiment)["results"]}
        assert made == {run for of, run in shown if of == experiment}


@pytest.mark.slow
@pytest.mark.parametrize("page", method_results.SHOWN)
def test_results_are_those_of_the_files(page):
    """The block as it would be written, and each of its numbers from the file by NumPy."""
    assert method_results.between_marks(page) == method_results.block(page)
    tables = re.findall(r"^\| run \|.*?\n\n", method_results.between_marks(page), re.M | re.S)
    assert len(tables) == len(method_results.SHOWN[page])
    for rows, table in zip(method_results.SHOWN[page], tables, strict=True):
        measured = method_results.results(rows.experiment)["results"]
        cells = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
        runs = (*rows.compared_with, *rows.own)
        for run, (_, *numbers) in zip(runs, cells, strict=True):
            for name, number in zip(rows.metrics, numbers, strict=True):
                seeds = [
                    result["metrics"][f"test/{name}"]
                    for result in measured
                    if result["run"] == run and result["budget"] in {"", rows.budget}
                ]
                assert len(seeds) == 3
                mean, deviation = (float(part) for part in number.removesuffix(" %").split(" ± "))
                factor = 100 if number.endswith("%") else 1
                assert mean == pytest.approx(factor * np.mean(seeds), rel=5e-3)
                assert deviation == pytest.approx(
                    factor * np.std(seeds, ddof=1), rel=0.06, abs=0.05
                )


@pytest.mark.slow
def test_claims_of_a_method_are_all_on_its_page():
    for page, of_page in method_results.SHOWN.items():
        text = method_results.between_marks(page)
        for rows in of_page:
            said = yaml.safe_load((CONFIGS / "experiments" / f"{rows.experiment}.yaml").read_text())
            for claim in said["claims"]:
                if claim["run"] in rows.own:
                    one, other = (
                        method_results.label(rows.experiment, claim[side])
                        for side in ("run", "beats")
                    )
                    assert f"| {one} beats {other} in " in text


@pytest.fixture
def workplace(tmp_path):
    """A folder with the configs, and with the models and texts that they name."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    for seed, name in enumerate(("teacher", "student")):
        tiny_llama(seed, vocab_size=14).save_pretrained(tmp_path / "runs" / name)
        arithmetic_tokenizer().save_pretrained(tmp_path / "runs" / name)
    for seed, name in enumerate(("teacher_llama", "teacher_gpt2")):
        sizes = {"vocab_size": 280, "max_position_embeddings": 128}
        tiny_llama(seed, **sizes).save_pretrained(tmp_path / "runs" / name)
    tokenizer = train_tokenizer(["123+456=", "12", "45", "0="] * 3, 270)
    tiny_llama(1, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "runs" / "other_teacher")
    tokenizer.save_pretrained(tmp_path / "runs" / "other_teacher")
    for name in ("corpus.txt", "dev.txt"):
        (tmp_path / name).write_text("to be or not to be that is the question " * 400)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12+34="}\n{"prompt": "5+6="}\n' * 4)
    return tmp_path


def small(page, command):
    """What makes a command of a page quick, behind it."""
    if command[0] == "tokenizer":
        return ["--vocab_size", 280]
    if command[0] == "predict":
        return [*QUIET, "--model.generation.max_new_tokens", 4, "--data.batch_size", 4]
    config = yaml.safe_load((CONFIGS / Path(command[2]).name).read_text())
    on_policy = config.get("on_policy", {})
    window = on_policy.get("steps_per_window", 1) * on_policy.get("passes", 1)
    more = [*QUIET, "--data.batch_size", 8, "--trainer.max_steps", max(8, window)]
    more += ["--trainer.log_every_n_steps", 1, "--trainer.num_sanity_val_steps", 0]
    more += ["--trainer.precision", "32-true"]
    if page != "sequence_kd":  # which has no validation
        more += ["--trainer.val_check_interval", 4, "--trainer.limit_val_batches", 1]
        more += ["--trainer.check_val_every_n_epoch", "null"]
    if config["data"]["class_path"] == "ArithmeticData":
        more += ["--data.train_size", 200, "--data.validation_size", 8]
    if "config" in config["model"]["init_args"]["student"]:
        more += ["--model.student.config", SMALL]
    return more + (["--export.overwrite", "true"] if "--export.dirpath" in command else [])


@pytest.mark.command_line
@every_page
def test_the_commands_run_and_log_the_names_to_watch(page, cli, workplace):
    lines = "".join(re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.S)).splitlines()
    assert lines
    for line in lines:
        program, *command = shlex.split(line)
        assert program == "lightning-kd"
        cli(*command, *small(page, command))
    names = re.findall(r"`((?:train|val|rollout)/\w+)`", section(page, "In TensorBoard"))
    assert len(names) >= 4
    not_logged = {*names} - {*scalars("runs").Tags()["scalars"]}
    assert not_logged == set()

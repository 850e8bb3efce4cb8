"""The recipes of docs/recipes.md: their files, commands and memory.

``python -m tests.support.recipes`` writes the tables of memory into the page.
"""

import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace

from lightning_kd.cli.parsing import ParsingCLI
from lightning_kd.cli.trainer_command import trainer_command
from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.models import ModelSpec, StudentSpec
from lightning_kd.models.skeleton import skeleton
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.preflight.facts import MemoryFacts, RowFacts
from lightning_kd.preflight.memory import SizedModel, describe_memory
from lightning_kd.preflight.setting import Setting, describe_rollouts
from lightning_kd.preflight.sizes import in_bytes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
_LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
_GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "head_dim": 256,
    "tie_word_embeddings": True,
}


def _sizes(
    family: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **own: Any
) -> Any:
    return (
        family
        | own
        | {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
    )


SIZES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _sizes(_QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _sizes(_QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _sizes(_QWEN3, 4096, 12288, 36, 32, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B-Instruct": _sizes(
        _LLAMA, 2048, 8192, 16, 32, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _sizes(
        _LLAMA, 4096, 14336, 32, 32, tie_word_embeddings=False
    ),
    "google/gemma-2-2b-it": _sizes(_GEMMA2, 2304, 9216, 26, 8, num_key_value_heads=4),
    "google/gemma-2-9b-it": _sizes(_GEMMA2, 3584, 14336, 42, 16, num_key_value_heads=8),
    # What the first command of MiniLLM leaves.
    "runs/start": _sizes(_QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
}
"""Configurations of the hub's models, as far as sizes depend on them."""


@dataclass(frozen=True)
class Recipe:
    """A file and the commands that read it.

    Attributes:
        name: Of the file, without its ending.
        text: The file.
        commands: Words behind ``lightning-kd``.
    """

    name: str
    text: str
    commands: list[list[str]]

    @property
    def sized(self) -> dict[str, list[str]]:
        """The commands of its own method, with all models in the process, by the GPUs they take."""
        return {
            "8 GPUs" if "--trainer.devices" in words else "1 GPU": words
            for words in self.commands
            if words[0] == "fit" and words.count("--config") == 1 and "--model" not in words
        }


def recipes(page: str) -> list[Recipe]:
    """Return the recipes of a page, one for each section with a file."""
    found = []
    for section in page.split("\n## ")[1:]:
        (text,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.S)
        name = re.match(r"# (\w+)\.yaml\n", text)
        assert name is not None, text
        lines = "\n".join(re.findall(r"```bash\n(.*?)```", section, flags=re.S)).splitlines()
        found.append(Recipe(name[1], text, [shlex.split(line)[1:] for line in lines if line]))
    return found


def memory(config: Namespace, built: Mapping[str, Any]) -> MemoryFacts:
    """Estimate the memory of a process on a GPU that need not be here.

    Args:
        config: What the command line came to.
        built: Its model and its ``on_policy``.
    """
    module: DistillationModule = built["model"]
    data, trainer, tokenizer = (
        config["data"]["init_args"],
        config["trainer"],
        arithmetic_tokenizer(),
    )
    specs = [("student", module.student_spec)]
    if isinstance(module, TeacherModule):
        specs += [
            (role, spec)
            for role, teacher in module.teachers.items()
            for spec in teacher.model_specs
        ]
    sized = [
        SizedModel(role, spec, skeleton(_of_size(spec), tokenizer, role)) for role, spec in specs
    ]
    setting = Setting(
        torch.device("cuda", 0),
        trainer["precision"],
        shards=int(trainer["devices"]) if trainer["strategy"] == "fsdp2" else 1,
    )
    if (callback := built["on_policy"]) is not None:
        window = data["batch_size"] * trainer["accumulate_grad_batches"]
        setting = replace(
            setting,
            rollouts=describe_rollouts(callback, window * callback.steps_per_window),
            engine=callback.engine,
            beams=callback.generation.num_beams,
        )
    length = data["max_length"]
    rows = RowFacts(1, 1, 0, 0, length, length, True, 1, 1, 0, (length,), length, ())
    return describe_memory(
        module, sized[0], sized[1:], rows, setting, batch_size=data["batch_size"]
    )


def _of_size(spec: ModelSpec) -> ModelSpec:
    config = SIZES[str(spec.name_or_path)]
    if isinstance(spec, StudentSpec):
        return StudentSpec(config=config, dtype=spec.dtype, lora=spec.lora)
    return ModelSpec(config=config, dtype=spec.dtype)


def parsed(parser: ParsingCLI, words: list[str]) -> tuple[Namespace, Mapping[str, Any]]:
    """Return what a command line comes to, and what it builds without weights and rows."""
    parser.read_arguments(words)
    parser.subcommand = words[0]
    return parser.config[words[0]], parser.build()


def row(name: str, facts: MemoryFacts) -> str:
    """Return a line of a table."""
    groups = dict.fromkeys(COLUMNS, 0)
    for part in facts.parts:
        (column,) = [c for c, starts in COLUMNS.items() if part.what.startswith(starts)]
        groups[column] += part.bytes
    assert not facts.unknown, facts.unknown
    cells = [in_bytes(size) if size else "" for size in groups.values()]
    return f"| {' | '.join([name, *cells, in_bytes(facts.needed('cuda:0'))])} |"


COLUMNS = {
    "student": ("weights of the student", "gradients"),
    "optimizer": ("states of the optimizer",),
    "teacher": ("weights of the teacher",),
    "logits": ("chunk of logits",),
    "cache": ("key-value cache",),
}
"""Columns of a table, and how the parts in them begin."""


def table(recipe: Recipe, parser: ParsingCLI) -> str:
    """Return the memory of a recipe's commands as a table."""
    head = ["", "student and gradients", *list(COLUMNS)[1:], "at least"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [row(name, memory(*parsed(parser, words))) for name, words in recipe.sized.items()]
    return "\n".join(lines)


def with_tables(page: str, parser: ParsingCLI) -> str:
    """Return a page with the tables of its recipes written anew."""
    for recipe in recipes(page):
        begin, end = f"<!-- memory: {recipe.name} -->\n", "<!-- end of memory -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table(recipe, parser)}\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    """Write the page; its files are read in a directory that is left empty."""
    sys.argv = sys.argv[:1]
    page = PAGE.read_text()
    with TemporaryDirectory() as scratch, chdir(scratch):
        for recipe in recipes(page):
            Path(f"{recipe.name}.yaml").write_text(recipe.text)
        PAGE.write_text(with_tables(page, trainer_command(ParsingCLI)))


if __name__ == "__main__":
    main()

"""The model card of an exported student."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lightning_kd.callbacks.export.options import is_repo_name
from lightning_kd.callbacks.export.training_record import TrainingRecord
from lightning_kd.resuming import Plain

_FILE_ENDING = re.compile(r"\.\w{2,8}$")


@dataclass(frozen=True)
class CardContext:
    """What a card says beside what the training has recorded.

    Attributes:
        record: Of the training.
        name: Name under which the student is loaded: that on the hub, or its directory.
        weights: Which weights these are, as text.
    """

    record: TrainingRecord
    name: str
    weights: str


def model_card(context: CardContext, changed: Mapping[str, Any]) -> ModelCard:
    """Return the card: front matter of the hub, how to load the student, and how it was trained.

    Args:
        context: What it says.
        changed: Special tokens of the generation config that are not those of the checkpoint that
            the student came from, with their former values.
    """
    parts = [_front_matter(context.record), *_body(context, changed)]
    return ModelCard("\n\n".join(parts) + "\n")


def _front_matter(record: TrainingRecord) -> str:
    tags = ["lightning-kd", _as_tag(record.method)]
    if record.teachers:
        tags.insert(1, "knowledge-distillation")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=record.base_model or None,
        datasets=_datasets(record) or None,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _body(context: CardContext, changed: Mapping[str, Any]) -> Iterator[str]:
    record = context.record
    name = " ".join(context.name.rpartition("/")[2].split())
    loaded = json.dumps(context.name, ensure_ascii=False)  # which Python reads as well
    yield f"# {name}"
    taught = f" by {record.method} from {_listed(record.teachers)}" if record.teachers else ""
    verb = "distilled" if record.teachers else f"trained by {record.method}"
    yield f"A causal language model, {verb}{taught} with lightning_kd."
    yield _block(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({loaded})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({loaded})",
    )
    yield "## Training"
    yield _table(("", ""), _facts(context))
    options = {"model": record.model, "data": record.data} | record.callbacks
    options |= {"optimizer": record.optimizer, "trainer": record.trainer}
    given = {name: values for name, values in options.items() if values}
    told = yaml.safe_dump(given, sort_keys=False, allow_unicode=True).strip()
    yield f"All options:\n\n{_block('yaml', told)}"
    if record.metrics:
        yield f"## Validation after {record.validated} optimizer steps"
        yield _table(("metric", "value"), {n: f"{v:.6g}" for n, v in record.metrics.items()})
    if record.sessions:
        yield "## Command"
        yield _block("bash", "\n".join(_session_lines(record)))
    if changed:
        yield "## Generation config"
        listed = "; ".join(
            f"`{name}` (before: {'not set' if old is None else old})"
            for name, old in changed.items()
        )
        yield (
            "It is that of the model that training started from, except for the special tokens that "
            f"the student was trained on: {listed}."
        )


def _facts(context: CardContext) -> dict[str, str]:
    record = context.record
    data = {name: value for name, value in record.data.items() if name in ("train", "subset")}
    facts = {
        "method": record.method,
        "student started from": record.student,
        "teacher": _listed(record.teachers),
        "divergence": ", ".join(_divergence(options) for options in record.divergences.values()),
        "data": ": ".join([str(record.data.get("class", "")), *map(str, data.values())]),
        "weights": context.weights,
        "lightning_kd": ", ".join(dict.fromkeys(s["version"] for s in record.sessions)),
    }
    return {name: value for name, value in facts.items() if value}


def _divergence(options: Plain) -> str:
    assert isinstance(options, dict)  # it is written by described()
    given = ", ".join(f"{name}={value}" for name, value in options.items() if name != "class")
    return f"{options['class']}({given})" if given else str(options["class"])


def _session_lines(record: TrainingRecord) -> Iterator[str]:
    for session in record.sessions:
        commit = f", commit {session['commit']}" if session.get("commit") else ""
        yield f"# lightning_kd {session['version']}{commit}"
        yield session["command"]


def _datasets(record: TrainingRecord) -> list[str]:
    """Return the names on the hub of the data sets that were trained on."""
    train = record.data.get("train")
    on_hub = isinstance(train, str) and is_repo_name(train) and not _FILE_ENDING.search(train)
    return [str(train)] if on_hub and not Path(str(train)).exists() else []


def _as_tag(method: str) -> str:
    """Return the name of a class as tags of the hub are written.

    Example:
        >>> [_as_tag(name) for name in ("GKD", "SupervisedKD", "OnPolicyDistillation")]
        ['gkd', 'supervised-kd', 'on-policy-distillation']
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", method).lower()


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _block(language: str, text: str) -> str:
    """Return text in a fence that is longer than any in the text.

    Example:
        >>> print(_block("bash", "echo ```"))
        ````bash
        echo ```
        ````
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    cells = ((name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows.items())
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in cells)])

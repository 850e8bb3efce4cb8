"""Commands over a user's own files: short runs, one's own classes, text and templates."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, QUIET, SMALL, fit, scalars
from tests.support.templates import family_tokenizer
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS

OWN = """
from torch import Tensor
from lightning_kd import ArithmeticData, Divergence, LocalTeacher, SupervisedKD

class {prefix}KL(Divergence):
    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return 0 * (teacher_log_probs - student_log_probs).sum(-1)

class {prefix}Data(ArithmeticData):
    pass

class {prefix}KD(SupervisedKD):
    pass

class {prefix}Teacher(LocalTeacher):
    pass
"""


def test_a_run_that_ends_before_its_first_validation_runs(cli, caplog):
    with caplog.at_level(logging.WARNING):
        cli(
            *("fit", "--config", CONFIGS / "sft.yaml", "--trainer.max_steps", 2, *QUIET),
            *("--model.student.config", SMALL, "--data.batch_size", 2),
        )
    assert "the run has 2: nothing is validated" in caplog.text
    assert Path("runs/version_0/student/config.json").exists()


def test_the_classes_of_a_file_beside_the_config_are_used(cli, teacher):
    Path("lab").mkdir()
    Path("lab/classes_beside.py").write_text(OWN.format(prefix="My"))
    options = {
        "student": {"config": yaml.safe_load(SMALL)},
        "teacher": {
            "class_path": "classes_beside.MyTeacher",
            "init_args": {"name_or_path": str(teacher)},
        },
        "divergence": "classes_beside.MyKL",
        "alpha": 0.0,
    }
    model = {"class_path": "classes_beside.MyKD", "init_args": options}
    data = {"class_path": "classes_beside.MyData", "init_args": {"batch_size": 2}}
    Path("lab/own.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    cli(
        *("fit", "--config", "lab/own.yaml", *QUIET, "--trainer.max_steps", 2),
        *("--trainer.limit_val_batches", 0, "--trainer.log_every_n_steps", 1),
    )
    # 0 times anything: it is this divergence that was used.
    assert all(event.value == 0 for event in scalars("runs").Scalars("train/loss"))
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert saved["model"]["class_path"] == "classes_beside.MyKD"
    assert saved["data"]["class_path"] == "classes_beside.MyData"


def test_a_class_in_the_working_directory_is_found_and_a_slip_in_it_named(cli, fails, teacher):
    Path("classes_here.py").write_text(OWN.format(prefix="Our"))
    given = fit("supervised_kd", "--model.teacher.name_or_path", teacher)
    cli(*given, "--model.divergence", "classes_here.OurKL")
    said = fails(*given, "--model.divergence", "classes_here.OurKLL")
    assert "classes_here has no OurKLL; did you mean OurKL?" in said
    said = fails(*given, "--model.divergence", "classes_nowhere.OurKL")
    assert (
        "there is no module classes_nowhere; a package of your own is found beside a file" in said
    )


@pytest.mark.parametrize("files", ["corpus.txt", "corp*.txt", '["corpus.txt"]'])
def test_a_tokenizer_is_trained_on_one_file_or_several(cli, files):
    Path("corpus.txt").write_text("to be or not to be that is the question " * 20)
    cli("tokenizer", "--files", files, "--vocab_size", 280, "--output", "tokenizer")
    assert len(AutoTokenizer.from_pretrained("tokenizer")) == 280


def test_a_tokenizer_is_trained_on_columns(cli):
    Path("rows.jsonl").write_text(json.dumps({"question": "ab " * 50, "answer": "cd " * 50}))
    for columns, learned in (("question", {"ab"}), ('["question", "answer"]', {"ab", "cd"})):
        given = ["--columns", columns, "--vocab_size", 264, "--output", "tokenizer"]
        cli("tokenizer", "--files", "rows.jsonl", *given)
        known = AutoTokenizer.from_pretrained("tokenizer").get_vocab()
        assert {word for word in ("ab", "cd") if word in known} == learned


def test_gsm8k_generates_whole_answers(cli, capsys):
    with pytest.raises(SystemExit):
        cli(
            *("fit", "--config", CONFIGS / "supervised_kd.yaml"),
            *("--config", CONFIGS / "overlays" / "gsm8k.yaml", "--print_config"),
        )
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    (samples,) = [
        c["init_args"] for c in callbacks if c["class_path"].endswith("CompletionSamples")
    ]
    assert samples["max_new_tokens"] == 256


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{a}: {b}", "{a}: {b}"),
        ('["{a}: {b}", "{a}"]', ["{a}: {b}", "{a}"]),
        ("[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]"),
    ],
)
def test_templates_of_the_command_line(cli, capsys, given, expected):
    with pytest.raises(SystemExit):
        cli(
            *("fit", "--config", CONFIGS / "sft.yaml", "--data", "PromptCompletionData"),
            *("--data.tokenizer", "x", "--data.prompt_template", given, "--print_config"),
        )
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["prompt_template"] == expected


def test_prompts_alone_need_somebody_to_complete_them(fails):
    family_tokenizer("chatml").save_pretrained("tokenizer")
    Path("prompts.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}]}))
    data = ["--data", "ChatData", "--data.tokenizer", "tokenizer", "--data.train", "prompts.jsonl"]
    assert "set data.train_on: none" in fails(*fit("sft", *data))
    said = fails(*fit("sft", *data, "--data.train_on", "none"))
    assert "the training rows are prompts alone: give on_policy" in said


@pytest.mark.parametrize(
    ("train_on", "options"),
    [
        ("all", ["--data.chat_template_kwargs", "{enable_thinking: false}"]),
        ("none", ["--on_policy.lmbda", 1, "--on_policy.generation.max_new_tokens", 2]),
    ],
)
def test_chats_are_trained_on_and_answered(cli, train_on, options):
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    tokenizer.save_pretrained("tokenizer")
    ask, tell = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    Path("chats.jsonl").write_text(json.dumps({"messages": [ask, tell, ask, tell]}))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": [ask]}))
    train = "prompts.jsonl" if train_on == "none" else "chats.jsonl"
    model = ["--model", "SFT", "--model.student.config", SMALL]
    if train_on == "none":
        tiny_llama(1, vocab_size=len(tokenizer)).save_pretrained("teacher")
        tokenizer.save_pretrained("teacher")
        model[1:2] = ["GKD", "--model.teacher.name_or_path", "teacher"]
    cli(
        *("fit", *QUIET, *model, "--trainer.max_steps", 2),
        *("--data", "ChatData", "--data.tokenizer", "tokenizer", "--data.batch_size", 1),
        *(
            "--data.train",
            train,
            "--data.train_on",
            train_on,
            *options,
            "--export.dirpath",
            "student",
        ),
    )
    cli(
        *("predict", *QUIET, "--model", "SFT", "--model.student.name_or_path", "student"),
        *("--data", "ChatData", "--data.tokenizer", "tokenizer"),
        *("--data.predict", "prompts.jsonl", "--predictions.path", "written.jsonl"),
        *("--model.generation.max_new_tokens", 2),
    )
    (row,) = map(json.loads, Path("written.jsonl").read_text().splitlines())
    assert row["prompt"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"

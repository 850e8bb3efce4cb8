"""A student on disk is evaluated without its run: in Python, and by ``lightning-kd evaluate``."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from lightning_kd import ArithmeticData, PromptCompletionData, evaluate
from lightning_kd.callbacks import CompletionSamples
from lightning_kd.cli.arguments import with_student_data
from lightning_kd.cli.habits import OF_EVALUATE
from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.evaluation import ExactMatch, RougeL
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.toys import letter_tokenizer, tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (
    (ROOT / "docs" / "evaluation.md")
    .read_text()
    .split("## A student on disk\n")[1]
    .split("\n## ")[0]
)
ROWS = [
    {"prompt": "abc"[: 1 + number % 3], "completion": ["de"[: 1 + number % 2], "k b b b"]}
    for number in range(7)
]
GSM8K = ["--completions.metrics=[GSM8KAccuracy]", "--accelerator=cpu"]
TEXTS = [{"text": "abcabcdefg"}, {"text": "hgfedcbabc"}]


@pytest.fixture
def on_disk(tmp_path):
    """A student, its teacher and rows, where the page says that they are."""
    for seed, name in enumerate(("student", "teacher")):
        tiny_llama(seed).save_pretrained(f"runs/{name}")
        letter_tokenizer().save_pretrained(f"runs/{name}")
    for name, rows in (("test", ROWS), ("stories", TEXTS)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def by_transformers():
    """Greedy completions, and nats of each token of the data's own, by a loop over the rows."""
    model = AutoModelForCausalLM.from_pretrained("runs/student").eval()
    tokenizer, texts, nats, tokens = letter_tokenizer(), [], 0.0, 0
    for row in ROWS:
        prompt = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
        )[0, prompt.shape[1] :]
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
        answer = tokenizer(row["completion"][0])["input_ids"] + [tokenizer.eos_token_id]
        whole = torch.cat([prompt, torch.tensor([answer])], -1)
        with torch.no_grad():
            log_probs = model(whole).logits[0].log_softmax(-1)
        for place, token in enumerate(answer, prompt.shape[1]):
            nats, tokens = nats - log_probs[place - 1, token].item(), tokens + 1
    return texts, nats / tokens


def test_the_numbers_are_those_of_a_loop_over_transformers(on_disk, capsys):
    texts, nats = by_transformers()
    data = PromptCompletionData(test=ROWS, tokenizer="runs/student", batch_size=3)
    measured = CompletionSamples(5, metrics=[ExactMatch(), RougeL()])
    found = evaluate("runs/student", data, measured, accelerator="cpu", output="results.json")
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score_multi(row["completion"], text)["rougeL"].fmeasure
        for text, row in zip(texts, ROWS, strict=True)
    ]
    assert found["test/rouge_l"] == pytest.approx(sum(rouge) / len(rouge))
    assert found["test/rouge_l"] > 0
    matches = [text in row["completion"] for text, row in zip(texts, ROWS, strict=True)]
    assert found["test/exact_match"] == pytest.approx(sum(matches) / 7)
    assert found["test/cross_entropy"] == pytest.approx(nats, rel=1e-5)
    said = json.loads(Path("results.json").read_text())
    assert said == {"student": "runs/student", "teacher": None, "metrics": found}
    assert "test/rouge_l" in capsys.readouterr().out


def test_a_teacher_is_compared_with(on_disk):
    data = PromptCompletionData(test=ROWS, tokenizer="runs/student")
    found = evaluate("runs/student", data, None, teacher="runs/teacher", accelerator="cpu")
    assert found["test/forward_kl"] > 0.01
    alone = evaluate("runs/student", data, None, accelerator="cpu")
    assert found["test/loss"] == pytest.approx(alone["test/loss"], rel=1e-6)
    assert not any("match" in name for name in found)
    same = evaluate("runs/student", data, None, teacher="runs/student", accelerator="cpu")
    assert same["test/forward_kl"] == pytest.approx(0, abs=1e-6)


def test_another_tokenizer_than_the_students_is_warned_of(on_disk):
    data = PromptCompletionData(
        test=[{"prompt": "1+1=", "completion": "2"}], tokenizer=arithmetic_tokenizer()
    )
    with pytest.warns(UserWarning, match="is another tokenizer than that beside the student"):
        evaluate("runs/student", data, None, accelerator="cpu")


@pytest.mark.parametrize("output", ["nowhere/results.json", "runs"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(output, on_disk):
    with pytest.raises(ValueError, match=f"output is '{output}'; give a file in a directory"):
        evaluate("no model", ArithmeticData(), output=output)


def commands():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


@pytest.mark.parametrize("command", commands(), ids=lambda words: words[-2])
def test_every_command_of_the_page_runs(cli, on_disk, capsys, command):
    cli(*command, "--accelerator", "cpu")
    said = capsys.readouterr().out
    assert "test/perplexity" in said
    assert ("test/exact_match" in said) == ("null" not in command and "DocumentData" not in command)
    assert ("test/reverse_kl" in said) == ("--teacher" in command)
    if "--output" in command:
        assert json.loads(Path("results.json").read_text())["metrics"]["test/rouge_l"] > 0


def test_the_python_of_the_page_runs(on_disk, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(program, "evaluation.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) < 1


def test_a_file_says_it_all(cli, on_disk, capsys):
    options = {
        "student": "runs/student",
        "data": {
            "class_path": "DocumentData",
            "init_args": {"test": "stories.jsonl", "tokenizer": "runs/student"},
        },
        "accelerator": "cpu",
    }
    Path("texts.yaml").write_text(yaml.safe_dump(options))
    cli("evaluate", "--config", "texts.yaml")
    assert "test/perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.test", "test.jsonl"], "which model? give --student"),
        (["--student", "runs/student"], "was not given data.test"),
        (["--student", "runs/student", "--data.test", "no.jsonl"], "'no.jsonl' does not exist"),
        (["--student", "runs/none", "--data.test", "test.jsonl"], "runs/none"),
        (
            ["--student", "runs/student", "--data.test", "test.jsonl", "--metrics", "[RougeL]"],
            "did you mean --completions.metrics?",
        ),
        (
            ["--student=runs/student", "--data.test=test.jsonl", "--completions.metrics=[RougL]"],
            "did you mean RougeL? choose DistinctN or ExactMatch or GSM8KAccuracy",
        ),
        (
            ["--student=runs/student", "--data.test=test.jsonl", "--completions.metrics=[own.x]"],
            "own",
        ),
        (
            ["--student=runs/student", "--data.test=test.jsonl", "--output=test.jsonl"],
            "which this run reads as its data",
        ),
        (
            ["--student=runs/student", "--data.test=test.jsonl", *GSM8K],
            "data.test: GSM8KAccuracy reads the number behind",
        ),
        (
            ["--student=runs/student", "--data.test=test.jsonl", "--accelerator=mps"],
            "can not run on your system",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(fails, on_disk, words, says):
    assert says in fails("evaluate", *words)


@pytest.mark.parametrize("typed", OF_EVALUATE)
def test_what_others_call_an_option_is_answered_with_ours(fails, typed):
    words = ["--student", "runs/student", "--data.test", "test.jsonl"]
    assert f"--{typed}: did you mean {OF_EVALUATE[typed]}?" in fails(
        "evaluate", *words, f"--{typed}", "1"
    )


def test_other_data_takes_the_students_tokenizer():
    words = ["evaluate", "--student=runs/student", "--data", "ChatData"]
    assert with_student_data(words)[1:5] == [
        *("--data", "PromptCompletionData"),
        *("--data.tokenizer", "runs/student"),
    ]
    assert with_student_data(["evaluate", "--help"]) == ["evaluate", "--help"]


def test_a_list_of_metrics_is_answered_with_what_takes_it():
    with pytest.raises(
        ValueError, match=r"completions is a list; give CompletionSamples\(metrics="
    ):
        evaluate("runs/student", ArithmeticData(), [RougeL()])


def test_a_run_is_no_student_and_a_misspelt_student_is_called_one(on_disk):
    data = PromptCompletionData(test=ROWS, tokenizer="runs/student")
    with pytest.raises(ValueError, match=r"student is 'runs', a run; did you mean runs/student\?"):
        evaluate("runs", data)
    with pytest.raises(ValueError, match=r"the student directory '\./runs/studnt' does not exist"):
        evaluate("./runs/studnt", data)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ('{"student": "runs/other", "teacher": null, "metrics": {}}', "the numbers of runs/other"),
        ('{"a": 1}', "something else"),
        ("a text", "something else"),
    ],
)
def test_results_of_another_model_are_not_overwritten(on_disk, there, said):
    Path("results.json").write_text(there)
    data = PromptCompletionData(test=ROWS, tokenizer="runs/student")
    with pytest.raises(ValueError, match=f"output is 'results.json', which has {said}; remove it"):
        evaluate("runs/student", data, None, accelerator="cpu", output="results.json")
    assert Path("results.json").read_text() == there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--completions.max_new_tokens=0"], "max_new_tokens is 0"),
        (
            ["--completions.completions_per_prompt=4"],
            "completions_per_prompt is 4 at temperature 0",
        ),
        (
            ["--completions.metrics=[textwrap.dedent]"],
            "the metric dedent does not take what it is given",
        ),
        (
            ["--callbacks=[{class_path: LMEvalTasks, init_args: {tasks: [a]}}]"],
            "LMEvalTasks needs lm",
        ),
    ],
)
def test_what_a_constructor_refuses_is_said_alone(fails, on_disk, monkeypatch, words, says):
    monkeypatch.setattr("lightning_kd.callbacks.lm_eval_tasks.find_spec", lambda name: None)
    said = fails("evaluate", "--student=runs/student", "--data.test=test.jsonl", *words)
    assert says in said
    assert not re.search("Union|Subtypes|Given value|Namespace|Errors", said)
    assert len(said.splitlines()) <= 2


def test_a_file_in_the_place_of_a_class_is_answered_with_the_option():
    with pytest.raises(ValueError, match=r"write --data\.test data/test\.jsonl"):
        with_student_data(["evaluate", "--student", "s", "--data", "data/test.jsonl"])

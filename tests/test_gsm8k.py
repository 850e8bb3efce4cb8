"""A run on problems in GSM8K's form: both accuracies, early stopping, the best checkpoint."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_kd import PromptCompletionData
from lightning_kd.data import write_tokenizer
from lightning_kd.evaluation import GSM8KAccuracy
from lightning_kd.generation import Completions
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, QUIET, scalars

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.command_line]

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text()
SECTION = PAGE.split("## GSM8K\n")[1].split("\n## ")[0]
WATCHED = re.findall(r"```yaml\n(.*?)```", PAGE.split("## Completions\n")[1], flags=re.S)[0]
ON_DISK, FEW_SHOT = re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.S)
HELD_OUT, LINES = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.S)
FIT, EVALUATE = (shlex.split(line)[1:] for line in LINES.splitlines())
OVERLAYS = [*("--config", CONFIGS / "sft.yaml"), *("--config", CONFIGS / "overlays" / "gsm8k.yaml")]
PROBLEMS = [
    {"question": f"{a}+{b}?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
    for a, b in ((1, 1), (2, 3), (600, 634), (4, 8))
]


def saved(rows, vocab_size, **sizes):
    """Files, a tokenizer and a model that has learned nothing, where the overlay looks for them."""
    Path("gsm8k").mkdir()
    for name in ("fit", "validation", "test"):
        Path(f"gsm8k/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["question", "answer"]
    write_tokenizer("gsm8k/fit.jsonl", "runs/gsm8k_tokenizer", vocab_size, columns)
    tokenizer = AutoTokenizer.from_pretrained("runs/gsm8k_tokenizer")
    torch.manual_seed(0)
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "bos_token_id": None}
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**config | sizes)).save_pretrained("runs/start")
    tokenizer.save_pretrained("runs/start")


def watched(tokens, **stopping):
    """The callbacks of the page, with short completions and a reason to stop."""
    Path("own.py").write_text("def score(completion, references):\n    return '#' in completion\n")
    callbacks = yaml.safe_load(WATCHED)["trainer"]["callbacks"]
    samples, early, best = callbacks
    samples["init_args"]["max_new_tokens"] = tokens
    early["init_args"] |= stopping
    best["init_args"] |= {"dirpath": "best", "save_last": True}
    Path("watched.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", "watched.yaml", *QUIET, "--model.student.name_or_path", "runs/start"]


def by_hand(directory):
    """Both accuracies of a saved model, and ROUGE-L: greedy completions by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    strict = flexible = rouge = 0
    for row in PROBLEMS:
        ids = torch.tensor([tokenizer(f"Question: {row['question']}\nAnswer: ")["input_ids"]])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        wanted = row["answer"].split("#### ")[1]
        strict += re.findall(r"#### (\d+)", text)[:1] == [wanted]
        flexible += re.findall(r"\d+", text)[-1:] == [wanted]
        rouge += RougeScorer(["rougeL"]).score(row["answer"], text)["rougeL"].fmeasure
    return [total / len(PROBLEMS) for total in (strict, flexible, rouge)]


def test_the_lines_of_the_page_stop_when_it_is_right_and_keep_the_best_weights(cli, capsys):
    saved(PROBLEMS, 280)
    Path("configs").symlink_to(CONFIGS)
    Path("gsm8k_test.yaml").write_text(ON_DISK)
    stops = ["--trainer.callbacks.stopping_threshold", 0.99, "--trainer.callbacks.patience", 100]
    cli(
        *(*FIT, *stops, *QUIET, "--data.batch_size", 4),
        *("--trainer.max_steps", 400, "--trainer.val_check_interval", 20),
        *("--model.optimizer.lr", 0.01, "--model.lr_scheduler", "null"),
    )
    strict, flexible = (
        scalars("runs").Scalars(f"val/gsm8k_accuracy_{rule}") for rule in ("strict", "flexible")
    )
    assert strict[0].value == 0
    assert [event.value >= 0.99 for event in flexible] == [False] * (len(flexible) - 1) + [True]
    assert flexible[-1].step < 399
    values = [event.value for event in strict]
    best = max(values)
    also = flexible[values.index(best)].value
    *accuracies, rouge = by_hand("runs/gsm8k_student")
    assert accuracies == pytest.approx([best, also])
    capsys.readouterr()
    cli(*EVALUATE, "--accelerator", "cpu")
    found = json.loads(Path("results.json").read_text())["metrics"]
    assert found["test/gsm8k_accuracy_strict"] == pytest.approx(best)
    assert found["test/gsm8k_accuracy_flexible"] == pytest.approx(also)
    assert found["test/rouge_l"] == pytest.approx(rouge, abs=1e-6)
    assert {"test/gsm8k_accuracy_flexible", "test/repetition_4"} <= set(found)
    assert "test/gsm8k_accuracy_flexible" in capsys.readouterr().out


def test_nothing_is_chosen_on_the_test_set():
    Path("gsm8k").mkdir()
    Path("gsm8k/train.jsonl").write_text("".join(f"{number}\n" for number in range(7473)))
    subprocess.run(["sh", "-ec", HELD_OUT], check=True, timeout=60)
    overlay = yaml.safe_load((CONFIGS / "overlays" / "gsm8k.yaml").read_text())["data"]["init_args"]
    train, validation = (
        [int(line) for line in Path(overlay[split]).read_text().splitlines()]
        for split in ("train", "validation")
    )
    assert train + validation == [*range(7473)]
    assert len(validation) == 473
    assert "test" not in overlay
    assert yaml.safe_load(ON_DISK)["data"]["init_args"]["test"] == "gsm8k/test.jsonl"


def test_real_problems_stop_a_run_that_gets_no_better(cli, shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:8]
    saved([json.loads(line) for line in lines], 400)
    cli(
        *("fit", *OVERLAYS, *watched(16, patience=2), "--data.batch_size", 2),
        *("--trainer.max_steps", 40, "--trainer.val_check_interval", 2),
        *("--model.optimizer.lr", 0.0, "--model.lr_scheduler", "null"),
    )
    seen = scalars("runs")
    assert {"val/distinct_1", "val/distinct_4", "val/bleu_score", "val/score"} <= set(
        seen.Tags()["scalars"]
    )
    strict = seen.Scalars("val/gsm8k_accuracy_strict")
    assert [event.step for event in strict] == [1, 3, 5]
    assert list(Path("best").glob("*.ckpt"))


def test_the_name_without_a_rule_is_refused_with_both(cli, fails):
    saved(PROBLEMS, 280)
    options = watched(8)
    text = Path("watched.yaml").read_text()
    Path("watched.yaml").write_text(
        text.replace("val/gsm8k_accuracy_flexible", "val/gsm8k_accuracy")
    )
    said = fails("fit", *OVERLAYS, *options, "--data.batch_size", 4)
    assert "EarlyStopping monitors val/gsm8k_accuracy, which is not logged; did you mean" in said
    assert "val/gsm8k_accuracy_flexible, val/gsm8k_accuracy_strict" in said


def test_few_shots_are_a_template_and_stop_strings_cut_the_next_question(cli, monkeypatch):
    saved(PROBLEMS, 280)
    few_shot = yaml.safe_load(FEW_SHOT)
    options = few_shot["data"]["init_args"]
    tokenizer = "runs/gsm8k_tokenizer"
    data = PromptCompletionData(validation="gsm8k/test.jsonl", tokenizer=tokenizer, **options)
    data.setup("validate")
    (prompt, *_) = next(iter(data.val_dataloader()))["prompt"]
    shot = "Question: What is 1+1?\nAnswer: 1+1 = <<1+1=2>>2\n#### 2\n\n"
    assert prompt == f"{shot}Question: 1+1?\nAnswer:"
    (samples,) = few_shot["trainer"]["callbacks"]
    samples["init_args"]["max_new_tokens"] = 8
    Path("few_shot.yaml").write_text(yaml.safe_dump(few_shot))
    measured = []
    update = GSM8KAccuracy.update
    monkeypatch.setattr(GSM8KAccuracy, "update", lambda *a: measured.extend(a[1]) or update(*a))
    written = "1+1 = <<1+1=2>>2\n#### 2\n\nQuestion: and more"
    monkeypatch.setattr(Completions, "texts", lambda self, _: [written] * len(self.ids))
    cli(
        *("validate", "--config", "few_shot.yaml", "--model", "SFT", *QUIET),
        *("--model.student.name_or_path", "runs/start", "--data.tokenizer", tokenizer),
        *("--data.validation", "gsm8k/test.jsonl"),
    )
    assert measured == ["1+1 = <<1+1=2>>2\n#### 2\n\n"] * 4

"""The student on a local task of lm-eval, offline; skipped where lm-eval is not installed."""

import json
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_kd import SFT, DocumentData
from lightning_kd.callbacks import LMEvalTasks
from tests.callbacks.test_document_likelihoods import TOKENIZER, rows, student
from tests.support.harness import trainer

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval (the extra lm_eval, 30 packages) is not installed"
)
ROWS = [
    ("two and", [" two is four", " is is"], 0),
    ("to be, or not", [" five", " to be: that is"], 1),
    ("that", [" is the question", " x"], 0),
    ("five", [" two", " four and"], 1),
]


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = [{"text": text, "ends": ends, "right": right} for text, ends, right in ROWS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local.yaml").write_text(
        f"task: which_end\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: ends\ndoc_to_target: right\ntarget_delimiter: ''\nmetadata: {version: 1}\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(folder)


def data(**settings):
    return DocumentData(
        tokenizer=TOKENIZER, validation=rows(), test=rows(), batch_size=2, **settings
    )


@torch.no_grad()
def by_hand(model):
    model = model.double().eval()

    def score(text, end):
        start = TOKENIZER(text)["input_ids"]
        # Both are tokenized together, as lm-eval does.
        ids = torch.tensor([TOKENIZER(text + end)["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(-1, ids[0, 1:, None])[len(start) - 1 :].sum().item()

    right = [score(text, ends[place]) > score(text, ends[1 - place]) for text, ends, place in ROWS]
    return sum(right) / len(right)


@needs_lm_eval
@pytest.mark.processes  # lm-eval asks git for a commit
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(4))
def test_the_accuracy_is_that_of_a_loop_and_of_the_exported_student(task, tmp_path, seed):
    callback = LMEvalTasks(["which_end"], include_path=task)
    fit = trainer(callbacks=[callback])
    (found,) = fit.test(SFT(student=student(seed)), datamodule=data(), verbose=False)
    assert found["test/which_end_acc"] == by_hand(student(seed))
    if seed == 0:
        import lm_eval
        from lm_eval.tasks import TaskManager

        student(seed).save_pretrained(tmp_path / "exported")
        TOKENIZER.save_pretrained(tmp_path / "exported")
        exported = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tmp_path / 'exported'},dtype=float32",
            device="cpu",
            tasks=["which_end"],
            task_manager=TaskManager(include_path=task),
            bootstrap_iters=0,
        )
        of_file = exported["results"]["which_end"]["acc,none"]
        assert found["test/which_end_acc"] == of_file


@needs_lm_eval
@pytest.mark.processes  # lm-eval asks git for a commit
@pytest.mark.filterwarnings("default")
def test_training_is_the_same_with_and_without_and_it_can_be_watched(task, tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = SFT(student=student())
        fit = trainer(
            max_steps=2,
            limit_val_batches=1.0,
            val_check_interval=1,
            num_sanity_val_steps=1,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
        )
        fit.fit(module, datamodule=data(train=rows()))
        return [*module.student.state_dict().values(), torch.get_rng_state()]

    best = ModelCheckpoint(tmp_path / "best", monitor="val/which_end_acc")
    tasks = LMEvalTasks(["which_end"], include_path=task, every_n_validations=1)
    pairs = zip(weights(), weights(tasks, best), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert best.best_model_score is not None


@needs_lm_eval
@pytest.mark.processes  # lm-eval asks git for a commit
@pytest.mark.filterwarnings("default")
def test_an_unknown_task_is_refused_by_name(task):
    fit = trainer(callbacks=[LMEvalTasks(["which_and"], include_path=task)])
    with pytest.raises(ValueError, match="there is no task which_and in lm-eval and"):
        fit.test(SFT(student=student()), datamodule=data(), verbose=False)


@needs_lm_eval
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("every", [0, 2])
def test_a_student_in_shards_is_refused_before_the_first_step(task, monkeypatch, every):
    monkeypatch.setattr("lightning_kd.callbacks.lm_eval_tasks.is_sharded", lambda model: True)
    callback = LMEvalTasks(["which_end"], include_path=task, every_n_validations=every)
    fit = trainer(max_steps=1, limit_val_batches=1.0, callbacks=[callback])
    module = SFT(student=student())
    if every:
        with pytest.raises(ValueError, match="the student is in shards; use ddp"):
            fit.fit(module, datamodule=data(train=rows()))
        assert fit.global_step == 0
    with pytest.raises(ValueError, match="the student is in shards; use ddp"):
        fit.test(module, datamodule=data(), verbose=False)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named():
    with pytest.raises(ValueError, match=r"lightning-kd\[lm_eval\]"):
        LMEvalTasks(["arc_easy"])


@pytest.mark.parametrize(
    "option", [{"tasks": []}, {"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}]
)
def test_values_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        LMEvalTasks(**({"tasks": ["arc_easy"]} | option))

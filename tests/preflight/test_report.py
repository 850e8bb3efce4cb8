"""Facts and judgement apart from the command: from Python, at the start of a fit, and by hand."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lightning_kd import SFT, ArithmeticData, LocalTeacher, Preflight, StudentSpec, check
from lightning_kd.data import Collator, Example
from lightning_kd.modules import SupervisedKD
from lightning_kd.preflight import Finding, Report
from lightning_kd.preflight.findings import judge
from lightning_kd.preflight.report import example
from lightning_kd.preflight.rows import describe_rows
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def sft():
    return SFT(student=StudentSpec(config=CONFIG))


@pytest.fixture
def facts():
    """Those of a sound run with a teacher."""
    module = SupervisedKD(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    return check(module, ArithmeticData(train_size=64)).facts


def names(facts):
    return [finding.name for finding in judge(facts)]


def test_the_python_of_the_page_runs():
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "preflight.md").read_text(), flags=re.S
    )
    found = {}
    exec(compile(program, "preflight.md", "exec"), found)
    assert found["names"] == []


def test_the_page_names_every_mismatch():
    from lightning_kd.preflight import MISMATCHES

    page = (ROOT / "docs" / "preflight.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.M) == list(MISMATCHES)


def test_a_sound_run_has_none_and_each_changed_fact_names_its_own(facts):
    teacher, rows = facts.teachers[0], facts.rows
    pretrained = replace(teacher, starts_at_random=False)
    for changed, expected in (
        ({}, []),
        ({"rows": replace(rows, ended=0, stopped=0)}, ["eos_untrained"]),
        ({"rows": replace(rows, ended=1)}, []),
        ({"rows": replace(rows, ended=0, stopped=rows.labeled)}, []),
        ({"rows": replace(rows, ended=0, stopped=rows.labeled // 2)}, ["eos_untrained"]),
        ({"rows": replace(rows, ended=0, masked_ends=3)}, ["eos_masked"]),
        ({"rows": replace(rows, ended=0, have_prompts=False)}, []),  # text need not end
        ({"rows": replace(rows, longest=2048)}, []),
        ({"rows": replace(rows, longest=2049)}, ["context", "context"]),
        ({"teachers": [replace(teacher, width=15)]}, ["vocabulary"]),
        ({"teachers": [replace(teacher, width=15)], "policy": "shared"}, []),
        ({"teachers": [replace(teacher, width=13)]}, ["vocabulary"]),
        ({"teachers": [replace(pretrained, eos_ids=[1, 2])]}, []),
        ({"teachers": [replace(pretrained, eos_ids=[2])]}, ["endless"]),
        ({"teachers": [replace(pretrained, eos_ids=[])]}, []),  # nothing is known
        ({"refused": ["no such file"]}, ["refused"]),
    ):
        assert names(replace(facts, **changed)) == expected, changed


def test_a_student_may_learn_another_end_and_a_teacher_may_not(facts):
    other = {"eos_ids": [2], "starts_at_random": False}
    assert names(replace(facts, student=replace(facts.student, **other))) == []
    assert names(replace(facts, teachers=[replace(facts.teachers[0], **other)])) == ["endless"]


def test_what_follows_from_another_tokenizer_is_not_named_again(facts):
    own = replace(facts.tokenizer, name="teacher", other_ids="'a' is 2 and 3", other_template="x")
    teacher = replace(
        facts.teachers[0], tokenizer=own, width=99, eos_ids=[50], starts_at_random=False
    )
    assert names(replace(facts, teachers=[teacher])) == ["tokenizer"]


def test_memory_is_judged_for_each_device_with_all_its_processes(facts):
    memory = facts.memory
    needed = memory.needed("cpu")
    for free, processes, expected in (
        (needed, 1, []),
        (needed - 1, 1, ["memory"]),
        (needed, 2, ["memory"]),
        (None, 2, []),
    ):
        changed = replace(memory, available={"cpu": free}, processes={"cpu": processes})
        assert names(replace(facts, memory=changed)) == expected


@pytest.mark.parametrize("same", [True, False])
def test_the_own_collator_trains_on_the_end_where_it_is_the_padding_too(same):
    """Rows of unequal length, so that there is padding behind an end."""
    tokenizer = letter_tokenizer()
    if same:
        tokenizer.pad_token = "<eos>"
    collate = Collator(tokenizer.pad_token_id)
    rows = [Example([5, 6, 7, 1], 2, "x", "y"), Example([5, 6, 7, 8, 9, 1], 2, "x", "y")]
    batch = collate([(n, n, row) for n, row in enumerate(rows)])
    found = describe_rows(BatchList([batch]), [batch], tokenizer)
    assert (found.ended, found.masked_ends, found.have_prompts) == (2, 0, True)
    # The same rows without an end, whose padding may look like one.
    rows = [Example(row.input_ids[:-1], 2, "x", "y") for row in rows]
    batch = collate([(n, n, row) for n, row in enumerate(rows)])
    found = describe_rows(BatchList([batch]), [batch], tokenizer)
    assert (found.ended, found.masked_ends) == (0, 0)


def test_rows_may_end_with_another_token_that_the_student_stops_at():
    collate = Collator(0)
    rows = [Example([5, 6, 7, 9], 2, "x", "y"), Example([5, 9, 7, 8], 2, "x", "y")]
    batch = collate([(n, n, row) for n, row in enumerate(rows)])
    tokenizer = letter_tokenizer()
    found = describe_rows(BatchList([batch]), [batch], tokenizer, [9, 12])
    assert (found.ended, found.stopped) == (0, 1)
    assert describe_rows(BatchList([batch]), [batch], tokenizer, [7, 8, 9]).stopped == 2


def test_an_end_that_a_foreign_collator_masks_is_seen():
    """By ids != pad, in the labels alone, or in the attention mask as well."""
    ids = torch.tensor([[5, 6, 7, 1, 1], [5, 6, 7, 8, 1]])
    for attention in (torch.tensor([[1, 1, 1, 1, 0], [1] * 5]), (ids != 1).long()):
        labels = ids.masked_fill(ids == 1, -100)
        labels[:, 0] = -100
        batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        tokenizer = letter_tokenizer()
        found = describe_rows(BatchList([batch]), [batch], tokenizer)
        assert found.ended == 0
        assert found.masked_ends >= 1


def test_the_completion_of_a_chat_is_its_last_answer_and_all_of_its_answers_are_trained_on():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, 8, 1], [-100] * 7 + [1], [-100] * 8])
    ids, mask = torch.full_like(labels, 3), torch.ones_like(labels)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = describe_rows(BatchList([batch]), [batch], letter_tokenizer())
    assert (found.completions, found.most_labels) == ([3, 1], 5)
    assert (found.labeled, found.ended, found.looked_at) == (2, 2, 3)


def test_the_first_row_is_shown_without_padding_and_in_colour_on_a_terminal(facts):
    text = example(facts.rows.example)
    assert re.fullmatch(r"(\d )+\+( \d)+ =( \[\d\])+ \[<eos>\]", text.plain)
    shown = Console(force_terminal=True, width=200, color_system="standard", file=None)
    with shown.capture() as captured:
        Report(facts, (Finding("endless", "no end", "end it"),)).show(shown)
    assert "\x1b[1;32m[<eos>]" in captured.get()
    assert "endless: " in captured.get()


def test_five_lines_are_the_most(facts):
    many = tuple(Finding(name, "it is so", "do this") for name in ("a", "b", "c", "d"))
    lines = Report(facts, many).short()
    assert len(lines) == 5
    assert lines[3].startswith("Would ruin the run: a: it is so. do this")
    assert "b, c, d" in lines[4]
    assert len(Report(facts, many[:2]).short()) == 5
    assert len(Report(facts, ()).short()) == 3
    assert Report(facts, ()).exit_code == 0
    assert Report(facts, many).exit_code == 1
    assert Report(facts, (*many, Finding("refused", "no"))).exit_code == 2


class Untouched(BatchList):
    """Batches of one's own; a loader that somebody has begun would have lost one."""

    def train_dataloader(self):
        self.made = getattr(self, "made", 0) + 1
        return super().train_dataloader()


def test_a_loader_of_ones_own_is_looked_at_by_check_alone(caplog):
    batches = [ragged_batch([(3, 4), (2, 5)], seed=n) for n in range(2)]
    data = Untouched(batches)
    module = SFT(student=StudentSpec.of(tiny_llama()))
    fit = trainer(callbacks=[Preflight()])
    with caplog.at_level("INFO"):
        fit.fit(module, datamodule=data)
    made = data.made
    said = [r.message for r in caplog.records if r.pathname.endswith("preflight/callback.py")]
    assert [line.partition(" ")[0] for line in said] == ["Student"]
    report = check(module, Untouched(batches))
    assert (report.facts.rows.looked_at, report.facts.rows.longest) == (4, 7)
    assert [finding.name for finding in report.findings] == ["eos_untrained"]
    again = Untouched(batches)
    trainer().fit(SFT(student=StudentSpec.of(tiny_llama())), datamodule=again)
    assert again.made == made  # as often as without the callback


@pytest.mark.parametrize("left", [True, False])
def test_prompts_alone_of_a_loader_of_ones_own_are_rows(left):
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 5]] if left else [[5, 6, 0, 0], [7, 8, 9, 5]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    rows = check(SFT(student=StudentSpec.of(tiny_llama())), BatchList([batch])).facts.rows
    assert (rows.longest, rows.longest_prompt, rows.labeled) == (4, 4, 0)
    assert example(rows.example).plain == "d e"


def test_a_fit_draws_the_same_numbers_with_and_without_it():
    losses = []
    for callbacks in ([], [Preflight()]):
        fit = trainer(callbacks=callbacks, max_steps=3, max_epochs=None)
        torch.manual_seed(7)
        fit.fit(sft(), datamodule=ArithmeticData(train_size=32))
        losses.append((fit.callback_metrics["train/loss"].item(), torch.rand(1).item()))
    assert losses[0] == losses[1]


def test_only_the_first_process_of_a_fit_speaks(caplog):
    data = ArithmeticData(train_size=8)
    with caplog.at_level("INFO"):
        for first, stage in ((False, "fit"), (True, "test")):
            run = SimpleNamespace(is_global_zero=first, datamodule=data)
            Preflight().setup(run, sft(), stage)
    assert not caplog.records


def test_what_is_no_method_and_rows_that_are_none_are_refused():
    with pytest.raises(ValueError, match="the module is a Linear; check a method"):
        check(torch.nn.Linear(1, 1), ArithmeticData(train_size=8))
    with pytest.raises(ValueError, match="rows is 0"):
        check(sft(), ArithmeticData(train_size=8), rows=0)
    with pytest.raises(ValueError, match=r"preflight\.rows is 0"):
        Preflight(rows=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        check(sft(), SimpleNamespace())

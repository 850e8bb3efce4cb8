"""Checks of loaders of the user's own."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from lightning_kd import SFT, check
from lightning_kd.preflight import Preflight
from tests.support.harness import trainer
from tests.support.toys import letter_tokenizer, tiny_llama


def loader(*, pad_is_eos):
    tokenizer = letter_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": [2, 3, 4, 1], "attention_mask": [1, 1, 1, 1]}] * 4
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return tokenizer, DataLoader(rows, batch_size=2, collate_fn=collate)


def test_an_eos_that_the_collator_masks_is_named():
    for pad_is_eos, names in ((True, ["eos_masked"]), (False, [])):
        tokenizer, given = loader(pad_is_eos=pad_is_eos)
        report = check(SFT(student=tiny_llama(0), tokenizer=tokenizer), given)
        assert [finding.name for finding in report.findings] == names
        assert report.facts.rows.looked_at == 4


def test_a_loader_that_gives_its_batches_once_is_left_alone():
    tokenizer, given = loader(pad_is_eos=False)
    once = iter(given)
    report = check(SFT(student=tiny_llama(0), tokenizer=tokenizer), once)
    (finding,) = report.findings
    assert "gives its batches once" in finding.says
    assert len(list(once)) == 2


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_lines_at_the_start_leave_the_order_of_a_run_alone(caplog):
    def order(callbacks, **options):
        seen = []

        def collate(rows):
            seen.extend(row[1] for row in rows)
            ids = torch.tensor(rows)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

        torch.manual_seed(3)
        module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
        given = DataLoader(
            [[2, place, 1] for place in range(3, 11)],
            2,
            shuffle=True,
            collate_fn=collate,
            **options,
        )
        trainer(max_steps=4, callbacks=callbacks).fit(module, given)
        return seen[-8:]

    alone = order([])
    with caplog.at_level(logging.INFO):
        assert order([Preflight()]) == alone
    assert "Training rows: 8 looked at" in caplog.text
    own = {"generator": torch.Generator().manual_seed(1)}
    with caplog.at_level(logging.INFO):
        with_look = order([Preflight()], **own)
    assert "Training rows: not looked at" in caplog.text
    assert with_look == order([], generator=torch.Generator().manual_seed(1))

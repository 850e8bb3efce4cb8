"""Checks of loaders of the user's own."""

from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from lightning_kd import SFT, check
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

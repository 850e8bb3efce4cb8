"""Loaders of the user's own in an evaluation: repeated rows, plain text, rows without a prompt."""

import json
from types import SimpleNamespace

import pytest
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from transformers import DataCollatorForSeq2Seq

from lightning_kd import SFT
from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX
from lightning_kd.callbacks import CompletionSamples, DocumentLikelihoods
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama


def rows(number, prompt=2):
    ids = [[5 + n, 6, 7, 8] for n in range(number)]
    labels = [[IGNORE_INDEX] * prompt + row[prompt:] for row in ids]
    return [
        {"input_ids": row, "attention_mask": [1] * 4, "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def loaded(data, rank, sampler=DistributedSampler, batch_size=2, **options):
    """What Lightning makes of a loader on one of two processes."""
    shared = sampler(data, 2, rank, shuffle=False)
    collate = DataCollatorForSeq2Seq(letter_tokenizer())
    return DataLoader(data, batch_size, sampler=shared, collate_fn=collate, **options)


def seen(loaders, rank):
    """The batches of some loaders, as a module has them on one of two processes."""
    module = SFT(student=tiny_llama(0), tokenizer=letter_tokenizer())
    module._trainer = SimpleNamespace(
        world_size=2, global_rank=rank, predicting=False, testing=False, val_dataloaders=loaders
    )
    batches = []
    for number, loader in enumerate(loaders):
        for place, batch in enumerate(loader):
            batch = dict(batch)
            module.on_validation_batch_start(batch, place, number)
            batches.append(batch)
    return batches


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_rows_that_a_distributed_sampler_repeats_are_filler(number, prompt):
    loaders = [[loaded(rows(n, prompt), rank) for n in (number, 3)] for rank in (0, 1)]
    batches = [batch for rank in (0, 1) for batch in seen(loaders[rank], rank)]
    evaluated = [
        (int(row), ids[0].item(), (labels != IGNORE_INDEX).sum().item())
        for batch in batches
        for row, ids, labels in zip(batch["row"], batch["input_ids"], batch["labels"], strict=True)
    ]
    real = [row for row in evaluated if row[0] != FILLER_ROW]
    assert all(tokens == 0 for row, _, tokens in evaluated if row == FILLER_ROW)
    assert all(tokens == 4 - prompt for _, _, tokens in real)
    firsts = sorted(first for _, first, _ in real)
    assert firsts == sorted([5 + n for n in range(number)] + [5, 6, 7])
    assert len({row for row, _, _ in real}) == number + 3
    assert all(("prompt_ids" in batch) == (prompt > 0) for batch in batches)


class OwnBatches(BatchSampler):
    """Composes batches as it likes."""


def test_repetitions_that_cannot_be_told_are_refused():
    def composed(number):
        sampler = DistributedSampler(range(number), 2, 0, shuffle=False)
        collate = DataCollatorForSeq2Seq(letter_tokenizer())
        batches = OwnBatches(sampler, 2, drop_last=False)
        return DataLoader(rows(number), batch_sampler=batches, collate_fn=collate)

    assert len(seen([composed(4)], 0)) == 1
    with pytest.raises(ValueError, match=r"the loader has 3 rows for 2 processes, .* OwnBatches"):
        seen([composed(3)], 0)


def evaluated(callback, *batches):
    fit = trainer(limit_val_batches=1.0, callbacks=[callback])
    (numbers,) = fit.validate(
        SFT(student=tiny_llama(0)), datamodule=BatchList([], evaluate=batches), verbose=False
    )
    return numbers


def own(*lengths):
    batch = ragged_batch(list(lengths))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def test_documents_of_plain_text_are_numbered(tmp_path):
    path = tmp_path / "documents.jsonl"
    plain = own((0, 4), (0, 6))
    numbers = evaluated(DocumentLikelihoods(str(path)), plain, own((0, 3)))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["document"], record["tokens"]) for record in found] == [(0, 3), (1, 5), (2, 2)]
    assert numbers["val/tokens"] == 10


def test_a_batch_with_one_row_without_a_prompt_is_refused():
    mixed = own((2, 2), (2, 3))
    mixed["labels"][0, 0] = mixed["input_ids"][0, 0]
    with pytest.raises(ValueError, match="a row has a label on its first token"):
        evaluated(CompletionSamples(2), own((2, 2)), mixed)


def test_a_row_without_labels_is_none_without_a_prompt():
    plain = own((0, 4), (0, 4))
    plain["labels"][1] = IGNORE_INDEX
    assert evaluated(CompletionSamples(2), plain)["val/tokens"] == 3

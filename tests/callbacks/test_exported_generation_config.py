"""The generation config that a student is published with, and what becomes of it."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from lightning_kd.callbacks import HFExport
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.modules import SFT
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

pytestmark = EXPECTED_WARNINGS

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
PUBLISHED = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "do_sample": True,
    "repetition_penalty": 1.05,
    "max_length": 200,
}


def published(**config):
    """A directory with a generation config, as a hub has it."""
    tiny_llama(1).save_pretrained("start")
    letter_tokenizer().save_pretrained("start")
    Path("start/generation_config.json").write_text(json.dumps(config))
    return "start"


def exported(student):
    fitted = trainer(max_steps=1, max_epochs=-1, callbacks=[HFExport("student", overwrite=True)])
    fitted.fit(SFT(student=student), datamodule=BatchList([BATCH]))
    found = GenerationConfig.from_pretrained("student").to_diff_dict()
    del found["transformers_version"]
    return found, Path("student/README.md").read_text()


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_what_the_source_was_published_with_is_kept(lora):
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 5}
    found, card = exported(StudentSpec(published(**PUBLISHED, **ids), lora=lora))
    assert found == PUBLISHED | ids
    assert "Generation config" not in card


def test_special_tokens_are_those_that_were_trained_and_the_card_says_which():
    found, card = exported(StudentSpec(published(**PUBLISHED, eos_token_id=7)))
    assert found == PUBLISHED | {"eos_token_id": [1, 7], "pad_token_id": 0}
    assert "`eos_token_id` (before: 7); `pad_token_id` (before: not set)" in card


def test_one_that_transformers_would_not_save_is_kept_as_it_is():
    """A temperature without sampling: many are published so."""
    found, _ = exported(StudentSpec(published(do_sample=False, temperature=0.6, eos_token_id=1)))
    assert found == {"do_sample": False, "temperature": 0.6, "eos_token_id": 1, "pad_token_id": 0}


def test_a_model_of_ones_own_keeps_its_config_and_is_not_changed():
    model = tiny_llama(0)
    model.generation_config.update(top_p=0.5, max_new_tokens=9)
    before = model.generation_config.to_dict()
    found, _ = exported(StudentSpec.of(model))
    assert found == {"top_p": 0.5, "max_new_tokens": 9, "eos_token_id": 1, "pad_token_id": 0}
    assert model.generation_config.to_dict() == before

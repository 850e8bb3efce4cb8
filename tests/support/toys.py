"""Toy models, a toy tokenizer and toy batches."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_kd.batch import IGNORE_INDEX, Batch

LETTERS = "abcdefghijklmnop"


def letter_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(letters)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama over the letters."""
    settings = {
        "vocab_size": len(LETTERS) + 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | overrides
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    # A fresh Llama is all but uniform: larger weights make distributions that differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def tiny_gemma(*, layer_types: list[str], **changes: object) -> PreTrainedModel:
    """A random Gemma 3 in evaluation mode, with layers of these kinds and a window of 4 tokens."""
    shape = {
        "vocab_size": 18,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    layers = {"layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma3TextConfig(**shape | layers | changes)).eval()


def ragged_batch(lengths: list[tuple[int, int]], seed: int = 0, vocabulary: int = 18) -> Batch:
    """Rows of random tokens: (prompt tokens, completion tokens) each."""
    generator = torch.Generator().manual_seed(seed)
    total = max(p + c for p, c in lengths)
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(lengths):
        end = prompt + completion
        ids[row, :end] = torch.randint(2, vocabulary, (end,), generator=generator)
        mask[row, :end] = 1
        labels[row, prompt:end] = ids[row, prompt:end]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "row": torch.arange(len(lengths)),
    }


def with_prompts(batch: Batch) -> Batch:
    """The batch and, beside it, its prompts padded on the left, and the texts."""
    tokenizer = letter_tokenizer()
    completion = batch["labels"] != IGNORE_INDEX
    prompts = [
        ids[mask.bool() & ~own]
        for ids, mask, own in zip(
            batch["input_ids"], batch["attention_mask"], completion, strict=True
        )
    ]
    longest = max(map(len, prompts))
    return batch | {
        "prompt_ids": torch.stack(
            [torch.nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts]
        ),
        "prompt_mask": torch.stack(
            [
                torch.nn.functional.pad(torch.ones_like(ids), (longest - len(ids), 0))
                for ids in prompts
            ]
        ),
        "prompt": tokenizer.batch_decode(prompts),
        "completion": [
            tokenizer.decode(ids[own], skip_special_tokens=True)
            for ids, own in zip(batch["input_ids"], completion, strict=True)
        ],
    }


def logit_gradient(divergence, student_log_probs, teacher_log_probs):
    """The second half of what a divergence computes at once."""
    return divergence.value_and_logit_gradient(student_log_probs, teacher_log_probs)[1]


def fused_letter_tokenizer() -> PreTrainedTokenizerFast:
    """The letters' tokenizer, its tokens joined to a text without anything between them."""
    tokenizer = letter_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer

"""A place to run ``lightning-kd check`` in: tokenizers, models and rows, sound or with a mismatch."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.command_line import QUIET
from tests.support.toys import LETTERS, tiny_llama

MARKS = ["<pad>", "<eos>", "<user>", "<bot>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<user>' }}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SIZE = len(MARKS) + len(LETTERS)


def chat_tokenizer(letters=LETTERS, *, template=TEMPLATE, eos="<end>", pad="<pad>"):
    vocabulary = {token: number for number, token in enumerate([*MARKS, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[mark for mark in MARKS if mark not in {eos, pad}],
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(name, tokenizer, *, seed=1, generation_eos=..., **overrides):
    sizes = {"vocab_size": SIZE, "eos_token_id": tokenizer.eos_token_id} | overrides
    model = tiny_llama(seed, **sizes)
    if generation_eos is not ...:
        model.generation_config.eos_token_id = generation_eos
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    return name


def write_rows(name="rows.jsonl", count=40, **more):
    rows = [
        {"prompt": LETTERS[n % 5 : n % 5 + 3], "completion": LETTERS[n % 7 : n % 7 + 5], **more}
        for n in range(count)
    ]
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def write_chats(name="chats.jsonl", count=40):
    rows = [
        {
            "messages": [
                {"role": "user", "content": LETTERS[n % 5 : n % 5 + 3]},
                {"role": "assistant", "content": LETTERS[n % 7 : n % 7 + 5]},
            ]
        }
        for n in range(count)
    ]
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


STUDENT = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2}"
)


def command(method, data, tokenizer, rows, *more, student=STUDENT, name="check"):
    """A run without a file of its own: everything is a flag."""
    given = [name, *QUIET, "--trainer.max_steps", 1, "--model", method]
    given += ["--model.student.config", student, "--data", data]
    given += ["--data.tokenizer", tokenizer, "--data.train", rows, "--data.batch_size", 4]
    if method != "SFT":
        given += ["--model.teacher.name_or_path", "teacher"]
    return [*given, *more]

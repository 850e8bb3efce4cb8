"""Models over a few words of two letters, so small that all that they can write can be written down."""

import itertools
import random

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_kd.fused import TokenLogProbs
from lightning_kd.generation import rollout_batch
from lightning_kd.generation.completions import Completions
from lightning_kd.teachers import Teacher
from tests.support.tokenizers import byte_level

LONGEST = 3


def pairs(*texts):
    """Byte-level BPE that has learned few words of the letters a and b."""
    return byte_level(263, texts=[*texts] * 5)


STUDENT_TOKENIZER = pairs("ab ab", "ab")
TEACHER_TOKENIZER = pairs("ba bb", "bb", "ba")
OF_A_NAME = pairs("ab ab", "ab")
"""The student's, with a special token that the teacher lacks: to the teacher it is those letters."""
OF_A_NAME.add_tokens(["bab"], special_tokens=True)


class Words(PreTrainedModel):
    """Next-token scores over a, b, ab, added tokens and the end for each prefix of them, float64."""

    config_class = PretrainedConfig

    def __init__(self, seed, tokenizer=STUDENT_TOKENIZER, words=("a", "b", "ab", "bab")):
        eos = tokenizer.eos_token_id
        super().__init__(PretrainedConfig(vocab_size=len(tokenizer), eos_token_id=eos))
        self.tokenizer = tokenizer
        words = [word for word in words if word in tokenizer.get_vocab()]
        self.tokens = [*tokenizer.convert_tokens_to_ids(words), eos]
        generator = torch.Generator().manual_seed(seed)
        size = LONGEST, (len(self.tokens) + 1) ** (LONGEST + 1), len(self.tokens)
        scores = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
        self.rows = torch.nn.Parameter(scores)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        known = torch.tensor(self.tokens)
        place = torch.arange(input_ids.shape[1])
        numbers = (input_ids[..., None] == known).long().argmax(-1)
        key = (numbers * (len(self.tokens) + 1) ** place).cumsum(-1)
        scores = torch.full((*input_ids.shape, self.config.vocab_size), -1e9, dtype=torch.float64)
        scores[..., self.tokens] = self.rows[place.clamp(max=LONGEST - 1), key % self.rows.shape[1]]
        return CausalLMOutput(logits=scores)

    def log_probs(self, prompt, completion):
        """Of each token of a completion, with a gradient."""
        ids = torch.tensor([[prompt, *completion]])
        scores = self(ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None])[:, 0]


def all_completions(tokens, eos):
    return [
        written
        for length in range(1, LONGEST + 1)
        for written in itertools.product(tokens, repeat=length)
        if eos not in written[:-1] and (written[-1] == eos or length == LONGEST)
    ]


class Bytes:
    """How likely each byte, and the end, is behind a text: a table that no tokenizer is part of."""

    def log_prob(self, letter, before):
        """Of the bytes a and b and the end (None), behind a text."""
        scores = torch.tensor(
            [len(before) * 0.3 - before.count(b"ab"), before.count(b"b") * 0.7, -0.5],
            dtype=torch.float64,
        )
        return scores.log_softmax(-1)[{b"a": 0, b"b": 1, None: 2}[letter]]

    def of_text(self, text, before=b"", ended=True):
        """Of a text, letter by letter, and of its end."""
        total = torch.zeros((), dtype=torch.float64)
        for place in range(len(text)):
            total = total + self.log_prob(text[place : place + 1], before + text[:place])
        return total + self.log_prob(None, before + text) if ended else total


class TokenTable(Teacher):
    """Finds each token as likely as a table has it for the tokens up to it."""

    answers = frozenset({"token_log_probs"})
    vocabulary_size = 1000

    @staticmethod
    def log_prob(ids):
        """Of the last of some tokens."""
        return -0.2 - 3 * random.Random(repr(ids)).random()

    def answer(self, batch, positions, *, kind, logits_backend):
        values = [
            self.log_prob(ids[: place + 2].tolist())
            for ids, mask in zip(batch["input_ids"], positions.mask, strict=True)
            for place in mask.nonzero()[:, 0].tolist()
        ]
        return TokenLogProbs(torch.tensor(values, dtype=torch.float64))


class ByteTeacher(Teacher):
    """Reads rows in the teacher's tokens, and knows them by their bytes alone."""

    answers = frozenset({"token_log_probs"})
    vocabulary_size = len(TEACHER_TOKENIZER)

    def answer(self, batch, positions, *, kind, logits_backend):
        table, values = Bytes(), []
        for ids, mask in zip(batch["input_ids"], positions.mask, strict=True):
            for place in mask.nonzero()[:, 0].tolist():
                before = TEACHER_TOKENIZER.decode(ids[: place + 1]).encode()
                token = int(ids[place + 1])
                ended = token == TEACHER_TOKENIZER.eos_token_id
                text = b"" if ended else TEACHER_TOKENIZER.decode([token]).encode()
                values.append(table.of_text(text, before, ended=ended))
        return TokenLogProbs(torch.stack(values))


def rollout_of_everything(student):
    """A rollout of every completion once, its probability, and the completions."""
    prompt, eos = student.tokens[0], student.tokenizer.eos_token_id
    completions = all_completions(student.tokens, eos)
    rows = len(completions)
    ids, mask = torch.zeros(rows, LONGEST, dtype=torch.long), torch.zeros(rows, LONGEST).bool()
    own = torch.zeros(rows, LONGEST, dtype=torch.float64)
    with torch.no_grad():
        for row, tokens in enumerate(completions):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
            own[row, : len(tokens)] = student.log_probs(prompt, tokens)
    prompts = torch.full((rows, 1), prompt)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "row": torch.arange(rows),
        "sample": torch.arange(rows),
        "prompt": ["a"] * rows,
        "completion": [""] * rows,
    }
    ended = torch.tensor([tokens[-1] == eos for tokens in completions])
    written = Completions(ids, mask, own, own, ended)
    rollout = rollout_batch(batch, written, pad_id=0, group_size=rows)
    return rollout, own.sum(-1).exp(), completions


def everything_written(student):
    """The same, with the log-probability of each text by a table of bytes."""
    rollout, probabilities, completions = rollout_of_everything(student)
    of_text = []
    for tokens in completions:
        ended = tokens[-1] == student.tokenizer.eos_token_id
        text = student.tokenizer.decode(tokens[: len(tokens) - ended]).encode()
        of_text.append(Bytes().of_text(text, b"a", ended=ended))
    return rollout, probabilities, torch.stack(of_text), completions

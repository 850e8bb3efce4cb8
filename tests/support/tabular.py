"""A language model that is a table, so small that all its texts can be written down."""

import itertools

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_kd.fused import TopKAndToken
from lightning_kd.generation import SamplingOptions, rollout_batch
from lightning_kd.generation.completions import Completions
from lightning_kd.normalization import Normalization
from lightning_kd.teachers import Teacher

VOCABULARY, EOS, PROMPT = 18, 1, 2
TOKENS = (0, EOS, 3)
"""What is ever written; all other tokens of the letters' vocabulary have no probability."""
OPTIONS = SamplingOptions(max_new_tokens=3)


class Table(PreTrainedModel):
    """Next-token scores for each prefix of up to four tokens, float64."""

    config_class = PretrainedConfig

    def __init__(self, seed: int) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY, eos_token_id=EOS))
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.nn.Parameter(
            2 * torch.randn(4, 4**4, len(TOKENS), generator=generator, dtype=torch.float64)
        )

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        place = torch.arange(input_ids.shape[1])
        key = (input_ids.clamp(max=3) * 4**place).cumsum(-1)
        scores = torch.full((*input_ids.shape, VOCABULARY), -1e9, dtype=torch.float64)
        scores[..., list(TOKENS)] = self.rows[place.clamp(max=3), key]
        return CausalLMOutput(logits=scores)


def all_completions(longest: int) -> list[tuple[int, ...]]:
    return [
        tokens
        for length in range(1, longest + 1)
        for tokens in itertools.product(TOKENS, repeat=length)
        if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == longest)
    ]


def log_probs(model: Table, completion: tuple[int, ...], temperature: float = 1.0):
    """Log-probability of each token of a completion, with a gradient."""
    ids = torch.tensor([[PROMPT, *completion]])
    scores = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None])[:, 0]


def next_log_probs(model: Table, prefix: tuple[int, ...], temperature: float = 1.0):
    """Log-probabilities of the three tokens after a prefix, with a gradient."""
    scores = model(torch.tensor([[PROMPT, *prefix]])).logits[0, -1][list(TOKENS)]
    return (scores / temperature).log_softmax(-1)


def kl_at(
    student: Table,
    teacher: Table,
    prefix: tuple[int, ...],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
):
    """Reverse KL of the next token after a prefix."""
    own = next_log_probs(student, prefix, student_temperature)
    other = next_log_probs(teacher, prefix, teacher_temperature)
    return (own.exp() * (own - other.detach())).sum()


class Naming(Teacher):
    """A table that names k tokens, and the one that follows."""

    answers = frozenset({"top_k_and_token"})
    vocabulary_size = VOCABULARY

    def __init__(self, table: Table, k: int, temperatures: tuple[float, ...] = (1.0,)) -> None:
        self.table, self.k, self.temperatures = table, k, frozenset(temperatures)

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        scores = self.table(batch["input_ids"]).logits[positions.mask]
        log_probs, places = scores.log_softmax(-1).sort(descending=True)
        tails = {
            tau: (scores / tau).log_softmax(-1).gather(-1, places)[:, self.k :].logsumexp(-1)
            for tau in self.temperatures
        }
        own = scores.log_softmax(-1).gather(-1, positions.targets[:, None])[:, 0]
        return TopKAndToken(places[:, : self.k], log_probs[:, : self.k], tails, label_log_probs=own)


def everything_written(
    student: Table,
    teacher: Table,
    longest: int = 3,
    alpha: float = 0.0,
    temperature: float = 1.0,
):
    """A rollout of every completion once, and its probability under its models."""
    completions = all_completions(longest)
    rows = len(completions)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    own = torch.zeros(rows, longest, dtype=torch.float64)
    mixture = torch.zeros(rows, longest, dtype=torch.float64)
    with torch.no_grad():
        for row, tokens in enumerate(completions):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
            q, p = (log_probs(model, tokens, temperature) for model in (student, teacher))
            own[row, : len(tokens)] = q
            mixture[row, : len(tokens)] = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
    prompts = torch.full((rows, 1), PROMPT)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "row": torch.arange(rows),
        "sample": torch.arange(rows),
        "prompt": ["a"] * rows,
        "completion": [""] * rows,
    }
    written = Completions(ids, mask, own, mixture, torch.ones(rows, dtype=torch.bool))
    return rollout_batch(batch, written, pad_id=0, group_size=rows), mixture.sum(-1).exp()


class Expectation(Normalization):
    """Weighs each row by its probability: the sum over all rows is the expectation."""

    name = "expectation"

    def __init__(self, probabilities) -> None:
        self.probabilities = probabilities

    def row_weights(self, tokens_per_row):
        return self.probabilities

    def count(self, tokens_per_row):
        return torch.ones((), dtype=torch.float64)


class Prepared(Callback):
    """Lets a module see its rollouts, as the callback that writes them does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        with torch.no_grad():
            pl_module.prepare_rollouts([batch], OPTIONS)


def flat_gradient(value, model: Table):
    return F.pad(torch.autograd.grad(value, model.rows)[0].flatten(), (0, 0))

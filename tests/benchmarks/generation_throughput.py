"""Tokens per second beside ``generate``: ``python -m tests.benchmarks.generation_throughput``.

The same model, prompts and lengths, one after the other in every round, in one process; ``generate``
also with the logits that a policy gradient needs, which our sampler always keeps the log-probability
of. Then completions that end where they end: rows that are done cost ``generate`` as much as others.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.generation import SamplingOptions, sample

ROUNDS, ROWS, PROMPT, NEW = 5, 16, 32, 64
SHAPES = {
    "2 M parameters, 512 tokens": {"hidden_size": 192, "num_hidden_layers": 4, "vocab_size": 512},
    "13 M, 32,000 tokens": {"hidden_size": 192, "num_hidden_layers": 4, "vocab_size": 32_000},
    "30 M, 8,000 tokens": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 8_000},
}


def llama(shape: dict[str, int]) -> LlamaForCausalLM:
    """A random model that ends a completion only by chance."""
    torch.manual_seed(0)
    width = shape["hidden_size"]
    config = LlamaConfig(
        **shape,
        intermediate_size=2 * width,
        num_attention_heads=width // 64 or 1,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def ours(model: LlamaForCausalLM, prompts: Tensor, mask: Tensor, eos: int) -> int:
    """Tokens that our sampler writes."""
    written = sample(
        [(model, 1.0)],
        prompts,
        mask,
        SamplingOptions(max_new_tokens=NEW),
        eos_ids={eos},
        pad_id=0,
        seeds=range(len(prompts)),
    )
    return int(written.mask.sum())


def theirs(
    model: LlamaForCausalLM, prompts: Tensor, mask: Tensor, eos: int, *, logits: bool
) -> int:
    """Tokens that ``generate`` writes, up to and including each first EOS."""
    output = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW,
        eos_token_id=eos,
        pad_token_id=0,
        output_logits=logits,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, prompts.shape[1] :]
    if logits:
        torch.stack(output.logits, 1).log_softmax(-1).gather(-1, ids[:, :, None])
    ended_before = (ids == eos).cumsum(-1) - (ids == eos).long()
    return int((ended_before == 0).sum())


def rates(model: LlamaForCausalLM, eos: int, padded: bool) -> dict[str, float]:
    """Median tokens per second of each way over the rounds."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 500, (ROWS, PROMPT), generator=generator)
    mask = torch.ones_like(prompts)
    if padded:
        for row in range(ROWS):
            mask[row, : 2 * row] = 0
    ways: dict[str, Callable[[], int]] = {
        "ours": lambda: ours(model, prompts, mask, eos),
        "generate": lambda: theirs(model, prompts, mask, eos, logits=False),
        "generate with logits": lambda: theirs(model, prompts, mask, eos, logits=True),
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            tokens = way()
            if turn:  # the first round warms up
                measured[name].append(tokens / (time.perf_counter() - started))
    return {name: median(values) for name, values in measured.items()}


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    table = Table("model", "rows", "ours, tokens/s", "of generate", "of generate with logits")
    for name, shape in SHAPES.items():
        model = llama(shape)
        cases = {"equal lengths": (shape["vocab_size"], False)}
        if shape["vocab_size"] == 512:
            cases["ragged ends"] = (7, True)
            with torch.no_grad():  # likely enough to end most rows on the way
                model.lm_head.weight[7] = 0.0
                model.lm_head.weight.mul_(0.3)
        for case, (eos, padded) in cases.items():
            rate = rates(model, eos, padded)
            table.add_row(
                name,
                case,
                f"{rate['ours']:.0f}",
                f"{rate['ours'] / rate['generate']:.2f}",
                f"{rate['ours'] / rate['generate with logits']:.2f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

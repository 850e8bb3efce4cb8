"""Tokens per second beside ``generate``: ``python -m tests.benchmarks.generation_throughput``.

The same model, prompts and lengths, one after the other in every round, in one process; ``generate``
also with the logits that a policy gradient needs, which our sampler always keeps the log-probability
of. Then completions that end where they end: rows that are done cost ``generate`` as much as others.
Last (alone with ``--unequal``) a window of rows of very unequal length, of which a part is generated at
a time: part after part, or with continuous batching. With one thread (``OMP_NUM_THREADS=1``) the time
is that of the processor, which what else runs on it hardly changes.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.generation import (
    CachedSampler,
    Completions,
    ContinuousBatchingSampler,
    Engine,
    Prompts,
    SamplingOptions,
    sample,
)

ROUNDS, ROWS, PROMPT, NEW = 5, 16, 32, 64
WINDOW, START, MEAN, LONGEST = 128, 16, 24, 256
"""Rows whose lengths are unequal, tokens of a prompt, mean and most tokens of a completion."""
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
    model: LlamaForCausalLM,
    prompts: Tensor,
    mask: Tensor,
    eos: int,
    *,
    new: int = NEW,
    logits: bool,
) -> int:
    """Tokens that ``generate`` writes, up to and including each first EOS."""
    output = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=new,
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
    return measured(ways)


def measured(ways: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median tokens per second of each way over the rounds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            started = clock()
            tokens = way()
            if turn:  # the first round warms up
                found[name].append(tokens / (clock() - started))
    return {name: median(values) for name, values in found.items()}


def ends_by_chance(model: LlamaForCausalLM, mean: int, eos: int) -> None:
    """Have a model end at any token with the same probability, after so many tokens in the mean."""
    old = model.lm_head.weight
    head = torch.nn.Linear(old.shape[1], old.shape[0], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        head.weight.copy_(0.3 * old)
        head.weight[eos] = 0.0
        head.bias.zero_()
        head.bias[eos] = math.log(old.shape[0] / mean)
    model.lm_head = head


def unequal_rates(shape: dict[str, int]) -> dict[str, float]:
    """Median tokens per second of a window whose rows end at any token with the same probability.

    Half of the rows have fewer than 17 tokens, one in a hundred more than 110.
    """
    model, eos = llama(shape), 7
    ends_by_chance(model, MEAN, eos)
    ids = torch.randint(8, 500, (WINDOW, START), generator=torch.Generator().manual_seed(0))

    def in_parts(engine: Engine, rows: int) -> int:
        parts = []
        for start in range(0, WINDOW, rows):
            part = ids[start : start + rows]
            prompts = Prompts(part, torch.ones_like(part), frozenset({eos}), pad_id=0)
            parts.append(
                engine.generate(
                    prompts,
                    SamplingOptions(max_new_tokens=LONGEST),
                    seeds=range(start, start + rows),
                    models=[(model, 1.0)],
                )
            )
        return int(Completions.join(parts, 0).mask.sum())

    def by_generate() -> int:
        parts = (ids[start : start + ROWS] for start in range(0, WINDOW, ROWS))
        return sum(
            theirs(model, part, torch.ones_like(part), eos, new=LONGEST, logits=False)
            for part in parts
        )

    return measured(
        {
            "parts": lambda: in_parts(CachedSampler(), ROWS),
            "continuous": lambda: in_parts(ContinuousBatchingSampler(ROWS), WINDOW),
            "together": lambda: in_parts(CachedSampler(), WINDOW),
            "generate": by_generate,
        }
    )


def print_unequal() -> None:
    """Print the table of rows of very unequal length."""
    table = Table(
        f"{WINDOW} rows, {ROWS} at a time",
        "continuous batching, tokens/s",
        "of CachedSampler in parts",
        "of generate in parts",
        f"of CachedSampler, {WINDOW} at a time",
    )
    for name, shape in SHAPES.items():
        rate = unequal_rates(shape)
        own = rate["continuous"]
        of_others = [f"{own / rate[way]:.2f}" for way in ("parts", "generate", "together")]
        table.add_row(name, f"{own:.0f}", *of_others)
    Console(width=110).print(table)


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unequal", action="store_true", help="rows of very unequal length alone")
    if not parser.parse_args().unequal:
        print_equal()
    print_unequal()


def print_equal() -> None:
    """Print the table of rows that are generated together."""
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

"""Completions by the continuous batching of Hugging Face transformers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from lightning_kd.generation.completions import Completions
from lightning_kd.generation.decoder import evaluating
from lightning_kd.generation.engine import Engine
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.prompts import Prompts, check_seeds
from lightning_kd.generation.token_positions import (
    accepted_arguments,
    check_steps,
    check_virtual_tokens,
)
from lightning_kd.generation.transformers_engine import generation_config
from lightning_kd.models.adapters import without_adapters
from lightning_kd.models.sharding import is_sharded
from lightning_kd.option_checks import check_whole, is_number
from lightning_kd.seeding import derive_seed

_PAGE = 256
"""Tokens of a page of the cache: what kernels of flash attention read."""

_DO_READ_PAGES = {"biogpt"}
"""Types of model whose attention reads pages, and of which transformers does not say so."""

_DO_NOT_READ_PAGES = {"diffllama", "doge", "gemma4_text", "hrm_text", "jetmoe", "nemotron"}
"""Those of which it says so, and which do not: attention of their own, layers that are used twice, keys
of another width in each layer."""

_STOPPING = 30.0
"""Seconds that the thread of transformers has to end."""


class TransformersContinuousBatching(Engine):
    """Engine that calls the continuous batching of transformers, with its paged key-value cache.

    Of the rows of a window, ``slots`` are generated at once, and where some have ended, the next ones
    enter. With the student's ``attn_implementation: flash_attention_2`` (or 3) it reads pages in place
    and records CUDA graphs; with another one it copies them at each token. It runs on a CPU too, and
    everywhere in the type of the weights: a ``mixed`` precision of the trainer does not reach it. All
    rows are drawn from one generator, so a row's completion depends on the rows beside it. Not measured
    on a GPU.

    Args:
        slots: Largest number of rows that are generated at once; the cache has room for them.
        timeout: Seconds without a further completion after which generation has failed.

    Raises:
        ValueError: If ``slots`` or ``timeout`` is no positive number; before the first step, if tokens
            are cut off by ``top_k`` or ``top_p``, whose log-probabilities it would record, or if the
            model is in shards, or its attention does not read the pages of transformers.
        RuntimeError: If transformers fails, or takes longer than ``timeout``.
    """

    gives_log_probs = True
    refills_slots = True
    may_change_on_resume = frozenset({"timeout"})

    def __init__(self, slots: int = 64, timeout: float = 600.0) -> None:
        check_whole("slots", slots)
        if not is_number(timeout) or not 0 < timeout < inf:
            raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        self.slots, self.timeout = slots, timeout

    def check_options(self, options: GenerationOptions) -> None:
        """Refuse options that cut off tokens: transformers tells no log-probabilities of all tokens."""
        if options.temperature > 0 and (options.top_k > 0 or options.top_p < 1):
            raise ValueError(
                f"top_k {options.top_k} and top_p {options.top_p}: TransformersContinuousBatching "
                "records log-probabilities of what they leave over, not of the model; set top_k: 0 and "
                "top_p: 1, or choose engine: ContinuousBatchingSampler"
            )

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        """Refuse models in shards, gathered or not, and those whose attention reads no pages."""
        for model in models:
            check_pages(model)
            # Its thread is none that FSDP2 knows.
            if is_sharded(model):
                raise ValueError(
                    f"{type(model).__name__} is in shards, so all processes must run it together, and "
                    "with TransformersContinuousBatching each takes the steps that its own rows need; "
                    "choose engine: CachedSampler"
                )

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Generate with one model; all seeds together decide the samples."""
        ((model, _),) = models
        check_seeds(seeds, len(prompts.ids))
        self.check_options(options)
        self.check_models([model])
        inner = without_adapters(model)
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)
        ]
        device = prompts.ids.device
        with (
            evaluating(model),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            manager = inner.init_continuous_batching(
                generation_config=generation_config(inner, prompts, options),
                continuous_batching_config=self._config(max(map(len, rows)), options, seeds),
            )
            with _running(manager):
                names = manager.add_requests(rows, max_new_tokens=options.max_new_tokens)
                # Only now, so that the same rows are always there in the first step.
                manager.start()
                results = self._collect(manager, len(names))
        done = [results[name] for name in names]
        return _completions(done, prompts, device)

    def _config(
        self, prompt: int, options: GenerationOptions, seeds: Sequence[int]
    ) -> ContinuousBatchingConfig:
        """Return settings with room for the rows that are generated at once, and for no more."""
        slots = min(self.slots, len(seeds))
        length = paged_length(prompt, options.max_new_tokens)
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=slots * length // _PAGE,
            max_batch_tokens=max(slots, prompt),
            max_requests_per_batch=slots,
            return_logprobs=True,
            seed=derive_seed(*seeds),
            # Another kernel than that of training is for the student's options to choose.
            auto_switch_to_flash=False,
        )

    def _collect(self, manager: Any, count: int) -> Mapping[str, Any]:
        """Wait for so many results, by name; each within the timeout of the one before."""
        results: dict[str, Any] = {}
        last = time.monotonic()
        while len(results) < count:
            result = manager.get_result(timeout=min(1.0, self.timeout))
            if result is None:
                running = manager.is_running()
                if running and time.monotonic() - last < self.timeout:
                    continue
                why = (
                    f"gave no further completion within {self.timeout:g} s"
                    if running
                    else f"ended early ({manager.background_thread_status.fatal_error})"
                )
                raise RuntimeError(
                    f"continuous batching of transformers {why}, with {len(results)} of {count} done; "
                    "choose engine: ContinuousBatchingSampler, or a longer timeout"
                )
            if result.error is not None:
                raise RuntimeError(
                    f"continuous batching of transformers failed: {result.error}; choose engine: "
                    "ContinuousBatchingSampler"
                )
            if result.is_finished():
                results[result.request_id] = result
                last = time.monotonic()
        return results


def check_pages(model: PreTrainedModel) -> None:
    """Refuse a model whose attention does not read and write the pages.

    Attention gets them as an argument of the kernels that transformers has registered. What has
    attention of its own passes over them without an error, and sees no token before the last one.

    Raises:
        ValueError: If it is such a model, or the pages do not hold what it keeps.
    """
    check_steps(model)
    check_virtual_tokens(model)
    inner = without_adapters(model)
    config = inner.config.get_text_config(decoder=True)
    obstacles = {
        "its attention is not that of registered kernels, which read the pages": not (
            inner._supports_attention_backend or config.model_type in _DO_READ_PAGES
        )
        or config.model_type in _DO_NOT_READ_PAGES,
        "it takes no position_ids": "position_ids" not in accepted_arguments(model),
        "it keeps a recurrent state": inner._is_stateful,
        "its keys are wider than head_dim (kv_lora_rank)": getattr(config, "kv_lora_rank", None)
        is not None,
        "its heads share one head of keys (multi_query)": getattr(config, "multi_query", False),
    }
    obstacle = next((reason for reason, there in obstacles.items() if there), None)
    if obstacle is None:
        try:
            group_layers_by_attn_type(config)
        except ValueError as error:
            obstacle = f"the pages do not hold what its layers keep ({error})"
    if obstacle is not None:
        raise ValueError(
            f"{type(model).__name__} cannot generate with TransformersContinuousBatching: {obstacle}; "
            "choose engine: CachedSampler"
        )


def paged_length(prompt: int, generated: int) -> int:
    """Return the tokens of a row that the paged cache has room for.

    Args:
        prompt: Tokens of the longest prompt.
        generated: Tokens that follow at most.

    Example:
        >>> paged_length(10, 20), paged_length(300, 200)
        (512, 768)
    """
    return _PAGE * (ceil((prompt + generated) / _PAGE) + 1)


@contextmanager
def _running(manager: Any) -> Iterator[None]:
    """Stop a manager's thread in the end, also where something fails.

    Raises:
        RuntimeError: If it does not stop.
    """
    try:
        yield
    finally:
        manager.stop(block=True, timeout=_STOPPING, hard_stop=True)
        if manager.is_running():
            raise RuntimeError(
                f"continuous batching of transformers did not stop within {_STOPPING:g} s; the process "
                "must be ended"
            )
        manager.destroy()


def _completions(results: Sequence[Any], prompts: Prompts, device: torch.device) -> Completions:
    """Return the completions of rows and their log-probabilities."""
    tokens = [result.generated_tokens for result in results]
    completions = Completions.of_tokens(
        tokens, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id, device=device
    )
    # The default type may be another, by the precision of the trainer.
    log_probs: Tensor = torch.zeros(completions.ids.shape, dtype=torch.float32, device=device)
    log_probs[completions.mask] = torch.tensor(
        [value for result in results for value in result.logprobs],
        dtype=torch.float32,
        device=device,
    )
    return replace(completions, log_probs=log_probs, sampling_log_probs=log_probs)

"""The shape of vLLM's completions: what its clients send, and what they read."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.generation import Completions, GenerationOptions
from lightning_kd.option_checks import is_number
from lightning_kd.seeding import derive_seed
from lightning_kd.serving.fields import flag, integer, number
from lightning_kd.serving.limits import Limits, RefusedError
from lightning_kd.serving.service import CompletionOrder
from lightning_kd.serving.texts import check_texts, token_ids
from lightning_kd.wire import Question

_FIXED: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "stream": False,
    "logprobs": None,
    "stop": None,
    "suffix": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "logit_bias": None,
}
"""Fields of which one value can be had; another would be another answer."""

_MOST_SEED = 2**63


@dataclass(frozen=True)
class CompletionRequest:
    """A request in the shape of ``POST /v1/completions``.

    Attributes:
        prompts: Token ids of each row.
        max_tokens: Longest completion; 0 generates none.
        prompt_log_probs: Tokens whose log-probabilities are told at each position; None tells none.
        options: Of generation.
        seed: Of the completions.
        token_ids: Whether ids are told beside the text.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    prompt_log_probs: int | None
    options: GenerationOptions
    seed: int
    token_ids: bool

    @classmethod
    def read(
        cls, body: Any, tokenizer: PreTrainedTokenizerBase, model: str, limits: Limits
    ) -> "CompletionRequest":
        """Read a request.

        Raises:
            RefusedError: If it is none, or asks for what this server does not do.
        """
        if not isinstance(body, dict):
            raise RefusedError(400, f"the body is a {type(body).__name__}; send a JSON mapping")
        given = dict(body)
        if (named := given.pop("model", model)) != model:
            raise RefusedError(404, f"the model {named!r} is not served here; {model!r} is")
        special = flag(given, "add_special_tokens", True)
        prompts = _prompts(given.pop("prompt", None), tokenizer, special, limits)
        max_tokens = integer(given, "max_tokens", 16, 0, limits.new_tokens)
        told = integer(given, "prompt_logprobs", None, 0, limits.k)
        seed = integer(given, "seed", None, -_MOST_SEED, _MOST_SEED)
        token_ids = flag(given, "return_token_ids", False)
        likeliest = integer(given, "top_k", 0, -1, _MOST_SEED) or 0
        temperature = number(given, "temperature", 1.0)
        top_p = number(given, "top_p", 1.0)
        try:
            options = GenerationOptions(
                max_new_tokens=max(1, max_tokens or 0),
                temperature=temperature,
                top_k=max(0, likeliest),  # vLLM writes all as -1 or 0
                top_p=top_p,
            )
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        given.pop("user", None)
        for name, only in _FIXED.items():
            value = given.pop(name, only)
            if value is not None and (
                value != only or isinstance(value, bool) != isinstance(only, bool)
            ):
                raise RefusedError(400, f"{name} is {value!r}; this server knows only {only!r}")
        if given:
            raise RefusedError(400, f"unknown fields: {', '.join(sorted(map(str, given)))}")
        if max_tokens == 0 and told is None:
            raise RefusedError(
                400, "max_tokens is 0 and prompt_logprobs none: nothing is asked for"
            )
        return cls(
            prompts,
            max_tokens or 0,
            told,
            options,
            secrets.randbits(62) if seed is None else seed,
            token_ids,
        )

    def question(self, pad_id: int) -> Question:
        """Return the question after the most likely tokens at every position but the last."""
        ids = _padded(self.prompts, pad_id)
        real = _padded([[1] * len(prompt) for prompt in self.prompts], 0)
        mask = real.bool()
        mask[:, :-1] &= real[:, 1:].bool()
        mask[:, -1] = False
        targets = ids[:, 1:][mask[:, :-1]]
        k = max(1, self.prompt_log_probs or 0)
        return Question(ids, real, mask, targets, "top_k", k=k, alone=False)

    def order(self, pad_id: int) -> CompletionOrder:
        """Return the order of the completions."""
        reversed_ = [prompt[::-1] for prompt in self.prompts]
        ids = _padded(reversed_, pad_id).flip(-1)
        real = _padded([[1] * len(prompt) for prompt in self.prompts], 0).flip(-1)
        seeds = tuple(derive_seed(self.seed, "completion", row) for row in range(len(self.prompts)))
        return CompletionOrder(ids, real, self.options, seeds)


def reply(
    request: CompletionRequest,
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    answer: Mapping[str, Tensor] | None,
    completions: Completions | None,
) -> dict[str, Any]:
    """Return the reply to a request.

    Args:
        request: The request.
        tokenizer: Decodes tokens.
        model: Its name.
        answer: To the question of the request, if it asks one.
        completions: Of its order, if there is one.
    """
    choices, start, written = [], 0, 0
    for row, prompt in enumerate(request.prompts):
        choice: dict[str, Any] = {"index": row, "text": "", "logprobs": None}
        choice |= {"finish_reason": "length", "stop_reason": None, "prompt_logprobs": None}
        tokens: list[int] = []
        if completions is not None:
            tokens = completions.ids[row][completions.mask[row]].tolist()
            choice["text"] = tokenizer.decode(tokens, skip_special_tokens=True)
            choice["finish_reason"] = "stop" if completions.ended[row] else "length"
        if answer is not None:
            end = start + len(prompt) - 1
            part = {name: tensor[start:end] for name, tensor in answer.items()}
            choice["prompt_logprobs"] = _prompt_log_probs(
                part, prompt, request.prompt_log_probs or 0, tokenizer
            )
            start = end
        if request.token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": list(prompt)}
        written += len(tokens)
        choices.append(choice)
    read = sum(map(len, request.prompts))
    return {
        "id": f"cmpl-{secrets.token_hex(8)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }


def _prompt_log_probs(
    answer: Mapping[str, Tensor],
    prompt: Sequence[int],
    k: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any] | None]:
    """Return an entry for each token of a prompt: the k most likely ones there, and its own."""
    listed: list[dict[str, Any] | None] = [None]
    for ids, log_probs, own, token in zip(
        answer["token_ids"][:, :k].tolist(),
        answer["log_probs"][:, :k].tolist(),
        answer["label_log_probs"].tolist(),
        prompt[1:],
        strict=True,
    ):
        entries = [(i, value, rank) for rank, (i, value) in enumerate(zip(ids, log_probs), 1)]  # noqa: B905
        if token not in ids:
            # Its rank among all is not known: it comes after those that are listed.
            entries.append((token, own, len(ids) + 1))
        listed.append(
            {
                str(i): {"logprob": value, "rank": rank, "decoded_token": tokenizer.decode([i])}
                for i, value, rank in entries
            }
        )
    return listed


def _prompts(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, special: bool, limits: Limits
) -> tuple[tuple[int, ...], ...]:
    """Return token ids of each prompt: of a text, a list of ids, or several of either."""
    alone = isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    )
    several = [prompt] if alone else prompt
    if not isinstance(several, list) or not several:
        raise RefusedError(400, "prompt must be a text, a list of token ids, or a list of these")
    check_texts(several, limits)
    rows = []
    for each in several:
        if isinstance(each, str):
            each = token_ids(each, tokenizer, special)
        if (
            not isinstance(each, list)
            or not each
            or not all(is_number(i, whole=True) and abs(i) < 2**63 for i in each)
        ):
            raise RefusedError(
                400, f"a prompt is {str(each)[:60]}; give text or token ids, not none"
            )
        rows.append(tuple(each))
    return tuple(rows)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

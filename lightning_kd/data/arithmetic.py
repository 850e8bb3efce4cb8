"""The offline task: addition, digit by digit."""

from functools import cache
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_kd.data.datamodule import DistillationData, Split
from lightning_kd.data.encoding import Example
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows
from lightning_kd.option_checks import check_choice
from lightning_kd.seeding import derive_seed
from lightning_kd.tokenization import TokenizerLike

_SIGNS = "0123456789+="

Hint = Literal["none", "solution", "demonstration", "feedback"]

_TASK_SEED = 0
"""Of the split, not of the run: all runs have the same test problems."""


class ArithmeticData(DistillationData):
    """Sums of two numbers, generated: data for trials, offline.

    Numbers are written with their last digit first and filled up with zeros, so that each digit of
    the sum needs only digits that stand before it: ``123 + 989`` is the prompt ``321+989=`` with the
    completion ``2111``. All pairs of numbers are put into one fixed order and dealt out: the first to
    test, the next to validation, the rest to training. No problem is in two splits, and a smaller
    ``train_size`` takes a part of what a larger one does.

    The other options are those of :class:`~lightning_kd.data.DistillationData`.

    Args:
        digits: Of each number, 1 to 3.
        train_size: Training problems. Defaults to all that are left.
        label_noise: Share of the training problems whose answer has one wrong digit, always the same
            problems and digits: data as people write it. Validation and test have none.
        validation_size: Validation problems.
        test_size: Test problems; ``predict`` completes them too.
        hint: What the teacher reads before the prompt, and the student does not: nothing (``none``),
            the problem with its ``solution``, another one with its (``demonstration``), or
            ``feedback``: a wrong answer to the problem, and behind another ``=`` the right one.
        tokenizer: One that has all the signs. Defaults to the task's own.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        *,
        digits: int = 3,
        train_size: int | None = None,
        label_noise: float = 0.0,
        validation_size: int = 1000,
        test_size: int = 1000,
        hint: Hint = "none",
        tokenizer: TokenizerLike | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            tokenizer=arithmetic_tokenizer() if tokenizer is None else tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        if not 1 <= digits <= 3:
            raise ValueError(f"digits is {digits}; it must be 1, 2 or 3")
        problems = 10 ** (2 * digits)
        left = problems - test_size - validation_size
        train_size = left if train_size is None else train_size
        if min(test_size, validation_size, train_size) < 1 or train_size > left:
            raise ValueError(
                f"train_size {train_size}, validation_size {validation_size} and test_size "
                f"{test_size} must be 1 or more and together at most {problems}"
            )
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise is {label_noise}; it is a share, in [0, 1]")
        check_choice("hint", hint, get_args(Hint))
        self.digits, self.label_noise, self.hint = digits, label_noise, hint
        starts = (0, test_size, test_size + validation_size)
        sizes = (test_size, validation_size, train_size)
        test, validation, train = (slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
        self._slices: dict[Split, slice] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": test,
        }

    def rows(self, split: Split) -> Rows:
        """The problems of a split.

        Raises:
            ValueError: If the tokenizer lacks a sign.
        """
        ids = self.tokenizer.convert_tokens_to_ids(list(_SIGNS))
        unknown = {None, self.tokenizer.unk_token_id}
        lacking = [s for s, i in zip(_SIGNS, ids, strict=True) if i in unknown]
        if lacking:
            raise ValueError(
                f"the tokenizer has no token for {', '.join(lacking)}; sums need one for each of "
                f"{_SIGNS}. Leave the tokenizer out to use the task's own"
            )
        noise = self.label_noise if split == "train" else 0.0
        hint = "none" if split == "predict" else self.hint
        problems = _order(self.digits)[self._slices[split]]
        return ArithmeticRows(problems, self.digits, self.tokenizer, noise, hint)


@cache
def _order(digits: int) -> Tensor:
    """Return all problems in the order in which they are dealt out; every split is a view of it."""
    generator = torch.Generator().manual_seed(_TASK_SEED)
    return torch.randperm(10 ** (2 * digits), generator=generator)


class ArithmeticRows:
    """Problems, each the number ``first * 10**digits + second``."""

    def __init__(
        self,
        problems: Tensor,
        digits: int,
        tokenizer: PreTrainedTokenizerBase,
        noise: float,
        hint: Hint = "none",
    ) -> None:
        self.problems, self.digits, self.tokenizer = problems, digits, tokenizer
        self.noise, self.hint = noise, hint
        prompt, completion = problem_text(0, digits)
        self.max_lengths = (len(prompt + completion) + 1, len(prompt))
        told = len(self._hint(0)) + len(prompt)
        self.max_teacher_lengths = (
            None if hint == "none" else (told + self.max_lengths[0] - len(prompt), told)
        )

    def __len__(self) -> int:
        """Problems of the split."""
        return len(self.problems)

    def example(self, row: int, pass_: int) -> Example:
        """The same problem in every pass."""
        problem = int(self.problems[row])
        prompt, completion = problem_text(problem, self.digits)
        draw = derive_seed(_TASK_SEED, "noise", problem)
        if draw % 10_000 < self.noise * 10_000:
            completion = with_a_wrong_digit(completion, draw // 10_000)
        ids = self.tokenizer.convert_tokens_to_ids(list(prompt + completion))
        told = self._hint(row)
        return Example(
            [*ids, self.tokenizer.eos_token_id],
            len(prompt),
            prompt,
            completion,
            teacher_prompt=self.tokenizer.convert_tokens_to_ids(list(told + prompt))
            if told
            else None,
        )

    def _hint(self, row: int) -> str:
        """Return what the teacher reads before the prompt of a row."""
        problem = int(self.problems[row])
        draw = derive_seed(_TASK_SEED, "hint", problem)
        if self.hint == "demonstration":
            other = (row + 1 + draw % max(1, len(self) - 1)) % len(self)
            problem = int(self.problems[other])
        prompt, solution = problem_text(problem, self.digits)
        if self.hint == "feedback":
            return f"{prompt}{with_a_wrong_digit(solution, draw)}={solution}"
        return "" if self.hint == "none" else prompt + solution


def problem_text(problem: int, digits: int) -> tuple[str, str]:
    """Return prompt and completion of a problem.

    Example:
        >>> problem_text(123989, 3)
        ('321+989=', '2111')
    """
    first, second = divmod(problem, 10**digits)
    written = [f"{number:0{digits}}"[::-1] for number in (first, second)]
    return f"{written[0]}+{written[1]}=", f"{first + second:0{digits + 1}}"[::-1]


def with_a_wrong_digit(completion: str, draw: int) -> str:
    """Return the completion with one digit replaced by another, chosen by ``draw``.

    Example:
        >>> with_a_wrong_digit("2111", 6)
        '2131'
    """
    draw, place = divmod(draw, len(completion))
    digit = (int(completion[place]) + 1 + draw % 9) % 10
    return f"{completion[:place]}{digit}{completion[place + 1 :]}"


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """Return a Hugging Face tokenizer with one token for each sign, padding and EOS.

    Example:
        >>> tokenizer = arithmetic_tokenizer()
        >>> tokenizer.decode(tokenizer("321+989=")["input_ids"])
        '321+989='
    """
    signs = ["<pad>", "<eos>", *_SIGNS]
    backend = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

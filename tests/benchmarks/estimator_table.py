"""Estimators of the reverse KL on a real pair: ``python -m tests.benchmarks.estimator_table``.

A teacher that others have trained on short stories, and a small student that the command trains on
them for about a minute. The student writes; at each of its positions every token is taken in turn for
the sampled one, so that mean and variance of each estimator are exact, in the student's logits. With
``--write FILE`` the table is put between the two marks of a document such as ``docs/on_policy.md``.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_kd import SFT, CorrectedTopK, DocumentData, SampledToken, StudentSpec
from lightning_kd.comparison.documents import replace_between_marks
from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import (
    DivergenceTerm,
    FullDistribution,
    LogitsChunk,
    MaterializedLogits,
    TeacherAnswer,
    TokenLogProbs,
    TokenTerm,
    TopK,
    TopKAndToken,
)
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.generation import SamplingOptions, generate
from lightning_kd.modules.reverse_kl_estimators import ReverseKLEstimator, SampledPositions
from lightning_kd.policy import ImportanceSampling
from tests.benchmarks.stories import DATA, STORIES, STUDENT, head

STEPS, ROWS, LENGTH = 300, 8, 65
KS = (4, 16, 64)

Estimator = Callable[[Tensor, Tensor, int], tuple[TokenTerm, TeacherAnswer | None]]
"""Logits of student and teacher, one row for each token that may be sampled, and k -> the loss."""


def estimator(
    chosen: ReverseKLEstimator, answer: Callable[[Tensor, int], TeacherAnswer]
) -> Estimator:
    """One of the library's."""

    def of(student: Tensor, teacher: Tensor, k: int) -> tuple[TokenTerm, TeacherAnswer]:
        own, other = (logits.log_softmax(-1).diagonal() for logits in (student, teacher))
        given = answer(teacher, k)
        positions = SampledPositions(
            tokens=torch.arange(len(student)),
            log_probs=own,
            sampling_log_probs=own,
            teacher_log_probs=other,
            later=torch.zeros_like(own),
            answer=given,
            student_temperature=1.0,
            teacher_temperature=1.0,
        )
        return chosen.loss(positions, ImportanceSampling(), 1.0), given

    return of


def named(teacher: Tensor, k: int) -> TopKAndToken:
    """The k most likely tokens, and the one that is sampled."""
    whole = FullDistribution((MaterializedLogits(teacher),))
    return top_k_of(whole, torch.arange(len(teacher)), k)


def events_only(student: Tensor, teacher: Tensor, k: int) -> tuple[TokenTerm, TeacherAnswer]:
    """The reverse KL over k tokens and one event for the rest."""
    return DivergenceTerm(ReverseKL()), named(teacher, k)


def sampled_or_not(student: Tensor, teacher: Tensor, k: int) -> tuple[TokenTerm, TeacherAnswer]:
    """The reverse KL over two events: the sampled token, and every other."""
    own = teacher.log_softmax(-1).diagonal()[:, None]
    return DivergenceTerm(ReverseKL()), TopK(torch.arange(len(teacher))[:, None], own)


class Truncated(TokenTerm):
    """The summands of the reverse KL at k tokens, and nothing for the rest."""

    def __init__(self, answer: TopK) -> None:
        self.answer = answer

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum."""
        own = chunk.student().gather(-1, self.answer.token_ids)
        return (own.exp() * (own - self.answer.log_probs)).sum(-1)


def truncated(student: Tensor, teacher: Tensor, k: int) -> tuple[TokenTerm, None]:
    """The reverse KL without its tail."""
    return Truncated(named(teacher, k)), None


ESTIMATORS: dict[str, tuple[bool, Estimator]] = {
    "the sampled token, `SampledToken`": (
        False,
        estimator(SampledToken(), lambda t, k: TokenLogProbs(t.log_softmax(-1).diagonal())),
    ),
    "corrected top-k, `CorrectedTopK`": (True, estimator(CorrectedTopK(), named)),
    "k tokens and the rest as one event": (True, events_only),
    "the sampled token or another, two events (TRL's server)": (False, sampled_or_not),
    "k tokens and no rest (as verl's)": (True, truncated),
}
"""Whether it depends on k, and the estimator."""


def train(tokenizer: str, stories: Path, steps: int) -> PreTrainedModel:
    """Train a small student on the first stories of a file."""
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        part = head(stories, STORIES, Path(folder) / "part.jsonl")
        data = DocumentData(
            tokenizer=tokenizer, train=part, max_length=128, truncation="right", batch_size=16
        )
        module = SFT(
            student=StudentSpec(config=STUDENT),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        )
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, enable_model_summary=False, **off
        )
        trainer.fit(module, datamodule=data)
    return module.student.eval()


@torch.no_grad()
def written(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: str) -> list[Tensor]:
    """Logits of student and teacher at each token that the student writes, float64."""
    prompts = torch.full((ROWS, 1), AutoTokenizer.from_pretrained(tokenizer).bos_token_id)
    options = SamplingOptions(max_new_tokens=LENGTH - 1)
    completions = generate(
        student,
        AutoTokenizer.from_pretrained(tokenizer),
        prompts,
        torch.ones_like(prompts),
        options,
        seeds=range(ROWS),
    )
    ids = torch.cat([prompts, completions.ids], -1)[:, :-1]
    return [model(ids).logits[completions.mask].double() for model in (student, teacher)]


def measure(
    make: Estimator, student: Tensor, teacher: Tensor, k: int
) -> tuple[float, float, float]:
    """Bias and deviation over the gradient's norm, and the cosine of expectation and gradient.

    Args:
        make: The estimator.
        student: Logits, ``(N, V)``.
        teacher: Logits, ``(N, V)``.
        k: Tokens that the teacher names.
    """
    width = student.shape[1]
    sums = torch.zeros(5, dtype=torch.float64)
    for own, other in zip(student, teacher, strict=True):
        rows, q = slice(0, width), own.softmax(-1)
        term, answer = make(own.expand(width, -1), other.expand(width, -1), k)
        seen = answer.rows(rows, (), width) if answer is not None and term.needs_teacher else None
        _, each = term.values_and_gradient(LogitsChunk(rows, own.expand(width, -1), seen))
        mean = q @ each
        ratio = own.log_softmax(-1) - other.log_softmax(-1)
        exact = q * (ratio - (q * ratio).sum())  # of the reverse KL over all tokens
        sums += torch.stack(
            [
                exact.square().sum(),
                mean.square().sum(),
                (mean * exact).sum(),
                (mean - exact).square().sum(),
                q @ (each - mean).square().sum(-1),
            ]
        )
    norm, of_mean, product, bias, variance = sums.tolist()
    return (bias / norm) ** 0.5, (variance / norm) ** 0.5, product / (norm * of_mean) ** 0.5


def table(student: Tensor, teacher: Tensor) -> str:
    """The table of all estimators."""
    ordered = teacher.softmax(-1).sort(-1, descending=True).values
    lines = [
        "| estimator | k (teacher's mass there) | unbiased | bias / norm | cosine | deviation / norm |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (has_k, make) in ESTIMATORS.items():
        for k in KS if has_k else (1,):
            bias, deviation, cosine = measure(make, student, teacher, k)
            mass = f"{k} ({ordered[:, :k].sum(-1).mean():.2f})" if has_k else ""
            unbiased = "yes" if bias < 1e-9 else "no"
            # Of what is exactly nothing, round-off is left.
            shown = [f"{value:.2f}" if value > 1e-6 else "0" for value in (bias, deviation)]
            lines.append(
                f"| {name} | {mass} | {unbiased} | {shown[0]} | {cosine:.3f} | {shown[1]} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with models and tinystories"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the student")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    source = str(given.data / "models" / "stories260K")
    teacher = AutoModelForCausalLM.from_pretrained(source).eval()
    student = train(source, given.data / "tinystories" / "train.jsonl", given.steps)
    made = table(*written(student, teacher, source))
    if given.write is None:
        print(made)
        return
    try:
        replace_between_marks(given.write, "estimator table", made)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

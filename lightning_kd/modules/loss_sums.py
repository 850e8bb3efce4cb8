"""Sums of a loss over the micro-batches of an optimizer step, or of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.modules.loss import MicroBatchLoss
from lightning_kd.normalization import check_counts, divisor


class LossSums:
    """Sums over the micro-batches of one optimizer step, or of one evaluation.

    Args:
        terms: Names of the terms.

    Raises:
        ValueError: If two have one name, or one has the name of the whole.
    """

    def __init__(self, terms: tuple[str, ...]) -> None:
        if len({"loss", *terms}) <= len(terms):
            raise ValueError(
                f"the terms are {terms}; give each a name of its own, and not loss, which is the "
                "name of their sum"
            )
        self.terms = terms
        self._sums: Tensor | None = None

    def add(self, loss: MicroBatchLoss) -> None:
        """Add a micro-batch; nothing is copied off its device.

        The sums are float64, so that their order (which a different cut into micro-batches changes)
        does not show.
        """
        tokens = loss.positions.tokens_per_row.sum()
        head = torch.stack([loss.count.double(), tokens.double()])
        row = torch.cat([head, *(loss.terms[name].sums() for name in self.terms)])
        self._sums = row if self._sums is None else self._sums + row

    def open(self, device: torch.device) -> None:
        """Let a rank to which nothing was added take part with zeros."""
        if self._sums is None:
            self._sums = torch.zeros(2 + 3 * len(self.terms), dtype=torch.float64, device=device)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> "ReducedSums":
        """Add up over all ranks, in one call, and start again from zero; nothing leaves the device.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._sums is None:
            raise RuntimeError(
                "nothing was added up in this optimizer step: an own training_step has to call "
                "super().training_step(batch, batch_idx); a method writes loss_terms or score instead"
            )
        sums, self._sums = self._sums, None
        return ReducedSums(self.terms, all_reduce(sums))

    def close(self, all_reduce: Callable[[Tensor], Tensor]) -> "ReducedLoss":
        """Add up as :meth:`reduce` does, and read the result.

        Raises:
            RuntimeError: If nothing was added.
            ValueError: If a normalization has counted nothing where there is something to divide.
        """
        return self.reduce(all_reduce).read()


@dataclass(frozen=True)
class ReducedSums:
    """Sums of one optimizer step, or one evaluation, over all ranks."""

    terms: tuple[str, ...]
    sums: Tensor
    """Count and tokens; of each term the weighted sum, it times the coefficient, and the count:
    ``(2 + 3 terms,)``, float64."""

    @property
    def divisor(self) -> Tensor:
        """The count, ``()``; 1 where nothing was scored."""
        return divisor(self.sums[0])

    def on_host(self, sums: Tensor) -> "ReducedSums":
        """Return the same of sums that have been copied to the host."""
        return ReducedSums(self.terms, sums)

    def means(self) -> dict[str, Tensor]:
        """Return the loss and each term, divided, on the device of the sums: ``()`` each."""
        values, parts, counts = self.sums[2:].reshape(-1, 3).unbind(-1)
        counts = divisor(counts)
        of_terms = zip(self.terms, (values / counts).unbind(), strict=True)
        return {"loss": (parts / counts).sum(), **dict(of_terms)}

    def read(self) -> "ReducedLoss":
        """Read the sums; the host waits for them, where they are on an accelerator.

        Raises:
            ValueError: If a normalization has counted nothing where there is something to divide.
        """
        here = self.on_host(self.sums.cpu())
        values, _, counts = here.sums[2:].reshape(-1, 3).unbind(-1)
        check_counts("the loss", *here.sums[:2, None])
        check_counts(f"the terms {', '.join(self.terms)}", counts, values)
        means, counts = here.means(), divisor(counts)
        row = torch.stack([here.divisor, here.sums[1], *means.values()])
        count, tokens, *of_all = torch.cat([row, counts]).tolist()
        own = dict(zip(self.terms, of_all[len(means) :], strict=True))
        return ReducedLoss(count, int(tokens), dict(zip(means, of_all, strict=False)), own)


@dataclass(frozen=True)
class ReducedLoss:
    """Loss and terms of one optimizer step, or one evaluation, over all ranks."""

    divisor: float
    """The count; 1 where nothing was scored, so that the loss is 0 and not 0/0."""
    tokens: int
    """Scored tokens."""
    means: dict[str, float]
    """The loss and each term, divided."""
    counts: dict[str, float]
    """The divisor of each term."""

"""The divisor of a peer's on-policy loss, to compare with."""

from collections.abc import Mapping
from dataclasses import replace

from lightning_kd import GKD, Batch, TokenMean
from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.modules import LossTerm, Scores


class PeerDivisorGKD(GKD):
    r"""GKD whose loss is divided as TRL's ``GKDTrainer`` (1.16) divides it, for a comparison.

    .. math:: L = \sum_b \sum_{t \in b} \ell_{b,t} \,/\, N

    where the sum is over the tokens that are scored, those of the completions that a model has written,
    and :math:`N` is ``num_items_in_batch``: the labels that the data set's completions had in the step,
    none of which is scored. So a step whose completions are half as long as the data's has half the
    gradient of the mean over tokens. Without generated completions both are the same.

    Raises:
        ValueError: If a step has several micro-batches or processes, over which this does not count, or
            the normalization is another than ``token``.
    """

    def on_fit_start(self) -> None:
        """Refuse what would be divided otherwise."""
        super().on_fit_start()
        accumulate, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if accumulate > 1 or processes > 1 or type(self.normalization) is not TokenMean:
            raise ValueError(
                f"PeerDivisorGKD got accumulate_grad_batches {accumulate}, {processes} process(es) and "
                f"the normalization {self.normalization!r}; it needs 1, 1 and token"
            )

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the divergence, times scored tokens over tokens of the data.

        Raises:
            ValueError: If the data has no completions, by which the peer would divide.
        """
        window, place = self.trainer.train_dataloader.window_of(batch)  # as the data had it
        of_data = int((window[place]["labels"] != IGNORE_INDEX).sum())
        if of_data == 0:
            raise ValueError(
                "no completion of the data has a label in this step, and the peer's loss is divided by "
                "their number; give data with completions"
            )
        ratio = int(self.positions(batch).tokens_per_row.sum()) / of_data
        return {
            name: replace(term, coefficient=term.coefficient * ratio)
            for name, term in super().loss_terms(batch, scores).items()
        }

"""Which texts a teacher can be asked about."""

from collections.abc import Iterable

from lightning_kd.batch import Batch
from lightning_kd.resuming import Plain
from lightning_kd.scoring import ScoredPositions


class UnreadableRowError(ValueError):
    """A row of a run's texts that a teacher cannot be asked about.

    Args:
        row: Its number in the split.
        reason: What is wrong with it, and what to do.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


class TextCoverage:
    """What answers about any text, unless a subclass says otherwise."""

    columns: frozenset[str] = frozenset()
    """Columns of ``batch["extra"]`` that its answers depend on; a cache knows its rows by them."""

    @property
    def answers_any_text(self) -> bool:
        """Whether it can be asked about what a model has generated just now, too."""
        return True

    @property
    def looks_at_texts(self) -> bool:
        """Whether :meth:`check_texts` is called: by default, where it knows only some."""
        return not self.answers_any_text

    def check_precision(self, precision: str) -> None:
        """Hear of the run's precision, before the first step, if :attr:`answers_any_text` is false.

        Args:
            precision: As the trainer has it.
        """

    def check_texts(
        self, texts: Iterable[tuple[Batch, ScoredPositions]], encoding: Plain = None
    ) -> None:
        """Validate, before the first step, that it can answer about the texts of a run.

        It is called if :attr:`looks_at_texts` is true.

        Args:
            texts: Batches of the run's texts with their scored positions, each text once.
            encoding: Options of the data, by :func:`~lightning_kd.resuming.describe`.

        Raises:
            ValueError: If it cannot answer about one; an :class:`UnreadableRowError` has the place of
                the row named before its message.
        """

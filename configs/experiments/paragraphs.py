"""The opening paragraphs of stories: real text whose ends a model without an end of text can write."""

from collections.abc import Sequence

import datasets

from lightning_kd import DocumentData
from lightning_kd.data.datamodule import Split
from lightning_kd.evaluation import MeanScore


class OpeningParagraphs(DocumentData):
    """The first paragraph of each document that has several, with the line break that ends it.

    A teacher of whole stories knows where a paragraph ends; with the line break as the model's
    ``eos_token_id`` a completion ends there. Documents of one paragraph are left out.
    """

    def load(self, split: Split) -> datasets.Dataset | None:
        """The paragraphs of a split."""
        documents = super().load(split)
        if documents is None:
            return None
        name = self.text_column
        several = documents.filter(lambda row: "\n" in row[name].strip())
        return several.map(lambda row: {name: row[name].strip().partition("\n")[0] + "\n"})


class ParagraphLength(MeanScore):
    """How long completions are, in characters, and which share of them ends by itself."""

    names = ("characters", "ended")
    needs_references = False

    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """Characters, and 1 where the line break was written."""
        return [len(completion), completion.endswith("\n")]

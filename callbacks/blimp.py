"""Evaluation of a student on minimal pairs of sentences."""

from collections.abc import Collection

import lightning as L

from lightning_kd.callbacks.evaluations import Stage
from lightning_kd.callbacks.occasional import OccasionalEvaluation
from lightning_kd.callbacks.text_scores import log_likelihoods
from lightning_kd.data.encoding import encode_documents
from lightning_kd.evaluation.minimal_pairs import (
    MinimalPairs,
    accuracies,
    group_names,
    read_minimal_pairs,
)
from lightning_kd.models.positions import check_length
from lightning_kd.modules import DistillationModule

_SANITY_PAIRS = 2


class BLiMP(OccasionalEvaluation):
    r"""Log how often an acceptable sentence is likelier than its unacceptable twin.

    A sentence's score is :math:`\sum_t \log q(y_t \mid y_{<t})`, over its tokens behind what the
    tokenizer begins a text with: with a BOS that is all of them; without, the first token only begins
    the text and is not scored. No EOS is appended. A pair counts where the acceptable sentence has the
    higher score; a tie does not, as of seven of BLiMP's 67,000, which are of two equal sentences. Where
    a score is NaN, so are the numbers that it is part of.

    Logs ``val/blimp``, the mean over the files, and the means over the files of each field
    (``val/blimp_morphology``) and each phenomenon (``val/blimp_island_effects``), as far as the files
    name them; ``test/`` in a test. The sanity check has two pairs of each file.

    Args:
        path: Directory of BLiMP's ``.jsonl`` files; other minimal pairs need ``sentence_good`` and
            ``sentence_bad`` on each line.
        limit: Pairs of each file, the first ones. Defaults to all.
        every_n_validations: Validations of a fit from one with BLiMP to the next, the first included; 0
            leaves it to the test. What watches ``val/blimp`` decides in those with BLiMP alone.
        batch_size: Sentences that are scored together, of about one length.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Warstadt et al., *BLiMP: The Benchmark of Linguistic Minimal Pairs for English*, TACL 2020.
        https://arxiv.org/abs/1912.00582
    """

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        every_n_validations: int = 1,
        batch_size: int = 64,
    ) -> None:
        super().__init__(every_n_validations)
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.path, self.limit, self.batch_size = path, limit, batch_size
        self._files: list[MinimalPairs] = []
        self._tokens: dict[str, list[int]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the pairs.

        Raises:
            ValueError: If there are none.
        """
        if stage != "predict":
            self._files = [file.first(self.limit) for file in read_minimal_pairs(self.path)]

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Tokenize the sentences.

        Raises:
            ValueError: If one is too long for the student, or nothing of it can be scored; see also
                :meth:`~lightning_kd.callbacks.occasional.OccasionalEvaluation.check`.
        """
        super().check(trainer, module, stage)
        assert isinstance(module, DistillationModule)
        sentences = [text for file in self._files for text in (*file.good, *file.bad)]
        encoded = encode_documents(sentences, module.tokenizer, add_eos=False)
        for text, ids in zip(sentences, encoded, strict=True):
            if len(ids) < 2:
                raise ValueError(
                    f"the sentence {text!r} of {self.path} is one token, of which nothing is scored, "
                    "for the tokenizer begins no text with a BOS; leave the pair out"
                )
        check_length({"student": module.student}, max(map(len, encoded)), "sentences of BLiMP")
        self._tokens = dict(zip(sentences, encoded, strict=True))

    def names(self) -> Collection[str]:
        """Return ``blimp`` and the name of each group of files."""
        return group_names(self._files)

    def measures(self, name: str) -> bool:
        """Return whether a name is ``blimp``, or that of a field or phenomenon."""
        return name == "blimp" or name.startswith("blimp_")

    def evaluate(self, module: L.LightningModule, *, is_trial: bool) -> dict[str, float]:
        """Score the pairs, a few of each file in a trial."""
        assert isinstance(module, DistillationModule)
        files = [file.first(_SANITY_PAIRS if is_trial else None) for file in self._files]
        good = [text for file in files for text in file.good]
        bad = [text for file in files for text in file.bad]
        # Each once: in two batches equal sentences would differ by round-off.
        places = {text: place for place, text in enumerate(dict.fromkeys(good + bad))}
        texts = [self._tokens[text] for text in places]
        scores = log_likelihoods(module, texts, self.batch_size)
        of_good, of_bad = (scores[[places[text] for text in side]] for side in (good, bad))
        return accuracies(files, of_good, of_bad)

"""A teacher that has said everything already, on disk."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch, has_prompts
from lightning_kd.cache import CacheReader, MissingRowError, row_keys
from lightning_kd.devices import to_device
from lightning_kd.fused import AnswerKind, TeacherAnswer
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.resuming import SHOWN, Plain, differences, tokenizer_digest
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.contract import Ability, Teacher, TeacherUnavailableError
from lightning_kd.teachers.payloads import make_payload

_BEGINNING = 60
"""Characters of a text that an error shows."""


class CachedTeacher(Teacher):
    """What a teacher has said about the texts of a data set, read from files.

    ``lightning-kd cache`` writes them. Rows are known by their token ids and scored positions, so the
    data may come in another order, in other batches and on any number of processes; a row that the
    teacher was not asked about is refused before the first step. It cannot answer for what a model
    generates on the way. Of the kinds of answers it gives those that the cache's kind tells.

    Args:
        dirpath: Directory that ``lightning-kd cache`` has written.

    Raises:
        ValueError: If there is no complete cache; in a run, if it is of another tokenizer or chat
            template, rows of the data are not in it, or a file has changed.
    """

    answers: frozenset[Ability] = frozenset(
        {"full_distribution", "top_k", "top_k_and_token", "sampled"}
    )

    may_change_on_resume = frozenset({"dirpath"})

    is_remote = True

    def __init__(self, dirpath: str) -> None:
        self.dirpath = dirpath
        self._reader = CacheReader(Path(dirpath).expanduser())
        about = self._reader.manifest.about
        self._payload = make_payload(about["kind"], about["options"])
        self.answers = self._payload.answers
        self.temperatures = self._payload.temperatures
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def vocabulary_size(self) -> int:
        """The teacher's, whose answers these are."""
        return int(self._reader.manifest.about["vocabulary_size"])

    @property
    def answers_any_text(self) -> bool:
        """No: it knows the texts that it was written for."""
        return False

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """Those that the teacher has read, by which rows are known beside their tokens."""
        return frozenset(self._reader.manifest.about.get("columns", ()))

    def resume_settings(self) -> dict[str, Any]:
        """Return what the cache is of: teacher, tokenizer and options."""
        about = self._reader.manifest.about
        names = ("kind", "options", "teacher", "tokenizer", "vocabulary_size", "precision")
        return super().resume_settings() | {"cache": {name: about[name] for name in names}}

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Compare the tokenizer, and map the files.

        Raises:
            ValueError: If the tokenizer or its chat template is another one, or a file is missing,
                cut short or damaged.
        """
        theirs, ours = self._reader.manifest.about["tokenizer"], tokenizer_digest(tokenizer)
        if theirs != ours:
            raise ValueError(
                f"the cache {self.dirpath} was written with another tokenizer, or another chat "
                f"template, than the data's ({theirs}, now {ours}): its tokens would stand for other "
                "text. Take that tokenizer, or write a cache with this one"
            )
        self._tokenizer = tokenizer
        self._reader.open()
        self._shared = {name: to_device(t, device) for name, t in self._reader.head().items()}

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind,
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Read what the teacher has said about these rows.

        Raises:
            TeacherUnavailableError: If a row is not in the cache, or its bytes have changed.
        """
        device = batch["input_ids"].device
        try:
            with self._naming_rows(batch):
                planes = self._reader.planes_of(row_keys(batch, positions, self.columns))
        except ValueError as error:
            raise TeacherUnavailableError(str(error)) from error
        planes = {name: to_device(plane, device) for name, plane in planes.items()}
        layout = self._reader.manifest.about["layout"]
        return self._payload.answer(planes, self._shared, layout, kind)

    def check_precision(self, precision: str) -> None:
        """Warn of another precision than the teacher has answered in."""
        written = self._reader.manifest.about["precision"]
        if written != precision:
            rank_zero_warn(
                f"the cache {self.dirpath} was written with trainer.precision {written}, and this run "
                f"has {precision}: its losses are not those of a run with the teacher beside it. For "
                f"these, write a cache with --trainer.precision {precision}"
            )

    def check_texts(
        self, texts: Iterable[tuple[Batch, ScoredPositions]], encoding: Plain = None
    ) -> None:
        """Look for every row.

        Raises:
            ValueError: If one is not in the cache.
        """
        for batch, positions in texts:
            with self._naming_rows(batch, encoding):
                self._reader.check_keys(row_keys(batch, positions, self.columns))

    @contextmanager
    def _naming_rows(self, batch: Batch, encoding: Plain = None) -> Iterator[None]:
        try:
            yield
        except MissingRowError as error:
            row = int(batch["row"][error.place])
            cause = (
                "its text was another one when the cache was written, or was not among the data, or "
                "other tokens of it are scored"
            )
            if self.columns:
                cause += f", or its {' or '.join(sorted(self.columns))} was another one"
            changed = list(differences(self._reader.manifest.about["data"], encoding))
            if encoding is not None and changed:
                cause = (
                    f"it was written with other options of the data: {'; '.join(changed[:SHOWN])}"
                )
            raise ValueError(
                f"row {row} ({self._beginning(batch, error.place)!r}) is not in the cache "
                f"{self.dirpath}: {cause}. Use the data and options as they were, or write a cache for "
                "these"
            ) from error

    def _beginning(self, batch: Batch, place: int) -> str:
        if has_prompts(batch):
            return f"{batch['prompt'][place]}{batch['completion'][place]}"[:_BEGINNING]
        assert self._tokenizer is not None  # prepare() comes first
        ids = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        return str(self._tokenizer.decode(ids[:_BEGINNING]))[:_BEGINNING]

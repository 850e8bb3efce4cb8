"""Several teachers, each for its own rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_kd.batch import FILLER_ROW, Batch
from lightning_kd.fused import AnswerKind, FullDistribution, RoutedLogits
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.local import LocalModels


class RoutedTeacher(LocalModels):
    """Several frozen models; a column of the data says which of them teaches a row.

    Args:
        members: A model for each value of the column.
        column: A column of the data module's ``extra_columns``.
        placement: Of every member, as :class:`~lightning_kd.teachers.LocalTeacher` has it; not
            ``sharded``.

    Raises:
        ValueError: If there are no members, or the placement is not one; in a run, if a row names
            none of them.

    References:
        Lu and Thinking Machines Lab, *On-Policy Distillation*, 2025 (several teachers, one for each
        data set). https://thinkingmachines.ai/blog/on-policy-distillation/
    """

    def __init__(
        self,
        members: dict[str, ModelSpec],
        *,
        column: str = "teacher",
        placement: str = "replicated",
    ) -> None:
        super().__init__(placement=placement)
        if not members:
            raise ValueError("a routed teacher needs at least one member; got an empty mapping")
        if placement == "sharded":
            raise ValueError(
                "placement: sharded needs all processes for every member, but each process asks the "
                "teachers of its own rows; use replicated or offloaded"
            )
        self.members, self.column = members, column

    @property
    def sources(self) -> Mapping[str, ModelSpec]:
        """The members."""
        return {f"teacher {name!r}": member for name, member in self.members.items()}

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> FullDistribution:
        """Run each model on its own rows."""
        present, routes = torch.unique(self._routes(batch), return_inverse=True)
        sources = []
        for number, member in enumerate(present.tolist()):
            rows = (routes == number).nonzero()[:, 0]
            picked: Batch = {
                **batch,
                "input_ids": batch["input_ids"][rows],
                "attention_mask": batch["attention_mask"][rows],
            }
            own = ScoredPositions(positions.mask[rows], positions.targets)
            sources.append(self._read(self.models[member], picked, own, logits_backend))
        narrow = tuple(source.narrowed(self.vocabulary_size) for source in sources)
        routed = RoutedLogits(narrow, routes[positions.rows])
        return FullDistribution((routed,), self.log_probs)

    def _routes(self, batch: Batch) -> Tensor:
        """The number of each row's teacher, ``(B,)``."""
        names = batch.get("extra", {}).get(self.column)
        if names is None:
            raise ValueError(
                f"the rows have no column {self.column!r} that says which teacher is theirs; name "
                f"it in data.extra_columns (there are {sorted(batch.get('extra', {}))})"
            )
        numbers = {name: number for number, name in enumerate(self.members)}
        for name, row in zip(names, batch["row"].tolist(), strict=True):
            if name not in numbers and row != FILLER_ROW:
                raise ValueError(
                    f"row {row} asks for the teacher {name!r}; there are {', '.join(numbers)}"
                )
        routes = [numbers.get(name, 0) for name in names]
        return torch.tensor(routes, device=batch["input_ids"].device)

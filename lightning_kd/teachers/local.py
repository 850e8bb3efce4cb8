"""Frozen models that say how likely each next token is."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from math import isfinite, log
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, FullDistribution, LazyLogits, single_model_log_probs
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.model_spec import DTypeName, ModelSpec
from lightning_kd.models.placement import check_placement, on_compute_device, place_model
from lightning_kd.models.sharding import is_sharded
from lightning_kd.models.vocabulary import (
    VocabularyPolicy,
    check_ids,
    check_tokenizers,
    vocabulary_size,
)
from lightning_kd.resuming import digest
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.contract import Ability, Teacher

Averaging = Literal["logits", "probabilities", "log_probs"]


class LocalModels(Teacher):
    """A teacher that runs frozen models in this process, all placed alike.

    Args:
        placement: Of every model, as :class:`LocalTeacher` has it.
    """

    answers: frozenset[Ability] = frozenset({"full_distribution"})

    may_change_on_resume = frozenset({"placement"})

    models: list[PreTrainedModel]
    """The frozen models, empty until :meth:`prepare`."""

    def __init__(self, *, placement: str = "replicated") -> None:
        self._keep(placement)

    def _keep(self, placement: str) -> None:
        check_placement(placement)
        self.placement = placement
        self.models = []
        self._weights: list[str] = []

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, ModelSpec]:
        """Where each model comes from, by its role."""

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """The models, by role."""
        return dict(zip(self.sources, self.models, strict=False))

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Load, check, freeze and place the models; a second call only places them.

        Args:
            tokenizer: The data's.
            device: Of the student, on this process.
            policy: What happens to a wider vocabulary.
            mesh: The processes that share weights; None where none do.

        Raises:
            ValueError: If a model cannot be had, does not fit the tokenizer, or cannot be placed.
        """
        if not self.models:
            self.models = [
                frozen(source, tokenizer, role, policy) for role, source in self.sources.items()
            ]
            # Before a process has no more than its share of them.
            self._weights = [digest(model.named_parameters()) for model in self.models]
        for model in self.models:
            if not is_sharded(model):
                place_model(model, self.placement, device, mesh)

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments and, of the models that are loaded, what they compute."""
        models = [
            {"config": model.config, "weights": weights}
            for model, weights in zip(self.models, self._weights, strict=True)
        ]
        return super().resume_settings() | {"models": models}

    def log_probs(self, logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the next token, from each model's logits: ``(N, V)``."""
        return single_model_log_probs(logits, temperature)

    @property
    def vocabulary_size(self) -> int:
        """Width of the narrowest model's logits."""
        return min(vocabulary_size(model) for model in self.models)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> FullDistribution:
        """Run the models on a batch and return their logits at the scored positions."""
        logits = tuple(self._read(model, batch, positions, logits_backend) for model in self.models)
        return FullDistribution(logits, self.log_probs)

    def _read(
        self,
        model: PreTrainedModel,
        batch: Batch,
        scored: ScoredPositions,
        logits_backend: LogitsBackend,
    ) -> LazyLogits:
        """Run a model where it works; what it says comes back to where the batch is."""
        here = batch["input_ids"].device
        with on_compute_device(model, self.placement, here) as there:
            moved: Batch = {
                **batch,
                "input_ids": batch["input_ids"].to(there),
                "attention_mask": batch["attention_mask"].to(there),
            }
            positions = ScoredPositions(scored.mask.to(there), scored.targets)
            return logits_backend.read(model, moved, positions).detached_to(here)


class LocalTeacher(ModelSpec, LocalModels):
    """One frozen model.

    The other options are those of :class:`~lightning_kd.models.ModelSpec`.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or a name on the Hugging Face hub.
        placement: ``replicated`` on every process, ``sharded`` over all of them (under a strategy
            that shards), ``offloaded`` to memory of the CPU between uses, or a device of its own,
            such as ``cuda:1``.
    """

    answers: frozenset[Ability] = frozenset({"full_distribution", "generation"})

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        placement: str = "replicated",
        config: dict[str, Any] | str | None = None,
        dtype: DTypeName = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        quantization: dict[str, Any] | None = None,
        max_positions: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            name_or_path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            quantization=quantization,
            max_positions=max_positions,
            trust_remote_code=trust_remote_code,
        )
        self._keep(placement)

    @classmethod
    def of(cls, model: PreTrainedModel, *, placement: str = "replicated") -> Self:
        """A teacher that you have built yourself.

        Args:
            model: The model; it is used, not copied.
            placement: As for the class.
        """
        return cls._handing_out(model, placement=placement)

    @property
    def sources(self) -> Mapping[str, ModelSpec]:
        """Itself."""
        return {"teacher": self}


class TeacherEnsemble(LocalModels):
    r"""Several frozen models whose predictions are averaged with weights :math:`w_k`.

    ===============  ====================================================================
    ``combine``      teacher distribution at temperature :math:`\tau`
    ===============  ====================================================================
    `logits`         :math:`\mathrm{softmax}(\sum_k w_k u_k / \tau)` (BabyLlama)
    `probabilities`  :math:`\sum_k w_k\, \mathrm{softmax}(u_k / \tau)`
    `log_probs`      :math:`\propto \exp \sum_k w_k \log \mathrm{softmax}(u_k / \tau)`
    ===============  ====================================================================

    The first and the last are the same distribution: a log-softmax only shifts the logits, and a
    shift does not survive the softmax. Both names are in use. The three agree where all models do.

    Args:
        members: Two or more models.
        combine: What is averaged.
        weights: One weight for each member, divided by their sum; equal when not given.
        placement: Of every member, as :class:`LocalTeacher` has it.

    Raises:
        ValueError: If there are no members, or the weights do not fit them.

    References:
        Timiryasov and Tastet, *Baby Llama*, 2023, section 3. https://arxiv.org/abs/2308.02019
    """

    def __init__(
        self,
        members: list[ModelSpec],
        *,
        combine: Averaging = "logits",
        weights: list[float] | None = None,
        placement: str = "replicated",
    ) -> None:
        super().__init__(placement=placement)
        if not members:
            raise ValueError("an ensemble needs at least one member; got an empty list")
        if combine not in get_args(Averaging):
            raise ValueError(f"unknown combine {combine!r}; choose one of {get_args(Averaging)}")
        weights = [1.0] * len(members) if weights is None else weights
        if len(weights) != len(members):
            raise ValueError(
                f"{len(weights)} weights came for {len(members)} members; give one each"
            )
        if not all(isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
            raise ValueError(f"weights must be 0 or more and not all 0; got {weights}")
        self.members = members
        self.combine: Averaging = combine
        self.weights = [w / sum(weights) for w in weights]

    @property
    def sources(self) -> Mapping[str, ModelSpec]:
        """The members."""
        return {f"teacher {k}": member for k, member in enumerate(self.members)}

    def log_probs(self, logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The combined log-probabilities at ``temperature``."""
        weighted = [(u, w) for u, w in zip(logits, self.weights, strict=True) if w > 0]
        if self.combine == "probabilities":
            shares = ((u / temperature).log_softmax(-1).add_(log(w)) for u, w in weighted)
            return reduce(torch.logaddexp, shares)
        (first, weight), *others = weighted
        total = first * (weight / temperature)
        for u, w in others:
            total.add_(u, alpha=w / temperature)
        return total.log_softmax(-1)


def frozen(
    source: ModelSpec, tokenizer: PreTrainedTokenizerBase, role: str, policy: VocabularyPolicy
) -> PreTrainedModel:
    """Load a model that never trains, checked against the data's tokenizer.

    Raises:
        ValueError: If the model cannot be had or does not fit the tokenizer.
    """
    model = source.load(tokenizer, role)
    if source.name_or_path is not None:
        check_tokenizers(tokenizer, source.name_or_path, role, policy)
    check_ids(tokenizer, model, role)
    model.requires_grad_(False)
    model.eval()
    return model

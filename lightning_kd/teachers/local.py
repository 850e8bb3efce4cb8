"""A frozen model in this process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.devices import is_queued
from lightning_kd.fused import AnswerKind, FullDistribution
from lightning_kd.generation import Completions, Engine, GenerationOptions, generate
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.model_spec import DTypeName, ModelSpec
from lightning_kd.models.placement import (
    KINDS,
    check_placement,
    on_compute_device,
    own_device,
    place_model,
)
from lightning_kd.models.sharding import is_sharded
from lightning_kd.models.vocabulary import (
    VocabularyPolicy,
    check_ids,
    check_tokenizers,
    vocabulary_size,
)
from lightning_kd.resuming import weights_digest
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.announced import Announced
from lightning_kd.teachers.contract import Ability, Teacher


class LocalTeacher(ModelSpec, Teacher):
    """One frozen model.

    The other options are those of :class:`~lightning_kd.models.ModelSpec`.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or a name on the Hugging Face hub.
        placement: ``replicated`` on every process, ``sharded`` over all of them (under a strategy
            that shards), ``offloaded`` to memory of the CPU between uses, or a device of its own,
            such as ``cuda:1``.
    """

    answers: frozenset[Ability] = frozenset({"full_distribution", "generation", "mixture"})

    may_change_on_resume = frozenset({"placement"})

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
        check_placement(placement)
        self.placement = placement
        self._model: PreTrainedModel | None = None
        self._role, self._weights = "teacher", ""
        self._own_device: torch.device | None = None
        self._backend: LogitsBackend | None = None
        self._announced: Announced | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, *, placement: str = "replicated") -> Self:
        """A teacher that you have built yourself.

        Args:
            model: The model; it is used, not copied.
            placement: As for the class.
        """
        return cls._handing_out(model, placement=placement)

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model, from :meth:`prepare` on."""
        assert self._model is not None, "prepare() comes first"
        return self._model

    @property
    def model_specs(self) -> Sequence[ModelSpec]:
        """This spec itself."""
        return (self,)

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """The model."""
        return {} if self._model is None else {self._role: self._model}

    @property
    def answers_collectively(self) -> bool:
        """Whether its weights are sharded."""
        return self.placement == "sharded"

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Load, check, freeze and place the model; a second call freezes and places it again.

        Raises:
            ValueError: If the model cannot be loaded, does not fit the tokenizer, or cannot be placed.
        """
        if self._model is None:
            self._role, self._model = role, self._loaded(tokenizer, role, policy)
        self.forget()
        self._own_device = own_device(self.placement, device)
        self._model.requires_grad_(False)
        self._model.eval()
        if not is_sharded(self._model):
            # Before a process has no more than its share of them.
            self._weights = weights_digest(self._model)
            place_model(self._model, self.placement, device, mesh)

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments and, once the model is loaded, its configuration and weights."""
        settings = super().resume_settings()
        if self._model is None:
            return settings
        return settings | {"model": {"config": self._model.config, "weights": self._weights}}

    @property
    def vocabulary_size(self) -> int:
        """Width of the model's logits."""
        return vocabulary_size(self.model)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> FullDistribution:
        """Run the model on a batch and return its logits at the scored positions.

        What was announced has been computed meanwhile, on a device of the model's own.
        """
        here = batch["input_ids"].device
        self._backend, announced = logits_backend, self._announced
        # It runs where it is kept; its logits come back to the batch.
        with on_compute_device(self.model, self.placement, here) as there:
            if announced is not None and announced.is_about(batch, positions, logits_backend):
                self.forget()
            else:  # what was announced comes later: a validation may come first
                announced = Announced.of(batch, positions, logits_backend, there)
            logits = announced.logits or announced.read(self.model)
            return FullDistribution((logits.detached_to(here),))

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """Whether the model has a device of its own: beside the student nothing would be free."""
        return self._own_device is not None

    @torch.no_grad()
    def announce(self, batch: Batch, positions: ScoredPositions, *, kind: AnswerKind) -> None:
        """Run the model on the micro-batch that comes next, while the student trains on this one.

        The work is queued on the model's own device, and its result stays there until it is asked for:
        to copy it before would make the student's device wait. A model on the CPU is run later, when it
        is asked, for the host has to do it; but it keeps the host's ids, which then need not come from
        the student's device. One micro-batch at a time is kept.
        """
        self.forget()
        there, backend = self._own_device, self._backend
        if there is None or backend is None:
            return
        if not is_queued(there) and batch["input_ids"].device != there:
            return
        announced = Announced.of(batch, positions, backend, there)
        if is_queued(there):
            announced = replace(announced, logits=announced.read(self.model))
        self._announced = announced

    def forget(self) -> None:
        """Let go of what was announced."""
        self._announced = None

    def check_generation(self, engine: Engine | None = None) -> None:
        """Refuse a device of its own.

        Raises:
            ValueError: If the model does not run on the student's device.
        """
        if self.placement not in KINDS:
            raise ValueError(
                f"the teacher is to generate, but placement is {self.placement!r}; a generating "
                f"model must run on the student's device: choose {', '.join(KINDS)}"
            )

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        engine: Engine | None = None,
        width: int | None = None,
    ) -> Completions:
        """Complete prompts with the model; see :func:`~lightning_kd.generation.generate`."""
        with self.model_on(prompt_ids.device) as model:
            return generate(
                model,
                tokenizer,
                prompt_ids,
                prompt_mask,
                options,
                seeds=seeds,
                engine=engine,
                width=width,
            )

    @contextmanager
    def model_on(self, device: torch.device) -> Iterator[PreTrainedModel]:
        """Yield the model; if it is offloaded, a copy is on the device meanwhile."""
        with on_compute_device(self.model, self.placement, device):
            yield self.model

    def _loaded(
        self, tokenizer: PreTrainedTokenizerBase, role: str, policy: VocabularyPolicy
    ) -> PreTrainedModel:
        model = self.load(tokenizer, role)
        self.check_model(model, tokenizer, role, policy)
        return model

    def check_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        role: str,
        policy: VocabularyPolicy,
    ) -> None:
        """Validate that the model has the data's tokens.

        Args:
            model: The model of this spec; its weights need not be there.
            tokenizer: The data's.
            role: Its name in messages.
            policy: What happens to a wider vocabulary.

        Raises:
            ValueError: If it has others.
        """
        if self.name_or_path is not None:
            check_tokenizers(tokenizer, self.name_or_path, role, policy)
        check_ids(tokenizer, model, role)

"""Spec of the student."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.models.adapters import check_without_adapters, peft_as_it_is
from lightning_kd.models.model_spec import DTypeName, ModelSpec
from lightning_kd.models.vocabulary import check_ids
from lightning_kd.seeding import derive_seed, run_seed


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters through peft; the weights they adapt stay frozen.

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by ``alpha / r``.
        dropout: Dropout before the adapter.
        target_modules: Which layers get one: peft's ``all-linear`` or a list of names.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.r < 1:
            raise ValueError(f"the rank r is {self.r}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze ``model`` and put adapters around its layers, whose values the run's seed decides.

        Raises:
            ValueError: If peft is not installed, or finds none of the layers.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError(
                "lora needs the peft package: pip install 'lightning-kd[lora]'"
            ) from error
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )
        try:
            with torch.random.fork_rng(devices=[]), peft_as_it_is():
                torch.manual_seed(derive_seed(run_seed(), "weights", "adapters"))
                return get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"lora.target_modules {self.target_modules!r}: {error}") from error


class StudentSpec(ModelSpec):
    """Spec of the student.

    The other options are those of :class:`~lightning_kd.models.ModelSpec`.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or a name on the Hugging Face hub.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a
            third more time.
        lora: Train low-rank adapters instead of the weights.
    """

    may_change_on_resume = frozenset({"gradient_checkpointing"})

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
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
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> Self:
        """Return the spec of a student that you have built.

        Args:
            model: The model; it is used, not copied.
            gradient_checkpointing: As for the class.
            lora: As for the class.
        """
        return cls._handing_out(model, gradient_checkpointing=gradient_checkpointing, lora=lora)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Return the model in training mode, checked against the tokenizer.

        Raises:
            ValueError: If the model cannot be had, or is too small for the tokenizer.
        """
        model = self.load(tokenizer, "student")
        check_ids(tokenizer, model, "student")
        return self.prepared(model)

    def prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        """Add to a model what training asks for."""
        if self.gradient_checkpointing:
            # Renamed in transformers 5.23; the lower bound has the old name only.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if self.lora is not None:
            check_without_adapters(model)
            if self.gradient_checkpointing:
                # The frozen embedding's output must require a gradient, or no layer is recomputed.
                model.enable_input_require_grads()
            model = self.lora.adapt(model)
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ValueError(
                "the student has no weights that train: all are frozen or quantized. Give it lora, or "
                "weights that are neither"
            )
        model.train()
        return model

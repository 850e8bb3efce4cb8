"""Spec of a causal language model: where it comes from."""

import pickle
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig

from lightning_kd.models.adapters import check_same_length
from lightning_kd.models.config_fields import make_config, read_config
from lightning_kd.models.loading import load_checkpoint
from lightning_kd.models.positions import allow_positions
from lightning_kd.resuming import Resumable
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.tokenization import check_path

DTypeName = Literal["float32", "bfloat16", "float16", "float64", "auto"]


class ModelSpec(Resumable):
    """A causal language model: a local directory, a hub name, or a configuration to start from.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or a name on the Hugging Face hub.
        config: Instead of ``name_or_path``, a configuration to initialize at random: a mapping with
            ``model_type`` and that type's fields, or the path of such a JSON file. A missing
            ``vocab_size`` is the tokenizer's.
        dtype: Type of the weights; ``auto`` keeps the type they were saved in.
        attn_implementation: Attention kernel, as transformers names them (``sdpa``, ``eager``,
            ``flash_attention_2``). Defaults to transformers' choice.
        revision: Branch, tag or commit on the hub.
        quantization: A quantization of transformers for the weights that are loaded, as a mapping
            with ``quant_method`` and its fields, for example ``{quant_method: bitsandbytes,
            load_in_8bit: true}``; its package must be installed.
        max_positions: Longest row of a loaded model with rotary positions, in tokens, instead of the
            ``max_position_embeddings`` that it was trained on; longer rows are refused.
        trust_remote_code: Whether to run model code that comes with the weights.

    Raises:
        ValueError: If not exactly one of ``name_or_path`` and ``config`` is given, or an option is
            about weights that are not loaded.
    """

    # What the model computes is compared, not where it lies; a kernel rounds otherwise.
    may_change_on_resume = frozenset(
        {"name_or_path", "config", "revision", "trust_remote_code", "attn_implementation"}
    )

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        config: dict[str, Any] | str | None = None,
        dtype: DTypeName = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        quantization: dict[str, Any] | None = None,
        max_positions: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if (name_or_path is None) == (config is None):
            got = "neither" if config is None else "both"
            raise ValueError(
                f"a model needs either name_or_path (a directory or hub name) or config "
                f"(a random start); {got} came. A saved model in place of a config takes config: null "
                "beside it (--model.student.config null; or teacher), "
                "a config in place of a saved model name_or_path: null"
            )
        self.name_or_path = name_or_path
        self.config = config
        self.dtype: DTypeName = dtype
        self.attn_implementation = attn_implementation
        if quantization is not None and name_or_path is None:
            raise ValueError("quantization is of weights that are loaded: give name_or_path")
        self.quantization = quantization
        if max_positions is not None and (name_or_path is None or max_positions < 1):
            raise ValueError(
                f"max_positions is {max_positions}; it is 1 or more and of a model that is loaded "
                "from name_or_path. A config has max_position_embeddings"
            )
        self.max_positions = max_positions
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self._given: PreTrainedModel | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return the spec of a model that you have built.

        Args:
            model: The model; it is used, not copied.
        """
        return cls._handing_out(model)

    @classmethod
    def _handing_out(cls, model: PreTrainedModel, **own: Any) -> Self:
        """Return the spec of a built model, with the options of a subclass."""
        source = cls(config={"model_type": model.config.model_type}, **own)
        source._given = model
        return source

    @property
    def is_given(self) -> bool:
        """Whether the model is an object of the user's, which cannot be built again."""
        return self._given is not None

    def is_same_object(self, other: "ModelSpec") -> bool:
        """Return whether both specs are of one model object."""
        return self._given is not None and self._given is other._given

    def is_same_checkpoint(self, other: "ModelSpec") -> bool:
        """Return whether both load the same weights, unchanged."""
        if self.name_or_path is None or other.name_or_path is None:
            return False
        own, others = (Path(name).expanduser() for name in (self.name_or_path, other.name_or_path))
        same = own == others or (own.exists() and others.exists() and own.samefile(others))
        alike = (self.revision, self.quantization) == (other.revision, other.quantization)
        return same and alike

    def load(self, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
        """Load the weights, or initialize them at random for a configuration.

        Args:
            tokenizer: Gives vocabulary size and special ids to a configuration without them.
            role: ``student``, ``teacher 0``, ...: models of one run that start at random differ.

        Raises:
            ValueError: If there is no such model, its configuration is invalid, or it has adapters that
                lengthen rows.
        """
        if self._given is not None:
            model = self._given
        elif self.config is None:
            model = self._from_pretrained()
        else:
            model = self._from_config(tokenizer, role)
        if getattr(model.config.get_text_config(), "num_hidden_layers", None) == 0:
            raise ValueError(
                f"the {role} has 0 layers, so that it sees one token at a time; give 1"
            )
        if getattr(model.config.get_text_config(), "is_decoder", True) is False:
            raise ValueError(
                f"the {role} is a {type(model).__name__} whose config has is_decoder: false, so each "
                "token sees those after it, which it is to predict. Use a causal language model"
            )
        check_same_length(model, role)
        if self.max_positions is not None:
            allow_positions(model, self.max_positions, role)
        return model

    def _from_pretrained(self) -> PreTrainedModel:
        check_path(str(self.name_or_path), "model")
        try:
            return load_checkpoint(
                str(self.name_or_path),
                revision=self.revision,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                **self._quantized(),
            )
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"cannot load the model {self.name_or_path!r}: its weights are pickled, with more "
                "in them than tensors. Have them saved as safetensors by someone you trust"
            ) from error
        except (
            *(OSError, ValueError, RuntimeError, ImportError),
            *(SafetensorError, StrictDataclassError),
        ) as error:
            raise ValueError(f"cannot load the model {self.name_or_path!r}: {error}") from error

    def _quantized(self) -> dict[str, Any]:
        """Return the options of ``from_pretrained`` for quantization."""
        if self.quantization is None:
            return {}
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return {
            "quantization_config": AutoQuantizationConfig.from_dict(self.quantization),
            "device_map": {"": device},
        }

    def _from_config(self, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
        of_tokenizer = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = make_config(read_config(self.config), of_tokenizer, role)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(run_seed(), "weights", role))
            try:
                return AutoModelForCausalLM.from_config(
                    config,
                    dtype=torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype),
                    attn_implementation=self.attn_implementation,
                )
            except (TypeError, ValueError, RuntimeError, ImportError, ArithmeticError) as error:
                raise ValueError(f"config of the {role} is not understood: {error}") from error

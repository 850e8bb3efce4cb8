"""Where a causal language model comes from."""

import json
import pickle
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from lightning_kd.seeding import derive_seed, run_seed

DTypeName = Literal["float32", "bfloat16", "float16", "float64", "auto"]


class ModelSource:
    """A causal language model: a local directory, a hub name, or a configuration to start from.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or a name on the Hugging Face hub.
        config: Instead of ``name_or_path``, a configuration to initialize at random: a mapping with
            ``model_type`` and that type's fields, or the path of such a JSON file. A missing
            ``vocab_size`` is the tokenizer's.
        dtype: Type of the weights; ``auto`` keeps the type they were saved in.
        attn_implementation: Attention kernel, as transformers names them (``sdpa``, ``eager``,
            ``flash_attention_2``); transformers chooses when it is not given.
        revision: Branch, tag or commit on the hub.
        quantization: A quantization of transformers for the weights that are loaded, as a mapping
            with ``quant_method`` and its fields, for example ``{quant_method: bitsandbytes,
            load_in_8bit: true}``; its package must be installed.
        trust_remote_code: Run model code that comes with the weights. Off unless you say so.

    Raises:
        ValueError: If not exactly one of ``name_or_path`` and ``config`` is given, or there is
            nothing to quantize.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        config: dict[str, Any] | str | None = None,
        dtype: DTypeName = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        quantization: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if (name_or_path is None) == (config is None):
            got = "neither" if config is None else "both"
            raise ValueError(
                f"a model needs either name_or_path (a directory or hub name) or config "
                f"(a random start); {got} came"
            )
        self.name_or_path = name_or_path
        self.config = config
        self.dtype: DTypeName = dtype
        self.attn_implementation = attn_implementation
        if quantization is not None and name_or_path is None:
            raise ValueError("quantization is of weights that are loaded: give name_or_path")
        self.quantization = quantization
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self._given: PreTrainedModel | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, **options: Any) -> Self:
        """A source that hands out a model you have built yourself.

        Args:
            model: The model; it is used, not copied.
            options: What the class takes beside the options of :class:`ModelSource`.
        """
        source = cls(config={"model_type": model.config.model_type}, **options)
        source._given = model
        return source

    @property
    def is_given(self) -> bool:
        """Was the model handed over, and cannot be had a second time?"""
        return self._given is not None

    def load(self, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
        """Load the weights, or draw them for a configuration.

        Args:
            tokenizer: Gives vocabulary size and special ids to a configuration without them.
            role: ``student``, ``teacher 0``, ...: models of one run that start at random differ.

        Raises:
            ValueError: If there is no such model, or its configuration is not understood.
        """
        if self._given is not None:
            return self._given
        return (
            self._from_pretrained() if self.config is None else self._from_config(tokenizer, role)
        )

    def _from_pretrained(self) -> PreTrainedModel:
        check_path(str(self.name_or_path), "model")
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name_or_path,
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
        except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
            raise ValueError(f"cannot load the model {self.name_or_path!r}: {error}") from error

    def _quantized(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told of quantization."""
        if self.quantization is None:
            return {}
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return {
            "quantization_config": AutoQuantizationConfig.from_dict(self.quantization),
            "device_map": {"": device},
        }

    def _from_config(self, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
        fields = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | _config_fields(self.config)
        model_type = fields.pop("model_type")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(run_seed(), "weights", role))
            try:
                config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
                return AutoModelForCausalLM.from_config(
                    config,
                    dtype=torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype),
                    attn_implementation=self.attn_implementation,
                )
            except (
                TypeError,
                ValueError,
                RuntimeError,
                ImportError,
                StrictDataclassError,
            ) as error:
                raise ValueError(f"config of the {role} is not understood: {error}") from error


def check_path(name_or_path: str, what: str) -> None:
    """Tell a directory that is not there from a hub name, before anything asks the network.

    Raises:
        ValueError: If ``name_or_path`` can only be a path and does not exist.
    """
    path = Path(name_or_path).expanduser()
    only_a_path = name_or_path.startswith((".", "/", "~")) or len(path.parts) > 2
    if only_a_path and not path.exists():
        raise ValueError(
            f"the {what} directory {name_or_path!r} does not exist; give a directory written by "
            "save_pretrained, or a hub name such as 'Qwen/Qwen3-0.6B'"
        )


def _config_fields(config: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"config is not a readable JSON file: {error}; give the path of a config.json, or "
                "the fields themselves"
            ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(
            f"config lacks model_type: got {config!r}; give for example "
            "{model_type: llama, hidden_size: 128, num_hidden_layers: 3, ...}"
        )
    return dict(config)

"""The output head of a model, apart from the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from lightning_kd.evaluation import Projection
from lightning_kd.strategies import gathered_copy, is_released

_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": float,  # Falcon-H1
}
"""What configurations call the factor on their logits."""


class UnsupportedHeadError(ValueError):
    """A head that is more than a product, a bias, a scale and a soft cap."""


@dataclass(frozen=True)
class OutputHead:
    """What a model does with its last hidden states to get logits."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def project(self, states: Tensor) -> Projection:
        """The head on these hidden states, ``(N, H)``, with the weights that it has now."""
        base: Any = getattr(self.module, "base_layer", self.module)
        factors = [(states, _whole(base.weight))]
        if base is not self.module:
            adapter: Any = self.module
            for name in adapter.active_adapters if not adapter.disable_adapters else ():
                low = adapter.lora_A[name](adapter.lora_dropout[name](states))
                factors.append((low * adapter.scaling[name], _whole(adapter.lora_B[name].weight)))
        bias = getattr(base, "bias", None)
        bias = None if bias is None else _whole(bias)
        # On an accelerator the products are made as autocast would; the logits stay float32.
        narrow = torch.get_autocast_dtype("cuda") if _under_autocast(states) else None
        pairs = tuple((h.to(narrow or h.dtype), w.to(narrow or w.dtype)) for h, w in factors)
        return Projection(pairs, bias, self.scale, self.softcap)

    @contextmanager
    def bypassed(self) -> Iterator[list[Tensor]]:
        """While this is open, the head hands on its hidden states; they are in the list."""
        seen: list[Tensor] = []

        def hand_on(states: Tensor) -> Tensor:
            seen.append(states)
            return states

        before = self.module.__dict__.get("forward")
        self.module.forward = hand_on
        try:
            yield seen
        finally:
            del self.module.forward
            if before is not None:
                self.module.forward = before


def find_head(model: PreTrainedModel) -> OutputHead:
    """The head of a model, which has been seen to give the model's own logits on a few tokens.

    Raises:
        UnsupportedHeadError: If there is no such head.
    """
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = core.get_output_embeddings()
    _check_kind(module)
    ids = torch.arange(8, device=module.weight.device)[None] % core.config.vocab_size
    trains = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits[0]
            heads = [OutputHead(module, s, c) for s, c in _candidates(core.config)]
            for head in heads:
                with head.bypassed() as seen:
                    model(input_ids=ids, use_cache=False)
                if len(seen) == 1 and _equals(head.project(seen[0][0]), expected):
                    return head
    finally:
        model.train(trains)
    raise UnsupportedHeadError(
        f"{type(core).__name__} makes its logits in a way that its output head and its "
        "configuration do not explain"
    )


def _check_kind(module: nn.Module | None) -> None:
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not (isinstance(base, nn.Linear) and isinstance(weight, Tensor)):
        raise UnsupportedHeadError(f"its output head is a {type(base).__name__}, not a Linear")
    if not weight.is_floating_point():
        raise UnsupportedHeadError(f"its output head is quantized to {weight.dtype}")
    if base is not module:
        adapter: Any = module
        if not hasattr(adapter, "lora_A") or any(adapter.lora_bias.values()):
            raise UnsupportedHeadError(f"its output head has a {type(module).__name__} around it")
        if getattr(adapter, "lora_variant", None) or adapter.merged:
            raise UnsupportedHeadError("the adapter of its output head is a variant, or merged")


def _candidates(config: PretrainedConfig) -> Iterator[tuple[float, float | None]]:
    """Scales and soft caps to try, what the configuration declares first.

    Small random logits do not tell a soft cap from none, and would not be small for long.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    declared = [f(getattr(config, name)) for name, f in _SCALES.items() if getattr(config, name, 0)]
    for scale in (*declared, 1.0):
        yield scale, softcap


def _equals(projection: Projection, expected: Tensor) -> bool:
    own = torch.empty(projection.shape, dtype=projection.dtype, device=expected.device)
    projection.fill(slice(0, len(own)), own)
    if own.shape != expected.shape:
        return False
    tolerance = 16 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    return bool((own - expected).abs().max() <= tolerance)


def _under_autocast(states: Tensor) -> bool:
    return states.is_cuda and torch.is_autocast_enabled("cuda")


def _whole(weight: Tensor) -> Tensor:
    """A sharded weight in one piece, whose gradient is the mean over all ranks."""
    if is_released(weight):
        return gathered_copy(weight)
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    # Without the placements each rank would keep nothing but its own contribution.
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        # Every other gradient of a sharded model is a mean, and the sum of this one would not be.
        whole.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return whole

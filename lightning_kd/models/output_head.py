"""The output head of a model, apart from the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from lightning_kd.fused import LazyHeadLogits
from lightning_kd.models.adapters import without_adapters
from lightning_kd.models.modes import evaluating, in_place_of
from lightning_kd.strategies import gathered_copy, is_partitioned, shape_of

_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": float,  # Falcon-H1
    "output_multiplier": float,
}
"""Names of the factor on logits in configurations."""

_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
    "softcap",
)
"""Names of the soft cap of logits in configurations."""


class UnsupportedHeadError(ValueError):
    """A head that is more than a product, a bias, a scale and a soft cap."""


@dataclass(frozen=True)
class OutputHead:
    """Output head of a model: from its last hidden states to logits."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def project(self, states: Tensor) -> LazyHeadLogits:
        """Return the head on hidden states, ``(N, H)``, with its present weights."""
        base: Any = getattr(self.module, "base_layer", self.module)
        factors = [(states, _unsharded(base.weight))]
        if base is not self.module:
            adapter: Any = self.module
            for name in adapter.active_adapters if not adapter.disable_adapters else ():
                down = adapter.lora_A[name]
                low = down(adapter.lora_dropout[name](states.to(down.weight.dtype)))
                factors.append(
                    (low * adapter.scaling[name], _unsharded(adapter.lora_B[name].weight))
                )
        bias = getattr(base, "bias", None)
        bias = None if bias is None else _unsharded(bias)
        # On an accelerator the products are made as autocast would; the logits stay float32.
        narrow = torch.get_autocast_dtype("cuda") if _under_autocast(states) else None
        pairs = tuple((h.to(narrow or h.dtype), w.to(narrow or w.dtype)) for h, w in factors)
        return LazyHeadLogits(pairs, bias, self.scale, self.softcap)

    @contextmanager
    def bypassed(self) -> Iterator[list[Tensor]]:
        """Make the head return its hidden states while the context is open, and collect them in a list.

        Raises:
            RuntimeError: If the model has written over them, for it may do so with logits.
        """
        seen: list[Tensor] = []
        versions: list[int] = []

        def hand_on(states: Tensor) -> Tensor:
            seen.append(states)
            if not torch.is_grad_enabled():
                return states.clone()
            # Not a copy: FSDP2 waits for the gradient of what a model returns.
            versions.append(states._version)
            return states

        with in_place_of(self.module, hand_on):
            yield seen
        if versions and [states._version for states in seen] != versions:
            raise RuntimeError(
                "the model writes over its logits in place, which it did not when its output head "
                "was looked at; use model.logits_backend: DenseLogits"
            )


def find_head(model: PreTrainedModel) -> OutputHead:
    """Find the output head of a model, by running it on a few tokens.

    The head is given known hidden states and compared with its product; then the model is given
    known logits, and what it makes of them is compared with every scale and soft cap that its
    configuration declares. So nothing depends on how large its own logits are.

    Raises:
        UnsupportedHeadError: If the model does anything else to its logits.
    """
    core = without_adapters(model)
    module = core.get_output_embeddings()
    _check_kind(module)
    ids = torch.arange(8, device=module.weight.device)[None] % shape_of(module.weight)[0]
    probe = _Probe(module)
    with evaluating(model), torch.no_grad(), in_place_of(module, probe):
        logits = model(input_ids=ids, use_cache=False).logits
    if probe.is_understood:
        for scale, softcap in _candidates(core.config.get_text_config(), core.config):
            if probe.becomes(logits, scale, softcap):
                return OutputHead(module, scale, softcap)
    raise UnsupportedHeadError(
        f"{type(core).__name__} makes its logits in a way that its output head and its "
        "configuration do not explain"
    )


class _Probe:
    """Placeholder for a head: compares it with its matmul, and returns known logits instead.

    Args:
        module: The head, with its own ``forward``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.calls = 0
        self.is_linear = False

    def __call__(self, states: Tensor) -> Tensor:
        """Examine the head, and return the known logits."""
        self.calls += 1
        own = self.forward(states)
        with torch.autocast(states.device.type, enabled=False):
            self.is_linear = self._is_linear(states)
        # Float32 also in a narrow model, where roundings would hide a scale or a wide soft cap.
        self.known = _ramp(own.shape).to(own.device, torch.promote_types(own.dtype, torch.float32))
        self.handed_on = self.known.clone()
        return self.handed_on

    @property
    def is_understood(self) -> bool:
        """Whether the head is a matmul that the model calls once, and does not change in place."""
        return self.calls == 1 and self.is_linear and torch.equal(self.handed_on, self.known)

    def becomes(self, logits: Tensor, scale: float, softcap: float | None) -> bool:
        """Return whether the model scaled and capped the known logits, and did nothing else."""
        if logits.shape != self.known.shape:
            return False
        expected = self.known.double() * scale
        if softcap is not None:
            expected = softcap * (expected / softcap).tanh()
        # The known logits are powers of 2, which every type holds. A product is rounded once, where a
        # model has narrowed its logits; a cap is a quotient, a hyperbolic tangent and a product.
        roundings = 3 if softcap is not None else 1 if scale != 1 else 0
        eps = torch.finfo(logits.dtype).eps
        if logits.dtype == self.known.dtype:
            roundings, eps = 4 * roundings, torch.finfo(torch.float32).eps
        tolerance = roundings * eps * expected.abs()
        # Entry by entry: one that is infinite, or not a number, is no other one's excuse.
        return bool(((logits.double() - expected).abs() <= tolerance).all())

    def _is_linear(self, like: Tensor) -> bool:
        """Return whether the head is its matmul, bias and adapter, for small and large logits."""
        head, weight = OutputHead(self.module), self.module.weight
        assert isinstance(weight, Tensor)  # _check_kind has looked
        draws = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(weight)
        rows = draws.reshape(-1, draws.shape[-1])
        sizes = _bound(head.project(rows)).amax(-1, keepdim=True)
        wanted = 4.0 ** (torch.arange(len(rows), device=like.device) % 8)[:, None]
        rows = (rows * (wanted / sizes.clamp(min=1e-30))).to(weight)
        found = self.forward(rows.reshape(like.shape)).reshape(len(rows), -1)
        head_logits = head.project(rows)
        expected = torch.empty(found.shape, dtype=head_logits.dtype, device=found.device)
        head_logits.fill(slice(0, len(rows)), expected)
        finite = expected.isfinite()
        if not torch.equal(found[~finite].to(expected), expected[~finite]):
            return False
        size = expected.where(finite, 0.0)
        error = (found - expected).where(finite, 0.0)
        # A result is rounded once, or twice with an adapter; its sum adds up in a wider type.
        once, summed = (torch.finfo(tensor.dtype).eps for tensor in (found, expected))
        of_entries = 2 * once * size.abs() + (once / 8 + 64 * summed) * _bound(head_logits)
        of_rows = (4 * once + 64 * summed) * size.norm(dim=-1)
        return bool((error.abs() <= of_entries).all() and (error.norm(dim=-1) <= of_rows).all())


def _ramp(shape: torch.Size) -> Tensor:
    """Return logits of every size up to 4096, of both signs, and 0, in another order in each row.

    So no two tokens of a vocabulary are alike, and an exchange of any two of them shows.
    """
    powers = 2.0 ** torch.arange(-6, 13)
    steps = torch.cat([-powers.flip(0), torch.zeros(1), powers])
    rows, width = shape[:-1].numel(), shape[-1]
    generator = torch.Generator().manual_seed(0)
    places = [row + torch.randperm(width, generator=generator) for row in range(rows)]
    return steps[torch.stack(places) % len(steps)].reshape(shape)


def _bound(head_logits: LazyHeadLogits) -> Tensor:
    """Return a bound of the logits without bias, by the norms of states and weights: (N, V)."""
    norms = [
        torch.linalg.vector_norm(states, dim=-1, dtype=head_logits.dtype)[:, None]
        * torch.linalg.vector_norm(weight, dim=-1, dtype=head_logits.dtype)
        for states, weight in head_logits.factors
    ]
    return torch.stack(norms).sum(0)


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


def _candidates(*configs: PretrainedConfig) -> Iterator[tuple[float, float | None]]:
    """Return the scales and soft caps that a configuration declares, and none."""
    scales = [f(v) for name, f in _SCALES.items() for v in _declared(configs, name)]
    softcaps = [float(value) for name in _SOFTCAPS for value in _declared(configs, name)]
    return product((*scales, 1.0), (*softcaps, None))


def _declared(configs: Sequence[PretrainedConfig], name: str) -> list[float]:
    values = [getattr(config, name, None) for config in configs]
    return [value for value in values if isinstance(value, int | float) and value]


def _under_autocast(states: Tensor) -> bool:
    return states.is_cuda and torch.is_autocast_enabled("cuda")


def _unsharded(weight: Tensor) -> Tensor:
    """Gather a sharded weight; its gradient is the mean over all ranks."""
    if is_partitioned(weight):
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

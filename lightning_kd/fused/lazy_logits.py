"""Logits: materialized, or lazy, as hidden states and an output head."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_kd.devices import to_device
from lightning_kd.fused.head_matmul import project, to_states, to_weight


class LazyLogits(ABC):
    """Logits at scored positions, computed any number of rows at a time."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary, ``(N, V)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the logits: float32 or wider."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the logits."""

    @abstractmethod
    def fill(self, rows: slice, out: Tensor) -> None:
        """Write the logits of some rows into ``out``."""

    @abstractmethod
    def narrowed(self, width: int) -> "LazyLogits":
        """Return the logits of the first ``width`` tokens of the vocabulary."""

    @abstractmethod
    def beyond(self, width: int) -> "LazyLogits":
        """Return the logits of all other tokens, from number ``width`` on."""

    @abstractmethod
    def detached_to(self, device: torch.device) -> "LazyLogits":
        """Return the logits without gradients, on a device, whatever changes in the model later."""


@dataclass(frozen=True)
class MaterializedLogits(LazyLogits):
    """Logits that a model has computed."""

    logits: Tensor
    """``(N, V)``, float32 or wider."""

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary."""
        return self.logits.shape[0], self.logits.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits."""
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self.logits.device

    def fill(self, rows: slice, out: Tensor) -> None:
        """Copy the logits."""
        out.copy_(self.logits[rows])

    def narrowed(self, width: int) -> "MaterializedLogits":
        """A view of the first columns."""
        return MaterializedLogits(self.logits[:, :width])

    def beyond(self, width: int) -> "MaterializedLogits":
        """A view of the other columns."""
        return MaterializedLogits(self.logits[:, width:])

    def detached_to(self, device: torch.device) -> "MaterializedLogits":
        """A copy, where they are elsewhere."""
        return MaterializedLogits(to_device(self.logits.detach(), device))


@dataclass(frozen=True)
class LazyHeadLogits(LazyLogits):
    r"""Hidden states and an output head.

    .. math:: z = c \tanh(s x / c), \qquad x = \sum_j h_j W_j^\top + b

    A plain head has one product, an adapted one a second of low rank; most have no soft cap
    (:math:`z = s x`) and a scale of 1.
    """

    factors: tuple[tuple[Tensor, Tensor], ...]
    """Hidden states ``(N, H_j)`` and weights ``(V, H_j)``."""
    bias: Tensor | None = None
    """``(V,)``."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary."""
        states, weight = self.factors[0]
        return states.shape[0], weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Float32, whatever the operands: rounded to bfloat16 logits lose the divergence."""
        wide = any(tensor.dtype == torch.float64 for tensor in self.inputs)
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the hidden states."""
        return self.factors[0][0].device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything that may get a gradient: states and weights in turn, and the bias."""
        flat = tuple(tensor for factor in self.factors for tensor in factor)
        return flat if self.bias is None else (*flat, self.bias)

    def with_inputs(self, inputs: Sequence[Tensor]) -> "LazyHeadLogits":
        """Return the head on other tensors, in the order of :attr:`inputs`."""
        pairs = inputs[: 2 * len(self.factors)]
        factors = tuple(zip(pairs[::2], pairs[1::2], strict=True))
        return replace(self, factors=factors, bias=inputs[-1] if self.bias is not None else None)

    def fill(self, rows: slice, out: Tensor) -> None:
        """Compute the logits."""
        for number, (states, weight) in enumerate(self.factors):
            project(states[rows], weight, out, add=number > 0)
        if self.bias is not None:
            out += self.bias
        if self.scale != 1:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def narrowed(self, width: int) -> "LazyHeadLogits":
        """Views of the first rows of each weight."""
        if width == self.shape[1]:  # the gradient of a view would be copied into a second one
            return self
        return self._of_tokens(slice(0, width))

    def beyond(self, width: int) -> "LazyHeadLogits":
        """Views of the other rows of each weight."""
        return self._of_tokens(slice(width, None))

    def _of_tokens(self, tokens: slice) -> "LazyHeadLogits":
        factors = tuple((states, weight[tokens]) for states, weight in self.factors)
        return replace(self, factors=factors, bias=None if self.bias is None else self.bias[tokens])

    def detached_to(self, device: torch.device) -> "LazyHeadLogits":
        """Copies of what is elsewhere."""
        return self.with_inputs([to_device(tensor.detach(), device) for tensor in self.inputs])

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the factor of a gradient in the backward pass of soft cap and scale."""
        return slope_of_head(logits, self.scale, self.softcap)

    def add_gradients(self, rows: slice, gradient: Tensor, into: Sequence[Tensor | None]) -> None:
        """Take the gradient of a chunk's products on to the inputs.

        Args:
            rows: The positions of the chunk, in order from 0.
            gradient: ``(n, V)``.
            into: A tensor for each of :attr:`inputs`, or None where none is wanted.
        """
        first = rows.start == 0
        for number, (states, weight) in enumerate(self.factors):
            of_states, of_weight = into[2 * number], into[2 * number + 1]
            if of_states is not None:
                to_states(gradient, weight, of_states[rows])
            if of_weight is not None:
                to_weight(gradient, states[rows], of_weight, add=not first)
        if self.bias is not None and (of_bias := into[-1]) is not None:
            of_bias += gradient.sum(0)


def slope_of_head(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """Return the factor of a gradient in the backward pass of soft cap and scale."""
    return scale if softcap is None else scale * (1 - (logits / softcap).square())


@dataclass(frozen=True)
class RoutedLogits(LazyLogits):
    """Each position has its logits from one of several sources."""

    sources: tuple[LazyLogits, ...]
    """Each has its own positions only, in order."""
    routes: Tensor
    """The number of each position's source, ``(N,)``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary."""
        return len(self.routes), self.sources[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the sources'."""
        wide = any(source.dtype == torch.float64 for source in self.sources)
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the routes."""
        return self.routes.device

    def fill(self, rows: slice, out: Tensor) -> None:
        """Fill the rows of each source."""
        for number, source in enumerate(self.sources):
            chosen = self.routes[rows] == number
            start = int((self.routes[: rows.start] == number).sum())
            own = out.new_empty(int(chosen.sum()), out.shape[1], dtype=source.dtype)
            source.fill(slice(start, start + len(own)), own)
            out[chosen] = own.to(out.dtype)

    def narrowed(self, width: int) -> "RoutedLogits":
        """Every source narrowed."""
        return replace(self, sources=tuple(source.narrowed(width) for source in self.sources))

    def beyond(self, width: int) -> "RoutedLogits":
        """The other tokens of every source."""
        return replace(self, sources=tuple(source.beyond(width) for source in self.sources))

    def detached_to(self, device: torch.device) -> "RoutedLogits":
        """Every source, and the routes."""
        sources = tuple(source.detached_to(device) for source in self.sources)
        return RoutedLogits(sources, to_device(self.routes, device))


@dataclass(frozen=True)
class PaddedLogits(LazyLogits):
    """Logits of a narrower vocabulary: tokens from its end on have probability 0."""

    source: LazyLogits
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary."""
        return self.source.shape[0], self.width

    @property
    def dtype(self) -> torch.dtype:
        """The source's."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """The source's."""
        return self.source.device

    def fill(self, rows: slice, out: Tensor) -> None:
        """Fill the source's tokens; minus infinity is for the others."""
        known = self.source.shape[1]
        own = out.new_empty(len(out), known)
        self.source.fill(rows, own)
        out[:, :known], out[:, known:] = own, -torch.inf

    def narrowed(self, width: int) -> LazyLogits:
        """The source narrowed, if it is as wide."""
        if width <= self.source.shape[1]:
            return self.source.narrowed(width)
        return PaddedLogits(self.source, width)

    def beyond(self, width: int) -> "PaddedLogits":
        """The source's other tokens, if it has any, and the padding."""
        known = min(width, self.source.shape[1])
        return PaddedLogits(self.source.beyond(known), self.width - width)

    def detached_to(self, device: torch.device) -> "PaddedLogits":
        """The source detached."""
        return PaddedLogits(self.source.detached_to(device), self.width)

"""Functions of tensors that are recorded once and then repeated without the host."""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

Tensors = tuple[Tensor, ...]

RECORDED_ON = {"cuda"}
"""Types of device that have recordings."""


class Graph(Protocol):
    """Keeps what a function does to tensors, whose addresses must not change meanwhile."""

    def warm_up(self, run: Callable[[], Tensors]) -> Tensors:
        """Run a function that will be recorded, and return its results."""

    def record(self, run: Callable[[], Tensors]) -> Tensors:
        """Record a function, which does not compute anything yet; return where its results will be."""

    def replay(self) -> None:
        """Do what was recorded."""


class CudaGraph:
    """Kernels of a CUDA device, which are launched together.

    Args:
        device: Whose tensors they read and write.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device, self._stream = device, _side_stream(device)

    def warm_up(self, run: Callable[[], Tensors]) -> Tensors:
        """Run on the stream that will record, for which libraries set themselves up."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = run()
        current.wait_stream(self._stream)
        # Memory of the other stream is free again for it alone, whatever this one still reads.
        return tuple(result.clone() for result in results)

    def record(self, run: Callable[[], Tensors]) -> Tensors:
        """Record the kernels that a function launches."""
        torch.cuda.synchronize(self._device)
        # Not by torch.cuda.graph, which leaves its stream the current one where recording fails.
        with torch.cuda.stream(self._stream):
            # A loader's thread that pins memory meanwhile does no harm.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                return run()
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        """Launch the kernels."""
        self._graph.replay()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream beside the current one; one for all, since each keeps memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recorded:
    """A function of tensors whose first call runs it, whose second records it, and all later repeat it.

    The function may read and write other tensors too, in place: what it sees of the host (numbers,
    shapes, which tensors there are) is that of the second call for ever. One that cannot be recorded
    is called as it is, with a warning.

    Args:
        function: Takes tensors and returns a tuple of tensors.
        graph: What records it.
    """

    def __init__(self, function: Callable[..., Tensors], graph: Graph) -> None:
        self._function = function
        self._graph: Graph | None = graph
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the function of tensors, of the same shapes in all calls."""
        if self._graph is None:
            return self._function(*inputs)
        if not self._inputs:
            self._inputs = tuple(given.clone() for given in inputs)
            return self._graph.warm_up(self._run)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if not self._outputs:
            try:
                self._outputs = self._graph.record(self._run)
            except RuntimeError as error:
                rank_zero_warn(
                    "a step of generation could not be recorded as a CUDA graph and is launched kernel "
                    f"by kernel ({error}); choose cache: dynamic of CachedSampler"
                )
                self._graph = None
                return self._function(*inputs)
        self._graph.replay()
        # The next call writes to where these results are.
        return tuple(result.clone() for result in self._outputs)

    def _run(self) -> Tensors:
        return self._function(*self._inputs)


def recorder(device: torch.device) -> Callable[[Callable[..., Tensors]], Callable[..., Tensors]]:
    """Return what makes a recorded function of one, on a device of which there are recordings.

    Elsewhere functions stay as they are.
    """
    if device.type in RECORDED_ON:
        return lambda function: Recorded(function, CudaGraph(device))
    return lambda function: function

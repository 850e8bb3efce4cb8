"""Random numbers of rows, each from a generator of its own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_kd.devices import to_device

DRAWN_AT_ONCE = 256
"""Random numbers of a row that are drawn together."""


class Uniforms:
    """Random numbers in [0, 1) for each row, drawn as needed.

    The generators are those of the CPU: a seed gives the same numbers for every device. What they draw
    is copied to a GPU in blocks, and the host does not wait for it.

    Args:
        seeds: One for each row.
        device: That the numbers are needed on.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._drawn = torch.empty(0)

    def at(self, place: int) -> Tensor:
        """Return the numbers of a position, ``(rows,)``; positions come in order."""
        if place % DRAWN_AT_ONCE == 0:
            self._drawn = self.block(range(len(self._generators)))
        return self._drawn[:, place % DRAWN_AT_ONCE]

    def block(self, rows: Iterable[int]) -> Tensor:
        """Return the next numbers of some rows, ``(rows, DRAWN_AT_ONCE)``, float64."""
        drawn = torch.stack(
            [
                torch.rand(DRAWN_AT_ONCE, generator=self._generators[row], dtype=torch.float64)
                for row in rows
            ]
        )
        return to_device(drawn, self._device)

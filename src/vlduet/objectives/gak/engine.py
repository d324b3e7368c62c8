"""Interface between the callers of the global alignment kernel and the engines that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

WeightKind = Literal["posterior", "gradient"]
"""`posterior`: d log K / d log kappa, the probability that an alignment passes through a cell.
`gradient`: d log K / d squared distance."""


@dataclass(frozen=True, slots=True)
class PairGrid:
    """A x B pairs of sequences whose squared distances lie in one tensor of cells, float[R, N, B].

    Row r of the cells holds the squared distances of one slice of a sequence x to the N slices of
    each of B sequences y. The slices of a sequence x are consecutive rows. This is the order in
    which one matrix product leaves the distances.
    """

    first_rows: Tensor
    """int64[A]: row of the first slice of every sequence x, ascending."""
    scale: Tensor
    """float[A, B]: 1 / (2 sigma^2) of every pair."""
    lengths_x: Tensor
    """int64[A, B]: number of slices of x, at least 1."""
    lengths_y: Tensor
    """int64[A, B]: number of slices of y, 1 to N. Cells beyond the lengths do not count."""


class Engine(Protocol):
    """Algorithm that sweeps the recursion of the kernel over the cells of many pairs at once.

    No method records a gradient; `all_pairs` builds its gradient from the weights.
    """

    runs_in_one_thread: bool
    """Whether a call uses the calling thread alone, so that the caller may run several at once."""

    def choose_group_size(self, device: torch.device, count: int) -> int:
        """Return how many of `count` sequences y to place side by side (B of `PairGrid`)."""
        ...

    def log_gak(self, cells: Tensor, grid: PairGrid) -> Tensor:
        """Return log K of every pair, float64[A, B]; sequences x may share rows of the cells."""
        ...

    def log_gak_and_weights(
        self, make_cells: Callable[[], Tensor], grid: PairGrid, *, kind: WeightKind
    ) -> tuple[Tensor, Tensor]:
        """Return log K of every pair, and the weight of every cell in it.

        Args:
            make_cells: returns the cells, float[R, N, B]. The engine may overwrite the returned
                tensor, and may call the function again. Sequences x must not share rows.
            grid: the pairs.
            kind: which weight.

        Returns:
            float64[A, B], and float[R, N, B]. Weights are 0 between the end of a pair and the
            longest of its row of the grid; rows and columns that no pair reaches are 0 if the
            cells are 0 there.
        """
        ...

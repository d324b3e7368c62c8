"""Engine of the global alignment kernel in log space, in plain torch operations, for any device.

The recursion runs along anti-diagonals: the cells of one diagonal depend only on the two before it,
so that one step handles a diagonal of all pairs. With L = log G and l = log kappa,

    L[i, j] = logsumexp(L[i, j-1], L[i-1, j-1], L[i-1, j]) + l[i, j]             (forward)
    E[i, j] = sum over successors t of E[t] exp(L[i, j] + l[t] - L[t])          (backward)

E is the alignment posterior (Cuturi and Blondel 2017, algorithm 2). A diagonal is stored relative
to its largest cell, and the sum of these maxima in float64: log G itself reaches hundreds, where
float32 has lost the digits that matter after normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlduet.objectives.gak.engine import PairGrid, WeightKind

INF = float("inf")
CPU_LANES = 128
GPU_LANES = 512
"""Largest number of sequences y side by side, per kind of device."""


class LogSpaceEngine:
    """Engine for any device and floating dtype; torch parallelises every operation itself."""

    runs_in_one_thread = False

    def choose_group_size(self, device: torch.device, count: int) -> int:
        """Return min(count, 128) on a CPU and min(count, 512) on other devices."""
        return min(CPU_LANES if device.type == "cpu" else GPU_LANES, count)

    def log_gak(self, cells: Tensor, grid: PairGrid) -> Tensor:
        """Return log K of every pair, float64[A, B]."""
        log_kappa = _gather_log_kappa(cells, grid)
        log_k, _, _ = _sweep_forward(log_kappa, _flat(grid.lengths_x), _flat(grid.lengths_y))
        return log_k.view(grid.scale.shape)

    def log_gak_and_weights(
        self, make_cells: Callable[[], Tensor], grid: PairGrid, *, kind: WeightKind
    ) -> tuple[Tensor, Tensor]:
        """Return log K of every pair, float64[A, B], and the weight of every cell, [R, N, B].

        `make_cells` is called once, and its tensor stays as it is. Cells beyond the lengths of
        their pair get the weight 0.
        """
        cells = make_cells()
        log_kappa = _gather_log_kappa(cells, grid)
        ends_x = _flat(grid.lengths_x)
        ends_y = _flat(grid.lengths_y)
        log_k, log_g, offsets = _sweep_forward(log_kappa, ends_x, ends_y, keep_table=True)
        pair_weights = _sweep_backward(log_kappa, log_g, offsets, ends_x, ends_y)  # [M, N, A * B]
        if kind == "gradient":
            # kappa = s / (2 - s) and s = exp(-scale d) give d log kappa / d d = -scale (1 + kappa).
            pair_weights *= -_flat(grid.scale) * (1 + log_kappa.exp())
        weights = torch.zeros_like(cells)
        row_index = torch.arange(len(log_kappa), device=cells.device)
        by_pair = pair_weights.unflatten(2, grid.scale.shape)  # [M, N, A, B]
        by_sequence = by_pair.permute(2, 0, 1, 3)  # [A, M, N, B]
        is_own_row = row_index < grid.lengths_x.amax(1)[:, None]  # [A, M]
        rows = grid.first_rows[:, None] + row_index
        weights[rows[is_own_row]] = by_sequence[is_own_row]
        return log_k.view(grid.scale.shape), weights


def compute_log_kappa(squared_distances: Tensor, scale: Tensor) -> Tensor:
    """Return log kappa = log s - log(2 - s) with s = exp(-scale d), of the shape of `d`.

    Distances below 0, which rounding leaves, count as 0. `scale` must broadcast to them.
    """
    log_s = squared_distances.clamp(min=0) * -scale
    return log_s - torch.log1p(-torch.expm1(log_s))  # log(2 - s), exact near s = 1


def _fill_outside(cells: Tensor, lengths_x: Tensor, lengths_y: Tensor, *, value: float) -> Tensor:
    """Return [M, N, P] cells with `value` beyond the lengths, int64[P], of every pair.

    The old content is not read, so that NaN in the padding reaches neither values nor gradients.
    """
    rows = torch.arange(cells.shape[0], device=cells.device)[:, None, None]
    columns = torch.arange(cells.shape[1], device=cells.device)[:, None]
    is_inside = (rows < lengths_x) & (columns < lengths_y)
    return cells.masked_fill(~is_inside, value)


def _flat(values: Tensor) -> Tensor:
    """Return [A, B] as [A * B]."""
    return values.reshape(-1)


def _gather_log_kappa(cells: Tensor, grid: PairGrid) -> Tensor:
    """Return log kappa of every pair of the grid, [M, N, A * B]; -inf beyond a pair's lengths."""
    row_index = torch.arange(int(grid.lengths_x.max()), device=cells.device)
    rows = (grid.first_rows[:, None] + row_index).clamp(max=len(cells) - 1)  # [A, M]
    pairs = cells[rows].permute(1, 2, 0, 3).flatten(2)  # [M, N, A * B]
    lengths_x = _flat(grid.lengths_x)
    lengths_y = _flat(grid.lengths_y)
    distances = _fill_outside(pairs, lengths_x, lengths_y, value=0.0)
    log_kappa = compute_log_kappa(distances, _flat(grid.scale))
    return _fill_outside(log_kappa, lengths_x, lengths_y, value=-INF).contiguous()


def _rows_of_diagonal(num_rows: int, num_columns: int, k: int) -> tuple[int, int]:
    """Return the first and the last row i of the cells (i, k - i)."""
    return max(0, k - num_columns + 1), min(k, num_rows - 1)


def _view_diagonal(cells: Tensor, k: int) -> Tensor:
    """Return a view [count, P] of the cells (i, k - i) of contiguous [M, N, P], by ascending i."""
    num_rows, num_columns, num_pairs = cells.shape
    low, high = _rows_of_diagonal(num_rows, num_columns, k)
    first_cell = low * num_columns + k - low
    strides = ((num_columns - 1) * num_pairs, 1)
    offset = cells.storage_offset() + first_cell * num_pairs
    return cells.as_strided((high - low + 1, num_pairs), strides, offset)


def _sweep_forward(
    log_kappa: Tensor, ends_x: Tensor, ends_y: Tensor, *, keep_table: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward recursion.

    Args:
        log_kappa: [M, N, P], -inf beyond the lengths.
        ends_x, ends_y: int64[P], the lengths.
        keep_table: keep log G for `_sweep_backward`.

    Returns:
        log K, float64[P]. Log G [M, N, P] relative to the offset of its diagonal, and the offsets,
        float64[M + N - 1, P]; without `keep_table`, both have no meaning.
    """
    num_rows, num_columns, num_pairs = log_kappa.shape
    log_g = torch.empty_like(log_kappa) if keep_table else log_kappa.new_empty(0)
    last_diagonal = ends_x + ends_y - 2  # the diagonal of a pair's last cell
    last_row = ends_x[None]  # in buffers with one row before the first slice: G[0, j]
    offset = torch.zeros(num_pairs, dtype=torch.float64, device=log_kappa.device)
    log_k = torch.full_like(offset, -INF)
    offsets = []
    # Diagonals k - 2, k - 1 and k.
    second_last, last, current = (
        log_kappa.new_full((num_rows + 1, num_pairs), -INF) for _ in range(3)
    )
    second_last[0] = 0.0  # log G[0, 0]
    lowest = torch.finfo(log_kappa.dtype).min
    for k in range(num_rows + num_columns - 1):
        low, high = _rows_of_diagonal(num_rows, num_columns, k)
        corner = second_last[low : high + 1]
        up = last[low : high + 1]
        left = last[low + 1 : high + 2]
        # -inf - -inf would be NaN, hence the lower bound.
        peak = torch.maximum(torch.maximum(corner, up), left).clamp_(min=lowest)
        total = (corner - peak).exp_().add_((up - peak).exp_()).add_((left - peak).exp_())
        diagonal = total.log_().add_(peak).add_(_view_diagonal(log_kappa, k))
        shift = diagonal.amax(0)
        shift = torch.where(shift > -INF, shift, 0.0)
        current.fill_(-INF)
        torch.sub(diagonal, shift, out=current[low + 1 : high + 2])
        last.sub_(shift)  # the next diagonal adds cells of this one and of the one before it
        offset = offset + shift.double()
        if keep_table:
            _view_diagonal(log_g, k).copy_(current[low + 1 : high + 2])
            offsets.append(offset)
        ends_here = last_diagonal == k
        log_k = torch.where(ends_here, current.gather(0, last_row)[0].double() + offset, log_k)
        second_last, last, current = last, current, second_last
    return log_k, log_g, torch.stack(offsets) if keep_table else offset


def _sweep_backward(
    log_kappa: Tensor, log_g: Tensor, offsets: Tensor, ends_x: Tensor, ends_y: Tensor
) -> Tensor:
    """Return the alignment posterior, [M, N, P], from the results of `_sweep_forward`.

    Every cell passes its probability on to the cells that it was summed from, in proportion to
    their share of the sum. Cells beyond the lengths get 0.
    """
    num_rows, num_columns, num_pairs = log_kappa.shape
    last_k = num_rows + num_columns - 2
    posterior = torch.zeros_like(log_kappa)
    last_diagonal = ends_x + ends_y - 2
    last_row = (ends_x - 1)[None]
    # Of diagonals k + 1 and k + 2, by row, with one row more at the end: the posterior, and
    # log(kappa / G), which is -inf where there is no cell (0 * exp(-inf) is 0, 0 * inf is not).
    posterior_1, posterior_2 = (log_kappa.new_zeros(num_rows + 1, num_pairs) for _ in range(2))
    ratio_1, ratio_2 = (torch.full_like(posterior_1, -INF) for _ in range(2))
    for k in range(last_k, -1, -1):
        low, high = _rows_of_diagonal(num_rows, num_columns, k)
        diagonal = _view_diagonal(log_g, k)
        to_next = (offsets[k] - offsets[min(k + 1, last_k)]).to(diagonal.dtype)
        to_second_next = (offsets[k] - offsets[min(k + 2, last_k)]).to(diagonal.dtype)
        right = slice(low, high + 1)
        down = slice(low + 1, high + 2)
        total = posterior_1[right] * (diagonal + ratio_1[right] + to_next).exp_()
        total.add_(posterior_1[down] * (diagonal + ratio_1[down] + to_next).exp_())
        total.add_(posterior_2[down] * (diagonal + ratio_2[down] + to_second_next).exp_())
        current = torch.zeros_like(posterior_1)
        ratio = torch.full_like(ratio_1, -INF)
        current[right] = total
        at_end = torch.where((last_diagonal == k)[None], 1.0, current.gather(0, last_row))
        current.scatter_(0, last_row, at_end.to(current.dtype))
        is_reached = diagonal > -INF  # no alignment passes where G = 0
        ratio[right] = torch.where(is_reached, _view_diagonal(log_kappa, k) - diagonal, -INF)
        current[right] = torch.where(is_reached, current[right], 0.0)
        _view_diagonal(posterior, k).copy_(current[right])
        posterior_1, posterior_2 = current, posterior_1
        ratio_1, ratio_2 = ratio, ratio_1
    return posterior

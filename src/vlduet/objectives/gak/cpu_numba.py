"""Engine of the global alignment kernel for float32 on a CPU, compiled by numba (extra `fast`).

The B sequences y of a grid are the lanes of vector instructions: a row of G is computed for all of
them at once in plain contiguous loops, and neither kappa nor G ever leaves the cache. A call uses
one thread; the caller runs several.

G is stored linearly, in float64. Each lane is rescaled to a peak of 1 where it leaves 1e-100 to
1e100, and the logarithm of what was divided out is added to `shift`. A pair whose G loses digits
in spite of that comes out as NaN, and the engine computes it again in log space.

The loops are written for the vectoriser: no calls that are not inlined, and few arrays, since every
two of them cost a run-time check for overlap. Therefore one array, `carry`, holds the sum of G of
the left and of the diagonal neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from vlduet.objectives.gak.engine import PairGrid, WeightKind
from vlduet.objectives.gak.log_space import LogSpaceEngine

LANES = 32
"""Number of sequences y side by side. A row of their G takes 4 KiB at 16 slices."""

RESCALE_ABOVE = 1e100
"""G of a lane is rescaled if its peak is above this value or below its inverse."""

LOSES_DIGITS_BELOW = 1e-290
"""A smaller G may have lost digits."""

MAX_REPAIR_CELLS = 1 << 17
"""Number of cells that are repaired in log space at once."""

f32 = np.float32
CONTRACT = {"contract"}
"""Floating-point freedom of the sweeps: multiplications and additions may be fused."""
VECTOR_MAXIMUM = {"nnan", "nsz"}
"""Freedom that a vector minimum or maximum needs. NaN among the distances was refused before."""


class NumbaEngine:
    """Engine for float32 cells on a CPU; one call runs in one thread."""

    runs_in_one_thread = True

    def choose_group_size(self, device: torch.device, count: int) -> int:
        """Return 32, whatever the device and the count."""
        return LANES

    def log_gak(self, cells: Tensor, grid: PairGrid) -> Tensor:
        """Return log K of every pair, float64[A, 32]; sequences x may share rows of the cells.

        Pairs beyond the range of float64 are computed again in log space. The cells stay as they
        are.
        """
        first_rows, scale, ends_x, ends_y = _kernel_arguments(grid)
        log_k = np.empty(grid.scale.shape)
        _log_gak_kernel(cells.numpy(), first_rows, scale, ends_x, ends_y, log_k)
        if np.isnan(log_k).any():
            _repair(cells, grid, log_k)
        return torch.from_numpy(log_k)

    def log_gak_and_weights(
        self, make_cells: Callable[[], Tensor], grid: PairGrid, *, kind: WeightKind
    ) -> tuple[Tensor, Tensor]:
        """Return log K, float64[A, 32], and weights, float32[R, N, 32].

        The weights are written over the tensor that `make_cells` returns. It is called once more if
        a pair is beyond the range of float64, which log space then computes.
        """
        weights = make_cells()
        plain = weights.numpy()
        first_rows, scale, ends_x, ends_y = _kernel_arguments(grid)
        log_k = np.empty(grid.scale.shape)
        is_posterior = kind == "posterior"
        _weights_kernel(plain, first_rows, scale, ends_x, ends_y, log_k, plain, is_posterior)
        if np.isnan(log_k).any():
            _repair(make_cells(), grid, log_k, weights=weights, kind=kind)
        return torch.from_numpy(log_k), weights


def _kernel_arguments(
    grid: PairGrid,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return first rows, scale, lengths of x and lengths of y as the kernels take them.

    It hardly calls torch: each call may hand the interpreter to another thread and wait for it.
    """
    ends_x = np.ascontiguousarray(grid.lengths_x.numpy(), dtype=np.int32)
    ends_y = np.ascontiguousarray(grid.lengths_y.numpy(), dtype=np.int32)
    return grid.first_rows.numpy(), np.ascontiguousarray(grid.scale.numpy()), ends_x, ends_y


def _repair(
    cells: Tensor,
    grid: PairGrid,
    log_k: np.ndarray,
    *,
    weights: Tensor | None = None,
    kind: WeightKind = "gradient",
) -> None:
    """Compute the pairs whose `log_k` is NaN in log space, in float64.

    Modifies `log_k` and, where they are given, `weights` in place.
    """
    engine = LogSpaceEngine()
    failed = torch.from_numpy(np.argwhere(np.isnan(log_k)))  # [F, 2]
    for pairs in failed.split(max(1, MAX_REPAIR_CELLS // cells[0].numel())):
        a, lane = pairs.unbind(1)
        lengths_x = grid.lengths_x[a, lane]
        row_index = torch.arange(int(lengths_x.max()))
        rows = (grid.first_rows[a][:, None] + row_index).clamp(max=len(cells) - 1)  # [F, M]
        # All failed pairs become the lanes of one sequence x.
        pair_cells = cells[rows, :, lane[:, None]].double().permute(1, 2, 0)  # [M, N, F]
        pair_grid = PairGrid(
            first_rows=torch.zeros(1, dtype=torch.long),
            scale=grid.scale[a, lane][None].double(),
            lengths_x=lengths_x[None],
            lengths_y=grid.lengths_y[a, lane][None],
        )
        if weights is None:
            pair_log_k = engine.log_gak(pair_cells, pair_grid)
        else:
            pair_log_k, pair_weights = engine.log_gak_and_weights(
                pair_cells.clone, pair_grid, kind=kind
            )
            pair, row = (row_index < lengths_x[:, None]).nonzero(as_tuple=True)
            weights[rows[pair, row], :, lane[pair]] = pair_weights[row, :, pair].float()
        log_k[a.numpy(), lane.numpy()] = pair_log_k[0].numpy()


# ------------------------------------------------------------------ compiled code


@intrinsic
def _float_from_bits(_context, _bits):
    """Reinterpret the bits of an int32 as a float32."""

    def _generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.float32(types.int32), _generate


@njit(inline="always")
def _exp_negative(z):
    """Return exp(-z) of a float32 z >= 0 with a relative error of 1e-7; 0 below 2^-127."""
    exponent = max(f32(-1.44269504) * z, f32(-127))  # the bits of 2^-127 are those of 0
    integer = np.floor(exponent + f32(0.5))
    f = (exponent - integer) * f32(0.69314718)  # |f| <= log(2) / 2: seven terms of e^f
    p = f32(1 / 720)
    p = p * f + f32(1 / 120)
    p = p * f + f32(1 / 24)
    p = p * f + f32(1 / 6)
    p = p * f + f32(0.5)
    p = p * f + f32(1)
    p = p * f + f32(1)
    power_of_two = (np.int32(integer) + np.int32(127)) << np.int32(23)
    return p * _float_from_bits(power_of_two)  # type: ignore[call-arg]


@njit(inline="always")
def _compute_kappa(distances, scale, kappa, num_columns):
    """Write kappa = s / (2 - s) of one row of cells, with s = exp(-scale * distance)."""
    for j in range(num_columns):
        for lane in range(LANES):
            s = _exp_negative(max(distances[j, lane], f32(0)) * scale[lane])
            kappa[j, lane] = s / (f32(2) - s)


@njit(inline="always")
def _advance_row(kappa, row, carry, num_columns):
    """Replace row i - 1 of G by row i: G[i,j] = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij.

    `carry` must hold G[i,0] + G[i-1,0] of every lane, and is overwritten.
    """
    for j in range(num_columns):
        for lane in range(LANES):
            up = row[j, lane]
            g = np.float64(kappa[j, lane]) * (carry[lane] + up)
            carry[lane] = g + up
            row[j, lane] = g


@njit(fastmath=VECTOR_MAXIMUM)
def _row_range(row, lowest, peak, num_columns):
    """Return the smallest and the largest cell of a row, at most 1.0 and at least 0.0.

    Those of every lane are written to `lowest` and `peak`. Lanes come first, since in one chain of
    minima each would wait for the one before it.
    """
    for lane in range(LANES):
        lowest[lane] = 1.0
        peak[lane] = 0.0
    for j in range(num_columns):
        for lane in range(LANES):
            lowest[lane] = min(lowest[lane], row[j, lane])
            peak[lane] = max(peak[lane], row[j, lane])
    low = 1.0
    high = 0.0
    for lane in range(LANES):
        low = min(low, lowest[lane])
        high = max(high, peak[lane])
    return low, high


@njit(fastmath=VECTOR_MAXIMUM)
def _row_peaks(row, peak, num_columns):
    """Write the largest cell of every lane of a row, at least 0, to `peak`."""
    for lane in range(LANES):
        peak[lane] = 0.0
    for j in range(num_columns):
        for lane in range(LANES):
            peak[lane] = max(peak[lane], row[j, lane])


@njit
def _rescale(row, shift, peak, num_columns):
    """Divide the lanes whose peak is out of range by it, and add its logarithm to their shift.

    Modifies row and shift; `peak` becomes the factor of every lane, 1 where it is in range.
    """
    for lane in range(LANES):
        is_out = peak[lane] > RESCALE_ABOVE or 0.0 < peak[lane] < 1 / RESCALE_ABOVE
        shift[lane] += math.log(peak[lane]) if is_out else 0.0
        peak[lane] = 1 / peak[lane] if is_out else 1.0
    for j in range(num_columns):
        for lane in range(LANES):
            row[j, lane] *= peak[lane]


@njit(inline="always")
def _forward_row(distances, scale, kappa, state, i, ends_x, ends_y, log_k):
    """Replace row i - 1 of G in `state` by row i, rescaled if it leaves the range.

    Writes kappa, the other arrays of the state, and log K of the lanes whose x ends with this row:
    NaN if a cell of the lane was ever below `LOSES_DIGITS_BELOW`.
    """
    row, carry, shift, peak, lowest, is_inexact, num_columns = state
    carry[:] = 1.0 if i == 0 else 0.0  # G[0,0] = 1, G[i,0] = 0
    _compute_kappa(distances, scale, kappa, num_columns)
    _advance_row(kappa, row, carry, num_columns)
    low, high = _row_range(row, lowest, peak, num_columns)
    for lane in range(LANES):
        is_inexact[lane] |= lowest[lane] < LOSES_DIGITS_BELOW
        if ends_x[lane] == i + 1:
            g = row[ends_y[lane] - 1, lane]
            log_k[lane] = math.nan if is_inexact[lane] else math.log(g) + shift[lane]
    if low < 1 / RESCALE_ABOVE or high > RESCALE_ABOVE:
        _rescale(row, shift, peak, num_columns)


@njit(nogil=True, cache=True, fastmath=CONTRACT, error_model="numpy")
def _log_gak_kernel(cells, first_rows, scale, ends_x, ends_y, log_k):
    """Write log K of every pair; NaN where the range of float64 is not enough.

    Args:
        cells: float32[R, N, LANES], squared distances.
        first_rows: int64[A], row of the first slice of every sequence x.
        scale: float32[A, LANES], 1 / (2 sigma^2).
        ends_x, ends_y: int32[A, LANES], the lengths.
        log_k: float64[A, LANES], overwritten.
    """
    max_columns = cells.shape[1]
    kappa = np.empty((max_columns, LANES), f32)
    row = np.empty((max_columns, LANES))
    carry = np.empty(LANES)
    shift = np.empty(LANES)
    peak = np.empty(LANES)
    lowest = np.empty(LANES)
    is_inexact = np.empty(LANES, np.bool_)
    for a in range(len(first_rows)):
        state = row, carry, shift, peak, lowest, is_inexact, ends_y[a].max()
        row[:] = 0.0
        shift[:] = 0.0
        is_inexact[:] = False
        for i in range(ends_x[a].max()):
            distances = cells[first_rows[a] + i]
            _forward_row(distances, scale[a], kappa, state, i, ends_x[a], ends_y[a], log_k[a])


@njit(nogil=True, cache=True, fastmath=CONTRACT, error_model="numpy")
def _weights_kernel(cells, first_rows, scale, ends_x, ends_y, log_k, weights, is_posterior):
    """Write log K as `_log_gak_kernel` does, and the weight of every cell.

    The forward G and the backward H, the sum over all ways from a cell to the end, give the
    posterior E = G H / K.

    Args:
        weights: float32[R, N, LANES], overwritten; may be the memory of the cells. Receives E if
            `is_posterior`, else d log K / d distance = -scale E (1 + kappa). Cells beyond a lane's
            lengths get 0, and those beyond the longest lane of their sequence x stay as they are.
    """
    max_rows = ends_x.max()
    max_columns = cells.shape[1]
    kappa = np.empty((max_rows, max_columns, LANES), f32)
    table = np.empty((max_rows, max_columns, LANES))
    row = np.empty((max_columns + 1, LANES))
    shifts = np.empty((max_rows, LANES))
    carry = np.empty(LANES)
    shift = np.empty(LANES)
    peak = np.empty(LANES)
    lowest = np.empty(LANES)
    is_inexact = np.empty(LANES, np.bool_)
    factor = np.empty(LANES)
    for a in range(len(first_rows)):
        num_rows = ends_x[a].max()
        num_columns = ends_y[a].max()
        state = row, carry, shift, peak, lowest, is_inexact, num_columns
        row[:] = 0.0
        shift[:] = 0.0
        is_inexact[:] = False
        for i in range(num_rows):
            distances = cells[first_rows[a] + i]
            _forward_row(distances, scale[a], kappa[i], state, i, ends_x[a], ends_y[a], log_k[a])
            shifts[i] = shift
            table[i, :num_columns] = row[:num_columns]
        _clear_outside(kappa, table, ends_x[a], ends_y[a], num_rows, num_columns)
        row[:] = 0.0
        shift[:] = 0.0
        for i in range(num_rows - 1, -1, -1):
            _start_row_backward(row, factor, shifts[i], shift, i, ends_x[a], ends_y[a], log_k[a])
            carry[:] = row[num_columns]
            row[num_columns] = 0.0
            _retreat_row(kappa[i], row, carry, table[i], num_columns)
            row_weights = weights[first_rows[a] + i]
            _write_weights(
                table[i], factor, kappa[i], scale[a], row_weights, num_columns, is_posterior
            )
            _row_peaks(row, peak, num_columns)
            _rescale(row, shift, peak, num_columns)


@njit(inline="always")
def _start_row_backward(row, factor, row_shift, shift, i, ends_x, ends_y, log_k):
    """Start H of the lanes that end with row i, and write the factor that makes G H the posterior.

    Modifies row and factor, and sets log K of a lane to NaN if its factor is out of range.
    """
    for lane in range(LANES):
        if ends_x[lane] == i + 1:  # H = 1 at the end, as if a cell after it had handed it back
            row[ends_y[lane], lane] = 1.0
        # Beyond the end of a lane, G is 0 and its scale may be anything: 0 * inf would be NaN.
        exponent = row_shift[lane] + shift[lane] - log_k[lane]
        factor[lane] = math.exp(exponent) if i < ends_x[lane] else 0.0
        if not factor[lane] < RESCALE_ABOVE:
            log_k[lane] = math.nan


@njit
def _clear_outside(kappa, table, ends_x, ends_y, num_rows, num_columns):
    """Set kappa and G beyond the lengths of every lane to 0, so that nothing passes there.

    Modifies kappa and `table` in the first `num_rows` rows and `num_columns` columns.
    """
    for lane in range(LANES):
        for i in range(num_rows):
            for j in range(ends_y[lane] if i < ends_x[lane] else 0, num_columns):
                kappa[i, j, lane] = 0.0
                table[i, j, lane] = 0.0


@njit(inline="always")
def _retreat_row(kappa, row, carry, table_row, num_columns):
    """Replace kappa H of row i + 1 in `row` by that of row i; multiply `table_row`, G, by H.

    `carry` must hold kappa H of cell [i + 1, num_columns], and is overwritten.
    """
    for j in range(num_columns - 1, -1, -1):
        for lane in range(LANES):
            down = row[j, lane]
            h = carry[lane] + down
            kappa_h = np.float64(kappa[j, lane]) * h
            carry[lane] = kappa_h + down
            row[j, lane] = kappa_h
            table_row[j, lane] *= h


@njit(inline="always")
def _write_weights(products, factor, kappa, scale, weights, num_columns, is_posterior):
    """Write the first `num_columns` weights of one row from its products G H.

    The posterior E is product * factor. Without `is_posterior`, the weight is -scale E (1 + kappa).
    """
    if is_posterior:
        for j in range(num_columns):
            for lane in range(LANES):
                weights[j, lane] = f32(products[j, lane] * factor[lane])
    else:  # d log kappa / d distance = -scale 2 / (2 - s) = -scale (1 + kappa)
        for j in range(num_columns):
            for lane in range(LANES):
                posterior = f32(products[j, lane] * factor[lane])
                weights[j, lane] = -posterior * (f32(1) + kappa[j, lane]) * scale[lane]

"""The sweeps of `alignment`, compiled for the CPU: pairs are vector lanes; kappa and G never leave the cache.

Cells come as float32[R, N, LANES]: a row is one slice of x against N slices of each of LANES sequences y, so that a row of
G is swept for all of them at once, in plain contiguous loops. G is linear, not logarithmic: float64 with a scale a row and a
pair, taken to 1 where it leaves 1e-100 ... 1e100. A pair whose G loses digits even so gives NaN, and `sweeps` does it again
in log space. Needs numba (extra `fast`).

Loops are written for the vectoriser: no calls, few arrays (each two of them are a run-time check for overlap), and one array
`carry` for what the column before hands on, left + corner.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 32
"""Pairs side by side. A row of their G is 4 KiB at 16 slices."""

FAR = 1e100
"""G is rescaled beyond FAR and below 1 / FAR."""

LOST = 1e-290
"""A smaller G may have lost digits."""

single = np.float32
EXACT = {"contract"}
ORDERED = {"nnan", "nsz"}  # what a vector maximum needs; NaN was refused before


@intrinsic
def _as_float(_context, _bits):
    """The float32 that has these bits."""

    def _generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.float32(types.int32), _generate


@njit(inline="always")
def _exp_negative(z):
    """exp(-z) of a float32 z >= 0, to 1e-7 of itself; 0 from 2^-127 on."""
    t = max(single(-1.44269504) * z, single(-127))  # the bits of 2^-127 are those of 0
    whole = np.floor(t + single(0.5))
    f = (t - whole) * single(0.69314718)  # |f| <= log(2) / 2: seven terms of e^f
    p = single(1 / 720)
    p = p * f + single(1 / 120)
    p = p * f + single(1 / 24)
    p = p * f + single(1 / 6)
    p = p * f + single(0.5)
    p = p * f + single(1)
    p = p * f + single(1)
    return p * _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))  # type: ignore[call-arg]


@njit(inline="always")
def _kappas(distances, scale, kappa, columns):
    for j in range(columns):
        for q in range(LANES):
            s = _exp_negative(max(distances[j, q], single(0)) * scale[q])
            kappa[j, q] = s / (single(2) - s)


@njit(inline="always")
def _row(kappa, row, carry, columns):
    """One row of G over the one before it: G[i,j] = (G[i,j-1] + G[i-1,j-1] + G[i-1,j]) kappa_ij."""
    for j in range(columns):
        for q in range(LANES):
            up = row[j, q]
            new = np.float64(kappa[j, q]) * (carry[q] + up)
            carry[q] = new + up
            row[j, q] = new


@njit(fastmath=ORDERED)
def _range(row, lowest, peak, columns):
    """The smallest and the largest cell of a row; of each lane first, for a chain of minima waits for itself."""
    for q in range(LANES):
        lowest[q], peak[q] = 1.0, 0.0
    for j in range(columns):
        for q in range(LANES):
            lowest[q] = min(lowest[q], row[j, q])
            peak[q] = max(peak[q], row[j, q])
    low, high = 1.0, 0.0
    for q in range(LANES):
        low, high = min(low, lowest[q]), max(high, peak[q])
    return low, high


@njit(fastmath=ORDERED)
def _peaks(row, peak, columns):
    for q in range(LANES):
        peak[q] = 0.0
    for j in range(columns):
        for q in range(LANES):
            peak[q] = max(peak[q], row[j, q])


@njit
def _rescale(row, shift, peak, columns):
    """The peak of a lane becomes 1 where it has gone far; shift is the logarithm of what was taken away."""
    for q in range(LANES):
        far = peak[q] > FAR or 0.0 < peak[q] < 1 / FAR
        shift[q] += math.log(peak[q]) if far else 0.0
        peak[q] = 1 / peak[q] if far else 1.0
    for j in range(columns):
        for q in range(LANES):
            row[j, q] *= peak[q]


@njit(inline="always")
def _forward(distances, scale, kappa, state, i, ends_x, ends_y, log_k):
    """Row i of G, and log K of the lanes that end with it."""
    row, carry, shift, peak, lowest, lost, columns = state
    carry[:] = 1.0 if i == 0 else 0.0  # G[0,0] = 1, G[i,0] = 0
    _kappas(distances, scale, kappa, columns)
    _row(kappa, row, carry, columns)
    low, high = _range(row, lowest, peak, columns)
    for q in range(LANES):
        lost[q] |= lowest[q] < LOST
        if ends_x[q] == i + 1:
            log_k[q] = math.nan if lost[q] else math.log(row[ends_y[q] - 1, q]) + shift[q]
    if low < 1 / FAR or high > FAR:
        _rescale(row, shift, peak, columns)


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _sweep(cells, first, scale, ends_x, ends_y, log_k):
    most = cells.shape[1]
    kappa, row = np.empty((most, LANES), single), np.empty((most, LANES))
    carry, shift, peak, lowest = np.empty(LANES), np.empty(LANES), np.empty(LANES), np.empty(LANES)
    lost = np.empty(LANES, np.bool_)
    for a in range(len(first)):
        state = row, carry, shift, peak, lowest, lost, ends_y[a].max()
        row[:], shift[:], lost[:] = 0.0, 0.0, False
        for i in range(ends_x[a].max()):
            _forward(cells[first[a] + i], scale[a], kappa, state, i, ends_x[a], ends_y[a], log_k[a])


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _sweep_back(cells, first, scale, ends_x, ends_y, log_k, weights, posterior):
    rows_most, most = ends_x.max(), cells.shape[1]
    kappa, grid = np.empty((rows_most, most, LANES), single), np.empty((rows_most, most, LANES))
    row, shifts = np.empty((most + 1, LANES)), np.empty((rows_most, LANES))
    carry, shift, peak, lowest = np.empty(LANES), np.empty(LANES), np.empty(LANES), np.empty(LANES)
    lost = np.empty(LANES, np.bool_)
    factor = np.empty(LANES)
    for a in range(len(first)):
        rows, columns = ends_x[a].max(), ends_y[a].max()
        state = row, carry, shift, peak, lowest, lost, columns
        row[:], shift[:], lost[:] = 0.0, 0.0, False
        for i in range(rows):
            _forward(
                cells[first[a] + i], scale[a], kappa[i], state, i, ends_x[a], ends_y[a], log_k[a]
            )
            shifts[i] = shift
            grid[i, :columns] = row[:columns]
        _clear(kappa, grid, ends_x[a], ends_y[a], rows, columns)
        row[:], shift[:] = 0.0, 0.0
        for i in range(rows - 1, -1, -1):
            for q in range(LANES):
                if ends_x[a, q] == i + 1:  # H = 1 at the end, as if handed back by a cell after it
                    row[ends_y[a, q], q] = 1.0
                # Beyond a lane's end its row is 0, and its scale may be anything: 0 * inf must not come of it.
                factor[q] = (
                    math.exp(shifts[i, q] + shift[q] - log_k[a, q]) if i < ends_x[a, q] else 0.0
                )
                if not factor[q] < FAR:
                    log_k[a, q] = math.nan
            carry[:] = row[columns]
            row[columns] = 0.0
            _row_back(kappa[i], row, carry, grid[i], columns)
            _share(grid[i], factor, kappa[i], scale[a], weights[first[a] + i], columns, posterior)
            _peaks(row, peak, columns)
            _rescale(row, shift, peak, columns)


@njit
def _clear(kappa, grid, ends_x, ends_y, rows, columns):
    """Nothing passes beyond a lane's own ends."""
    for q in range(LANES):
        for i in range(rows):
            for j in range(ends_y[q] if i < ends_x[q] else 0, columns):
                kappa[i, j, q] = 0.0
                grid[i, j, q] = 0.0


@njit(inline="always")
def _row_back(kappa, row, carry, grid, columns):
    """One row of H over the one after it, times G; `row` holds kappa H of the row after, then of this one."""
    for j in range(columns - 1, -1, -1):
        for q in range(LANES):
            down = row[j, q]
            h = carry[q] + down
            back = np.float64(kappa[j, q]) * h
            carry[q] = back + down
            row[j, q] = back
            grid[j, q] *= h


@njit(inline="always")
def _share(grid, factor, kappa, scale, weights, columns, posterior):
    if posterior:
        for j in range(columns):
            for q in range(LANES):
                weights[j, q] = single(grid[j, q] * factor[q])
    else:  # d log kappa / d z = 2 / (2 - s) = 1 + kappa
        for j in range(columns):
            for q in range(LANES):
                weights[j, q] = (
                    -single(grid[j, q] * factor[q]) * (single(1) + kappa[j, q]) * scale[q]
                )


Array = NDArray[Any]


def sweep(
    cells: Array, first: Array, *, scale: Array, ends_x: Array, ends_y: Array, log_k: Array
) -> None:
    """log K of every lane.

    Args:
        cells: float32[R, N, LANES], squared distances; sequence a of x has the rows from first[a] on.
        first: int64[A].
        scale: float32[A, LANES], 1 / (2 sigma^2).
        ends_x, ends_y: int32[A, LANES], the lengths of x and y.
        log_k: float64[A, LANES], written; NaN where the range of float64 was not enough.
    """
    _sweep(cells, first, scale, ends_x, ends_y, log_k)


def sweep_back(
    cells: Array,
    first: Array,
    *,
    scale: Array,
    ends_x: Array,
    ends_y: Array,
    log_k: Array,
    weights: Array,
    posterior: bool,
) -> None:
    """log K as in `sweep`, and the share of every cell in it.

    Forward G and backward H, the sum over the ways from a cell to the end, give the posterior E = G H / K.

    Args:
        weights: float32[R, N, LANES], zeros, written: E where `posterior`, else d log K / d cells = -scale E (1 + kappa).
    """
    _sweep_back(cells, first, scale, ends_x, ends_y, log_k, weights, posterior)

"""Global alignment kernel of all pairs of two sets of ragged sequences, with its gradient.

1. `SliceTable`: the slices of all sequences of a side are the rows of one matrix, centred, with the
   shortest sequence first.
2. `_plan_blocks`: a block has a run of sequences x and B neighbouring sequences y.
3. One matrix product gives the squared distances of a block, and the engine gives its log K.
4. For the gradient, the engine also gives d log K / d distance of every cell.

With an engine that uses one thread, every thread multiplies and sweeps whole blocks: their cells
stay near one core, and no core waits for another. Otherwise torch parallelises each operation.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives.gak import threads
from vlduet.objectives.gak.engine import Engine, PairGrid
from vlduet.objectives.gak.slice_table import SigmaRule, SliceTable, requires_gradient

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CELLS_PER_BLOCK = 1 << 21
"""Number of cells of a block on a CPU; a few times as much memory lives beside the result."""

GPU_BLOCK_FACTOR = 16
"""Number of times that a block of another device may be larger."""

MIN_CELLS_PER_THREAD = 1 << 20
"""Number of cells that are worth starting a thread for."""


def all_pairs(left: SliceTable, right: SliceTable, rule: SigmaRule, *, engine: Engine) -> Tensor:
    """Return raw log K of all pairs of two centred tables, differentiable in their features.

    If both are the same object, only the upper triangle is computed, and mirrored.

    Returns:
        float64[n, m] for n sequences of `left` and m of `right`, in the user's order.
    """
    is_symmetric = left is right
    blocks = list(_plan_blocks(left, right, rule, engine))
    needs_gradient = requires_gradient(left.features, right.features)
    log_k = _AllPairs.apply(  # type: ignore[no-untyped-call]
        left.features, right.features, blocks, engine, needs_gradient
    )
    strips: dict[int, list[Tensor]] = {}
    for block, block_log_k in zip(blocks, log_k, strict=True):
        strips.setdefault(block.first_y, []).append(block_log_k)
    num_rows = len(left.first_rows)
    columns = []
    for parts in strips.values():
        strip = torch.cat(parts)  # in a symmetric matrix, it ends at the diagonal
        columns.append(F.pad(strip, (0, 0, 0, num_rows - len(strip))))
    matrix = torch.cat(columns, 1)[:, : len(right.first_rows)]
    if is_symmetric:
        matrix = matrix.triu() + matrix.triu(1).mT
    return matrix[left.order.argsort()][:, right.order.argsort()]


def self_terms(
    table: SliceTable, partners: SliceTable, rule: SigmaRule, *, engine: Engine
) -> Tensor:
    """Return raw log K(x, x) of the sequences of `table` with the sigma of every pair (x, y).

    It depends on y only by its length, so that each distinct length is computed once.
    Differentiable in the features of `table`, which must be centred.

    Returns:
        float64[n, m] for n sequences of `table` and m of `partners`, in the user's order.
    """
    lengths, length_index = torch.unique(partners.lengths, return_inverse=True)
    if not rule.depends_on_length:
        lengths = lengths[:1]
        length_index = torch.zeros_like(length_index)
    count = len(table.first_rows)
    group_size = engine.choose_group_size(table.features.device, count)
    groups = [table.select_group(begin, group_size) for begin in range(0, count, group_size)]
    needs_gradient = requires_gradient(table.features)
    log_k = _SelfTerms.apply(  # type: ignore[no-untyped-call]
        table.features, groups, lengths, rule, engine, needs_gradient
    )
    terms = torch.cat(log_k, 1)[:, :count].T[table.order.argsort()]  # [n, U]
    return terms[:, length_index[partners.order.argsort()]]


# ------------------------------------------------------------------ blocks


@dataclass(frozen=True, slots=True)
class _Block:
    """Run of sequences x against B sequences y, swept at once."""

    first_y: int
    """Index of the first sequence y."""
    rows: slice
    """Rows of the slices of the sequences x in their table."""
    columns: Tensor
    """int64[N * B], rows of the slices of y in theirs: first slices, then second ones, ..."""
    grid: PairGrid
    """The A x B pairs; its first rows count from `rows.start`."""

    @property
    def num_cells(self) -> int:
        """Number of squared distances."""
        return int(self.rows.stop - self.rows.start) * len(self.columns)


def _plan_blocks(
    left: SliceTable, right: SliceTable, rule: SigmaRule, engine: Engine
) -> Iterator[_Block]:
    """Yield blocks that cover all pairs; at least the upper triangle if both tables are one object.

    For each group of B sequences y, in the order of their table, runs of x follow one another. The
    last group is filled up with its last sequence. A block has at most `MAX_CELLS_PER_BLOCK` cells,
    `GPU_BLOCK_FACTOR` times as many on other devices than a CPU, and fewer for an engine that runs
    in one thread; but it has at least one sequence x.
    """
    is_symmetric = left is right
    features = left.features
    max_cells = MAX_CELLS_PER_BLOCK
    if features.device.type != "cpu":
        max_cells *= GPU_BLOCK_FACTOR
    if engine.runs_in_one_thread:  # several blocks for every thread
        all_cells = len(features) * len(right.features) // (2 if is_symmetric else 1)
        share = all_cells // (2 * torch.get_num_threads())
        max_cells = min(max_cells, max(MIN_CELLS_PER_THREAD // 2, share))
    ends = [*left.first_rows.tolist(), len(features)]
    group_size = engine.choose_group_size(features.device, len(right.first_rows))
    for begin in range(0, len(right.first_rows), group_size):
        lengths_y, rows_y = right.select_group(begin, group_size)
        count = len(left.first_rows)
        if is_symmetric:
            count = min(begin + group_size, count)
        for start, stop in _split_runs(ends, count, max_rows=max(1, max_cells // rows_y.numel())):
            lengths_x = left.lengths[start:stop, None].expand(-1, group_size)
            grid = PairGrid(
                first_rows=left.first_rows[start:stop] - ends[start],
                scale=rule.compute_scale(lengths_x, lengths_y).to(features.dtype),
                lengths_x=lengths_x,
                lengths_y=lengths_y.expand(stop - start, -1),
            )
            yield _Block(begin, slice(ends[start], ends[stop]), rows_y.T.flatten(), grid)


def _split_runs(ends: list[int], count: int, *, max_rows: int) -> Iterator[tuple[int, int]]:
    """Split sequences 0 to count - 1 into runs (start, stop) of at most `max_rows` slices.

    Sequence i has the rows ends[i] to ends[i + 1]. A run has at least one sequence.
    """
    start = 0
    while start < count:
        stop = bisect_right(ends, ends[start] + max_rows, hi=count + 1) - 1
        stop = max(start + 1, stop)
        yield start, stop
        start = stop


def _map_items(
    task: Callable[[Item], Result], items: Sequence[Item], engine: Engine, *, num_cells: int
) -> list[Result]:
    """Return [task(item) for item in items], by several threads where the cells are worth it.

    The last items must be the costliest: they start first. Raises what `task` raises.
    """
    if engine.runs_in_one_thread and num_cells >= 2 * MIN_CELLS_PER_THREAD:
        return threads.map_in_threads(task, items[::-1])[::-1]
    return [task(item) for item in items]


class _Scratch(threading.local):
    """Memory of one thread for all its blocks: fresh pages would cost as much as the sweep."""

    def __init__(self, like: Tensor, *, num_rows: int, num_cells: int = 0) -> None:
        self.facing = like.new_empty(num_rows, like.shape[1])
        self.cells = like.new_empty(num_cells)


def _gather_facing(features: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """Return rows y of a centred table as (y, -|y|^2 / 2, -1/2), written to `out`.

    The inner product with a row (x, 1, |x|^2) is -|x - y|^2 / 2. They are gathered block by block,
    since a few rows fit into the cache, and all of them do not.
    """
    torch.index_select(features, 0, rows, out=out)
    out[:, -2] = out[:, -1] / -2
    out[:, -1] = -0.5
    return out


class _AllPairs(torch.autograd.Function):
    """Log K of every block, float64[A, B] each, as a function of the features of both tables.

    If a gradient is needed, forward stores d log K / d distance of every cell.
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        blocks: list[_Block],
        engine: Engine,
        needs_gradient: bool,
    ) -> tuple[Tensor, ...]:
        """Return log K of every block, float64[A, B], in the order of the blocks.

        Args:
            ctx: receives what backward needs, if `needs_gradient`.
            left: float[S, d + 2], features of a centred table, of the sequences x.
            right: float[S', d + 2], likewise, of the sequences y.
            blocks: from `_plan_blocks`.
            engine: computes log K and the weights.
            needs_gradient: store d log K / d distance of every cell.
        """
        max_columns = max(len(block.columns) for block in blocks)
        max_cells = max(block.num_cells for block in blocks)
        # The weights of a block overwrite its cells and are kept, so they need memory of their own.
        scratch = _Scratch(left, num_rows=max_columns, num_cells=0 if needs_gradient else max_cells)
        zero = left.new_zeros(())

        def compute(block: _Block) -> tuple[Tensor, Tensor | None]:
            """Return log K of a block, and its weights [R, N, B]; None if no gradient is needed.

            Overwrites `scratch`.
            """
            rows = left[block.rows]
            facing = scratch.facing[: len(block.columns)]
            _gather_facing(right, block.columns, out=facing)
            shape = (len(rows), -1, block.grid.scale.shape[1])  # [R, N, B]
            if not needs_gradient:
                out = scratch.cells[: block.num_cells].view(len(rows), len(facing))
                torch.addmm(zero, rows, facing.T, beta=0, alpha=-2, out=out)
                return engine.log_gak(out.view(shape), block.grid), None

            def make_cells() -> Tensor:
                return torch.addmm(zero, rows, facing.T, beta=0, alpha=-2).view(shape)

            return engine.log_gak_and_weights(make_cells, block.grid, kind="gradient")

        num_cells = sum(block.num_cells for block in blocks)
        results = _map_items(compute, blocks, engine, num_cells=num_cells)
        if needs_gradient:
            ctx.blocks = blocks
            ctx.engine = engine
            ctx.save_for_backward(left, right, *(weights for _, weights in results))
        return tuple(log_k for log_k, _ in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `left` and `right` from those of every block's log K.

        They have the shapes of the features, with 0 in the last two columns. Three None follow, for
        the other arguments.
        """
        left, right, *weights = ctx.saved_tensors
        blocks: list[_Block] = ctx.blocks
        grad_left = torch.zeros_like(left)
        grad_right = torch.zeros_like(right)
        max_columns = max(len(block.columns) for block in blocks)
        max_cells = max(block.num_cells for block in blocks)
        scratch = _Scratch(left, num_rows=max_columns, num_cells=max_cells)
        lock = threading.Lock()

        def accumulate(item: tuple[_Block, Tensor, Tensor]) -> None:
            """Add the gradient of (block, its weights, gradient of its log K) to both sums.

            Overwrites `scratch`; the sums are changed under the lock.
            """
            block, weight, grad = item
            row_owner = torch.repeat_interleave(block.grid.lengths_x[:, 0])
            row_grad = grad.to(weight.dtype)[row_owner, None, :]  # [R, 1, B]
            out = scratch.cells[: block.num_cells].view_as(weight)
            cell_grad = torch.mul(weight, row_grad, out=out).flatten(1)  # w, [R, N * B]
            x = left[block.rows]
            facing = scratch.facing[: len(block.columns)]
            y = torch.index_select(right, 0, block.columns, out=facing)
            # d sum w |x - y|^2 / dx = 2 (x sum w - sum w y), and likewise for y. The column of ones
            # makes sum w part of the same product.
            product_x = cell_grad @ y
            product_y = cell_grad.T @ x
            with lock:
                grad_left[block.rows] += 2 * (product_x[:, -2:-1] * x - product_x)
                to_right = 2 * (product_y[:, -2:-1] * y - product_y)
                grad_right.index_add_(0, block.columns, to_right)

        items = list(zip(blocks, weights, grads, strict=True))
        num_cells = sum(block.num_cells for block in blocks)
        _map_items(accumulate, items, ctx.engine, num_cells=num_cells)
        # The last two columns follow from the features, and the distances' gradient is complete.
        grad_left[:, -2:] = 0
        grad_right[:, -2:] = 0
        return grad_left, grad_right, None, None, None


# ------------------------------------------------------------------ self terms


class _SelfTerms(torch.autograd.Function):
    """Log K(x, x) of every group of sequences, float64[U, B] each, as a function of the features.

    U is the number of distinct lengths of a partner.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        groups: list[tuple[Tensor, Tensor]],
        partner_lengths: Tensor,
        rule: SigmaRule,
        engine: Engine,
        needs_gradient: bool,
    ) -> tuple[Tensor, ...]:
        """Return log K(x, x) per group, float64[U, B]: row u for the partner length u.

        Args:
            ctx: receives what backward needs, if `needs_gradient`.
            features: float[S, d + 2] of a centred table.
            groups: lengths, int64[B], and rows, int64[B, N], of B sequences each.
            partner_lengths: int64[U].
            rule: gives the sigma of x and a partner.
            engine: computes log K and the weights.
            needs_gradient: store d log K / d distance of every cell.
        """

        def compute(group: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """Return log K of a group, and its weights [U, N, N, B]; without gradient none."""
            lengths, rows = group
            slices = features[rows]  # [B, N, d + 2]
            squares = slices[..., -1]
            x = slices[..., :-2]
            sums = squares[:, :, None] + squares[:, None, :]
            cells = (
                torch.baddbmm(sums, x, x.mT, alpha=-2).permute(1, 2, 0).contiguous()
            )  # [N, N, B]
            log_k = []
            weights = [cells.new_empty(0)]
            for part in partner_lengths.split(max(1, MAX_CELLS_PER_BLOCK // cells.numel())):
                own_lengths = lengths.expand(len(part), -1)
                # Weights overwrite cells, so that every partner length needs a copy of them.
                num_copies = len(part) if needs_gradient else 1
                copies = torch.arange(len(part), device=cells.device) % num_copies
                grid = PairGrid(
                    first_rows=copies * len(cells),
                    scale=rule.compute_scale(own_lengths, part[:, None]).to(cells.dtype),
                    lengths_x=own_lengths,
                    lengths_y=own_lengths,
                )
                if not needs_gradient:
                    log_k.append(engine.log_gak(cells, grid))
                    continue
                part_log_k, part_weights = engine.log_gak_and_weights(
                    partial(cells.repeat, num_copies, 1, 1), grid, kind="gradient"
                )
                log_k.append(part_log_k)
                weights.append(part_weights.flatten())
            return torch.cat(log_k), torch.cat(weights).view(-1, *cells.shape)

        # A cell costs about a quarter of one of `_AllPairs`, since its product is small.
        num_cells = sum(rows.shape[0] * rows.shape[1] ** 2 for _, rows in groups)
        cost = num_cells * len(partner_lengths) // 4
        results = _map_items(compute, groups, engine, num_cells=cost)
        if needs_gradient:
            ctx.groups = groups
            ctx.save_for_backward(features, *(weights for _, weights in results))
        return tuple(log_k for log_k, _ in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the features from those of every group's log K.

        It has their shape, with 0 in the last two columns. Five None follow, for the other
        arguments.
        """
        features, *weights = ctx.saved_tensors
        grad_features = torch.zeros_like(features)
        for (_, rows), weight, grad in zip(ctx.groups, weights, grads, strict=True):
            cell_grad = torch.einsum("uijb,ub->bij", weight, grad.to(weight.dtype))
            cell_grad = cell_grad + cell_grad.mT  # a slice is on both sides
            x = features[rows][..., :-2]
            grad_x = 2 * (cell_grad.sum(2, keepdim=True) * x - cell_grad @ x)
            grad_features[:, :-2].index_add_(0, rows.flatten(), grad_x.flatten(0, 1))
        return grad_features, None, None, None, None, None

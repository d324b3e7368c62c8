"""All pairs of ragged sequences: their squared distances by one matrix product a block, and the sweep over each block.

With the compiled sweep of a CPU, a block is multiplied and swept by one thread, and so are the products of its gradient: its
cells stay near one core, and no core waits for another. Else torch shares out the product, and the sweep its pairs.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.objectives.gak import log_space, threads

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 1 << 21
"""Cells of one block of pairs on the CPU; what lives beside the result is a few times this."""

ENOUGH = 1 << 20
"""Cells that are worth a thread."""


@dataclass
class Kernel:
    """What K is of a pair besides its slices."""

    width: float
    by_length: bool
    band: int | None

    def scale(self, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
        """1 / (2 sigma^2), broadcast."""
        mean = (lengths_x + lengths_y).double() / 2
        return 0.5 / (self.width**2 * (mean if self.by_length else torch.ones_like(mean)))


@dataclass
class Slices:
    """Sequences, shortest first, as one matrix of slices."""

    features: Tensor
    """float[S, d]; after `around` float[S, d + 2], with 1 and |x|^2 behind each."""
    lengths: Tensor
    """int64[n], rising."""
    first: Tensor
    """int64[n], row of the first slice."""
    order: Tensor
    """int64[n], where each stood in what was given."""
    middle: Tensor
    """float[d], the mean of all slices as they were given; no gradient."""
    room: Tensor | None = None
    """float[S, d + 2] that `features` is a view of: `around` copies nothing. None where they have a gradient."""

    @classmethod
    def of(cls, sequences: Sequence[Tensor], name: str) -> Slices:
        if not len(sequences):
            raise ValueError(f"{name} holds no sequences")
        shapes = [sequence.shape for sequence in sequences]
        width = shapes[0][-1] if shapes[0] else 0
        for i, shape in enumerate(shapes):
            if len(shape) != 2 or not shape[0] or shape[1] != width:
                raise ValueError(
                    f"{name}[{i}] has the shape {tuple(shape)}: [slices, {width or 'd'}] with one slice or more is needed"
                )
        device = sequences[0].device
        lengths, order = torch.sort(torch.tensor([shape[0] for shape in shapes]), stable=True)
        ordered, room = [sequences[i] for i in order.tolist()], None
        double = any(sequence.dtype == torch.float64 for sequence in sequences)
        dtype = torch.float64 if double else torch.float32
        if torch.is_grad_enabled() and any(sequence.requires_grad for sequence in sequences):
            features = torch.cat(ordered).to(dtype)
        else:
            room = torch.empty(int(lengths.sum()), width + 2, dtype=dtype, device=device)
            features = torch.cat(ordered, out=room[:, :-2])
        first, middle = lengths.cumsum(0) - lengths, features.detach().mean(0)
        # What is not finite makes the mean so: all slices are looked at only then.
        if not bool(middle.isfinite().all()) and not bool(features.isfinite().all()):
            row = int((~features.isfinite()).any(1).nonzero()[0])
            wrong = int(order[int((first <= row).sum()) - 1])
            raise ValueError(f"{name}[{wrong}] has features that are not finite")
        return cls(features, lengths.to(device), first.to(device), order.to(device), middle, room)

    def among(self, begin: int, wide: int) -> tuple[Tensor, Tensor]:
        """`wide` sequences from `begin` on, the last one repeated: lengths int64[wide], rows int64[wide, longest].

        Beyond a sequence's end stands any slice: a sweep does not look there.
        """
        which = torch.arange(begin, begin + wide, device=self.first.device).clamp(
            max=len(self.first) - 1
        )
        inner = torch.arange(int(self.lengths[which[-1]]), device=self.first.device)
        rows = self.first[which, None] + inner
        return self.lengths[which], rows.clamp(max=len(self.features) - 1)

    def around(self, middle: Tensor) -> None:
        """Takes a point away from every slice, in place, and makes what a product needs to give distances."""
        centred = self.features.sub_(middle)  # of a fresh tensor: see `of`
        squares = torch.linalg.vector_norm(centred, dim=1, keepdim=True) ** 2
        if self.room is None:
            self.features = torch.cat([centred, torch.ones_like(squares), squares], 1)
        else:
            self.room[:, -2:-1], self.room[:, -1:] = 1, squares
            self.features = self.room


def _facing(features: Tensor, index: Tensor, *, out: Tensor | None) -> Tensor:
    """float[I, d + 2] of some rows of `Slices.features`: -2 times an inner product of these with them is a squared distance.

    -2 (<x, y> - |x|^2 / 2 - |y|^2 / 2). Made where it is needed: a few rows fit into the cache, all of them do not.
    """
    found: Tensor = torch.index_select(features, 0, index, out=out)
    found[:, -2] = found[:, -1] / -2
    found[:, -1] = -0.5
    return found


@dataclass(frozen=True, slots=True)
class _Block:
    """Some sequences of x against those of y that lie side by side in a sweep."""

    begin: int
    """The first sequence of y."""
    some: slice
    """The sequences of x."""
    rows: slice
    """Their slices."""
    index: Tensor
    """int64[N * B], the slices of y: the first one of every sequence, then the second of every one ..."""
    first: Tensor
    """int64[A], where each x begins among `rows`."""
    scale: Tensor
    """float[A, B], 1 / (2 sigma^2)."""
    lengths: tuple[Tensor, Tensor]
    """int64[A, B] of x and of y."""

    @property
    def cells(self) -> int:
        """How many there are."""
        return int(self.rows.stop - self.rows.start) * len(self.index)


class _Scratch(threading.local):
    """Memory of one thread, for all of its blocks: fresh pages cost as much as the sweep."""

    def __init__(self, like: Tensor, *, facing: int, cells: int = 0) -> None:
        self.facing, self.cells = like.new_empty(facing, like.shape[1]), like.new_empty(cells)


def all_pairs(left: Slices, right: Slices, kernel: Kernel) -> Tensor:
    """Raw log K, float64[n, m] in the order given. If both are the same, of the upper triangle only, which is mirrored."""
    rows, same = left.features, left is right
    compiled, moving = _compiled(kernel, rows), _moving(rows, right.features)
    wide = _lanes(kernel, rows, len(right.first))
    blocks = [*_blocks(left, right, kernel, wide=wide, alone=compiled)]
    if compiled and moving:
        found = [*_Pairs.apply(rows, right.features, blocks)]  # type: ignore[no-untyped-call]
    else:
        found = _log_k(left, right, blocks, kernel, alone=compiled)
    strips: dict[int, list[Tensor]] = {}
    for block, part in zip(blocks, found, strict=True):
        strips.setdefault(block.begin, []).append(part)
    whole = [
        torch.cat(parts) for parts in strips.values()
    ]  # of both the same, the first ones are shorter
    table = torch.cat([F.pad(strip, (0, 0, 0, len(left.first) - len(strip))) for strip in whole], 1)
    table = table[:, : len(right.first)]
    if same:
        table = table.triu() + table.triu(1).mT
    return table[left.order.argsort()][:, right.order.argsort()]


def _log_k(
    left: Slices, right: Slices, blocks: list[_Block], kernel: Kernel, *, alone: bool
) -> list[Tensor]:
    """log K of every block, float64[A, B]; autograd follows where it must."""
    rows, kept = left.features, None
    nothing = rows.new_zeros(())
    if alone:
        longest = max(len(block.index) for block in blocks)
        kept = _Scratch(rows, facing=longest, cells=max(block.cells for block in blocks))

    def log_k(block: _Block) -> Tensor:
        some, (x, y) = rows[block.rows], block.lengths
        facing = _facing(
            right.features,
            block.index,
            out=None if kept is None else kept.facing[: len(block.index)],
        )
        out = None if kept is None else kept.cells[: block.cells].view(len(some), len(facing))
        cells = torch.addmm(nothing, some, facing.T, beta=0, alpha=-2, out=out).view(
            len(some), -1, x.shape[1]
        )
        if alone:
            return log_space.log_gak_alone(
                cells, block.first, block.scale, lengths_x=x, lengths_y=y
            )
        return log_space.log_gak_cells(
            cells, block.first, block.scale, lengths_x=x, lengths_y=y, band=kernel.band
        )

    return _shared(log_k, blocks, cells=sum(block.cells for block in blocks) if alone else 0)


class _Pairs(torch.autograd.Function):
    """log K of every block, with a gradient: a weight a cell is kept, d log K / d sqdist, in the cell's own place."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, blocks: list[_Block]) -> tuple[Tensor, ...]:
        longest = max(len(block.index) for block in blocks)
        kept, nothing = _Scratch(left, facing=longest), left.new_zeros(())

        def log_k(block: _Block) -> tuple[Tensor, Tensor]:
            facing = _facing(right, block.index, out=kept.facing[: len(block.index)])

            def cells() -> Tensor:
                product = torch.addmm(nothing, left[block.rows], facing.T, beta=0, alpha=-2)
                return product.view(len(product), -1, block.scale.shape[1])  # [R, N, B]

            x, y = block.lengths
            return log_space.weigh_alone(cells, block.first, block.scale, lengths_x=x, lengths_y=y)

        found = _shared(log_k, blocks, cells=sum(block.cells for block in blocks))
        ctx.blocks = blocks
        ctx.save_for_backward(left, right, *(weights for _, weights in found))
        return tuple(log_k for log_k, _ in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right, *weights = ctx.saved_tensors
        # The columns behind the features follow from them: the gradient is of the distances, and goes to the features.
        of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
        longest = max(len(block.index) for block in ctx.blocks)
        kept = _Scratch(left, facing=longest, cells=max(block.cells for block in ctx.blocks))
        adding = threading.Lock()

        def share(given: tuple[_Block, Tensor, Tensor]) -> None:
            block, weight, grad = given
            owner = torch.repeat_interleave(block.lengths[0][:, 0])
            out = kept.cells[: block.cells].view_as(weight)
            each = torch.mul(weight, grad.float()[owner, None, :], out=out).flatten(1)
            some = left[block.rows]
            others = torch.index_select(right, 0, block.index, out=kept.facing[: len(block.index)])
            # d sum w |x - y|^2 / dx = 2 (x sum w - sum w y); the column of ones makes sum w of the same product.
            near, far = each @ others, each.T @ some
            with adding:
                of_left[block.rows] += 2 * (near[:, -2:-1] * some - near)
                of_right.index_add_(0, block.index, 2 * (far[:, -2:-1] * others - far))

        _shared(
            share,
            list(zip(ctx.blocks, weights, grads, strict=True)),
            cells=sum(block.cells for block in ctx.blocks),
        )
        of_left[:, -2:], of_right[:, -2:] = 0, 0
        return of_left, of_right, None


def self_terms(own: Slices, other: Slices, kernel: Kernel) -> Tensor:
    """Raw log K(x, x) with the sigma of every pair, float64[n, m] in the order given: one a distinct length of the other."""
    lengths, which = torch.unique(other.lengths, return_inverse=True)
    if not kernel.by_length:
        lengths, which = lengths[:1], torch.zeros_like(which)
    rows, wide = own.features, _lanes(kernel, own.features, len(own.first))
    alone = _compiled(kernel, rows) and not _moving(rows)
    several = [(begin, *own.among(begin, wide)) for begin in range(0, len(own.first), wide)]
    kept = _Scratch(rows, facing=several[-1][2].numel()) if alone else None

    def log_k(some: tuple[int, Tensor, Tensor]) -> Tensor:
        begin, mine, index = some
        room = None if kept is None else kept.facing[: index.numel()]
        slices = torch.index_select(rows, 0, index.flatten(), out=room).view(
            *index.shape, -1
        )  # [B, N, d + 2]
        squares, centred = slices[..., -1], slices[..., :-2]
        square = torch.baddbmm(
            squares[:, :, None] + squares[:, None, :], centred, centred.mT, alpha=-2
        )
        square = square.permute(1, 2, 0).contiguous()  # [N, N, B]
        parts = lengths.split(len(lengths) if alone else max(1, BLOCK // square.numel()))
        found = torch.cat(
            [_of_lengths(square, mine, part, kernel=kernel, alone=alone) for part in parts]
        )
        return found[:, : len(own.first) - begin]  # [U, B]

    # A cell costs a quarter here, for there is hardly a product; and short calls of several threads wait for each other.
    cells = len(rows) * int(own.lengths[-1]) * len(lengths) // 4
    found = _shared(log_k, several, cells=cells if alone else 0)
    terms = torch.cat(found, 1).T[own.order.argsort()]  # [n, U]
    return terms[:, which[other.order.argsort()]]


def _of_lengths(
    square: Tensor, mine: Tensor, others: Tensor, *, kernel: Kernel, alone: bool
) -> Tensor:
    """Raw log K(x, x) of B squares, float[N, N, B], with the sigma of every other length, int64[U]: float64[U, B]."""
    both = mine.expand(len(others), -1)
    scale = kernel.scale(both, others[:, None]).to(square.dtype)
    first = torch.arange(len(others), device=square.device) * len(square)
    if alone:  # all of them read the same cells
        return log_space.log_gak_alone(
            square, torch.zeros_like(first), scale, lengths_x=both, lengths_y=both
        )
    cells = square.expand(len(others), *square.shape).flatten(0, 1)  # [U * N, N, B]
    return log_space.log_gak_cells(
        cells, first, scale, lengths_x=both, lengths_y=both, band=kernel.band
    )


def _shared(work: Callable[[Item], Result], items: Sequence[Item], *, cells: int) -> list[Result]:
    """Of every item, in their order, of which the last ones are the largest; by threads of one core each where there is
    enough to do."""
    if cells < 2 * ENOUGH:
        return [work(item) for item in items]
    return threads.map_in_threads(work, items[::-1])[::-1]


def _compiled(kernel: Kernel, like: Tensor) -> bool:
    """Is the sweep compiled for the CPU, so that one thread can make a whole block?"""
    return like.device.type == "cpu" and log_space.engine(like, kernel.band) is not None


def _moving(*features: Tensor) -> bool:
    """Will a gradient be asked for?"""
    return torch.is_grad_enabled() and any(each.requires_grad for each in features)


def _lanes(kernel: Kernel, like: Tensor, count: int) -> int:
    """How many of `count` sequences y lie side by side."""
    if like.device.type != "cpu":
        return min(512, count)
    engine = log_space.engine(like, kernel.band)
    lanes: int = min(128, count) if engine is None else engine.LANES
    return lanes


def _blocks(
    left: Slices, right: Slices, kernel: Kernel, *, wide: int, alone: bool
) -> Iterator[_Block]:
    rows, same = left.features, left is right
    most = BLOCK if rows.device.type == "cpu" else 16 * BLOCK
    if alone:  # some for every thread
        all_cells = len(rows) * len(right.features) // (2 if same else 1)
        most = min(most, max(ENOUGH // 2, all_cells // (2 * torch.get_num_threads())))
    ends = torch.cat([left.first, left.first.new_tensor([len(rows)])]).tolist()
    for begin in range(0, len(right.first), wide):
        mine, index = right.among(begin, wide)
        count = min(begin + wide, len(left.first)) if same else len(left.first)
        for a, b in _runs(ends, count, most=max(1, most // index.numel())):
            x, y = left.lengths[a:b, None].expand(-1, wide), mine.expand(b - a, -1)
            scale = kernel.scale(x, y).to(rows.dtype)
            first = left.first[a:b] - ends[a]
            yield _Block(
                begin, slice(a, b), slice(ends[a], ends[b]), index.T.flatten(), first, scale, (x, y)
            )


def _runs(ends: list[int], count: int, *, most: int) -> Iterator[tuple[int, int]]:
    """Runs of the first `count` sequences with at most `most` slices, one sequence at least."""
    begin = 0
    while begin < count:
        end = max(begin + 1, bisect_right(ends, ends[begin] + most, hi=count + 1) - 1)
        yield begin, end
        begin = end

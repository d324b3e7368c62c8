"""Ragged sequences of slices as one matrix, and the rule for the width of the kernel of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SigmaRule:
    """Rule for the width sigma of the kernel of a pair."""

    factor: float
    """Sigma itself, or delta."""
    depends_on_length: bool
    """True: sigma = factor * sqrt((M + N) / 2), as in the paper. False: sigma = factor."""

    def compute_scale(self, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
        """Return 1 / (2 sigma^2) in float64, of the shape to which the lengths broadcast."""
        mean_length = (lengths_x + lengths_y).double() / 2
        if not self.depends_on_length:
            mean_length = torch.ones_like(mean_length)
        return 0.5 / (self.factor**2 * mean_length)


@dataclass
class SliceTable:
    """Slices of all sequences of a side as one matrix, the shortest sequence first."""

    features: Tensor
    """float[S, d]; after `center` float[S, d + 2], with 1 and |x|^2 behind each slice."""
    lengths: Tensor
    """int64[n], ascending."""
    first_rows: Tensor
    """int64[n], row of the first slice of every sequence."""
    order: Tensor
    """int64[n], index of every sequence in the user's list."""
    mean: Tensor
    """float[d], mean of all slices before `center`; without gradient."""
    buffer: Tensor | None
    """float[S, d + 2] that `features` is a view of, which saves `center` a copy. None if the
    features have a gradient."""

    @classmethod
    def from_sequences(cls, sequences: Sequence[Tensor], name: str) -> SliceTable:
        """Copy sequences, float[n_i, d] each, into a table; float32 unless one is float64.

        The tensors of the table are on the device of the first sequence. Equal lengths stay in the
        user's order. The features are not centred yet.

        Raises:
            ValueError: no sequences, an empty one, different d, or features that are not finite.
                The message calls the list `name`.
        """
        dim = _check_shapes(sequences, name)
        lengths, order = torch.sort(torch.tensor([len(x) for x in sequences]), stable=True)
        sorted_sequences = [sequences[i] for i in order.tolist()]
        is_double = any(x.dtype == torch.float64 for x in sequences)
        dtype = torch.float64 if is_double else torch.float32
        device = sequences[0].device
        if requires_gradient(*sequences):
            buffer = None
            features = torch.cat(sorted_sequences).to(dtype)
        else:
            buffer = torch.empty(int(lengths.sum()), dim + 2, dtype=dtype, device=device)
            features = torch.cat(sorted_sequences, out=buffer[:, :-2])
        first_rows = lengths.cumsum(0) - lengths
        mean = features.detach().mean(0)
        # A feature that is not finite makes the mean so: all of them are checked only then.
        if not bool(mean.isfinite().all()) and not bool(features.isfinite().all()):
            bad_row = int((~features.isfinite()).any(1).nonzero()[0])
            bad_sequence = int(order[int((first_rows <= bad_row).sum()) - 1])
            raise ValueError(f"{name}[{bad_sequence}] has features that are not finite")
        lengths, first_rows, order = (t.to(device) for t in (lengths, first_rows, order))
        return cls(features, lengths, first_rows, order, mean, buffer)

    def center(self, point: Tensor) -> None:
        """Subtract a point, float[d], from every slice in place, and append 1 and |x|^2.

        Sets `features` to float[S, d + 2]; call it once. The columns let one matrix product give
        distances, see `_gather_facing`. Distances do not change, but those around a common centre
        lose fewer digits in the product.
        """
        centred = self.features.sub_(point)  # `from_sequences` has copied the user's tensors
        squares = torch.linalg.vector_norm(centred, dim=1, keepdim=True) ** 2
        if self.buffer is None:
            self.features = torch.cat([centred, torch.ones_like(squares), squares], 1)
        else:
            self.buffer[:, -2:-1] = 1
            self.buffer[:, -1:] = squares
            self.features = self.buffer

    def select_group(self, begin: int, group_size: int) -> tuple[Tensor, Tensor]:
        """Select `group_size` sequences from `begin` on; the last one is repeated to fill them.

        Returns:
            Their lengths, int64[B], and the rows of their slices, int64[B, longest], with B the
            group size. Beyond the end of a sequence stands the row of any slice.
        """
        device = self.first_rows.device
        last = len(self.first_rows) - 1
        sequences = torch.arange(begin, begin + group_size, device=device).clamp(max=last)
        within = torch.arange(int(self.lengths[sequences[-1]]), device=device)
        rows = self.first_rows[sequences, None] + within
        return self.lengths[sequences], rows.clamp(max=len(self.features) - 1)


def requires_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd records what is computed from the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_shapes(sequences: Sequence[Tensor], name: str) -> int:
    """Return d of sequences of shape [n_i, d].

    Raises:
        ValueError: no sequences, or one of another shape or with n_i = 0, named as `name`[index].
    """
    if not len(sequences):
        raise ValueError(f"{name} holds no sequences")
    first_shape = sequences[0].shape
    dim = first_shape[-1] if first_shape else 0
    for i, sequence in enumerate(sequences):
        shape = tuple(sequence.shape)
        if len(shape) != 2 or not shape[0] or shape[1] != dim:
            expected = f"[slices, {dim or 'd'}] with at least one slice"
            raise ValueError(f"{name}[{i}] has the shape {shape}; expected {expected}")
    return dim

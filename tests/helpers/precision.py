"""Double precision throughout, also where transformers computes in float32 by name.

Norms of most families, rotary embeddings and some softmaxes cast to float32 whatever dtype the
model has. Two doubles that differ in their last bit may round to different floats, and which bit
that is depends on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class DoubleInsteadOfFloat(TorchFunctionMode):
    """Context in which `Tensor.float()` is `Tensor.double()`, and a dtype float32 means float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        double_kwargs = {name: _to_double(value) for name, value in (kwargs or {}).items()}
        return func(*map(_to_double, args), **double_kwargs)


def compute_in_double(model: nn.Module) -> None:
    """Make all norms and rotary embeddings of a model compute in float64."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.forward = _wrap_in_double(module.forward)


def _wrap_in_double(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward method that runs in `DoubleInsteadOfFloat`, with the same signature."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with DoubleInsteadOfFloat():
            return forward(*args, **kwargs)

    return wrapped


def _to_double(value: Any) -> Any:
    """Return float64 for the dtype float32, and anything else unchanged."""
    return torch.float64 if value is torch.float32 else value

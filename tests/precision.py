"""Single precision replaced by double, also where transformers asks for single by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Compute in float64 whatever torch function is asked for a float32 result.

    Norms of most families, rotary embeddings and some softmaxes cast to float32 whatever the model is
    in. Two doubles that differ in their last bit may round to different floats, and by which bit they
    differ depends on the CPU. Inside this mode `Tensor.float()` is `Tensor.double()`, and a dtype
    argument of float32 is float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*map(_double, args), **named)


def compute_in_double(model: nn.Module) -> None:
    """Let every norm and rotary embedding in `model` run in `InDouble`, also in recomputed layers."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.forward = _in_double(module.forward)


def _in_double(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a module's forward; its signature stays readable."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with InDouble():
            return forward(*args, **kwargs)

    return wrapped


def _double(value: Any) -> Any:
    """Return float64 for float32, and anything else unchanged."""
    return torch.float64 if value is torch.float32 else value

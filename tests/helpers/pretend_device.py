"""A pretended accelerator: tensors that say they are on a device of their own, compute on the CPU, and do not mix with the
CPU's.

What fails on a GPU for lying on the wrong device, such as an index on the CPU that is added to one on the GPU, fails here
too, and everything else gives the CPU's numbers. It stands on torch's experimental backends in Python. A process that uses
it must do so before its first backward pass, which counts the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICE_TYPE = "pretend"
DEVICE = f"{DEVICE_TYPE}:0"

MOVES = ("aten::_to_copy", "aten::copy_")
"""What may read one device and write another."""

INDEXING = (
    "aten::index",
    "aten::_unsafe_index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)
"""Their indices may be on the CPU, as on CUDA."""

FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
)
"""All others fill what one of these makes."""


class PretendTensor(Tensor):
    """A tensor on the pretended device."""

    inner: Tensor
    """What it holds, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        shape = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
        }
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), **shape, device=torch.device(DEVICE)
        )  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in INDEXING:
            _check(
                name,
                (
                    args[0],
                    [index for index in args[1] if isinstance(index, PretendTensor)],
                    args[2:],
                ),
            )
        else:
            _check(name, (args, kwargs))
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        plain = dict(kwargs)
        if plain.get("device") is not None:
            plain["device"] = torch.device("cpu")
        found = func(*_inner(args), **_inner(plain))
        if to_cpu or (name == "aten::copy_" and not isinstance(args[0], PretendTensor)):
            return found
        return return_and_correct_aliasing(
            func, args, kwargs, tree_map_only(Tensor, PretendTensor, found)
        )

    # What torch answers without a dispatch:

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: PretendTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)


def _check(name: str, given: Any) -> None:
    """Refuse tensors of both devices; a number may be on the CPU, as on CUDA."""
    tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor) and each.dim()]
    if name not in MOVES and len({isinstance(each, PretendTensor) for each in tensors}) > 1:
        where = ", ".join(f"{list(each.shape)} on {each.device}" for each in tensors)
        raise RuntimeError(f"{name}: tensors on two devices: {where}")


def _inner(given: Any) -> Any:
    return tree_map_only(PretendTensor, lambda each: each.inner, given)


def _factory(operator: Any) -> Callable[..., PretendTensor]:
    return lambda *args, device=None, **kwargs: PretendTensor(
        operator(*args, device="cpu", **kwargs)
    )


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _inner(to).copy_(_inner(source))
    return to


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register_device() -> torch.library.Library:
    """Make the device known, as long as what is returned lives, and all models go there by default."""
    from vlduet.model import backbone

    _setup_privateuseone_for_python_backend(DEVICE_TYPE, _Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        operator, _, overload = name.partition(".")
        library.impl(
            name,
            _factory(getattr(getattr(torch.ops.aten, operator), overload or "default")),
            "PrivateUse1",
        )
    # Tied weights stay tied when a module moves: tensors of different kinds cannot lend each other their data.
    torch.__future__.set_swap_module_params_on_conversion(True)
    backbone.select_device = lambda: torch.device(DEVICE)
    return library

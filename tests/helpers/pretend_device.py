"""A pretended accelerator, to test on a CPU that tensors are on the right device.

Its tensors claim to be on a device of their own, compute on the CPU, and refuse to mix with CPU
tensors. What fails on a GPU because a tensor is on the wrong device, such as an index on the CPU
added to one on the GPU, fails here too; everything else gives the CPU's numbers. It uses torch's
experimental backends in Python, and must be registered before the first backward pass of the
process, which counts the devices.
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

COPIES = ("aten::_to_copy", "aten::copy_")
"""Operators that may read one device and write another."""
INDEXING = (
    "aten::index",
    "aten::_unsafe_index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)
"""Operators whose indices may be on the CPU, as on CUDA."""
FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
)
"""Operators that create tensors; all others fill what one of these creates."""


class PretendTensor(Tensor):
    """A tensor on the pretended device."""

    inner: Tensor
    """CPU tensor with the values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        tensor: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the inner tensors, after checking that devices are not mixed."""
        kwargs = kwargs or {}
        name = func._schema.name
        checked_args = args
        if name in INDEXING:
            pretend_indices = [index for index in args[1] if isinstance(index, PretendTensor)]
            checked_args = (args[0], pretend_indices, args[2:])
        _refuse_mixed_devices(name, (checked_args, kwargs))
        cpu_kwargs = dict(kwargs)
        if kwargs.get("device") is not None:
            cpu_kwargs["device"] = torch.device("cpu")
        output = func(*_unwrap(args), **_unwrap(cpu_kwargs))
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if to_cpu or (name == "aten::copy_" and not isinstance(args[0], PretendTensor)):
            return output
        wrapped = tree_map_only(Tensor, PretendTensor, output)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    # Torch answers these without a dispatch:

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


def _refuse_mixed_devices(name: str, arguments: Any) -> None:
    """Raise RuntimeError for tensors of both devices; scalars may be on the CPU, as on CUDA."""
    leaves = tree_leaves(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    is_mixed = len({isinstance(tensor, PretendTensor) for tensor in tensors}) > 1
    if is_mixed and name not in COPIES:
        places = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name}: tensors on two devices: {places}")


def _unwrap(arguments: Any) -> Any:
    """Replace all pretended tensors of a tree of arguments by their CPU tensors."""
    return tree_map_only(PretendTensor, lambda tensor: tensor.inner, arguments)


def _wrap_factory(operator: Any) -> Callable[..., PretendTensor]:
    """Return an operator that creates tensors on the pretended device."""
    return lambda *args, device=None, **kwargs: PretendTensor(
        operator(*args, device="cpu", **kwargs)
    )


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the devices, in place, and return the target."""
    _unwrap(target).copy_(_unwrap(source))
    return target


class _Backend(_DummyBackendModule):
    """The module `torch.pretend`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register_device() -> torch.library.Library:
    """Register the device and make it the default of all models that are opened afterwards.

    Returns:
        The registration, which the caller must keep: the device works as long as it lives.
    """
    from vlduet.model import backbone

    _setup_privateuseone_for_python_backend(DEVICE_TYPE, _Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        operator, _, overload = name.partition(".")
        factory = getattr(getattr(torch.ops.aten, operator), overload or "default")
        library.impl(name, _wrap_factory(factory), "PrivateUse1")
    # Tied weights stay tied when a module moves: tensors of different types cannot exchange their
    # data.
    torch.__future__.set_swap_module_params_on_conversion(True)
    backbone.select_device = lambda: torch.device(DEVICE)
    return library

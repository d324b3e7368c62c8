"""Import of lancedb without what a search in a local folder does not need.

These are its clients of remote databases, hundreds of classes of pydantic, and pandas. Together
they take four fifths of the time of importing lancedb and of opening a table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any

import pyarrow as pa

CLIENT_MODULES = ("lance_namespace_urllib3_client", "lancedb.remote", "lancedb.namespace")
"""Modules, with their submodules, that lancedb needs only for a database on a server."""
STAND_IN_ERRORS = (AttributeError, ImportError, NameError, RecursionError, TypeError)
"""Errors of an import that uses more of a stand-in than its name."""


def import_lancedb() -> ModuleType:
    """Return the module `lancedb`; its clients of servers are imported when they are first used.

    Where lancedb was imported before, nothing changes. Otherwise names of `CLIENT_MODULES` that
    lancedb imports are bound to stand-ins, and the modules themselves stay unimported: a later
    import of them, by whomever, gives the real ones. A version of lancedb that needs them for its
    own import is imported with them.
    """
    if "lancedb" in sys.modules:
        return sys.modules["lancedb"]
    finder = _DeferringFinder()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("lancedb")
    except STAND_IN_ERRORS:
        for name in [name for name in sys.modules if name.startswith("lancedb.")]:
            # An extension module can be initialised only once in a process.
            loader = getattr(sys.modules[name], "__loader__", None)
            if not isinstance(loader, ExtensionFileLoader):
                del sys.modules[name]
    finally:
        sys.meta_path.remove(finder)
        for name in finder.module_names:
            sys.modules.pop(name, None)
    return importlib.import_module("lancedb")


def disable_pandas() -> None:
    """Let pyarrow do without pandas for the rest of the process, as if it were not installed.

    pyarrow looks for pandas once, at its first array, and then imports it, which takes half a
    second. It would no longer recognise data frames, so this is for a program of our own only.
    Nothing changes where pandas is imported already. Another import of pandas is not affected.
    """
    if "pandas" in sys.modules:
        return
    finder = _MissingPandasFinder()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


class _MissingPandasFinder:
    """Finder for `sys.meta_path` by which pandas cannot be imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Raise ModuleNotFoundError for pandas; find nothing else."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


class _DeferringFinder(Loader):
    """Finder and loader of stand-ins for `CLIENT_MODULES`, for `sys.meta_path`."""

    def __init__(self) -> None:
        self.module_names: list[str] = []
        """Names of the modules that have a stand-in."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load the stand-in of a client module; None for all other modules."""
        if not any(name == client or name.startswith(f"{client}.") for client in CLIENT_MODULES):
            return None
        self.module_names.append(name)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module whose attributes are stand-ins."""
        return _DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no content."""


class _DeferredModule(ModuleType):
    """Module that gives a stand-in for each public name that is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stand_in = _DeferredType(name, (), {"__module__": self.__name__})
        setattr(self, name, stand_in)
        return stand_in


class _DeferredType(type):
    """Type of the stand-ins; what is done with one is done with the object that it stands for.

    A stand-in is a class, so that it can be part of an annotation. It cannot be the base of one.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        """Return a stand-in; raise TypeError for a class that is derived from one."""
        if bases:
            raise TypeError(f"'{name}' is derived from a stand-in")
        return super().__new__(cls, name, bases, namespace)

    def resolve(cls) -> Any:
        """Return the object that the stand-in stands for; import its module."""
        return getattr(importlib.import_module(cls.__module__), cls.__name__)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls.resolve()(*arguments, **options)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.resolve(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        # Without the module there are no instances.
        return cls.__module__ in sys.modules and isinstance(instance, cls.resolve())

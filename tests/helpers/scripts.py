"""The scripts of an experiment as modules, for tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def load_scripts(experiment: str) -> SimpleNamespace:
    """Import all scripts of a folder of `experiments`, and return them as attributes of an object.

    The scripts import each other by their short names, which are taken out of `sys.modules` again.
    """
    folder = EXPERIMENTS / experiment
    names = [path.stem for path in sorted(folder.glob("*.py"))]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)

"""The scripts of `experiments/claims` as modules, for tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

CLAIMS_FOLDER = Path(__file__).parents[2] / "experiments" / "claims"


def load_claims() -> SimpleNamespace:
    """Import all scripts of the study, and return them as attributes of an object.

    The scripts import each other by their short names, which are taken out of `sys.modules` again.
    """
    names = [path.stem for path in sorted(CLAIMS_FOLDER.glob("*.py"))]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(CLAIMS_FOLDER))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(CLAIMS_FOLDER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


claims = load_claims()
"""The scripts by name."""

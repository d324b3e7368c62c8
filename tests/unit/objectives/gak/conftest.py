"""Both engines of float32 on a CPU, for the tests of the alignment kernel."""

from __future__ import annotations

import pytest

from vlduet.objectives.gak import api


@pytest.fixture(params=["numba", "log space"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute float32 by the engine of this name; skip the test if it is not installed."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(api, "ENGINES", {})
    return str(request.param)

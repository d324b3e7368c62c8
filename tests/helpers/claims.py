"""The scripts of `experiments/claims` as modules, for tests."""

from __future__ import annotations

from helpers.scripts import EXPERIMENTS, load_scripts

CLAIMS_FOLDER = EXPERIMENTS / "claims"

claims = load_scripts("claims")
"""The scripts by name."""

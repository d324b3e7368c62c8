"""Losses as pure functions of tensors, for this package and for other training loops."""

from vlduet.objectives.contrastive import contrastive_loss
from vlduet.objectives.gak.api import gak_matrix
from vlduet.objectives.structure import structure_loss
from vlduet.objectives.sugar_targets import sugar_targets

__all__ = ["contrastive_loss", "gak_matrix", "structure_loss", "sugar_targets"]

"""State of a training run: what set-up, loop and steps share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vlduet.config import RunConfig, TrainSection
from vlduet.data.quarantine import Quarantine
from vlduet.data.stream import Mixture, Sample
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.recipes.recipe import BoundRecipe
from vlduet.train.source_records import SourceRecords
from vlduet.train.usage import UsageCounts

TrainableModel: TypeAlias = DuetModel | DualEncoder
"""A model that the training loop can train."""


class RequiredOutputs(NamedTuple):
    """Readings of the forward pass that the losses of a run need."""

    labels: bool
    """Negative log-likelihoods at labels, for the loss `language`."""
    anchors: bool
    """Embeddings at anchors, for any other loss."""


def count_steps(settings: TrainSection, num_records: int) -> int:
    """Return the number of steps of a run, at least 1.

    It is `settings.steps`, or that of `settings.epochs` passes over `num_records` records, rounded
    up.
    """
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None, "a config has steps or epochs"
    # A fraction of the decimal digits: 0.1 * 3000 / 100 is exactly 3, not a little more.
    return math.ceil(Fraction(str(settings.epochs)) * num_records / settings.batch_size)


@dataclass
class TrainingRun:
    """Everything that the training loop needs."""

    config: RunConfig
    """Settings of the run."""
    model: TrainableModel
    """The trained model; the trained parameters require gradients."""
    recipe: BoundRecipe
    """Training method with its options."""
    sources: list[SourceRecords]
    """Records of every source of the config, and counts of those left out."""
    mixture: Mixture
    """Training samples by position."""
    num_steps: int
    """Number of optimizer steps, of the present and of earlier sessions."""
    optimizer: torch.optim.Optimizer
    """Optimizer of all trained parameters."""
    quarantine: Quarantine
    """Collector of the records that cannot be used."""
    encoders: FrozenEncoders
    """Frozen encoders for losses that compare contents; none for most recipes."""
    usage: UsageCounts = field(default_factory=UsageCounts)
    """Counts of the records that this process has laid out for training."""

    def find_source(self, sample: Sample) -> SourceRecords:
        """Return the source that a sample of the run's mixture comes from."""
        return self.sources[int(sample.origin.partition(".")[0])]

    def trainable_parameters(self) -> list[Tensor]:
        """Return all trained parameters, in an order that is the same on every rank."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the config's losses by name, without those that are 0."""
        return {name: weight for name, weight in self.config.objectives.items() if weight}

    def required_outputs(self) -> RequiredOutputs:
        """Return which readings the losses with a weight need."""
        losses = self.loss_weights().keys()
        return RequiredOutputs(labels="language" in losses, anchors=bool(losses - {"language"}))

    def compute_losses(self, readout: Readout) -> dict[str, Tensor]:
        """Return every loss with a weight as a scalar by name, and their weighted sum as `loss`.

        Each is this rank's share of the loss of the global batch (see `vlduet.distributed`), with
        its graph. Losses of the recipe whose weight is 0 are left out. Collective: every rank must
        call it, even with an empty readout.
        """
        weights = self.loss_weights()
        losses = self.recipe.objective(readout, self.model.logit_scale)
        total = readout.nll.new_zeros(())
        for name, weight in weights.items():
            total = total + weight * losses[name]
        return {"loss": total, **{name: losses[name] for name in weights}}

"""Type of a training method: how a record becomes sequences, and which losses are computed of them.

A recipe is one file of this package that ends with `RECIPE = Recipe(...)`, and one line in
`registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data.records import Parts, Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer

OptionsT = TypeVar("OptionsT")
BuildModel = Callable[[RunConfig, FrozenEncoders], DualEncoder]
PrepareModel = Callable[[DuetModel, RunConfig], None]
AfterStep = Callable[[DuetModel], None]


def select_no_encoders(options: object, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return no roles, for recipes that need no frozen encoder."""
    return ()


def has_answer(record: Record) -> bool:
    """Return whether a chat has a turn of the assistant with a text that is learned."""
    return any(
        turn.role == "assistant" and turn.supervised and has_text(turn.parts)
        for turn in record.messages
    )


def has_text(parts: Parts) -> bool:
    """Return whether there is a text among parts."""
    return any(isinstance(part, str) for part in parts)


@dataclass(frozen=True)
class BoundRecipe:
    """Recipe whose options are set: what a training run uses."""

    name: str
    layout: Callable[[Sample, Renderer], list[Sequence]]
    """Turns a sample into its sequences. Raises DataError for a record that it cannot use."""
    objective: Callable[[Readout, Tensor], dict[str, Tensor]]
    """Computes all losses, by name, from a readout and the logit scale (a scalar tensor). Each is
    this rank's share of the loss of the global batch (see `vlduet.distributed`)."""
    find_losses: Callable[[Record], tuple[str, ...]]
    """Returns the losses, by name, that a record may have something for, by its fields alone."""
    requirements: Mapping[str, str] = field(default_factory=dict)
    """What a record needs for a loss, by the loss's name, for messages."""
    encoder_roles: tuple[str, ...] = ()
    """Roles of the frozen encoders that the losses need."""
    build_model: BuildModel | None = None
    start: PrepareModel | None = None
    after_step: AfterStep | None = None
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class Recipe(Generic[OptionsT]):
    """A training method. Only options, objectives, layout and objective are needed."""

    name: str
    """Value of `recipe.name` in a config."""
    options: type[OptionsT]
    """Dataclass of the other keys of `recipe` in a config."""
    objectives: tuple[str, ...]
    """Names of the losses that `objective` returns; a config gives their weights."""
    layout: Callable[[Sample, Renderer, OptionsT], list[Sequence]]
    """See `BoundRecipe.layout`."""
    objective: Callable[[Readout, Tensor, OptionsT], dict[str, Tensor]]
    """See `BoundRecipe.objective`."""
    find_losses: Callable[[Record, OptionsT], tuple[str, ...]] | None = None
    """See `BoundRecipe.find_losses`. It opens no image and runs on every record before training,
    which leaves out those without a loss. None: every record may have something for all losses."""
    requirements: Mapping[str, str] = field(default_factory=dict)
    """See `BoundRecipe.requirements`."""
    encoder_roles: Callable[[OptionsT, Mapping[str, float]], tuple[str, ...]] = select_no_encoders
    """Returns the roles of the frozen encoders that the losses need with these loss weights."""
    build_model: BuildModel | None = None
    """Builds what is trained. None: the model at `model.path` is trained."""
    start: PrepareModel | None = None
    """Modifies the model at `model.path` before its parameters are selected for training. Raises
    ConfigError for settings that the method does not allow."""
    after_step: AfterStep | None = None
    """Modifies the model at `model.path` after every optimizer step."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Coefficients of AdamW."""

    def bind(self, options: OptionsT, weights: Mapping[str, float]) -> BoundRecipe:
        """Return the recipe with its options and loss weights (name -> weight) set.

        Its `layout` and `objective` take no options; the weights only select `encoder_roles`.
        """

        def layout(sample: Sample, renderer: Renderer) -> list[Sequence]:
            return self.layout(sample, renderer, options)

        def objective(readout: Readout, logit_scale: Tensor) -> dict[str, Tensor]:
            return self.objective(readout, logit_scale, options)

        def find_losses(record: Record) -> tuple[str, ...]:
            if self.find_losses is None:
                return self.objectives
            return self.find_losses(record, options)

        return BoundRecipe(
            name=self.name,
            layout=layout,
            objective=objective,
            find_losses=find_losses,
            requirements=self.requirements,
            encoder_roles=self.encoder_roles(options, weights),
            build_model=self.build_model,
            start=self.start,
            after_step=self.after_step,
            betas=self.betas,
        )

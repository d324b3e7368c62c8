"""From a config to the things a run is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.config import RunConfig, parse_options
from vlduet.data.batches import Batch, split_into_chunks
from vlduet.data.formats import read_records
from vlduet.data.quarantine import Quarantine
from vlduet.data.sequences import Sequence, trim
from vlduet.data.stream import Mixture, Sample
from vlduet.encoders.dual import DualEncoder, open_frozen_encoder
from vlduet.encoders.frozen import FrozenEncoder, FrozenEncoders
from vlduet.errors import ConfigError, DataError
from vlduet.logs import logger
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import select_device
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import VISION_BATCH_IMAGES, FeatureCache, replace_pixels_by_features
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Prompts
from vlduet.recipes.recipe import BoundRecipe
from vlduet.recipes.registry import load_recipe

MAX_PROBED_RECORDS = 256
"""Records of a source that are asked, at most, whether there is anything in it to learn from."""

TrainableModel = DuetModel | DualEncoder


@dataclass
class TrainingRun:
    """Everything the loop needs."""

    config: RunConfig
    model: TrainableModel
    recipe: BoundRecipe
    mixture: Mixture
    optimizer: torch.optim.Optimizer
    quarantine: Quarantine
    encoders: FrozenEncoders
    layout_executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def trainable_parameters(self) -> list[Tensor]:
        """The parameters that move, in a fixed order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def required_outputs(self) -> tuple[bool, bool]:
        """What the losses that have a weight ask for: labels, anchors."""
        losses = {name for name, weight in self.config.objectives.items() if weight}
        return "language" in losses, bool(losses - {"language"})

    def compute_losses(self, readout: Readout) -> dict[str, Tensor]:
        """Every loss that has a weight, by name, and their weighted sum `loss`."""
        found = self.recipe.objective(readout, self.model.logit_scale)
        weights = {name: weight for name, weight in self.config.objectives.items() if weight}
        total = sum(
            (weight * found[name] for name, weight in weights.items()), readout.nll.new_zeros(())
        )
        return {"loss": total, **{name: found[name] for name in weights}}


def load_model(config: RunConfig, recipe: BoundRecipe, *, cache: Path | None) -> DuetModel:
    """The starting model, with what is to be trained opened; `cache` holds its vision features (None: memory)."""
    section = config.model
    if section.path is None:
        raise ConfigError(
            "model.path is missing", place="model", fix="Name the checkpoint to start from"
        )
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    model = DuetModel.from_pretrained(section.path, dtype=dtype)
    model.set_prompts(
        parse_options(Prompts, model.prompts.to_dict() | section.prompts, place="model.prompts")
    )
    if (
        config.train.soft_prompts
        and model.soft_prompts is not None
        and section.prompts.keys() & {"image", "text", "parts"}
    ):
        raise ConfigError(
            "the model brings learned prompts",
            place="model.prompts",
            fix="Leave image, text and parts out",
        )
    if section.head is not None and (section.head, section.dim) != (
        model.head.kind,
        model.head.dim,
    ):
        torch.manual_seed(config.seed)
        model.reset_head(section.head, section.dim)
    if recipe.start is not None:
        recipe.start(model, config)
    if (model.prompts.image_pool == "vision") != (model.head.kind == "split"):
        what = f"image_pool is {model.prompts.image_pool}, and the head is {model.head.kind}"
        raise ConfigError(
            what,
            place="model.prompts.image_pool",
            fix="Only recipe fromage makes models that read vision",
        )
    model.renderer.max_tokens = config.data.max_tokens
    model.feature_cache = FeatureCache(cache)
    torch.manual_seed(config.seed)
    train = config.train
    lora = None if train.lora is None else LoraSettings(**train.lora.model_dump())
    model.make_trainable(lora=lora, projector=train.projector, soft_prompts=train.soft_prompts)
    if train.temperature is not None:
        model.logit_scale.requires_grad_(False).fill_(-math.log(train.temperature))
    if train.checkpointing:
        model.backbone.enable_gradient_checkpointing()
    return model


def load_encoders(
    config: RunConfig, recipe: BoundRecipe, *, own: DuetModel | None, cache: Path | None
) -> FrozenEncoders:
    """The frozen encoders that the recipe asks, opened when they are first needed.

    Raises:
        ConfigError: one that is not given; ModelError: a folder that holds none.
    """
    found: dict[str, FrozenEncoder] = {}
    store = FeatureCache(cache)
    device = own.backbone.device if own else select_device()
    for role in recipe.encoder_roles:
        folder: Path | None = getattr(config.encoders, role)
        if folder is None:
            what = f"{recipe.name} compares slices with a frozen {role} encoder, and none is given"
            fix = "Name its folder (docs/train.md says which are good), or leave out the loss that asks it"
            raise ConfigError(what, place=f"encoders.{role}", fix=fix)
        found[role] = open_frozen_encoder(folder, cache=store, trained_model=own, device=device)
    return FrozenEncoders(found, cache=store)


def load_mixture(config: RunConfig, quarantine: Quarantine) -> Mixture:
    """The training records of all sources. Broken records are quarantined."""

    def dropped(error: DataError) -> None:
        quarantine.add(error.place, error)

    sources = [list(read_records(source.path, on_error=dropped)) for source in config.data.train]
    return Mixture(sources, [source.weight for source in config.data.train], seed=config.seed)


def build_optimizer(
    model: TrainableModel, config: RunConfig, *, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW in two groups: LoRA, and what is new. The temperature has no weight decay."""
    train = config.train
    lr_new = train.lr_new or train.lr
    own = {name: p for name, p in model.own_tensors().items() if p.requires_grad}
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in model.adapter_tensors().values() if p.requires_grad],
            "lr": train.lr,
        },
        {"params": [p for name, p in own.items() if name != "logit_scale"], "lr": lr_new},
        {
            "params": [p for name, p in own.items() if name == "logit_scale"],
            "lr": lr_new,
            "weight_decay": 0.0,
        },
    ]
    groups = [group | {"initial_lr": group["lr"]} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=betas, weight_decay=train.weight_decay)


def prepare_run(config: RunConfig, *, write_files: bool = True) -> TrainingRun:
    """Config -> Run; `keep=False` writes nothing to disk.

    Raises:
        ConfigError, DataError, ModelError: whatever is wrong, before anything is trained.
    """
    recipe = load_recipe(config)
    suffix = f"-{distributed.get_rank()}" if distributed.get_world_size() > 1 else ""
    quarantine = Quarantine(config.out / f"quarantine{suffix}.jsonl" if write_files else None)
    mixture = load_mixture(config, quarantine)
    wanted = config.out / "features" if config.data.cache is None else config.data.cache
    cache = wanted if write_files and wanted is not False else None
    model: TrainableModel
    if recipe.build_model is None:
        model = own = load_model(config, recipe, cache=cache)
        encoders = load_encoders(config, recipe, own=own, cache=cache)
    else:
        encoders = load_encoders(config, recipe, own=None, cache=cache)
        model = recipe.build_model(config, encoders)
    optimizer = build_optimizer(model, config, betas=recipe.betas)
    run = TrainingRun(config, model, recipe, mixture, optimizer, quarantine, encoders)
    check_sources(run)
    return run


def check_sources(run: TrainingRun) -> None:
    """Names the sources without a record that any loss asks something of: their share of a run changes nothing.

    Raises:
        DataError: all of them, so that the run would change nothing. (One may be there for what another run learns of it.)
    """
    sources = range(len(run.mixture.sources))
    empty = [why for number in sources if (why := _nothing_in(run, number, every=False))]
    if len(empty) == len(sources):
        sure = [_nothing_in(run, number, every=True) for number in sources]
        if all(sure) and sure[0] is not None:
            raise sure[0]
    for why in empty if distributed.is_main_process() else ():
        logger.warning(f"warning: {why}")


def _nothing_in(run: TrainingRun, number: int, *, every: bool) -> DataError | None:
    """Why a source has nothing to learn from; None for the first record that has. A large one is looked at here and there,
    for a look decodes its images."""
    labels, anchors = run.required_outputs()
    source, first = run.mixture.sources[number], ""
    seen = range(0, len(source), 1 if every else -(-len(source) // MAX_PROBED_RECORDS))
    for at in seen:
        try:
            laid_out = run.recipe.layout(
                Sample(source[at], at, run.config.seed, f"{number}.{at}"), run.model.renderer
            )
        except DataError as error:
            first = first or f" (the first: {error})"
        else:
            if any(trim(one, labels=labels, anchors=anchors) for one in laid_out):
                return None
    losses = ", ".join(name for name, weight in run.config.objectives.items() if weight)
    looked = (
        f"{len(seen)} of its {len(source)}" if len(seen) < len(source) else f"its {len(source)}"
    )
    what = f"none of {looked} records has anything for {losses} of {run.recipe.name}{first}"
    fix = "Look at it with `vlduet data check` and `vlduet data show`, or leave it out"
    return DataError(what, place=run.config.data.train[number].path, fix=fix)


def _sequences(run: TrainingRun, samples: list[Sample]) -> list[Sequence]:
    """Samples, laid out and seen by the encoders. One that cannot be is quarantined."""
    made: list[Sequence] = []
    for sample in samples:
        try:
            made += run.encoders.attach_features(run.recipe.layout(sample, run.model.renderer))
        except DataError as error:
            run.quarantine.add(sample.record, error)
    if run.config.train.chunk_tokens and isinstance(run.model, DuetModel):
        return replace_pixels_by_features(
            made, run.model.feature_cache, run.model.backbone.compute_vision_features
        )
    return made


def iterate_batches(
    run: TrainingRun, start: int, stop: int | None = None
) -> Iterator[tuple[list[Sample], list[Batch]]]:
    """This rank's samples of steps `start` to `stop` and what goes through the model, laid out one step ahead in a thread.

    The batches are the chunks of the step: one, unless `train.chunk_tokens` or `train.fused` cut it; none where nothing is
    left. A record that cannot be laid out is quarantined and missing. What no loss asks for (a loss of weight 0 asks for
    nothing) does not go through the model.
    """
    train = run.config.train
    stop = train.steps if stop is None else stop
    labels, anchors = run.required_outputs()
    passes = [(labels, anchors)] if train.fused else [(False, anchors), (labels, False)]

    def lay_out(step: int) -> tuple[list[Sample], list[list[Sequence]]]:
        samples = run.mixture.step_samples(
            step,
            train.batch_size,
            rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
        )
        some = [
            samples[begin : begin + VISION_BATCH_IMAGES]
            for begin in range(0, len(samples), VISION_BATCH_IMAGES)
        ]
        made = [sequence for part in some for sequence in _sequences(run, part)]
        groups = [
            [s for one in made if (s := trim(one, labels=now, anchors=read))]
            for now, read in passes
        ]
        if train.chunk_tokens:
            groups = [
                part
                for group in groups
                for part in split_into_chunks(group, train.chunk_tokens, pack_to=train.pack)
            ]
        return samples, [group for group in groups if group]

    ahead = run.layout_executor.submit(lay_out, start) if start < stop else None
    for step in range(start, stop):
        assert ahead is not None
        samples, groups = ahead.result()
        ahead = run.layout_executor.submit(lay_out, step + 1) if step + 1 < stop else None
        chunks = [run.model.collate(group, pack_to=train.pack) for group in groups]
        del groups  # thousands of sequences, which nobody needs any more
        yield samples, chunks

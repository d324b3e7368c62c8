"""Set-up of a training run: from a config to model, recipe, data and optimizer.

1. `load_recipe`    the method and its options                           (recipes/registry.py)
2. `load_mixture`   the records of all sources, mixed by weight          (train/source_records.py)
3. `load_model`     the model at `model.path`, its trained parameters selected
4. `load_encoders`  frozen encoders, if the method compares contents
"""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import torch

from vlduet import distributed
from vlduet.config import RunConfig, parse_options
from vlduet.data.image_store import ImageStore
from vlduet.data.quarantine import Quarantine
from vlduet.data.stream import Mixture
from vlduet.encoders.dual import open_frozen_encoder
from vlduet.encoders.frozen import FrozenEncoder, FrozenEncoders
from vlduet.errors import ConfigError
from vlduet.logs import logger
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import select_device
from vlduet.model.duet import DuetModel
from vlduet.model.embedding_presets import find_preset
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation.inputs import require_lm_head
from vlduet.model.prompts import Prompts
from vlduet.recipes.recipe import BoundRecipe
from vlduet.recipes.registry import load_recipe
from vlduet.train.optim import build_optimizer
from vlduet.train.run import TrainableModel, TrainingRun, count_steps
from vlduet.train.source_records import SourceRecords, read_source_records


def prepare_run(
    config: RunConfig, *, write_files: bool = True, resume: bool = False
) -> TrainingRun:
    """Open everything that a config names; return it as a run with a new optimizer.

    Records are read into memory, and their images are not opened: `check_sources` looks at them.
    The model is on the default device, with the trained parameters selected. Sets torch's global
    seed.

    Args:
        config: settings of the run. No state is loaded, whatever its folder `out` holds.
        write_files: write broken records to ``out/quarantine.jsonl`` (``quarantine-RANK.jsonl``
            with several processes), and features and images without files of their own to
            `data.cache`, by default ``out/features``. False (for a dry run) keeps features in
            memory and such images in a folder for temporary files.
        resume: continue the list of broken records of an earlier session instead of replacing it.

    Raises:
        ConfigError, DataError, ModelError: as `load_recipe`, `load_mixture`, `load_model`,
            `load_encoders`.
    """
    recipe = load_recipe(config)
    suffix = f"-{distributed.get_rank()}" if distributed.get_world_size() > 1 else ""
    quarantine = Quarantine()
    if write_files:
        path = config.out / f"quarantine{suffix}.jsonl"
        quarantine = Quarantine(path) if resume else Quarantine.create(path)
    cache = None
    if write_files and config.data.cache is not False:
        cache = config.out / "features" if config.data.cache is None else config.data.cache
    store = ImageStore(None if cache is None else cache / "images")
    sources, mixture = load_mixture(config, recipe, quarantine=quarantine, store=store)
    model: TrainableModel
    if recipe.build_model is None:
        model = duet = load_model(config, recipe, cache=cache)
        encoders = load_encoders(config, recipe, trained_model=duet, cache=cache)
    else:
        encoders = load_encoders(config, recipe, trained_model=None, cache=cache)
        model = recipe.build_model(config, encoders)
    optimizer = build_optimizer(model, config, betas=recipe.betas)
    num_steps = count_steps(config.train, mixture.num_records)
    return TrainingRun(
        config, model, recipe, sources, mixture, num_steps, optimizer, quarantine, encoders
    )


def load_mixture(
    config: RunConfig, recipe: BoundRecipe, *, quarantine: Quarantine, store: ImageStore
) -> tuple[list[SourceRecords], Mixture]:
    """Read the training records of all sources into memory; return them, and their order.

    Images are not opened. Those that are no files, nor in a file, are written to `store`, which is
    closed with the mixture; their size is logged. Broken rows, and records that no loss can use,
    are left out and listed in `quarantine`.

    Raises:
        DataError: a source is missing, cannot be read or recognised, or has no record; no source
            has a record with something for the losses; or a weight gives a source less than a
            thousandth of the samples.
    """
    sources = read_source_records(config, recipe, quarantine=quarantine, store=store)
    if store.num_bytes:
        size = f"{store.num_bytes / 1e6:,.1f} MB"
        logger.info(f"{size} of images inside the training sources are files in {store.folder}")
    weights = [source.section.weight for source in sources]
    mixture = Mixture([source.records for source in sources], weights, seed=config.seed)
    weakref.finalize(mixture, store.close)
    return sources, mixture


def load_model(config: RunConfig, recipe: BoundRecipe, *, cache: Path | None) -> DuetModel:
    """Return the model at `model.path` with the config's settings, ready to be trained.

    It is in evaluation mode on the default device; all parameters that are not trained are frozen.
    A `train.temperature` replaces the model's and is not trained. Sets torch's global seed to that
    of the config, before new adapters are initialised.

    Args:
        config: its sections `model` and `train` decide prompts, head and trained parameters.
        recipe: its hook `start` may modify the model first.
        cache: folder of the vision features; None keeps them in memory.

    Raises:
        ConfigError: `model.path` is missing, or the config does not fit the model (its adapter,
            learned prompts, head, `image_pool`) or the recipe.
        ModelError: there is no model at `model.path`, or it is broken, or has no LM head for the
            loss `language`.
    """
    model = _open_start_model(config)
    if config.objectives.get("language"):
        require_lm_head(model.backbone)
    if recipe.start is not None:
        recipe.start(model, config)
    if (model.prompts.image_pool == "vision") != (model.head.kind == "split"):
        raise ConfigError(
            f"image_pool is {model.prompts.image_pool}, and the head is {model.head.kind}",
            place="model.prompts.image_pool",
            fix="Only recipe fromage makes models that read vision",
        )
    model.feature_cache = _create_feature_cache(config, cache)
    torch.manual_seed(config.seed)
    train = config.train
    lora = None if train.lora is None else LoraSettings(**train.lora.model_dump())
    model.make_trainable(lora=lora, projector=train.projector, soft_prompts=train.soft_prompts)
    if train.temperature is not None:
        model.logit_scale.requires_grad_(False).fill_(-math.log(train.temperature))
    if train.checkpointing:
        model.backbone.enable_gradient_checkpointing()
    return model


def _create_feature_cache(config: RunConfig, folder: Path | None) -> FeatureCache:
    """Return a cache in a folder (None: in memory) with this process's share of its limit."""
    limit_bytes = config.data.cache_limit / distributed.get_world_size()
    return FeatureCache(folder, limit_bytes=limit_bytes)


def _open_start_model(config: RunConfig) -> DuetModel:
    """Return the model at `model.path` with the config's dtype, limits, prompts and head.

    Prompts and limits that the config names replace the model's, the others stay; one of `image`,
    `text`, `parts` and `chat` replaces the template of a published model with its pooling. With
    another kind or width of head than the model's, torch's global seed is set and the head is new
    and random.

    Raises:
        ConfigError: there is no `model.path`, the preset is unknown, a prompt is invalid, or
            `train.soft_prompts` is set and the config has prompts in place of the model's learned
            ones.
        ModelError: as `DuetModel.from_pretrained`.
    """
    section = config.model
    if section.path is None:
        raise ConfigError(
            "model.path is missing", place="model", fix="Name the checkpoint to start from"
        )
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    model = DuetModel.from_pretrained(
        section.path,
        dtype=dtype,
        prompts=None if section.preset is None else find_preset(section.preset).prompts,
        max_tokens=config.data.max_tokens,
        max_image_tokens=section.max_image_tokens,
    )
    prompts = model.prompts.to_dict()
    if section.prompts.keys() & {"image", "text", "parts", "chat"}:
        prompts |= {"template": "", "system": "", "query_system": "", "pool": "last"}
    prompts |= section.prompts
    model.set_prompts(parse_options(Prompts, prompts, place="model.prompts"))
    replaces_prompts = bool(section.prompts.keys() & {"image", "text", "parts"})
    if config.train.soft_prompts and model.soft_prompts is not None and replaces_prompts:
        raise ConfigError(
            "the model brings learned prompts",
            place="model.prompts",
            fix="Leave image, text and parts out",
        )
    is_other_head = (section.head, section.dim) != (model.head.kind, model.head.dim)
    if section.head is not None and is_other_head:
        torch.manual_seed(config.seed)
        model.reset_head(section.head, section.dim)
    return model


def load_encoders(
    config: RunConfig, recipe: BoundRecipe, *, trained_model: DuetModel | None, cache: Path | None
) -> FrozenEncoders:
    """Return the frozen encoders of the recipe's roles; their weights are read at first use.

    Args:
        config: its section `encoders` has a folder for every role.
        recipe: its `encoder_roles` are opened; without any the result is empty.
        trained_model: model whose vision tower is shared where an encoder is its checkpoint, and
            whose device the encoders use; None: the default device.
        cache: folder of the features; None keeps them in memory.

    Raises:
        ConfigError: the folder of a role is not given, or its encoder does not read all that the
            role needs, such as images.
        ModelError: a folder holds no encoder.
    """
    encoders: dict[str, FrozenEncoder] = {}
    feature_cache = _create_feature_cache(config, cache)
    device = trained_model.backbone.device if trained_model else select_device()
    for role in recipe.encoder_roles:
        folder: Path | None = getattr(config.encoders, role)
        if folder is None:
            raise ConfigError(
                f"{recipe.name} compares slices with a frozen {role} encoder, and none is given",
                place=f"encoders.{role}",
                fix="Name its folder (docs/train.md says which are good), "
                "or leave out the loss that needs it",
            )
        encoders[role] = open_frozen_encoder(
            folder, cache=feature_cache, trained_model=trained_model, device=device
        )
    return FrozenEncoders(encoders, cache=feature_cache)

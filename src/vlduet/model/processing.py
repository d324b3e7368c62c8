"""A checkpoint folder without its weights: tokenizer and image processor, enough to lay out sequences."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as advice

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.errors import ImageError, ModelError
from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs, run_image_processor
from vlduet.model.families.registry import find_family

IMAGE_BACKEND = "pil"
"""The one image backend for training, indexing and serving: two backends give two embeddings of one picture."""

Tokenizer: TypeAlias = PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Processor:
    """What a renderer knows of a checkpoint."""

    tokenizer: Tokenizer
    prepare_image: Callable[[ImageRef], PreparedImage]
    """What becomes of an image."""
    image_token_id: int
    """What fills an image's place."""
    image_delimiters: ImageDelimiters
    """What stands around it."""
    image_placeholder: str
    """What the chat template writes for it."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer; the first one ends a text."""

    @classmethod
    def build(
        cls,
        family: Family,
        config: Any,
        generation_config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        prepare_image: Callable[[ImageRef], PreparedImage],
    ) -> Self:
        """Of a family, and a checkpoint's own settings."""
        told = (
            generation_config.eos_token_id
        )  # an answer's end, where that is not a text's (Gemma, GLM)
        ends = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
        return cls(
            tokenizer,
            prepare_image,
            image_token_id=int(config.image_token_id),
            image_delimiters=family.image_delimiters(config, tokenizer),
            image_placeholder=family.image_placeholder(config, tokenizer),
            eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        )


def load_processor(folder: Path) -> Processor:
    """Open a checkpoint folder without its weights; its images are keyed by content alone.

    Raises:
        ModelError: as `load_backbone` does.
    """
    family = find_family(read_config(folder).get("model_type", ""), folder)
    with translate_load_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        there = (folder / "generation_config.json").is_file()
        generation = (
            GenerationConfig.from_pretrained(folder, local_files_only=True)
            if there
            else GenerationConfig.from_model_config(config)
        )
    tokenizer, processor = load_tokenizer_and_image_processor(folder, family, config)

    def prepare(ref: ImageRef) -> PreparedImage:
        inputs = preprocess_image(processor, ref, preprocess=family.preprocess)
        return build_prepared_image(
            family, config, tokenizer, inputs=inputs, key=images.image_key(ref)
        )

    return Processor.build(family, config, generation, tokenizer=tokenizer, prepare_image=prepare)


def build_prepared_image(
    family: Family, config: Any, tokenizer: Tokenizer, *, inputs: ImageInputs, key: str
) -> PreparedImage:
    """An image of which the processor made `inputs`."""
    grid = None if family.token_grid is None else family.token_grid(config, inputs)
    words = family.interleaved_tokens(config, tokenizer, inputs)
    return PreparedImage(
        inputs,
        family.num_image_tokens(config, inputs) + len(words),
        key,
        grid=grid,
        interleaved_tokens=words,
    )


def load_tokenizer_and_image_processor(
    folder: Path, family: Family, config: Any
) -> tuple[Tokenizer, Any]:
    """Tokenizer and image processor of a folder. Raises ModelError."""
    with translate_load_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(
            folder, backend=IMAGE_BACKEND, local_files_only=True, trust_remote_code=False
        )
    for name, value in family.processor_overrides(config).items():
        setattr(processor, name, value)
    return tokenizer, processor


def preprocess_image(
    processor: Any,
    ref: ImageRef,
    *,
    preprocess: Callable[[Any, Any], Mapping[str, Any]] = run_image_processor,
) -> dict[str, Tensor]:
    """Decode an image and `run` the checkpoint's own preprocessing. Raises ImageError."""
    picture = images.load_image(ref)
    try:
        made = preprocess(processor, picture)
    except ValueError as error:  # such as proportions that the checkpoint cannot read
        raise ImageError(str(error), place=ref.name, fix="Crop it, or leave it out") from None
    found = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    if (
        found["pixel_values"].ndim == 5
    ):  # images that have tiles: of this one image they are the rows
        found["pixel_values"] = found["pixel_values"].flatten(0, 1)
    return found


@contextmanager
def translate_load_errors(folder: Path) -> Iterator[None]:
    """Quiet inside; what transformers says of broken files becomes one line."""
    try:
        with silence_transformers():
            yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"broken checkpoint ({str(error).splitlines()[0]})",
            place=folder,
            fix="Copy the whole folder again",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, refused where it wants to run its own code. Raises ModelError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "no config.json here",
            place=folder,
            fix="Name a folder that holds a Hugging Face checkpoint",
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(
            f"broken JSON ({error})", place=path, fix="Copy the whole folder again"
        ) from None
    if "auto_map" in config:
        raise ModelError(
            "config.json has auto_map: it wants to run its own code",
            place=path,
            fix="Use a converted checkpoint",
        )
    return config


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Loading and adapting print pages of advice, bars, and deprecations between libraries; only errors are for users."""
    level, bars = advice.get_verbosity(), advice.is_progress_bar_enabled()
    advice.set_verbosity_error()
    advice.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        advice.set_verbosity(level)
        if bars:
            advice.enable_progress_bar()

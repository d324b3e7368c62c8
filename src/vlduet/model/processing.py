"""Preprocessing side of a checkpoint: tokenizer and image processor, without the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.errors import ImageError, ModelError, quote_value
from vlduet.library_errors import COPY_AGAIN, translate_library_errors
from vlduet.model.chat_template import read_chat_template
from vlduet.model.config_limits import check_token_ids
from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs, run_image_processor
from vlduet.model.families.registry import find_family
from vlduet.model.folder_checks import TYPE_REMEDIES, describe_folder_without_config
from vlduet.structured_files import read_json_object

IMAGE_BACKEND = "pil"
"""Library that resizes images in training, indexing and serving: another one changes embeddings."""

Tokenizer: TypeAlias = PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Processor:
    """Everything that rendering records into token sequences needs to know about a checkpoint."""

    tokenizer: Tokenizer
    prepare_image: Callable[[ImageRef], PreparedImage]
    """Function that decodes and preprocesses an image; raises ImageError."""
    image_token_id: int
    """Token id at the positions that hold vision features."""
    image_delimiters: ImageDelimiters
    """Text before and after every image."""
    image_placeholder: str
    """Text that the chat template writes for an image."""
    eos_token_ids: tuple[int, ...]
    """Distinct token ids that end an answer; the first one ends a text."""
    template_delimits_images: bool = False
    """A template writes the delimiters of its images; False: the processor of transformers does."""

    @classmethod
    def build(
        cls,
        family: Family,
        generation_config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        prepare_image: Callable[[ImageRef], PreparedImage],
    ) -> Self:
        """Return the processor of a checkpoint.

        Its `eos_token_ids` are the tokenizer's end token, then those of `generation_config`, each
        once; none if neither has any.

        Raises:
            ModelError: an end token of `generation_config` is not an integer.
        """
        # The generation config may end answers with another token than texts (Gemma, GLM).
        answer_ends = generation_config.eos_token_id
        if not isinstance(answer_ends, list):
            answer_ends = [answer_ends]
        end_ids = [i for i in (tokenizer.eos_token_id, *answer_ends) if i is not None]
        for token_id in end_ids:
            if type(token_id) is not int:
                message = f"eos_token_id is {quote_value(token_id)}, not a number of a token"
                place = Path(tokenizer.name_or_path) / "generation_config.json"
                raise ModelError(message, place=place, fix=COPY_AGAIN)
        return cls(
            tokenizer,
            prepare_image,
            image_token_id=int(family.config.image_token_id),
            image_delimiters=family.image_delimiters(tokenizer),
            image_placeholder=family.image_placeholder(tokenizer),
            template_delimits_images=family.template_delimits_images,
            eos_token_ids=tuple(dict.fromkeys(end_ids)),
        )


def load_processor(
    folder: Path,
    *,
    image_settings: Mapping[str, Any] | None = None,
    max_image_tokens: int | None = None,
    chat_template: str | None = None,
    ignores_code: bool = False,
) -> Processor:
    """Open a local checkpoint folder without its weights; nothing is downloaded.

    The cache keys of its images are hashes of their content alone: no features can be cached.

    Args:
        folder: folder of the checkpoint.
        image_settings: attributes of the image processor in place of the checkpoint's own.
        max_image_tokens: most tokens of an image, if `image_settings` is None; None has no limit.
        chat_template: chat template in place of the checkpoint's own.
        ignores_code: as of `read_config`.

    Raises:
        ModelError: not a checkpoint folder, an unknown family, remote code, or broken files. Later
            calls of its `prepare_image` raise ImageError, or ModelError for an unsupported variant.
    """
    model_type = read_config(folder, ignores_code=ignores_code).get("model_type", "")
    family_class = find_family(model_type, folder)
    with translate_load_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            generation_config = GenerationConfig.from_model_config(config)
    family = family_class(config)
    tokenizer, image_processor = load_tokenizer_and_image_processor(
        folder, family, chat_template=chat_template
    )
    if image_settings is None and max_image_tokens is not None:
        image_settings = family.bounded_settings(image_processor, max_image_tokens)
    family.apply_settings(image_processor, image_settings or {})

    def prepare_image(ref: ImageRef) -> PreparedImage:
        """Decode and preprocess one image; its cache key is the SHA-256 of its content."""
        inputs = preprocess_image(image_processor, ref, preprocess=family.preprocess)
        key = images.image_key(ref)
        return build_prepared_image(family, tokenizer, inputs=inputs, cache_key=key)

    return Processor.build(
        family, generation_config, tokenizer=tokenizer, prepare_image=prepare_image
    )


def load_tokenizer_and_image_processor(
    folder: Path, family: Family, *, chat_template: str | None = None
) -> tuple[Tokenizer, Any]:
    """Return the tokenizer and the image processor of a checkpoint folder.

    The tokenizer has the given chat template, else the one that `read_chat_template` finds.
    The image processor uses `IMAGE_BACKEND` and the overrides of the family.

    Raises:
        ModelError: the files are missing or broken.
    """
    with translate_load_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer has no Rust backend, which tells where tokens begin",
                place=folder,
                fix="Save the checkpoint with a tokenizer.json",
            )
        if not isinstance(tokenizer.model_max_length, int | float):
            message = f"model_max_length is {quote_value(tokenizer.model_max_length)}, not a number"
            raise ModelError(message, place=folder / "tokenizer_config.json", fix=COPY_AGAIN)
        vocab_size = family.config.get_text_config().vocab_size
        check_token_ids(tokenizer.backend_tokenizer, vocab_size, path=folder / "tokenizer.json")
        if chat_template is None:
            chat_template = read_chat_template(folder, tokenizer.chat_template)
        tokenizer.chat_template = chat_template
        image_processor = AutoImageProcessor.from_pretrained(
            folder, backend=IMAGE_BACKEND, local_files_only=True, trust_remote_code=False
        )
    for name, value in family.processor_overrides().items():
        setattr(image_processor, name, value)
    return tokenizer, image_processor


def preprocess_image(
    image_processor: Any,
    ref: ImageRef,
    *,
    preprocess: Callable[[Any, Any], Mapping[str, Any]] = run_image_processor,
) -> dict[str, Tensor]:
    """Decode an image and return it preprocessed for the vision tower.

    Args:
        preprocess: (image processor, PIL image) -> outputs; only tensors among them are returned.

    Returns:
        At least `pixel_values`, without a batch axis over images: tiles of an image are its rows.

    Raises:
        ImageError: the image is missing or cannot be decoded, or `preprocess` raises ValueError.
    """
    picture = images.load_image(ref)
    try:
        outputs = preprocess(image_processor, picture)
    except ValueError as error:  # for example an aspect ratio that the checkpoint cannot read
        raise ImageError(str(error), place=ref.name, fix="Crop it, or leave it out") from None
    inputs = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    if inputs["pixel_values"].ndim == 5:  # [1, tiles, 3, H, W]
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    return inputs


def build_prepared_image(
    family: Family, tokenizer: Tokenizer, *, inputs: ImageInputs, cache_key: str
) -> PreparedImage:
    """Return an image with its number of tokens, token grid and interleaved text tokens.

    Args:
        inputs: result of `preprocess_image`.
        cache_key: key under which the vision features of the image may be cached.

    Raises:
        ModelError: the config asks for an unsupported variant of the architecture.
    """
    interleaved_tokens = family.interleaved_tokens(tokenizer, inputs)
    return PreparedImage(
        inputs,
        family.num_image_tokens(inputs) + len(interleaved_tokens),
        cache_key,
        grid=family.token_grid(inputs),
        interleaved_tokens=interleaved_tokens,
    )


def read_config(folder: Path, *, ignores_code: bool = False) -> dict[str, Any]:
    """Return the parsed config.json of a checkpoint folder.

    Args:
        folder: folder of the checkpoint.
        ignores_code: accept `auto_map`, whose code is not run: it adds nothing to the architecture.

    Raises:
        ModelError: there is none, it is not a JSON object, or it asks to run code of the
            checkpoint (`auto_map`).
    """
    path = folder / "config.json"
    if not path.is_file():
        raise describe_folder_without_config(folder)
    config = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN)
    if "auto_map" in config and not ignores_code:
        raise ModelError(
            "config.json has auto_map: it asks to run code of the checkpoint",
            place=path,
            fix=TYPE_REMEDIES.get(str(config.get("model_type")), "Use a converted checkpoint"),
        )
    return config


@contextmanager
def translate_load_errors(folder: Path) -> Iterator[None]:
    """Silence transformers in the block and turn its errors about files into a ModelError.

    Every exception of READ_ERRORS becomes a ModelError, as `translate_library_errors` says.
    """
    with translate_library_errors(folder, subject="checkpoint"), silence_transformers():
        yield


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide log messages below errors, progress bars and FutureWarnings in the block.

    Loading and adapting models prints advice that is not meant for users of this package. Log
    messages and progress bars are those of transformers alone, warnings those of all libraries.
    The settings hold for all threads and are restored at the end, also after an error.
    """
    verbosity = transformers_logging.get_verbosity()
    had_progress_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bars:
            transformers_logging.enable_progress_bar()

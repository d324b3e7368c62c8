"""Numbers of config files that decide sizes: each is compared before anything is allocated by it.

A config that was damaged or made by a stranger may ask for a billion layers, which never ends, or
for pictures of a terabyte. The weights say which numbers are possible: a layer has at least a
tensor, and a width is an axis of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlduet.data.images import MAX_IMAGE_PIXELS
from vlduet.errors import ModelError, quote_value
from vlduet.library_errors import COPY_AGAIN
from vlduet.structured_files import read_json_object, read_safetensors_header

COUNT_ENDINGS = ("blocks", "depth", "depths", "layers", "repeats")
"""Endings of the keys of numbers of layers."""
SIZE_ENDINGS = ("channels", "dim", "dims", "experts", "features", "groups", "heads", "size")
"""Endings of the keys of widths."""
MIN_COUNT_LIMIT = 1_000
"""Number of layers that is never refused: keys that a model ignores have values of other models."""
MIN_SIZE_LIMIT = 1 << 16
"""Width that is never refused, for the same reason."""
SIZE_FACTOR = 4
"""Ratio of the largest width to the longest axis of a tensor that is not refused."""
IMAGE_TOKEN_KEYS = (
    "image_token_id",
    "image_token_index",
    "vision_end_token_id",
    "vision_start_token_id",
)
"""Keys of tokens that must have a row in the embedding table."""
TOKENS_PER_IMAGE_KEYS = ("image_seq_length", "mm_tokens_per_image", "vision_soft_tokens_per_image")
MAX_POSITIONS = 1 << 27
"""Largest number of positions, which weights need not have."""
MAX_SIDE = int(MAX_IMAGE_PIXELS**0.5)
"""Longest side of the images that an image processor makes: as many pixels as it may get."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PIXEL_KEYS = ("max_pixels", "min_pixels")
"""Keys of numbers of pixels; Qwen writes them as ``size.longest_edge``, too."""
AREA_EDGES = ("size.longest_edge", "size.shortest_edge")


class _Number(NamedTuple):
    """An integer of a config."""

    path: str
    """Its keys with dots; that of an item of a list is the list's."""
    value: int

    @property
    def key(self) -> str:
        """Last key."""
        return self.path.rpartition(".")[2]


def check_config_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the sizes in a checkpoint's config and image processor with what is possible.

    Args:
        folder: folder of a checkpoint, with weights ``model*.safetensors``, whose headers are read.
        config: content of its config.json.

    Raises:
        ModelError: a size is too large or, of images, negative; a weights file is not in
            safetensors format, or a file of `PROCESSOR_FILES` is broken.
    """
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        _, tensors = read_safetensors_header(path, error_class=ModelError, fix=COPY_AGAIN)
        shapes |= {name: tensor["shape"] for name, tensor in tensors.items()}
    axes = [axis for shape in shapes.values() for axis in shape]
    vision = _get_vision_config(config)
    num_vision_layers = vision.get("num_hidden_layers")
    limits = {
        "image_size": MAX_SIDE,
        "max_position_embeddings": MAX_POSITIONS,
        "vision_feature_layer": num_vision_layers,
        **dict.fromkeys(TOKENS_PER_IMAGE_KEYS, MIN_SIZE_LIMIT),
    }
    tables = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    if tables:
        last_token_id = max(shape[0] for shape in tables if shape) - 1
        limits |= dict.fromkeys(IMAGE_TOKEN_KEYS, last_token_id)
    for number in _iterate_numbers(config):
        limit = limits.get(number.key)
        minimum = 0
        if number.key == "vision_feature_layer":  # -1 is the last of the layers and their input
            minimum = -1 - num_vision_layers if isinstance(num_vision_layers, int) else number.value
        elif number.key.endswith(COUNT_ENDINGS) and not number.key.endswith("feature_layers"):
            limit = max(len(shapes), MIN_COUNT_LIMIT)
        elif number.key.endswith(SIZE_ENDINGS) and number.key not in limits:
            limit = max([SIZE_FACTOR * axis for axis in axes] + [MIN_SIZE_LIMIT])
        if isinstance(limit, int) and not minimum <= number.value <= limit:
            reason = "the weights have no such size"
            raise _describe_number(number, reason, path=folder / "config.json")
    _check_mrope(folder, config)
    for name in PROCESSOR_FILES:
        if (folder / name).exists():
            _check_image_processor(folder / name, config)


def check_token_ids(tokenizer: Any, vocab_size: int, *, path: Path) -> None:
    """Compare the token ids of a vocabulary with the number of rows of an embedding table.

    Args:
        tokenizer: Rust backend of a tokenizer.
        vocab_size: number of rows, which added tokens may exceed by `MIN_SIZE_LIMIT`.
        path: file of the tokenizer, for the error.

    Raises:
        ModelError: an id is too large.
    """
    for with_added_tokens, limit in ((False, vocab_size), (True, vocab_size + MIN_SIZE_LIMIT)):
        vocabulary = tokenizer.get_vocab(with_added_tokens=with_added_tokens)
        last = max(vocabulary, key=vocabulary.__getitem__, default=None)
        if last is not None and vocabulary[last] >= limit:
            message = f"token {quote_value(last)} has the id {vocabulary[last]} of {vocab_size}"
            raise ModelError(message, place=path, fix=COPY_AGAIN)


def _check_mrope(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError if the sections of a rotary embedding are not its frequencies, by number.

    Configs that do not name all of these numbers pass.
    """
    text = config.get("text_config", config)
    match text:
        case {"head_dim": int(head_dim)}:
            pass
        case {"hidden_size": int(hidden_size), "num_attention_heads": int(num_heads)}:
            head_dim = hidden_size // max(num_heads, 1)
        case _:
            return
    for name in ("rope_parameters", "rope_scaling"):
        match text.get(name):
            case {"mrope_section": [int(), int(), int()] as sizes} as section:
                share = section.get("partial_rotary_factor", text.get("partial_rotary_factor", 1))
                num_frequencies = int(head_dim * share) // 2
                if sum(sizes) != num_frequencies or min(sizes) < 0:
                    number = _Number(f"{name}.mrope_section", sum(sizes))
                    reason = f"a head has {num_frequencies} frequencies"
                    raise _describe_number(number, reason, path=folder / "config.json")


def _check_image_processor(path: Path, config: Mapping[str, Any]) -> None:
    """Check the sizes of an image processor; see `check_config_numbers`.

    Squares and their groups are those of the vision tower, where both name them.
    """
    settings = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN)
    section = settings.get("image_processor")  # in processor_config.json
    settings = section if isinstance(section, dict) else settings
    vision = _get_vision_config(config)
    sides = {"merge_size": "spatial_merge_size"}
    keys = ("merge_size", "patch_size", "temporal_patch_size")
    expected = {key: vision.get(sides.get(key, key)) for key in keys}
    for number in _iterate_numbers(settings):
        is_area = number.key in PIXEL_KEYS
        is_area |= "merge_size" in settings and number.path.endswith(AREA_EDGES)
        limit = MAX_IMAGE_PIXELS if is_area else MAX_SIDE
        if not 0 <= number.value <= limit:
            raise _describe_number(number, "no image has so many pixels", path=path)
        size = expected.get(number.key)
        if isinstance(size, int) and "merge_size" in settings and number.value != size:
            message = f"'{number.path}' is {number.value}, that of the vision tower {size}"
            raise ModelError(message, place=path, fix=COPY_AGAIN)


def _get_vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of a config about the vision tower; {} if there is none."""
    vision = config.get("vision_config")
    return vision if isinstance(vision, Mapping) else {}


def _describe_number(number: _Number, reason: str, *, path: Path) -> ModelError:
    """Return, not raise, the error of a number that the file `path` cannot have, with a reason."""
    message = f"'{number.path}' is {quote_value(number.value)}, but {reason}"
    return ModelError(message, place=path, fix=COPY_AGAIN)


def _iterate_numbers(value: Any, path: str = "") -> Iterator[_Number]:
    """Yield the integers in a parsed JSON value; `path` is that of the value."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield _Number(path, value)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _iterate_numbers(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for child in value:
            yield from _iterate_numbers(child, path)

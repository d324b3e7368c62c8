"""Base class of VLM families: everything that VLDuet must know about a checkpoint's architecture.

A family says how an image is preprocessed, how many tokens it takes, what the vision tower and the
projector compute, and which extra inputs the language model needs. To support another family,
subclass `Family`, implement the two abstract methods, override what differs, and add the class to
`registry.FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

ImageInputs = Mapping[str, Tensor]
"""Tensors of the image processor for one or several images; tiles are rows of `pixel_values`."""
ImageDelimiters = tuple[str, str]
"""Text before and text after the tokens of an image; both may be empty."""


def run_image_processor(image_processor: Any, picture: Any) -> Mapping[str, Any]:
    """Return the outputs of a transformers image processor for one PIL image, as tensors."""
    outputs: Mapping[str, Any] = image_processor(images=picture, return_tensors="pt")
    return outputs


def replace_attributes(image_processor: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set attributes of an image processor, in place, and return their earlier values.

    A dict in place of an object of a size, as transformers stores it, becomes such an object.
    """
    replaced = {name: getattr(image_processor, name) for name in settings}
    for name, value in settings.items():
        is_size = isinstance(value, dict) and not isinstance(replaced[name], dict)
        setattr(image_processor, name, type(replaced[name])(**value) if is_size else value)
    return replaced


def token_string(tokenizer: Any, token_id: int) -> str:
    """Return the vocabulary entry of a token id, for example `<image>`."""
    return str(tokenizer.convert_ids_to_tokens(token_id))


class Family(ABC):
    """Architecture-specific behaviour of a checkpoint.

    Shapes: N images, Dv the width of vision features, D the hidden size of the language model.
    `model` is the transformers model with its LM head; its inner model is `model.model`. `inputs`
    are the `ImageInputs` of one image, except in `vision_features`, which takes several.

    Args:
        config: the transformers config of the checkpoint; read whenever a method is called.
    """

    template_delimits_images = False
    """A chat template writes the `image_delimiters`; False: the processor of transformers does."""
    language_model_path = "language_model"
    """Dotted attribute path from the inner model to the language model without its LM head."""
    vision_tower_path = "vision_tower"
    """Dotted attribute path from the inner model to the vision tower."""
    projector_path = "multi_modal_projector"
    """Dotted attribute path from the inner model to the module between tower and language model."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of tokens of one image that hold vision features.

        Raises:
            ModelError: the config asks for a variant of the architecture that is not supported.
        """

    @abstractmethod
    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on the inputs of several images, concatenated along the batch axis.

        Returns:
            float[tokens of all images, Dv], the projector's input. Families with DeepStack append
            D columns for each language-model layer that takes image features of its own.
        """

    def project(self, model: Any, projector: Any, features: Tensor) -> Tensor:
        """Project vision features float[tokens, Dv] to token embeddings float[tokens, D]."""
        projected: Tensor = projector(features)
        return projected

    def vision_width(self, projector: nn.Module) -> int:
        """Return Dv, the input width of the projector: that of its first linear layer."""
        return next(m.in_features for m in projector.modules() if isinstance(m, nn.Linear))

    def processor_overrides(self) -> Mapping[str, Any]:
        """Return image-processor attributes to set after loading; an exported model keeps them."""
        return {}

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return image-processor attributes with which no image takes more than `max_tokens`.

        A bound is only ever lowered: the result is empty if the present settings keep to
        `max_tokens`, or if the number of tokens is fixed. Where the fewest tokens that the family
        can do are more than `max_tokens`, the result gives these. Nothing is modified.
        """
        return {}

    def apply_settings(self, image_processor: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Set attributes of the image processor, in place, and return their earlier values."""
        return replace_attributes(image_processor, settings)

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Preprocess one PIL image; entries that are not tensors are dropped by the caller.

        Raises:
            ValueError: the checkpoint's image processor rejects the image, for example its shape.
        """
        return run_image_processor(image_processor, picture)

    def vision_tower_pixels(self, inputs: ImageInputs) -> Tensor:
        """Return the preprocessed picture float[3, H, W] as the vision tower receives it.

        For an image that is cut into tiles, this is the overview: the whole picture, downscaled.
        """
        return inputs["pixel_values"][-1]  # the overview follows the tiles

    def overview_features(self, inputs: ImageInputs) -> slice:
        """Return which of an image's feature rows describe `vision_tower_pixels`; tiles are not."""
        return slice(None)

    def token_grid(self, inputs: ImageInputs) -> tuple[int, int] | None:
        """Return (rows, columns) of the tokens if the model uses 2-D positions, else None."""
        return None

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        """Return the text before and after every image."""
        return "", ""

    def image_placeholder(self, tokenizer: Any) -> str:
        """Return the text that the checkpoint's chat template writes for an image."""
        return token_string(tokenizer, self.config.image_token_id)

    def interleaved_tokens(self, tokenizer: Any, inputs: ImageInputs) -> Mapping[int, int]:
        """Return text tokens between an image's feature tokens, as {offset in the image: token id}.

        Offsets count all tokens of the image, feature tokens and text tokens.
        """
        return {}

    def attention_mask_kinds(self) -> Mapping[str, bool]:
        """Return the layer types of the language model that need an explicit attention mask.

        Returns:
            {layer type: whether the tokens of one image attend to each other in both directions}.
            Empty if the language model builds correct causal masks itself.
        """
        return {}

    def extra_inputs(self, language_model: Any, token_ids: Tensor) -> Mapping[str, Tensor]:
        """Return keyword arguments of the language model besides the token embeddings.

        Args:
            token_ids: int64[B, T], with -1 at feature tokens of images.
        """
        return {}

    def on_vocab_resize(  # noqa: B027 - a hook that few families need
        self, language_model: Any, old_vocab_size: int
    ) -> None:
        """Initialise, in place, further per-token tables after the embedding table has grown.

        `extra_inputs` must return for new tokens what it returned before for unknown ones.
        """

    def logit_softcap(self) -> float | None:
        """Return c if the model's logits are c * tanh(logits / c), else None."""
        return None

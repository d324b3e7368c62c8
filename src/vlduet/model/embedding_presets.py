"""Embedding models that are published without a description of their format: their prompts.

All of them read the last token and have no head. A folder is recognised by a part of its name and
its `model_type`; `model.preset` names a preset for other folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlduet.errors import ConfigError, quote_value, suggest_name
from vlduet.hub import describe_snapshot
from vlduet.model.prompts import Prompts

LLAMA3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}\nSummary above %s in one word: "
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
)
"""Prompt of E5-V around a content that is called %s."""
QWEN_TURN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)
"""Prompt of GME around any content."""
VLM2VEC_TEMPLATE = (
    "{% for part in messages[-1]['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ image_placeholder + ' ' }}"
    "{% if loop.length == 1 %}Represent the given image.{% endif %}{% endif %}{% endfor %}"
)
"""Layout of VLM2Vec: images without delimiters before texts, which are instructions."""


@dataclass(frozen=True, slots=True)
class EmbeddingPreset:
    """How a family of published models embeds."""

    model_types: tuple[str, ...]
    """`model_type` of its checkpoints."""
    prompts: Prompts
    """Prompts of the paper or of the publisher's code."""
    source: str
    """Where the prompts are from."""


def _spell_prompts(text: str, *names: str) -> Prompts:
    """Return prompts outside of the checkpoint's chat template.

    Args:
        text: prompt with `{}` for the content and, with names, %s for its name.
        names: names of an image, a text and a mixture.
    """
    texts = [text % name for name in names] or [text] * 3
    slots = ("{image}", "{text}", "{parts}")
    image, plain, parts = (
        text.replace("{}", slot) for text, slot in zip(texts, slots, strict=True)
    )
    return Prompts(image=image, text=plain, parts=parts, chat=False)


PRESETS = {
    "e5-v": EmbeddingPreset(
        ("llava_next",),
        _spell_prompts(LLAMA3_TURN, "image", "sentence", "image and sentence"),
        "arXiv 2407.12580; the prompt of mixtures is ours, the paper has one for each task",
    ),
    "vlm2vec": EmbeddingPreset(
        ("qwen2_vl", "qwen2_5_vl", "llava_next"),
        Prompts(image="{image}", text="{text}", parts="{parts}", template=VLM2VEC_TEMPLATE),
        "arXiv 2410.05160 and 2507.04590; texts contain the instruction of their task",
    ),
    "gme-qwen2-vl": EmbeddingPreset(
        ("qwen2_vl",),
        _spell_prompts(QWEN_TURN),
        "arXiv 2412.16855, with the default instruction",
    ),
}
"""Presets by name. The name is also the part of a folder's name by which one is recognised."""


def recognise_preset(folder: Path, model_type: object) -> EmbeddingPreset | None:
    """Return the preset of a checkpoint by its name and type; None if it has none.

    Args:
        folder: folder of the checkpoint; the name on the hub counts for a snapshot in a cache.
        model_type: `model_type` of its config.json.
    """
    words = (describe_snapshot(folder) or folder.name).lower().partition("@")[0].split("/")[-1]
    for name, preset in PRESETS.items():
        if f"-{name}-" in f"-{words}-" and model_type in preset.model_types:
            return preset
    return None


def find_preset(name: str) -> EmbeddingPreset:
    """Return the preset of a name. Raises ConfigError, with the names, for an unknown one."""
    if name not in PRESETS:
        message, fix = f"unknown preset {quote_value(name)}", suggest_name(name, PRESETS)
        raise ConfigError(message, place="model.preset", fix=fix)
    return PRESETS[name]

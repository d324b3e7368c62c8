"""Tiny random checkpoints of the families we support, made in a second: what most tests run on instead of weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts, Renderer

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>"]
"""Around every image of a Qwen2-VL or an InternVL."""
SMOLVLM_TOKENS = [
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
]
"""Before the squares of a SmolVLM: the first one before every square and behind the last, which is the picture whole."""
MISTRAL3_TOKEN_PIXELS = 8
"""Pixels a side that make a token of a Mistral 3."""
PIXTRAL_TOKENS = ["[IMG_BREAK]", "[IMG_END]"]
"""Between the rows of an image of a Mistral 3, and behind it."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def gemma_chat_template(line: str) -> str:
    """A chat template as Gemma's: an image is the token that begins one, and `line` follows a turn's name and its end."""
    found = (
        CHAT_TEMPLATE.replace("+ '|>'", f"+ '|>{line}'")
        .replace("'</s>'", f"'</s>{line}'")
        .replace("t|>'", f"t|>{line}'")
    )
    return found.replace("'<image>'", f"'{VISION_TOKENS[0]}'")


PLAIN_PROMPTS = Prompts(
    image="{image}", text="{text}</s>", parts="{parts}</s>", chat=False, image_pool="mean"
)


def build_tokenizer(
    *,
    bos: bool,
    more: list[str] | None = None,
    names: dict[str, str] | None = None,
    merges: list[tuple[str, str]] | None = None,
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a few special ones; `more` of these stand behind the bytes, some with `names` of their own, and
    what `merges` make of two tokens behind them."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), merges or []
    words = [*SPECIAL_TOKENS, *alphabet, *(more or []), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(words)}, merges))
    # With merges a text is one piece, as Gemma's is: no rule parts what stands together.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:] + (more or []),
        **({"model_specific_special_tokens": names} if names else {}),
    )


def build_text_config() -> LlamaConfig:
    """Two layers of width 32."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL_TOKENS) + 256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build_llava(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA 1.5 checkpoint: CLIP with 4 patches and a class token that is dropped."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=build_text_config(),
        image_token_index=3,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _processor(folder, bos=True, size=16, patch=8, strategy="default", extra=1)
    return folder


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )


def _siglip(*, patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=patch,
        vision_use_head=False,
    )


def build_llava_next(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA 1.6 checkpoint: 4 tokens a square, and up to four squares beside the whole picture."""
    torch.manual_seed(seed)
    points = [[16, 32], [32, 16], [32, 32], [16, 48]]
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=build_text_config(),
        image_token_index=3,
        image_grid_pinpoints=points,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=points
    ).save_pretrained(folder)
    return _words(folder, build_tokenizer(bos=True))


def build_llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA-OneVision checkpoint: 4 tokens a square, and up to six squares a side."""
    torch.manual_seed(seed)
    points = [[16 * rows, 16 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=_siglip(patch=8),
        text_config=build_text_config(),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=points,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=points).save_pretrained(folder)
    return _words(folder, build_tokenizer(bos=True))


def _words(folder: Path, made: PreTrainedTokenizerFast, *, template: str = CHAT_TEMPLATE) -> Path:
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def build_fast_vlm(folder: Path, *, seed: int = 0) -> Path:
    """A FastVLM checkpoint with a convolutional tower, as nano is: 4 tokens an image, tied embeddings."""
    torch.manual_seed(seed)
    vision = EfficientNetConfig(
        image_size=8,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        in_channels=(32, 16),
        out_channels=(16, 32),
        kernel_sizes=(3, 3),
        strides=(1, 2),
        num_block_repeats=(1, 1),
        expand_ratios=(1, 2),
        hidden_dim=320,
        hidden_size=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    text = build_text_config()
    text.tie_word_embeddings = True
    config = FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    # The default initialisation lets the image's signal die on its way; a test that changes an image must see it.
    for parameter in [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]:
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    for name, parameter in model.model.vision_tower.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    _processor(folder, bos=False, size=8, patch=4, strategy="full", extra=0)
    return folder


def _processor(
    folder: Path, *, bos: bool, size: int, patch: int, strategy: str, extra: int
) -> None:
    LlavaProcessor(
        build_clip_image_processor(size),
        build_tokenizer(bos=bos),
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def build_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2-VL checkpoint: 4 to 16 tokens an image, by its proportions; tied embeddings."""
    torch.manual_seed(seed)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(**_qwen(vision | QWEN_PATCH_CONFIG | {"in_channels": 3}))
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return _qwen_processor(folder)


def build_qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2.5-VL checkpoint: its tower attends in windows of 2 x 2 tokens, but for one layer."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    config = Qwen2_5_VLConfig(
        **_qwen(vision | QWEN_PATCH_CONFIG | {"window_size": 16, "fullatt_block_indexes": [1]})
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return _qwen_processor(folder)


def build_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3-VL checkpoint: two layers of its tower speak to the first two of the trunk."""
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_qwen3())).save_pretrained(folder)
    return _qwen_processor(folder)


def build_qwen3_vl_moe(folder: Path, *, seed: int = 0) -> Path:
    """The same with two of four experts a token."""
    torch.manual_seed(seed)
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }
    Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**_qwen3(**experts))).save_pretrained(
        folder
    )
    return _qwen_processor(folder)


def _qwen3(**text: object) -> dict[str, Any]:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    made = _qwen(
        vision
        | QWEN_PATCH_CONFIG
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    )
    return made | {"text_config": made["text_config"] | {"head_dim": 8} | text}


def build_glm4v(folder: Path, *, seed: int = 0) -> Path:
    """A GLM-4.1V checkpoint: as Qwen2-VL's, with tokens that a convolution makes of patches."""
    torch.manual_seed(seed)
    Glm4vForConditionalGeneration(Glm4vConfig(**_glm())).save_pretrained(folder)
    return _glm_processor(folder, Glm4vImageProcessorPil)


def build_glm46v(folder: Path, *, seed: int = 0) -> Path:
    """A GLM-4.6V checkpoint, the same but for its names."""
    torch.manual_seed(seed)
    Glm46VForConditionalGeneration(Glm46VConfig(**_glm())).save_pretrained(folder)
    return _glm_processor(folder, Glm46VImageProcessorPil)


def _glm() -> dict[str, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
    }
    made = _qwen(vision | QWEN_PATCH_CONFIG | {"image_size": 16})
    first, last = made.pop("vision_start_token_id"), made.pop("vision_end_token_id")
    made["text_config"]["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    return made | {
        "image_start_token_id": first,
        "image_end_token_id": last,
        "tie_word_embeddings": False,
    }


def _glm_processor(folder: Path, processor: type) -> Path:
    _qwen_processor(folder)
    processor(
        size={"shortest_edge": 16 * 16 * 2, "longest_edge": 32 * 32 * 2},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
    ).save_pretrained(folder)
    return folder


QWEN_PATCH_CONFIG = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _qwen(vision: dict[str, object]) -> dict[str, Any]:
    text = build_text_config().to_dict()
    shape = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    kept = {name: text[name] for name in (*shape, "pad_token_id", "bos_token_id", "eos_token_id")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    first = len(SPECIAL_TOKENS) + 256
    return {
        "vision_config": vision,
        "text_config": kept | {"vocab_size": first + len(VISION_TOKENS), "rope_parameters": rope},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": first,
        "vision_end_token_id": first + 1,
        "tie_word_embeddings": True,
    }


def _qwen_processor(folder: Path) -> Path:
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
    ).save_pretrained(folder)
    framed = CHAT_TEMPLATE.replace("'<image>'", f"'{VISION_TOKENS[0]}<image>{VISION_TOKENS[1]}'")
    return _words(folder, build_tokenizer(bos=False, more=VISION_TOKENS), template=framed)


def build_internvl(folder: Path, *, seed: int = 0, tiles: bool = False) -> Path:
    """An InternVL checkpoint: 4 tokens a square; with `tiles`, a picture that is not square has several squares."""
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = build_text_config()
    text.vocab_size += len(VISION_TOKENS)
    shape = {"image_token_id": 3, "image_seq_length": 4, "tie_word_embeddings": False}
    config = InternVLConfig(vision_config=vision, text_config=text, **shape)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=tiles
    ).save_pretrained(folder)
    names = dict(zip(("start_image_token", "end_image_token"), VISION_TOKENS, strict=True))
    return _words(folder, build_tokenizer(bos=False, more=VISION_TOKENS, names=names))


def build_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """A SmolVLM checkpoint: 4 tokens an image, whose processor would cut tiles."""
    torch.manual_seed(seed)
    return _smol(
        folder,
        SmolVLMForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMVisionConfig,
        SmolVLMImageProcessorPil,
    )


def build_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """An Idefics3 checkpoint, the same but for its names."""
    torch.manual_seed(seed)
    return _smol(
        folder,
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        Idefics3VisionConfig,
        Idefics3ImageProcessorPil,
    )


def _smol(folder: Path, model: type, config: type, vision: type, processor: type) -> Path:
    text = build_text_config()
    text.vocab_size += len(SMOLVLM_TOKENS)
    seen = vision(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    made = config(
        vision_config=seen,
        text_config=text,
        image_token_id=3,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    model(made).save_pretrained(folder)
    processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}).save_pretrained(
        folder
    )
    return _words(folder, build_tokenizer(bos=False, more=SMOLVLM_TOKENS))


def build_mistral3(folder: Path, *, seed: int = 0) -> Path:
    """A Mistral 3 checkpoint: up to 32 x 32 pixels, cells of 8 x 8 a token."""
    torch.manual_seed(seed)
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    text = build_text_config()
    text.vocab_size += len(PIXTRAL_TOKENS)
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    patches = {"height": 4, "width": 4}
    PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=patches).save_pretrained(folder)
    return _words(folder, build_tokenizer(bos=True, more=PIXTRAL_TOKENS))


LINE_END_MERGES = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("ĊĊ", "ĊĊ")]
"""Line ends that are one token where they stand together, as Gemma's do."""


def build_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma 3 checkpoint: 4 tokens an image, one layer that sees all and one that sees 16 tokens."""
    torch.manual_seed(seed)
    text = {
        name: value
        for name, value in build_text_config().to_dict().items()
        if name in Gemma3TextConfig().to_dict()
    }
    first = text["vocab_size"]
    text |= {
        "model_type": "gemma3_text",
        "vocab_size": first + len(VISION_TOKENS) + len(LINE_END_MERGES),
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": None,
    }
    ids = {"image_token_index": 3, "boi_token_index": first, "eoi_token_index": first + 1}
    config = Gemma3Config(
        vision_config=_siglip(patch=4), text_config=text, mm_tokens_per_image=4, **ids
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    model.save_pretrained(folder)
    Gemma3ImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    names = dict(zip(("boi_token", "eoi_token"), VISION_TOKENS, strict=True)) | {
        "image_token": "<image>"
    }
    return _words(
        folder,
        build_tokenizer(bos=True, more=VISION_TOKENS, names=names, merges=LINE_END_MERGES),
        template=gemma_chat_template(""),
    )


def build_gemma4(folder: Path, *, seed: int = 0) -> Path:
    """A small Gemma 4: up to 70 tokens an image, tables of words for its layers, the last two with keys of those before."""
    apart = {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    }
    return _gemma4(folder, apart, seed=seed)


def build_gemma4_large(folder: Path, *, seed: int = 0) -> Path:
    """A large one: images see both ways where there is a window, keys are values where there is none, and experts."""
    experts = {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    both = {
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    return _gemma4(folder, {"hidden_size_per_layer_input": 0} | experts | both, seed=seed)


def _gemma4(folder: Path, more: dict[str, Any], *, seed: int) -> Path:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = shape | {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
    }
    plain = build_text_config().to_dict()
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "eos_token_id",
    )
    first = plain["vocab_size"]
    text = {name: plain[name] for name in kept} | {
        "vocab_size": first + len(VISION_TOKENS),
        "vocab_size_per_layer_input": first + len(VISION_TOKENS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 48,
        "final_logit_softcapping": 2.0,
    }
    ids = {
        "image_token_id": 3,
        "boi_token_id": first,
        "eoi_token_id": first + 1,
        "video_token_id": first - 1,  # bytes of no text here
        "audio_token_id": first - 2,
    }
    config = Gemma4Config(
        text_config=text | more, vision_config=vision | {"position_embedding_size": 70 * 4}, **ids
    )
    Gemma4ForConditionalGeneration(config).save_pretrained(folder)
    Gemma4ImageProcessorPil(
        patch_size=4, pooling_kernel_size=2, max_soft_tokens=70
    ).save_pretrained(folder)
    return _words(folder, build_tokenizer(bos=True, more=VISION_TOKENS))


FAMILY_BUILDERS = {
    "fast_vlm": build_fast_vlm,
    "gemma3": build_gemma3,
    "gemma4": build_gemma4,
    "gemma4_large": build_gemma4_large,
    "glm46v": build_glm46v,
    "glm4v": build_glm4v,
    "idefics3": build_idefics3,
    "internvl": build_internvl,
    "llava": build_llava,
    "llava_next": build_llava_next,
    "llava_onevision": build_llava_onevision,
    "mistral3": build_mistral3,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen2_vl": build_qwen2_vl,
    "qwen3_vl": build_qwen3_vl,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "smolvlm": build_smolvlm,
}


def build_duet_model(
    folder: Path, *, family: str = "fast_vlm", head: str = "mlp", prompts: Prompts = PLAIN_PROMPTS
) -> DuetModel:
    """A DuetModel on a tiny checkpoint, in float64-friendly size."""
    from vlduet.model.backbone import load_backbone

    torch.manual_seed(1)
    return DuetModel(
        load_backbone(FAMILY_BUILDERS[family](folder)), prompts=prompts, head=head, dim=12
    ).eval()


def build_vision_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A DINOv2 of 4 patches."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    )
    Dinov2Model(config).save_pretrained(folder)
    build_clip_image_processor(16).save_pretrained(folder)
    return folder


def build_text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A sentence encoder."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(
        BertConfig(vocab_size=len(SPECIAL_TOKENS) + 256, hidden_size=24, **shape)
    ).save_pretrained(folder)
    build_tokenizer(bos=False).save_pretrained(folder)
    return folder


def build_cross_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = CLIPTextConfig(vocab_size=len(SPECIAL_TOKENS) + 256, **shape, **ends)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    build_tokenizer(bos=True).save_pretrained(folder)
    build_clip_image_processor(16).save_pretrained(folder)
    return folder


def build_bart(folder: Path, *, seed: int = 0) -> Path:
    """A BART."""
    torch.manual_seed(seed)
    shape = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SHAPE.items()
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        d_model=16,
        max_position_embeddings=64,
        **shape,
        **ends,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    build_tokenizer(bos=True).save_pretrained(folder)
    return folder


BART_SHAPE = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def build_frozen_encoders(folder: Path) -> dict[str, Path]:
    """A folder for every role."""
    made = {
        "vision": build_vision_encoder,
        "text": build_text_encoder,
        "cross": build_cross_encoder,
    }
    return {role: make(folder / role) for role, make in made.items()}


def scale_up_weights(model: DuetModel) -> DuetModel:
    """The same with weights that are large: 0.02 would hide a wrong position or neighbour behind the tolerance."""
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def build_clip_image_processor(size: int) -> CLIPImageProcessorPil:
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)


def transformers_inputs(
    model: DuetModel, ids: torch.Tensor, prepared: Iterable[PreparedImage] = ()
) -> dict[str, torch.Tensor]:
    """What plain transformers takes: token ids, and images as the processor made them."""
    made = [image.inputs for image in prepared]
    given = {name: torch.cat([one[name] for one in made]) for name in (made[0] if made else ())}
    if made and "image_sizes" in given and given["pixel_values"].shape[-1] == MISTRAL3_TOKEN_PIXELS:
        given["pixel_values"] = torch.stack([_of_cells(**one) for one in made])
    if given.pop("tiles", None) is not None:  # Idefics3 wants squares in rows
        given["pixel_values"] = given["pixel_values"][:, None]
    # Some want to be told which tokens are images.
    kind = model.backbone.model.config.model_type
    kinds = (ids == SPECIAL_TOKENS.index("<image>")).int()
    named = {"gemma3": {"token_type_ids": kinds}, "gemma4": {"mm_token_type_ids": kinds}}
    asked = {"mm_token_type_ids": kinds} if "image_grid_thw" in given else named.get(kind, {})
    return {"input_ids": ids, **given, **asked}


def _of_cells(pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """float[3, 32, 32]: the cells of a Mistral 3, row by row, and nothing beside them."""
    height, width = image_sizes[0].tolist()
    whole, cells = torch.zeros(3, 32, 32), iter(pixel_values)
    for y in range(0, height, MISTRAL3_TOKEN_PIXELS):
        for x in range(0, width, MISTRAL3_TOKEN_PIXELS):
            whole[:, y : y + MISTRAL3_TOKEN_PIXELS, x : x + MISTRAL3_TOKEN_PIXELS] = next(cells)
    assert next(cells, None) is None
    return whole


def image_as_text(renderer: Renderer, ref: ImageRef) -> str:
    """What an image is in a sequence, as text."""
    before, after = renderer.image_delimiters
    inside = renderer.tokenizer.decode(
        renderer.prepare_image(ref).token_ids(renderer.image_token_id)
    )
    return f"{before}{inside}{after}"


def random_image(seed: int = 0, side: int = 24, *, width: int | None = None) -> ImageRef:
    """A random image, as PNG bytes; a square unless it has a `width`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, width or side, 3), dtype=np.uint8)
    return ImageRef(data=images.encode_png(images.from_pixels(pixels)))

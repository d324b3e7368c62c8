"""Tiny random checkpoints of the families we support, made in a second: what most tests run on instead of weights."""

from __future__ import annotations

from pathlib import Path

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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.llava import LlavaProcessor

from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts

SPECIALS = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BARE = Prompts(image="{image}", text="{text}</s>", parts="{parts}</s>", chat=False, image_pool="mean")


def tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIALS, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )


def text_config() -> LlamaConfig:
    """Two layers of width 32."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIALS) + 256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llava(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA 1.5 checkpoint: CLIP with 4 patches and a class token that is dropped."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=3, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _processor(folder, bos=True, size=16, patch=8, strategy="default", extra=1)
    return folder


def fast_vlm(folder: Path, *, seed: int = 0) -> Path:
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
    text = text_config()
    text.tie_word_embeddings = True
    config = FastVlmConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=4, tie_word_embeddings=True
    )
    model = FastVlmForConditionalGeneration(config)
    # The default initialisation lets the image's signal die on its way; a test that changes an image must see it.
    for parameter in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    for name, parameter in model.model.vision_tower.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    _processor(folder, bos=False, size=8, patch=4, strategy="full", extra=0)
    return folder


def _processor(folder: Path, *, bos: bool, size: int, patch: int, strategy: str, extra: int) -> None:
    LlavaProcessor(
        _pictures(size),
        tokenizer(bos=bos),
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        image_token="<image>",
        chat_template=CHAT,
    ).save_pretrained(folder)


FAMILIES = {"llava": llava, "fast_vlm": fast_vlm}


def duet(folder: Path, *, family: str = "fast_vlm", head: str = "mlp", prompts: Prompts = BARE) -> DuetModel:
    """A DuetModel on a tiny checkpoint, in float64-friendly size."""
    from vlduet.model.backbones import load_backbone

    torch.manual_seed(1)
    return DuetModel(load_backbone(FAMILIES[family](folder)), prompts=prompts, head=head, dim=12).eval()


def vision_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A DINOv2 of 4 patches."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    _pictures(16).save_pretrained(folder)
    return folder


def text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A sentence encoder."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(SPECIALS) + 256, hidden_size=24, **shape)).save_pretrained(folder)
    tokenizer(bos=False).save_pretrained(folder)
    return folder


def cross_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = CLIPTextConfig(vocab_size=len(SPECIALS) + 256, **shape, **ends)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    _pictures(16).save_pretrained(folder)
    return folder


def bart(folder: Path, *, seed: int = 0) -> Path:
    """A BART."""
    torch.manual_seed(seed)
    shape = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SHAPE_OF_BART.items()}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=len(SPECIALS) + 256, d_model=16, max_position_embeddings=64, **shape, **ends)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    return folder


SHAPE_OF_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def encoders(folder: Path) -> dict[str, Path]:
    """A folder for every role."""
    made = {"vision": vision_encoder, "text": text_encoder, "cross": cross_encoder}
    return {role: make(folder / role) for role, make in made.items()}


def _pictures(size: int) -> CLIPImageProcessorPil:
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)


def picture(seed: int = 0, side: int = 24) -> ImageRef:
    """A random image, as PNG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return ImageRef(data=images.encode_png(images.from_pixels(pixels)))

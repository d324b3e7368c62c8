"""Checkpoint folders as frozen encoders: vectors against the original libraries, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
    SegformerConfig,
    SegformerModel,
)

from helpers import tiny
from vlduet.data.images import load_image
from vlduet.encoders.loading import fingerprint_encoder, load_text_encoder, open_encoder
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel

TEXTS = ["a cat", "a much longer sentence about a dog"]
IMAGES = [tiny.random_image(i) for i in range(3)]


def encode(folder: Path, parts: list[Any], *, model: DuetModel | None = None) -> Tensor:
    """Return the normalised vectors of images or texts by the encoder of a folder."""
    modality = "text" if isinstance(parts[0], str) else "image"
    encoder = open_encoder(folder, trained_model=model)
    return F.normalize(encoder.encode_functions[modality](parts), dim=1)


def preprocess(folder: Path) -> Tensor:
    """Return the pixels of the images as transformers prepares them."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels: Tensor = processor([load_image(i) for i in IMAGES], return_tensors="pt").pixel_values
    return pixels


@torch.no_grad()
def encode_by_bert(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the hidden states of the texts, and their attention mask."""
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    hidden = BertModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    return hidden, batch["attention_mask"][..., None]


# ------------------------------------------------------------------ images


def test_a_vision_model_gives_its_pooled_output(encoder_folders: dict[str, Path]) -> None:
    folder = encoder_folders["vision"]
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(preprocess(folder)).last_hidden_state
    assert_close(encode(folder, IMAGES), F.normalize(hidden[:, 0], dim=1))


def test_a_vision_model_that_pools_nothing_is_refused(
    tmp_path: Path, encoder_folders: dict[str, Path]
) -> None:
    config = SegformerConfig(
        hidden_sizes=[8] * 4,
        sr_ratios=[1] * 4,
        num_attention_heads=[1] * 4,
        depths=[1] * 4,
        decoder_hidden_size=8,
    )
    SegformerModel(config).save_pretrained(tmp_path)
    shutil.copy(encoder_folders["vision"] / "preprocessor_config.json", tmp_path)
    with pytest.raises(ModelError, match="'segformer' gives no vector"):
        encode(tmp_path, IMAGES)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_timm_folder_gives_the_vectors_of_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        batch = torch.stack([transform(load_image(image)) for image in IMAGES])
        pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert_close(encode(tmp_path, IMAGES), F.normalize(pooled, dim=1))


def write_timm_folder(folder: Path, **config: Any) -> None:
    content = {"architecture": "tf_efficientnet_lite0.in1k", "pretrained_cfg": {}, **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize("config", [{}, {"model_type": "timm_wrapper"}])
def test_a_timm_folder_needs_timm(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_timm_folder(tmp_path, **config)
    monkeypatch.setattr("vlduet.encoders.loading.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="timm and torchvision not installed"):
        open_encoder(tmp_path)
    monkeypatch.setattr("vlduet.encoders.loading.find_spec", lambda name: object())
    assert open_encoder(tmp_path).modalities == ("image",)


@pytest.mark.parametrize(
    "architecture", ["hf-hub:someone/something", "local-dir:/tmp", "someone/something"]
)
def test_a_timm_folder_cannot_name_a_download(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlduet.encoders.loading.find_spec", lambda name: object())
    write_timm_folder(tmp_path, architecture=architecture)
    with pytest.raises(ModelError, match="names no architecture"):
        open_encoder(tmp_path)


@pytest.mark.parametrize("shares_model", [True, False])
def test_the_vision_tower_of_a_vlm_gives_the_mean_of_its_features(
    shares_model: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    model = tiny.build_duet_model(folder)
    vectors = encode(folder, IMAGES, model=model if shares_model else None)
    features = model.vision_features([model.prepare_image(image) for image in IMAGES])
    means = features.reshape(len(IMAGES), -1, features.shape[1]).mean(1)
    assert_close(vectors, F.normalize(means, dim=1))


def test_features_of_deepstack_layers_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    model = tiny.build_duet_model(folder, family="qwen3_vl")
    features = model.vision_features([model.prepare_image(IMAGES[0])])
    width = model.backbone.vision_width
    assert features.shape[1] > width
    (vector,) = encode(folder, IMAGES[:1], model=model)
    assert_close(vector, F.normalize(features[:, :width].mean(0), dim=0))


def test_the_vision_model_of_clip_is_an_image_encoder(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    tiny.build_clip_image_processor(16).save_pretrained(tmp_path)
    assert open_encoder(tmp_path).modalities == ("image",)
    with torch.no_grad():
        pooled = CLIPVisionModel.from_pretrained(tmp_path).eval()(preprocess(tmp_path))
    assert_close(encode(tmp_path, IMAGES), F.normalize(pooled.pooler_output, dim=1))


# ------------------------------------------------------------------ texts


def test_a_sentence_encoder_pools_by_the_mean_of_tokens(encoder_folders: dict[str, Path]) -> None:
    folder = encoder_folders["text"]
    hidden, mask = encode_by_bert(folder)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    assert_close(encode(folder, TEXTS), F.normalize(mean, dim=1))


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls"},
    ],
)
def test_a_sentence_encoder_pools_as_its_folder_says(
    pooling: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny.build_text_encoder(tmp_path / "bge")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    hidden, _ = encode_by_bert(folder)
    assert_close(load_text_encoder(folder)(TEXTS), F.normalize(hidden[:, 0], dim=1))


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "encoder")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(ModelError, match="lasttoken"):
        load_text_encoder(folder)


def test_texts_are_cut_at_the_limit_of_the_folder(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "encoder")
    long = "a much longer sentence about a dog"
    uncut, cut = load_text_encoder(folder)([long, long[:16]])
    assert not torch.allclose(uncut, cut)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    assert_close(load_text_encoder(folder)([long])[0], cut)


def test_modules_beyond_pooling_and_normalisation_are_refused(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "encoder")
    expected = load_text_encoder(folder)(TEXTS)

    def write_modules(*kinds: str) -> None:
        modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))

    write_modules("Transformer", "Pooling", "Normalize")
    assert_close(load_text_encoder(folder)(TEXTS), expected)
    write_modules("Transformer", "Pooling", "Normalize", "Dense")
    with pytest.raises(ModelError, match="Dense"):
        load_text_encoder(folder)


# ------------------------------------------------------------------ both, and fingerprints


def test_clip_encodes_images_and_texts(encoder_folders: dict[str, Path]) -> None:
    folder = encoder_folders["cross"]
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = CLIPModel.from_pretrained(folder).eval()(**batch, pixel_values=preprocess(folder))
    assert open_encoder(folder).modalities == ("image", "text")
    assert_close(encode(folder, IMAGES), outputs.image_embeds)
    assert_close(encode(folder, TEXTS), outputs.text_embeds)


def test_the_fingerprint_depends_on_weights_and_pooling(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "encoder")
    fingerprint = fingerprint_encoder(folder)
    other_weights = tiny.build_text_encoder(tmp_path / "other", seed=1)
    assert fingerprint_encoder(other_weights) != fingerprint
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert fingerprint_encoder(folder) != fingerprint


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nor config\.json here: the folder is empty"):
        open_encoder(tmp_path)

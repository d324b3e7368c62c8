"""Frozen encoders: any local folder in its role, every vector computed once, and nothing broken goes unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
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
from vlduet.data.sequences import Anchor, Sequence, Slice
from vlduet.encoders.frozen import FrozenEncoder, FrozenEncoders, make_slice
from vlduet.encoders.loading import load_text_encoder, open_encoder
from vlduet.errors import ConfigError, DataError, ModelError
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.processing import preprocess_image

TEXTS = ["a cat", "a much longer sentence about a dog"]
PICTURES = [tiny.random_image(i) for i in range(3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders"))


def encoders(folders: dict[str, Path], cache: Path | None = None) -> FrozenEncoders:
    return FrozenEncoders(
        {role: open_encoder(folder) for role, folder in folders.items()}, cache=FeatureCache(cache)
    )


def vectors(made: FrozenEncoders, role: str, parts: list) -> torch.Tensor:
    slices = [make_slice(part) for part in parts]
    found = made.compute_vectors(role, slices)
    return torch.stack([found[one.content_key] for one in slices])


def pixels(folder: Path) -> torch.Tensor:
    from vlduet.encoders.loading import _load_image_processor

    return torch.cat(
        [preprocess_image(_load_image_processor(folder), picture)["pixel_values"] for picture in PICTURES]
    )


# ---------------------------------------------------------------------- what the folders give


def test_vision_is_the_pooled_output(folders: dict[str, Path]) -> None:
    with torch.no_grad():
        hidden = (
            Dinov2Model.from_pretrained(folders["vision"])
            .eval()(pixels(folders["vision"]))
            .last_hidden_state
        )
    assert_close(vectors(encoders(folders), "vision", PICTURES), F.normalize(hidden[:, 0], dim=1))


def test_text_is_the_mean_or_what_the_folder_says(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folders["text"]),
        BertModel.from_pretrained(folders["text"]).eval(),
    )
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert_close(vectors(encoders(folders), "text", TEXTS), mean)
    folder = tiny.build_text_encoder(tmp_path / "bge")
    (folder / "1_Pooling").mkdir()
    for config in (
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls"},
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        assert_close(load_text_encoder(folder)(TEXTS), F.normalize(hidden[:, 0], dim=1))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(ModelError, match="lasttoken"):
        load_text_encoder(folder)


def test_a_sentence_encoder_is_read_as_its_folder_says_or_not_at_all(tmp_path: Path) -> None:
    folder = tiny.build_text_encoder(tmp_path / "encoder")
    long = "a much longer sentence about a dog"
    whole, cut = load_text_encoder(folder)([long, long[:16]])
    assert not torch.allclose(whole, cut)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    assert_close(load_text_encoder(folder)([long])[0], cut)
    kinds = ["models.Transformer", "models.Pooling", "models.Normalize"]
    for more in ([], ["models.Dense"]):
        modules = [{"type": f"sentence_transformers.{kind}"} for kind in kinds + more]
        (folder / "modules.json").write_text(json.dumps(modules))
        if not more:
            load_text_encoder(folder)
    with pytest.raises(ModelError, match="Dense"):
        load_text_encoder(folder)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_timm_folder_is_read_as_timm_reads_it(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    see = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    with torch.no_grad():
        batch = torch.stack([see(load_image(picture)) for picture in PICTURES])
        pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    made = FrozenEncoders({"vision": open_encoder(tmp_path)}, cache=FeatureCache(None))
    assert_close(vectors(made, "vision", PICTURES), F.normalize(pooled, dim=1))


@pytest.mark.parametrize("more", [{}, {"model_type": "timm_wrapper"}])
def test_timm_is_asked_for_by_name_and_fetches_nothing(
    more: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architecture": "tf_efficientnet_lite0.in1k", "pretrained_cfg": {}, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("vlduet.encoders.loading.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="timm and torchvision not installed"):
        open_encoder(tmp_path)
    monkeypatch.setattr("vlduet.encoders.loading.find_spec", lambda name: object())
    assert open_encoder(tmp_path).modalities == ("image",)
    for somewhere in ("hf-hub:someone/something", "local-dir:/tmp", "someone/something"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": somewhere}))
        with pytest.raises(ModelError, match="names no architecture"):
            open_encoder(tmp_path)


def test_a_vision_model_that_pools_nothing_is_named(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    small = {
        "hidden_sizes": [8] * 4,
        "sr_ratios": [1] * 4,
        "num_attention_heads": [1] * 4,
        "depths": [1] * 4,
        "decoder_hidden_size": 8,
    }
    SegformerModel(SegformerConfig(**small)).save_pretrained(tmp_path)
    shutil.copy(folders["vision"] / "preprocessor_config.json", tmp_path)
    with pytest.raises(ModelError, match="'segformer' gives no vector"):
        open_encoder(tmp_path).encode_functions["image"](PICTURES)


def test_cross_reads_both_kinds_in_one_space(folders: dict[str, Path]) -> None:
    clip = CLIPModel.from_pretrained(folders["cross"]).eval()
    batch = AutoTokenizer.from_pretrained(folders["cross"])(
        TEXTS, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = clip(**batch, pixel_values=pixels(folders["cross"]))
    made = encoders(folders)
    assert_close(vectors(made, "cross", PICTURES), out.image_embeds)
    assert_close(vectors(made, "cross", TEXTS), out.text_embeds)


@pytest.mark.parametrize("ours", [True, False])
def test_the_tower_of_a_model_is_an_encoder(ours: bool, tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    encoder = open_encoder(tmp_path / "base", trained_model=model if ours else None)
    found = vectors(
        FrozenEncoders({"vision": encoder}, cache=FeatureCache(None)), "vision", PICTURES
    )
    tokens = model.vision_features([model.prepare_image(picture) for picture in PICTURES])
    assert_close(found, F.normalize(tokens.reshape(3, 4, -1).mean(1), dim=1))


def test_of_a_tower_that_speaks_to_several_layers_only_what_the_projector_reads_counts(
    tmp_path: Path,
) -> None:
    model = tiny.build_duet_model(tmp_path / "base", family="qwen3_vl")
    encoder = open_encoder(tmp_path / "base", trained_model=model)
    found = vectors(
        FrozenEncoders({"vision": encoder}, cache=FeatureCache(None)), "vision", PICTURES[:1]
    )
    tokens = model.vision_features([model.prepare_image(PICTURES[0])])
    width = model.backbone.vision_width
    assert tokens.shape[1] > width
    assert_close(found[0], F.normalize(tokens[:, :width].mean(0), dim=0))


def test_a_vision_part_of_clip_alone(tmp_path: Path) -> None:
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
    found = vectors(
        FrozenEncoders({"vision": open_encoder(tmp_path)}, cache=FeatureCache(None)),
        "vision",
        PICTURES,
    )
    assert found.shape == (3, 16)


# ---------------------------------------------------------------------- once, and by content


def test_vectors_are_computed_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {role: vectors(encoders(folders, tmp_path), role, TEXTS) for role in ("text", "cross")}
    monkeypatch.setattr(
        FrozenEncoder,
        "encode_functions",
        property(lambda self: pytest.fail(f"{self.folder} was opened")),
    )
    again = encoders(folders, tmp_path)
    for role, wanted in first.items():
        assert torch.equal(vectors(again, role, TEXTS), wanted)


def test_another_encoder_s_vectors_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors(encoders(folders, tmp_path / "cache"), "text", TEXTS)
    other = tiny.build_text_encoder(tmp_path / "other", seed=1)
    found = vectors(encoders({"text": other}, tmp_path / "cache"), "text", TEXTS)
    assert_close(found, load_text_encoder(other)(TEXTS))
    pooled = tiny.build_text_encoder(tmp_path / "pooled")
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    found = vectors(encoders({"text": pooled}, tmp_path / "cache"), "text", TEXTS)
    assert_close(found, load_text_encoder(pooled)(TEXTS))


def test_the_key_is_the_content(tmp_path: Path) -> None:
    image = tiny.random_image(1)
    (tmp_path / "a.png").write_bytes(image.data or b"")
    assert (
        make_slice(image).content_key
        == make_slice(type(image)(path=tmp_path / "a.png")).content_key
        != make_slice(PICTURES[0]).content_key
    )
    assert make_slice("A cat").content_key != make_slice("a cat").content_key
    assert (
        make_slice(make_slice(image).content_key).content_key != make_slice(image).content_key
    )  # a text that spells an image's key


# ---------------------------------------------------------------------- sequences


def test_see_fills_what_each_role_compares(folders: dict[str, Path]) -> None:
    slices = (make_slice(PICTURES[0]), make_slice(TEXTS[0]))
    anchors = (
        Anchor(0, 1, "image", "a", "k", slices[:1]),
        Anchor(1, 2, "text", "a", "k", slices),
        Anchor(0, 1, "x", "", ""),
    )
    (seen,) = encoders(folders).attach_features([Sequence((1, 2), (-100, -100), anchors)])
    assert seen.anchors == anchors  # features decide no equality
    image, text = seen.anchors[1].slices
    assert image.features.keys() == {"vision", "cross"} and text.features.keys() == {
        "text",
        "cross",
    }
    assert seen.anchors[0].slices[0] is image
    bare = [Sequence((1,), (-100,))]
    assert encoders(folders).attach_features(bare) is bare


def faulty(value: float) -> FrozenEncoders:
    def encode(parts: list) -> torch.Tensor:
        return torch.stack([torch.full((3,), value if part == "bad" else 1.0) for part in parts])

    return FrozenEncoders(
        {"text": FrozenEncoder(Path("x"), ("text",), lambda: {"text": encode}, "f")},
        cache=FeatureCache(None),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_nan_and_zero_vectors_are_named(value: float) -> None:
    assert len(faulty(value).compute_vectors("text", [make_slice("good")])) == 1
    with pytest.raises(
        DataError, match=r"the text encoder x gives (NaN|infinite numbers or zeros alone) for 'bad'"
    ):
        faulty(value).compute_vectors("text", [make_slice("good"), make_slice("bad")])


def test_a_broken_cache_is_mended_and_a_foreign_width_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wanted = vectors(encoders(folders, tmp_path), "text", TEXTS)
    one, other = sorted(tmp_path.rglob("*.npy"))
    np.save(one, np.full(24, np.nan, np.float32))
    assert_close(vectors(encoders(folders, tmp_path), "text", TEXTS), wanted)
    one.unlink()
    assert_close(vectors(encoders(folders, tmp_path), "text", TEXTS), wanted)
    np.save(other, np.ones(25, np.float32))
    with pytest.raises(ModelError, match=r"text: a cached vector has 2[45] numbers.*Delete"):
        vectors(encoders(folders, tmp_path), "text", TEXTS)


def test_a_role_needs_an_encoder_that_reads_its_kinds(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for role, wrong in (("vision", "text"), ("text", "vision"), ("cross", "vision")):
        with pytest.raises(ConfigError, match=f"encoders.{role}.*needs"):
            encoders({role: folders[wrong]})
    assert encoders({"vision": folders["cross"], "text": folders["cross"]})
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_encoder(tmp_path)


def test_a_slice_compares_by_content() -> None:
    assert Slice("a", "k", {"text": torch.ones(2)}) == Slice("a", "k")

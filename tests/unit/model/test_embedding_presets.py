"""Presets of published models without a description of their format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from helpers import runs, tiny
from helpers.tiny_published import remove_lm_head
from vlduet import config
from vlduet.data.records import Parts, Record
from vlduet.errors import ConfigError, ModelError
from vlduet.inspect.tokens import list_record_tokens
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.embedding_presets import PRESETS, recognise_preset
from vlduet.recipes.registry import load_recipe
from vlduet.train.setup import load_model

IMAGE = tiny.random_image(2, 24, width=40)


def read_text(model: DuetModel, parts: Parts) -> str:
    """Return the text of the tokens of an embedding, with one image token for each image."""
    token_ids = list(model.renderer.render_embedding(parts).token_ids)
    image = model.renderer.image_token_id
    merged = [i for n, i in enumerate(token_ids) if i != image or token_ids[n - 1] != image]
    return str(model.backbone.tokenizer.decode(merged))


@pytest.mark.parametrize(
    ("name", "model_type", "preset"),
    [
        ("e5-v", "llava_next", "e5-v"),
        ("E5-V", "llava_next", "e5-v"),
        ("e5-v", "llava", None),
        ("VLM2Vec-Qwen2VL-2B", "qwen2_vl", "vlm2vec"),
        ("vlm2vec", "llava_next", "vlm2vec"),
        ("gme-Qwen2-VL-2B-Instruct", "qwen2_vl", "gme-qwen2-vl"),
        ("my-gme-photos", "qwen2_vl", None),
        ("base", "qwen2_vl", None),
    ],
)
def test_presets_are_recognised_by_name_and_type(
    name: str, model_type: str, preset: str | None
) -> None:
    expected = None if preset is None else PRESETS[preset]
    assert recognise_preset(Path("models") / name, model_type) is expected
    snapshot = Path(f"hub/models--org--{name}/snapshots/abc")
    assert recognise_preset(snapshot, model_type) is expected


def test_gme_is_read_without_its_code(tmp_path: Path) -> None:
    """Its config names code that wraps Qwen2-VL, and so does its modules.json."""
    folder = tiny.build_qwen2_vl(tmp_path / "gme-Qwen2-VL-2B-Instruct")
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}
    (folder / "config.json").write_text(json.dumps(content))
    modules = [{"type": "custom_st.MultiModalTransformer", "path": ""}]
    (folder / "modules.json").write_text(json.dumps(modules))
    model = DuetModel.from_pretrained(folder, device="cpu")
    turn = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><image><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
        "<|endoftext|>"
    )
    assert read_text(model, (IMAGE, "what?")) == turn
    vectors = model.encode(["a cat", IMAGE])
    model.save_pretrained(tmp_path / "saved")
    saved = DuetModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.abs(saved.encode(["a cat", IMAGE]) - vectors).max() < 1e-6
    rows = list_record_tokens(Record("r", image=IMAGE, short=("a cat",)), folder)
    assert "You are a helpful assistant." in "".join(row.text for row in rows)


def test_vlm2vec_has_no_delimiters_around_images(tmp_path: Path) -> None:
    folder = tiny.FAMILY_BUILDERS["qwen2_vl"](tmp_path / "VLM2Vec-Qwen2VL-2B")
    model = DuetModel.from_pretrained(folder, device="cpu")
    assert read_text(model, (IMAGE,)) == "<image> Represent the given image."
    assert read_text(model, (IMAGE, "What is it?")) == "<image> What is it?"
    assert read_text(model, ("A cat",)) == "A cat"


def test_e5_v_reads_the_last_token_of_its_prompt(tmp_path: Path) -> None:
    folder = tiny.FAMILY_BUILDERS["llava_next"](tmp_path / "e5-v")
    model = tiny.scale_up_weights(DuetModel.from_pretrained(folder, device="cpu"))
    prompt = (
        "<|start_header_id|>user<|end_header_id|>\n\nA cat\nSummary above sentence in one word: "
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )
    tokens = model.backbone.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        hidden = model.backbone.model.model(**tokens).last_hidden_state
    expected = functional.normalize(hidden[0, -1], dim=0).numpy()
    assert np.abs(model.encode(["A cat"])[0] - expected).max() < 1e-5


def test_a_config_names_the_preset_of_another_folder(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path)
    run_config = config.load_run_config(path, ["model.preset=e5-v", "model.prompts={}"])
    model = load_model(run_config, load_recipe(run_config), cache=None)
    assert model.prompts.text == PRESETS["e5-v"].prompts.text
    run_config = config.load_run_config(path, ["model.preset=e5v", "model.prompts={}"])
    with pytest.raises(ConfigError, match=r"unknown preset 'e5v'.*'e5-v'"):
        load_model(run_config, load_recipe(run_config), cache=None)


def test_a_run_without_an_lm_head_needs_no_language_loss(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, family="llava")
    remove_lm_head(tmp_path / "base")
    run_config = config.load_run_config(path)
    with pytest.raises(ModelError, match=r"without its LM head.*objectives\.language=0"):
        load_model(run_config, load_recipe(run_config), cache=None)
    run_config = config.load_run_config(path, ["objectives.language=0"])
    assert not load_model(run_config, load_recipe(run_config), cache=None).backbone.has_lm_head


def test_prompts_of_the_caller_replace_a_preset(tmp_path: Path) -> None:
    folder = tiny.FAMILY_BUILDERS["llava_next"](tmp_path / "e5-v")
    model = DuetModel.from_pretrained(folder, device="cpu", prompts=tiny.PLAIN_PROMPTS)
    assert model.prompts == tiny.PLAIN_PROMPTS
    assert load_backbone(folder).has_lm_head

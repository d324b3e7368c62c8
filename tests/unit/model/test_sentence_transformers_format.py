"""Published embedding models give the vectors of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as transformer_module
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.gemma3 import Gemma3Processor
from transformers.models.idefics3 import Idefics3Processor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from helpers import tiny
from helpers.tiny_published import (
    GELU,
    IDENTITY,
    MESSAGE,
    build_published,
    write_json,
)
from vlduet.data.images import load_image
from vlduet.data.records import ImageRef, Message
from vlduet.errors import DataError, ModelError
from vlduet.model.adapters import LoraSettings
from vlduet.model.checkpoint import MANIFEST_NAME, find_damage
from vlduet.model.duet import DuetModel, Embeddable
from vlduet.model.limits import accept_truncation
from vlduet.model.sentence_transformers_format import read_published_model

WIDE = tiny.random_image(3, 24, width=40)
ITEMS: list[Embeddable] = ["a red apple", WIDE, (WIDE, "what is this?"), ("it is", WIDE), " x\n"]
"""A text, an image, both in either order, and a text with white space at its ends."""
GENERATION_PROMPT = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
TEXT_ONLY = {"modality_config": {"text": MESSAGE}}
LATEST = {"pooling_mode_lasttoken": True}


def convert_item(item: Embeddable) -> object:
    """Return an item as sentence-transformers takes it."""
    if isinstance(item, str):
        return item
    if isinstance(item, ImageRef):
        return load_image(item)
    names = ("text" if isinstance(part, str) else "image" for part in item)
    return {name: convert_item(part) for name, part in zip(names, item, strict=True)}


def assert_equal_vectors(folder: Path, items: list[Embeddable] = ITEMS) -> DuetModel:
    """Compare queries and documents with those of sentence-transformers; return our model."""
    model = DuetModel.from_pretrained(folder, device="cpu")
    reference = SentenceTransformer(str(folder), device="cpu")
    for is_query in (False, True):
        encode = reference.encode_query if is_query else reference.encode_document
        expected = np.concatenate([encode([convert_item(item)]) for item in items])
        vectors = model.encode(items, is_query=is_query, on_truncate=accept_truncation)
        assert np.abs(expected - vectors).max() < 1e-5
        assert np.abs(vectors[0] - vectors[1:]).max() > 1e-2 or len(items) == 1
    return model


# -------------------------------------------------------------------- equal vectors


@pytest.mark.parametrize("transformer", [{}, GENERATION_PROMPT])
@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_vectors_equal_sentence_transformers(
    tmp_path: Path, mode: str, transformer: Mapping[str, Any]
) -> None:
    pooling = {"pooling_mode": mode, "include_prompt": False}
    folder = build_published(tmp_path / "model", pooling=pooling, transformer=transformer)
    model = assert_equal_vectors(folder)
    documents, queries = model.encode(ITEMS), model.encode(ITEMS, is_query=True)
    assert np.abs(documents - queries).max() > 1e-2


def test_the_first_token_is_pooled(tmp_path: Path) -> None:
    """In a causal model it sees nothing else: all vectors are equal, here as there."""
    folder = build_published(tmp_path / "model", pooling={"pooling_mode_cls_token": True})
    vectors = DuetModel.from_pretrained(folder, device="cpu").encode(ITEMS)
    expected = SentenceTransformer(str(folder), device="cpu").encode(["a red apple"])
    assert np.abs(vectors - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("dense", "head"),
    [
        (((12, IDENTITY),), "linear"),
        (((7, IDENTITY), (12, IDENTITY)), "linear"),
        (((32, GELU), (12, IDENTITY)), "mlp"),
    ],
)
def test_dense_layers_become_the_head(
    tmp_path: Path, dense: tuple[tuple[int, str], ...], head: str
) -> None:
    folder = build_published(tmp_path / "model", dense=dense, pooling=LATEST)
    model = assert_equal_vectors(folder)
    assert (model.head.kind, model.dim) == (head, 12)


def build_processor(folder: str, family: str) -> Any:
    """Return a processor of transformers whose creation needs torchvision, or more settings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if family == "gemma3":
        processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=4)
    elif family == "idefics3":
        processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
    else:
        processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
        processor.image_processor, processor.tokenizer = image_processor, tokenizer
        processor.video_processor = None
        processor.image_token, processor.image_token_id, processor.image_ids = "<image>", 3, [3]
        processor.video_token, processor.video_token_id, processor.video_ids = "<video>", -1, []
        processor.audio_ids = []
    processor.chat_template = tokenizer.chat_template
    return processor


@pytest.mark.parametrize("family", ["fast_vlm", "gemma3", "idefics3", "qwen2_vl", "qwen3_vl"])
def test_vectors_of_other_families_equal_sentence_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = build_published(
        tmp_path / "model", family=family, transformer=GENERATION_PROMPT, pooling=LATEST
    )
    if family != "fast_vlm":

        class FamilyProcessor:
            @staticmethod
            def from_pretrained(folder: str, **_: object) -> Any:
                return build_processor(folder, family)

        monkeypatch.setattr(transformer_module, "AutoProcessor", FamilyProcessor)
    assert_equal_vectors(folder)


LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}USER: {% endif %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ p['text'] | trim }}{% endfor %} {% endfor %}"
    "{{ 'Task: ' + (task or 'none') if add_generation_prompt else '' }}"
)
"""Template that puts images first, each with a line end, strips texts, and reads the task."""


@pytest.mark.parametrize(
    "arguments",
    [
        {"add_generation_prompt": True, "chat_template": LLAVA_TEMPLATE},
        {"chat_template": "embedding", "style": "short", "number": 2, "is_short": False},
    ],
)
def test_templates_that_the_call_names_or_spells(
    tmp_path: Path, arguments: Mapping[str, object]
) -> None:
    transformer = {"processing_kwargs": {"chat_template": arguments}}
    folder = build_published(tmp_path / "model", transformer=transformer)
    named = folder / "additional_chat_templates"
    named.mkdir()
    (named / "embedding.jinja").write_text(
        "{{ style }}{{ number + 1 }}{{ '' if is_short else '!' }}"
        "{% for m in messages %}{% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
    )
    model = assert_equal_vectors(folder)
    # Chats have the checkpoint's own template nevertheless.
    assert isinstance(model.generate([Message("user", ("hi",))], max_new_tokens=3), str)


def test_a_template_may_read_the_text_of_the_prompt(tmp_path: Path) -> None:
    template = (
        "{% set prompt = messages[0]['content'][0]['text'] %}{% if prompt not in ('q', 'd') %}"
        "{{ raise_exception('a prompt is q or d') }}{% endif %}"
        "{{ 'Search: <|user|>' if prompt == 'q' else '<|assistant|>' }}"
        "{% for p in messages[1]['content'] %}{{ p['text'] or '<image>' }}{% endfor %}</s>"
    )
    transformer = {"processing_kwargs": {"chat_template": {"chat_template": template}}}
    prompts = {"query": "q", "document": "d"}
    folder = build_published(tmp_path / "model", transformer=transformer, prompts=prompts)
    assert_equal_vectors(folder)


def test_a_template_without_system_turns_ignores_the_prompts(tmp_path: Path) -> None:
    template = "{% for p in messages[-1]['content'] %}{{ p['text'] or '<image>' }}{% endfor %}</s>"
    transformer = {"processing_kwargs": {"chat_template": {"chat_template": template}}}
    model = assert_equal_vectors(build_published(tmp_path / "model", transformer=transformer))
    assert np.abs(model.encode(["x"]) - model.encode(["x"], is_query=True)).max() < 1e-6


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_model_without_messages_reads_the_prompt_before_the_text(
    tmp_path: Path, include_prompt: bool
) -> None:
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": include_prompt}
    folder = build_published(tmp_path / "model", transformer=TEXT_ONLY, pooling=pooling)
    model = assert_equal_vectors(folder, ["a red apple", "x"])
    # sentence-transformers has no image without messages; ours are in the place of the text.
    assert np.abs(model.encode([WIDE]) - model.encode(["x"])).max() > 1e-2


def test_the_end_of_a_text_that_the_tokenizer_writes(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", transformer=GENERATION_PROMPT)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer["post_processor"]["single"].append(end)
    tokenizer["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>",
        "ids": [2],
        "tokens": ["</s>"],
    }
    write_json(path, tokenizer)
    model = assert_equal_vectors(folder)
    assert model.renderer.render_embedding(("a",)).token_ids[-2:] == (5, 2)


@pytest.mark.parametrize(
    ("prompts", "default", "document", "query"),
    [
        ({"query": "Q", "passage": "P"}, None, "P", "Q"),
        ({"default": "D"}, "default", "D", "D"),
        ({"query": "Q"}, "query", "", "Q"),
        ({"query": "", "document": None, "corpus": "C"}, None, "C", ""),
        ({}, None, "", ""),
    ],
)
def test_prompts_of_documents_and_queries(
    tmp_path: Path, prompts: dict[str, str], default: str | None, document: str, query: str
) -> None:
    folder = build_published(tmp_path / "model", prompts=prompts, default_prompt=default)
    published = read_published_model(folder)
    assert published is not None
    assert (published.prompts.system, published.prompts.query_system) == (document, query)


def test_the_default_prompt_is_that_of_encode(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", prompts={"d": "Say."}, default_prompt="d")
    vectors = DuetModel.from_pretrained(folder, device="cpu").encode(["a red apple"])
    reference = SentenceTransformer(str(folder), device="cpu")
    assert np.abs(vectors - reference.encode(["a red apple"])).max() < 1e-5
    assert np.abs(vectors - reference.encode(["a red apple"], prompt="")).max() > 1e-3


def test_long_texts_are_cut_as_in_sentence_transformers(tmp_path: Path) -> None:
    transformer = {**GENERATION_PROMPT, "max_seq_length": 64}
    folder = build_published(tmp_path / "model", transformer=transformer)
    model = assert_equal_vectors(folder, ["many words " * 20, "few"])
    assert model.limits.max_tokens == 64
    with pytest.raises(DataError, match="the limit is 64"):
        model.encode(["many words " * 20])


def test_settings_of_images_are_those_of_the_file(tmp_path: Path) -> None:
    transformer = {"processing_kwargs": {"image": {"do_normalize": False}}}
    folder = build_published(tmp_path / "model", transformer=transformer)
    model = assert_equal_vectors(folder, [WIDE, "x"])
    assert model.backbone.image_settings == {"do_normalize": False}
    model.save_pretrained(tmp_path / "saved")
    reopened = DuetModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.abs(reopened.encode([WIDE]) - model.encode([WIDE])).max() < 1e-6


def test_numbers_of_pixels_become_a_size(tmp_path: Path) -> None:
    transformer = {"processor_kwargs": {"max_pixels": 16 * 16 * 2, "padding_side": "left"}}
    folder = build_published(tmp_path / "model", family="qwen3_vl", transformer=transformer)
    backbone = DuetModel.from_pretrained(folder, device="cpu").backbone
    assert backbone.image_settings == {"size": {"shortest_edge": 256, "longest_edge": 512}}
    assert backbone.prepare_image(WIDE).num_tokens * 64 <= 512


def test_a_folder_that_sentence_transformers_saved(tmp_path: Path) -> None:
    """It has the base model only, without an LM head: it embeds and cannot generate."""
    base = tiny.build_llava(tmp_path / "base")
    transformer = Transformer(str(base), processing_kwargs=GENERATION_PROMPT["processing_kwargs"])
    width = transformer.get_embedding_dimension()
    torch.manual_seed(0)
    modules = [transformer, Pooling(width, "mean"), Dense(width, 9, activation_function=None)]
    saved = SentenceTransformer(modules=[*modules, Normalize()], prompts={"query": "Q: "})
    saved.save(str(tmp_path / "model"))
    model = assert_equal_vectors(tmp_path / "model", ["a red apple", WIDE])
    with pytest.raises(ModelError, match="saved without its LM head"):
        model.generate([Message("user", ("hi",))])
    with pytest.raises(ModelError, match="saved without its LM head"):
        model.compute_caption_nll([(WIDE, "a photo")])
    vectors = model.encode(ITEMS)
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged", device="cpu")
    assert not merged.backbone.has_lm_head
    assert np.abs(merged.encode(ITEMS) - vectors).max() < 1e-5


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", path="0_Transformer")
    model = DuetModel.from_pretrained(folder, device="cpu")
    assert model.backbone.folder == folder / "0_Transformer"
    expected = DuetModel.from_pretrained(build_published(tmp_path / "flat"), device="cpu")
    assert np.abs(model.encode(ITEMS) - expected.encode(ITEMS)).max() < 1e-6


def test_documents_are_between_the_texts_of_the_template(tmp_path: Path) -> None:
    """Recipes of documents put their own anchors into what an embedding reads."""
    folder = build_published(tmp_path / "model", transformer=GENERATION_PROMPT)
    renderer = DuetModel.from_pretrained(folder, device="cpu").renderer
    builder, segments = renderer.render_document(("A text.", WIDE))
    embedded = renderer.render_embedding(("A text.", WIDE))
    assert builder.build(500).token_ids == embedded.token_ids and len(segments) == 2
    builder, _ = renderer.render_document(("A text.", WIDE), has_prompt=False)
    assert len(builder.build(500).token_ids) < len(embedded.token_ids)


# -------------------------------------------------------------------- saved and trained further


def test_saving_keeps_vectors_before_and_after_training(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", dense=((12, IDENTITY),))
    model = DuetModel.from_pretrained(folder, device="cpu")
    vectors = model.encode(ITEMS, is_query=True)
    model.save_pretrained(tmp_path / "saved")
    saved = DuetModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.abs(saved.encode(ITEMS, is_query=True) - vectors).max() < 1e-6
    assert saved.fingerprint == model.fingerprint and saved.limits == model.limits
    saved.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    saved.eval()
    trained = saved.encode(ITEMS)
    assert np.abs(trained - model.encode(ITEMS)).max() > 1e-2
    for name, save in (("adapter", saved.save_pretrained), ("merged", saved.save_merged)):
        save(tmp_path / name)
        reopened = DuetModel.from_pretrained(tmp_path / name, device="cpu")
        assert np.abs(reopened.encode(ITEMS) - trained).max() < 1e-5


@pytest.mark.parametrize(
    ("mode", "dense", "transformer"),
    [
        ("lasttoken", ((12, IDENTITY),), GENERATION_PROMPT),
        ("mean", ((32, GELU), (12, IDENTITY)), {}),
        ("mean", (), TEXT_ONLY),
    ],
)
def test_a_merged_model_is_one_of_sentence_transformers(
    tmp_path: Path,
    mode: str,
    dense: tuple[tuple[int, str], ...],
    transformer: Mapping[str, Any],
) -> None:
    pooling = {"pooling_mode": mode, "include_prompt": False}
    folder = build_published(
        tmp_path / "model", pooling=pooling, dense=dense, transformer=transformer
    )
    model = DuetModel.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        for parameter in (*model.head.parameters(), *model.backbone.projector.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_merged(tmp_path / "merged")
    assert find_damage(tmp_path / "merged")[0] == []
    items = ["a red apple", "x"] if transformer is TEXT_ONLY else ITEMS
    merged = assert_equal_vectors(tmp_path / "merged", items)
    assert np.abs(merged.encode(items) - model.encode(items)).max() < 1e-5
    (tmp_path / "merged" / MANIFEST_NAME).unlink()
    assert_equal_vectors(tmp_path / "merged", items)  # by the files of sentence-transformers alone

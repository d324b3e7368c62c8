"""Qwen-VL and GLM-V: images in their own proportions, positions with three axes."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import tiny
from helpers.family_checks import (
    CLOSE,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_beams_equal_transformers,
    assert_logits_equal_transformers,
    render_mixed_sequences,
    render_prompts,
    transformers_inputs_of,
)
from vlduet.data import images
from vlduet.data.batches import collate
from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import IGNORE_INDEX, PreparedImage, Sequence, compute_position_ids
from vlduet.errors import ImageError
from vlduet.inspect import internals
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.generation.beam import beam_search, generate_arguments
from vlduet.model.prompts import Prompts


@pytest.fixture(
    scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return tiny.scale_up_weights(
        tiny.build_duet_model(folder, family=request.param, prompts=PROMPTS, head="none")
    )


def test_number_of_tokens_follows_the_proportions(model: DuetModel) -> None:
    prepared = [model.prepare_image(ref) for ref in (WIDE, TALL, SMALL)]
    assert [image.grid for image in prepared] == [(2, 6), (3, 2), (2, 2)]
    assert [image.num_tokens for image in prepared] == [12, 6, 4]
    in_one_batch = model.vision_features(prepared).split([12, 6, 4])
    for image, features in zip(prepared, in_one_batch, strict=True):
        model.feature_cache._memory.clear()
        assert_close(model.vision_features([image]), features, **CLOSE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_equal_transformers_with_padding(model: DuetModel, padding_side: str) -> None:
    batch = model.collate(render_mixed_sequences(model), padding_side=padding_side)
    assert_logits_equal_transformers(model, batch)


def test_position_ids_equal_transformers(model: DuetModel) -> None:
    for sequence in render_mixed_sequences(model):
        position_ids = compute_position_ids(sequence)
        if not sequence.images:
            assert position_ids.tolist() == [list(range(len(sequence)))]
            continue
        inputs = transformers_inputs_of(model, sequence)
        expected, _ = model.backbone.model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        assert torch.equal(position_ids, expected[:, 0])


def test_position_ids_of_a_sequence_do_not_depend_on_its_row(model: DuetModel) -> None:
    sequences = render_mixed_sequences(model)
    packed = model.collate(sequences, pack_to=70)
    assert packed.position_ids.shape == (3, *packed.token_ids.shape)
    assert len(packed.token_ids) < len(sequences)
    single = {}
    with torch.no_grad():
        for sequence in sequences:
            embeddings = model(model.collate([sequence])).embeddings
            single[sequence.anchors[0].record_name] = embeddings[0]
        readout = model(packed)
    for embedding, anchor in zip(readout.embeddings, readout.anchors, strict=True):
        assert_close(embedding, single[anchor.record_name], **CLOSE)
    with torch.no_grad():
        without_grids = [_remove_grids(sequence) for sequence in sequences]
        embeddings = model(collate(without_grids, pad_token_id=0)).embeddings
    assert (embeddings[0] - single["0"]).abs().max() > 1e-3, "the grid changes nothing"


def _remove_grids(sequence: Sequence) -> Sequence:
    """Return the sequence with images whose positions are counted like those of text."""
    flat_images = tuple(
        (start, PreparedImage(image.inputs, image.num_tokens, image.cache_key))
        for start, image in sequence.images
    )
    return Sequence(sequence.token_ids, sequence.labels, sequence.anchors, flat_images)


def test_every_image_is_between_its_delimiters(model: DuetModel) -> None:
    to_tokens = model.backbone.tokenizer.convert_ids_to_tokens
    (chat,) = render_prompts(model, [(WIDE, "what?", SMALL)])
    caption = model.renderer.render_caption(TALL, "a tall one")
    for sequence in [*render_mixed_sequences(model), chat, caption]:
        tokens = to_tokens(list(sequence.token_ids))
        assert tokens.count("<|vision_start|>") == len(sequence.images)
        assert tokens.count("<|vision_end|>") == len(sequence.images)
        for start, image in sequence.images:
            end = start + image.num_tokens
            assert (tokens[start - 1], tokens[end]) == ("<|vision_start|>", "<|vision_end|>")
            assert set(tokens[start:end]) == {"<image>"}


def test_document_is_cut_before_an_image_that_does_not_fit(model: DuetModel) -> None:
    parts = (WIDE, "one", SMALL)
    limit = model.renderer.max_tokens
    builder, segments = model.renderer.render_document(parts)
    complete = builder.build(limit)
    assert len(complete.images) == 2 and len(segments) == 3
    exact_fit = model.renderer.with_options(max_tokens=len(complete))
    same = exact_fit.render_document(parts)[0].build(limit)
    assert same.token_ids == complete.token_ids
    renderer = model.renderer.with_options(max_tokens=len(complete) - 1)
    builder, segments = renderer.render_document(parts)
    sequence = builder.build(limit)
    assert len(segments) == 2 and len(sequence.images) == 1
    text = "".join(model.backbone.tokenizer.convert_ids_to_tokens(list(sequence.token_ids)))
    assert text.partition("<|vision_end|>")[2].startswith("one")


def test_mean_pooling_covers_the_image_without_its_delimiters(model: DuetModel) -> None:
    prompts = Prompts("{image}", "{text}", "{parts}", chat=False, image_pool="mean")
    renderer = model.renderer.with_options(prompts=prompts)
    for parts in ((WIDE,), ("a text", WIDE)):
        sequence = renderer.render_embedding(parts)
        start, image = sequence.images[0]
        anchor = sequence.anchors[0]
        assert (anchor.start, anchor.end) == (start, start + image.num_tokens)


def test_greedy_tokens_equal_a_forward_pass_and_transformers(model: DuetModel) -> None:
    """Prompts of different lengths and numbers of images are one batch with a cache."""
    sequences = render_prompts(model, [(WIDE, "what is it?"), (TALL, SMALL, "and these?")])
    prefill_inputs = model.prefill_inputs(sequences)
    with generate_arguments(model.backbone, prefill_inputs, 6, num_beams=1) as arguments:
        unending = {"min_new_tokens": None, "eos_token_id": None}
        token_ids = model.backbone.model.generate(**arguments | unending).tolist()
    suppressed = arguments["suppress_tokens"]
    for sequence, generated in zip(sequences, token_ids, strict=True):
        ids = list(sequence.token_ids)
        for token_id in generated:
            text_so_far = Sequence(tuple(ids), (IGNORE_INDEX,) * len(ids), (), sequence.images)
            with torch.no_grad():
                hidden_states = model.hidden_states(model.collate([text_so_far]))
                logits = hidden_states[0, -1] @ model.lm_head_weight.T
            logits[suppressed] = -torch.inf
            assert token_id == int(logits.argmax())
            ids.append(token_id)
        expected = model.backbone.model.generate(
            **transformers_inputs_of(model, sequence),
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=suppressed,
            eos_token_id=None,
        )
        assert expected[0, len(sequence.token_ids) :].tolist() == generated


def test_beams_equal_transformers(model: DuetModel) -> None:
    second = (TALL, SMALL, "and these?")
    if model.backbone.model.config.model_type.startswith("glm"):
        # With several images, transformers mixes up those of GLM's beams: their scores are not
        # those of a forward pass.
        second = (TALL, "and this?")
    assert_beams_equal_transformers(model, [(WIDE, "what is it?"), second], num_beams=3)


def test_beam_search_is_not_disturbed_by_another_thread(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread answers while this one's inputs wait for the prefill."""
    with_images, text_only = [
        model.prefill_inputs([sequence])
        for sequence in render_prompts(model, [(WIDE, TALL, "what?"), ("hello",)])
    ]
    generate = model.backbone.model.generate
    expected = beam_search(model.backbone, with_images, 8, num_beams=2)
    expected_beams = beam_search(model.backbone, text_only, 8, num_beams=3)
    messages = [Message("user", ("hello",))]
    expected_answer = model.generate(messages, max_new_tokens=8)
    results = []

    def answer_in_another_thread() -> None:
        results.append(model.generate(messages, max_new_tokens=8))
        results.append(beam_search(model.backbone, text_only, 8, num_beams=3))

    def interrupted_generate(**arguments: object) -> object:
        monkeypatch.setattr(model.backbone.model, "generate", generate)
        thread = Thread(target=answer_in_another_thread)
        thread.start()
        thread.join()
        return generate(**arguments)

    monkeypatch.setattr(model.backbone.model, "generate", interrupted_generate)
    assert beam_search(model.backbone, with_images, 8, num_beams=2) == expected
    assert results == [expected_answer, expected_beams]


def test_cached_features_give_the_same_embedding(model: DuetModel, tmp_path: Path) -> None:
    """The cache must also keep the grid of the image."""
    path = tmp_path / "wide.png"
    path.write_bytes(WIDE.data or b"")
    first = model.encode([ImageRef(path=path)])
    second = model.encode([ImageRef(path=path)])
    assert np.array_equal(first, second)
    assert np.array_equal(first, model.encode([WIDE]))
    assert model.prepare_image(ImageRef(path=path)).inputs.keys() == {"features"}


def test_picture_is_restored_from_its_patches(model: DuetModel) -> None:
    pixels = np.zeros((16, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = (200, 100, 50)
    pixels[:8, :20] = 250
    ref = ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    prepared = model.backbone.prepare_image(ref)
    picture = internals.denormalize_pixels(
        model.backbone.vision_tower_pixels(prepared), model.backbone.image_processor
    )
    assert picture.shape == pixels.shape
    assert np.abs(picture.astype(int) - pixels).max() <= 1
    weights = internals.to_patch_grid(np.arange(10.0), *picture.shape[:2])
    assert weights.shape == (2, 5) == prepared.grid


def test_extreme_proportions_are_an_error_of_the_image(model: DuetModel) -> None:
    with pytest.raises(ImageError, match=r"aspect ratio must be smaller than 200.*leave it out"):
        model.encode([tiny.random_image(0, 2, width=4020)])


def test_hub_folder_opens_without_torchvision(tmp_path: Path) -> None:
    """Hub checkpoints name the processor that needs torchvision, and older names of settings."""
    tiny.build_qwen2_vl(tmp_path / "base")
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 256,
        "max_pixels": 1024,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    prepared = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert prepared.grid == (2, 6)
    assert len(prepared.inputs["pixel_values"]) == 48

"""Families that see an image in more than one way, as transformers has them: Qwen2-VL and Qwen2.5-VL in its own proportions,
with positions in rows and columns, InternVL in squares, SmolVLM and Idefics3 whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoTokenizer, PixtralVisionConfig
from transformers.models.gemma3 import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3 import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from helpers import tiny
from vlduet.data import images
from vlduet.data.batches import Batch, collate
from vlduet.data.records import ImageRef, Message, Parts, as_parts
from vlduet.data.sequences import PreparedImage, Sequence, compute_position_ids
from vlduet.errors import ImageError, ModelError
from vlduet.inspect import internals
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.generation import beam
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.processing import load_processor
from vlduet.model.prompts import Prompts

PROMPTS = Prompts(image="See {image} sum:", text="{text} sum:", parts="{parts} all:", chat=False)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(
    scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v"]
)
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return tiny.scale_up_weights(
        tiny.build_duet_model(folder, family=request.param, prompts=PROMPTS, head="none")
    )


def as_transformers_has_them(model: DuetModel, batch: Batch) -> torch.Tensor:
    """float[B, T, V]: the logits of a batch, compared with those of transformers, which is given ids and pixels."""
    with torch.no_grad():
        given = tiny.transformers_inputs(model, batch.token_ids, batch.images) | {
            "attention_mask": (batch.segment_ids > 0).long()
        }
        theirs = model.backbone.model(**given).logits
        ours = model.backbone.compute_logits(model.hidden_states(batch))
    real = batch.segment_ids > 0
    assert theirs.std() > 0.1
    assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
    return ours


def answered_as_transformers_does(model: DuetModel, turns: list[Parts], *, beams: int) -> None:
    """Six tokens of every beam of a batch of prompts are those of transformers, which is given ids and pixels."""
    asked = [
        model.renderer.render_chat((Message("user", parts),), add_generation_prompt=True)
        for parts in turns
    ]
    with beam.generate_arguments(
        model.backbone, model.prefill_inputs(asked), 6, num_beams=beams
    ) as given:
        ids = model.backbone.model.generate(
            **given | {"min_new_tokens": None, "eos_token_id": None}
        )
    several = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "suppress_tokens": given["suppress_tokens"],
    }
    for sequence, ours in zip(asked, ids.view(len(asked), beams, -1), strict=True):
        plain = tiny.transformers_inputs(
            model, torch.tensor([sequence.token_ids]), [image for _, image in sequence.images]
        )
        theirs = model.backbone.model.generate(
            **plain, max_new_tokens=6, do_sample=False, eos_token_id=None, **several
        )
        assert theirs[:, len(sequence.token_ids) :].tolist() == ours.tolist()


def packed_as_alone(model: DuetModel, items: list[Any], *, pack_to: int) -> Batch:
    """Embeddings of items are the same alone, padded and packed; returns what was packed."""
    alone = np.concatenate([model.encode([item]) for item in items])
    assert_close(model.encode(items), alone, atol=1e-5, rtol=0)
    sequences = [
        model.renderer.render_embedding(as_parts(item), record_name=str(n))
        for n, item in enumerate(items)
    ]
    packed = model.collate(sequences, pack_to=pack_to)
    assert len(packed.token_ids) < len(items)
    with torch.no_grad():
        found = model(packed)
    order = [int(anchor.record) for anchor in found.anchors]
    assert_close(found.embeddings.numpy(), alone[order], atol=1e-5, rtol=0)
    return packed


WIDE, TALL, SMALL = (
    tiny.random_image(0, 16, width=48),
    tiny.random_image(1, 24, width=16),
    tiny.random_image(2, 16),
)


def rows(model: DuetModel) -> list[Sequence]:
    """Several images a sequence, of different shapes, side by side and apart; a text alone."""
    items = [(WIDE, "then", TALL), ("before", SMALL, WIDE), (TALL,), ("no image",)]
    return [
        model.renderer.render_embedding(parts, record_name=str(i)) for i, parts in enumerate(items)
    ]


def test_an_image_takes_tokens_by_its_proportions(qwen: DuetModel) -> None:
    made = [qwen.prepare_image(ref) for ref in (WIDE, TALL, SMALL)]
    assert [image.grid for image in made] == [(2, 6), (3, 2), (2, 2)]
    assert (
        [image.num_tokens for image in made]
        == [12, 6, 4]
        == [len(qwen.vision_features([image])) for image in made]
    )
    together = qwen.vision_features(made)
    for image, features in zip(made, together.split([12, 6, 4]), strict=True):
        qwen.feature_cache._memory.clear()
        assert_close(qwen.vision_features([image]), features, **CLOSE)


def test_logits_are_those_of_transformers(qwen: DuetModel) -> None:
    """Padded on either side: the padding of a row is masked, and its positions begin where it does."""
    for side in ("left", "right"):
        as_transformers_has_them(qwen, qwen.collate(rows(qwen), padding_side=side))


def test_positions_are_those_of_transformers(qwen: DuetModel) -> None:
    for sequence in rows(qwen):
        found = compute_position_ids(sequence)
        ids = torch.tensor([sequence.token_ids])
        if not sequence.images:
            assert found.tolist() == [list(range(len(sequence)))]
            continue
        given = tiny.transformers_inputs(qwen, ids, [image for _, image in sequence.images])
        theirs, _ = qwen.backbone.model.model.get_rope_index(
            ids, given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
        )
        assert torch.equal(found, theirs[:, 0])


def test_positions_of_a_sequence_do_not_know_its_row(qwen: DuetModel) -> None:
    sequences = rows(qwen)
    packed = qwen.collate(sequences, pack_to=70)
    assert packed.position_ids.shape == (3, *packed.token_ids.shape) and len(
        packed.token_ids
    ) < len(sequences)
    with torch.no_grad():
        alone = {s.anchors[0].record_name: qwen(qwen.collate([s])).embeddings[0] for s in sequences}
        found = qwen(packed)
    for vector, anchor in zip(found.embeddings, found.anchors, strict=True):
        assert_close(vector, alone[anchor.record], **CLOSE)
    flat = [
        Sequence(s.token_ids, s.labels, s.anchors, tuple((at, _flat(i)) for at, i in s.images))
        for s in sequences
    ]
    with torch.no_grad():
        other = qwen(collate(flat, pad_id=0)).embeddings
    assert (other[0] - alone["0"]).abs().max() > 1e-3, "else this test would prove nothing"


def _flat(image: PreparedImage) -> PreparedImage:
    return PreparedImage(image.inputs, image.num_tokens, image.cache_key)


def test_every_image_stands_in_its_frame(qwen: DuetModel) -> None:
    token = qwen.backbone.tokenizer.convert_ids_to_tokens
    chat = qwen.renderer.render_chat(
        (Message("user", (WIDE, "what?", SMALL)),), add_generation_prompt=True
    )
    for sequence in [*rows(qwen), chat, qwen.renderer.render_caption(TALL, "a tall one")]:
        names = token(list(sequence.token_ids))
        assert (
            names.count("<|vision_start|>") == names.count("<|vision_end|>") == len(sequence.images)
        )
        for at, image in sequence.images:
            around = names[at - 1], names[at + image.num_tokens]
            assert around == ("<|vision_start|>", "<|vision_end|>")
            assert set(names[at : at + image.num_tokens]) == {"<image>"}
    whole, _ = qwen.renderer.render_document((WIDE, "one", SMALL))
    qwen.renderer.max_tokens = len(whole.token_ids)
    try:
        builder, spans = qwen.renderer.render_document((WIDE, "one", SMALL))
    finally:
        qwen.renderer.max_tokens = 2048
    assert len(spans) == 2 and len(builder.images) == 1 and len(whole.images) == 2
    assert "".join(token(builder.token_ids)).partition("<|vision_end|>")[2].startswith("one")


def test_a_mean_is_that_of_the_image_alone(qwen: DuetModel) -> None:
    qwen.set_prompts(Prompts("{image}", "{text}", "{parts}", chat=False, image_pool="mean"))
    try:
        for parts in ((WIDE,), ("a text", WIDE)):
            sequence = qwen.renderer.render_embedding(parts)
            at, image = sequence.images[0]
            assert (sequence.anchors[0].start, sequence.anchors[0].end) == (
                at,
                at + image.num_tokens,
            )
    finally:
        qwen.set_prompts(PROMPTS)


def test_generated_with_cache_as_without(qwen: DuetModel) -> None:
    """Prompts of different lengths and images in one batch: each token is the best of a whole forward; transformers,
    given ids and pixels, agrees."""
    turns = [(WIDE, "what is it?"), (TALL, SMALL, "and these?")]
    asked = [
        qwen.renderer.render_chat((Message("user", parts),), add_generation_prompt=True)
        for parts in turns
    ]
    with beam.generate_arguments(qwen.backbone, qwen.prefill_inputs(asked), 6) as given:
        ids = qwen.backbone.model.generate(**given | {"min_new_tokens": None, "eos_token_id": None})
    banned = given["suppress_tokens"]
    for row, sequence in enumerate(asked):
        so_far = list(sequence.token_ids)
        for token in ids[row].tolist():
            whole = Sequence(tuple(so_far), (-100,) * len(so_far), (), sequence.images)
            with torch.no_grad():
                logits = qwen.hidden_states(qwen.collate([whole]))[0, -1] @ qwen.lm_head_weight.T
            logits[banned] = -torch.inf
            assert token == int(logits.argmax())
            so_far.append(token)
        plain = tiny.transformers_inputs(
            qwen, torch.tensor([sequence.token_ids]), [image for _, image in sequence.images]
        )
        theirs = qwen.backbone.model.generate(
            **plain, max_new_tokens=6, do_sample=False, suppress_tokens=banned, eos_token_id=None
        )
        assert theirs[0, len(sequence.token_ids) :].tolist() == ids[row].tolist()


def test_beams_as_transformers_has_them(qwen: DuetModel) -> None:
    """Every beam of a batch of prompts with images of several grids, whose positions have three axes."""
    glm = qwen.backbone.model.config.model_type.startswith("glm")
    # Of several images transformers gives GLM's beams those of other beams: the scores are not those of a whole forward.
    turns = [(WIDE, "what is it?"), (TALL, "and this?") if glm else (TALL, SMALL, "and these?")]
    answered_as_transformers_does(qwen, turns, beams=3)


def test_answers_in_two_threads_do_not_mix(
    qwen: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's prompt is read while this one's images wait to be given to the trunk."""
    pictured, plain = [Message("user", (WIDE, TALL, "what?"))], [Message("user", ("hello",))]
    wanted = [qwen.generate(asked, max_new_tokens=8) for asked in (pictured, plain)]
    real, found = qwen.backbone.model.generate, []

    def interrupted(**given: object) -> object:
        if not found:
            found.append("")
            other = Thread(target=lambda: found.append(qwen.generate(plain, max_new_tokens=8)))
            other.start()
            other.join()
        return real(**given)

    monkeypatch.setattr(qwen.backbone.model, "generate", interrupted)
    assert [qwen.generate(pictured, max_new_tokens=8), found[1]] == wanted


def test_cached_features_bring_their_grid(qwen: DuetModel, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(WIDE.data or b"")
    first, again = (qwen.encode([ImageRef(path=path)]) for _ in range(2))
    assert np.array_equal(first, again) and np.array_equal(first, qwen.encode([WIDE]))
    assert qwen.prepare_image(ImageRef(path=path)).inputs.keys() == {"features"}


def test_the_picture_is_put_together_again(qwen: DuetModel) -> None:
    pixels = np.zeros((16, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = (200, 100, 50)
    pixels[:8, :20] = 250
    prepared = qwen.backbone.prepare_image(
        ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    )
    seen = internals.denormalize_pixels(
        qwen.backbone.vision_tower_pixels(prepared), qwen.backbone.image_processor
    )
    assert seen.shape == pixels.shape and np.abs(seen.astype(int) - pixels).max() <= 1
    assert (
        internals.to_patch_grid(np.arange(10.0), *seen.shape[:2]).shape == (2, 5) == prepared.grid
    )


def test_proportions_that_it_cannot_read_are_an_image_s_fault(qwen: DuetModel) -> None:
    with pytest.raises(ImageError, match=r"aspect ratio must be smaller than 200.*leave it out"):
        qwen.encode([tiny.random_image(0, 2, width=4020)])


def test_a_folder_as_the_hub_has_it_opens_without_torchvision(tmp_path: Path) -> None:
    """Hub checkpoints name the processor that needs torchvision, and give pixels by their older names."""
    tiny.build_qwen2_vl(tmp_path / "base")
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    pixels = {"min_pixels": 256, "max_pixels": 1024}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    (tmp_path / "base" / "preprocessor_config.json").write_text(
        json.dumps(settings | pixels | patches)
    )
    prepared = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert prepared.grid == (2, 6) and len(prepared.inputs["pixel_values"]) == 48


# ------------------------------------------------------------------ InternVL


@pytest.fixture(params=[False, True], ids=["whole", "tiles"])
def intern(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    tiny.build_internvl(tmp_path / "base", tiles=request.param)
    return tiny.scale_up_weights(
        DuetModel(load_backbone(tmp_path / "base"), prompts=PROMPTS).eval()
    )


def test_squares_take_tokens_as_transformers_counts_them(intern: DuetModel) -> None:
    tiles = intern.backbone.image_processor.crop_to_patches
    made = [intern.prepare_image(ref) for ref in (WIDE, TALL, SMALL)]
    squares = [1, 1, 1]
    if tiles:  # a grid of them, and the whole picture behind it
        process = intern.backbone.image_processor.get_number_of_image_patches
        squares = [process(16, 48, {}), process(24, 16, {}), process(16, 16, {})]
        assert squares[0] == 4
    assert [image.num_tokens for image in made] == [4 * n for n in squares]
    together = intern.vision_features(made)
    for image, features in zip(
        made, together.split([image.num_tokens for image in made]), strict=True
    ):
        intern.feature_cache._memory.clear()
        assert_close(intern.vision_features([image]), features, **CLOSE)


def test_where_it_looks_is_drawn_on_the_whole_picture(intern: DuetModel) -> None:
    whole = intern.backbone.prepare_image(WIDE)
    assert intern.backbone.vision_tower_pixels(whole).shape == (3, 16, 16)
    assert len(range(whole.num_tokens)[intern.backbone.overview_features(whole)]) == 4
    with internals.eager_attention(intern):
        found = internals.attention_map(intern, WIDE)
    assert found.weights.shape == (2, 2)
    assert (found.weights.sum() < 0.99 * found.share) == (whole.num_tokens > 4), (
        "tiles have their share, too"
    )


def test_logits_of_squares_are_those_of_transformers(intern: DuetModel) -> None:
    batch = intern.collate(rows(intern), padding_side="left")
    as_transformers_has_them(intern, batch)
    with torch.no_grad():
        other = intern.hidden_states(
            intern.collate(
                [intern.renderer.render_embedding((tiny.random_image(9, 16), "then", TALL))]
            )
        )
    assert (other[0, -1] - intern.hidden_states(batch)[0, -1]).abs().max() > 1e-3, (
        "else no image would be seen"
    )


def test_a_chat_is_what_the_checkpoint_s_processor_would_write(intern: DuetModel) -> None:
    chat = intern.renderer.render_chat(
        (Message("user", (WIDE, "what?")),), add_generation_prompt=True
    )
    inside = "<image>" * intern.prepare_image(WIDE).num_tokens
    written = f"<|user|><|vision_start|>{inside}<|vision_end|>what?</s><|assistant|>"
    assert list(chat.token_ids) == intern.backbone.tokenizer.encode(
        written, add_special_tokens=False
    )


def test_a_folder_of_squares_as_the_hub_has_it_opens_without_torchvision(tmp_path: Path) -> None:
    tiny.build_internvl(tmp_path / "base")
    names = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
    }
    nothing = dict.fromkeys(
        ("crop_size", "device", "do_center_crop", "input_data_format", "return_tensors")
    )
    size = {
        "size": {"height": 16, "width": 16},
        "crop_to_patches": False,
        "data_format": "channels_first",
    }
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(names | nothing | size))
    prepared = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert prepared.num_tokens == 4 and prepared.inputs["pixel_values"].shape == (1, 3, 16, 16)


# ------------------------------------------------------------------ LLaVA-NeXT and LLaVA-OneVision


@pytest.fixture(params=["llava_next", "llava_onevision"])
def tiled(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    model = tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )
    with torch.no_grad():
        model.backbone.model.model.image_newline.normal_()
    return model


ODD = tiny.random_image(4, 29, width=40)


def test_rows_of_tiles_take_tokens_as_their_processor_counts_them(tiled: DuetModel) -> None:
    kinds = {"llava_next": LlavaNextProcessor, "llava_onevision": LlavaOnevisionProcessor}
    options = {
        "llava_next": {"patch_size": 8, "num_additional_image_tokens": 1},
        "llava_onevision": {"num_image_tokens": 4},
    }
    kind = tiled.backbone.model.config.model_type
    strategy = tiled.backbone.model.config.vision_feature_select_strategy
    theirs = kinds[kind].__new__(kinds[kind])
    theirs.image_processor = tiled.backbone.image_processor
    theirs.vision_feature_select_strategy, theirs.vision_aspect_ratio = strategy, "anyres_max_9"
    for name, value in options[kind].items():
        setattr(theirs, name, value)
    for ref in (WIDE, TALL, SMALL, ODD):
        width, height = images.load_image(ref).size
        counted = theirs._get_number_of_features(height, width, 16, 16) - (
            kind == "llava_next"
        )  # the class token
        assert tiled.prepare_image(ref).num_tokens == counted
    made = [tiled.prepare_image(ref) for ref in (WIDE, ODD)]
    together = tiled.backbone.compute_vision_features(made)
    apart = torch.cat([tiled.backbone.compute_vision_features([image]) for image in made])
    batched = tiled.backbone._run_vision_tower(made)
    assert len(together) == sum(image.num_tokens for image in made)
    assert_close(together, apart, **CLOSE)
    assert_close(together, batched, **CLOSE)


def test_logits_of_rows_of_tiles_are_those_of_transformers(tiled: DuetModel) -> None:
    """One picture a prompt: of several, LLaVA-OneVision's processor would cut none."""
    sequences = [
        tiled.renderer.render_embedding(parts)
        for parts in ((WIDE, "then"), ("before", TALL), (ODD, "so"), ("no image",))
    ]
    batch = tiled.collate(sequences, padding_side="left")
    ours = as_transformers_has_them(tiled, batch)
    with torch.no_grad():
        tiled.backbone.model.model.image_newline.normal_()
        other = tiled.hidden_states(batch) @ tiled.lm_head_weight.T
    assert (other[0, -1] - ours[0, -1]).abs().max() > 1e-3, "rows end with it"


def test_packed_and_padded_tiles_are_those_of_one_alone(tiled: DuetModel) -> None:
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so")]
    together = tiled.encode(items)
    assert_close(
        together, np.concatenate([tiled.encode([item]) for item in items]), atol=1e-5, rtol=0
    )
    answered = [
        tiled.generate([Message("user", (ref, "what?"))], max_new_tokens=6) for ref in (ODD, WIDE)
    ]
    start = tiled.prefill_inputs(
        [
            tiled.renderer.render_chat(
                (Message("user", (ref, "what?")),), add_generation_prompt=True
            )
            for ref in (ODD, WIDE)
        ]
    )
    assert beam.generate_texts(tiled.backbone, start, 6) == answered


def test_a_row_s_end_stops_no_gradient(tiled: DuetModel) -> None:
    """The projector is also asked about rows of zeros, whose answer is not taken: their gradient must be none, not NaN."""
    tiled.make_trainable(lora=None, projector=True)
    ours = (
        tiled.train()(tiled.collate([tiled.renderer.render_embedding((ODD, "x"))]))
        .embeddings[:, 0]
        .sum()
    )
    found = torch.autograd.grad(ours, list(tiled.backbone.projector.parameters()))
    real = tiled.backbone.family.project

    def only_of_the_picture(
        inner: object, projector: torch.nn.Module, features: torch.Tensor
    ) -> torch.Tensor:
        ends = ~features.any(1)
        whole = tiled.backbone.model.model.image_newline.expand(len(features), -1).clone()
        whole[~ends] = projector(features[~ends])
        return whole

    tiled.backbone.family = replace(tiled.backbone.family, project=only_of_the_picture)
    theirs = (
        tiled(tiled.collate([tiled.renderer.render_embedding((ODD, "x"))])).embeddings[:, 0].sum()
    )
    wanted = torch.autograd.grad(theirs, list(tiled.backbone.projector.parameters()))
    assert tiled.backbone.family.project is not real and any(one.abs().max() > 0 for one in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, **CLOSE)


def test_where_it_looks_is_drawn_on_the_small_whole_picture(tiled: DuetModel) -> None:
    prepared = tiled.backbone.prepare_image(ODD)
    assert tiled.backbone.vision_tower_pixels(prepared).shape == (3, 16, 16)
    assert len(range(prepared.num_tokens)[tiled.backbone.overview_features(prepared)]) == 4


def test_a_large_picture_is_made_small_before_it_is_cut(tmp_path: Path) -> None:
    """More than nine tiles of LLaVA-OneVision would be made smaller behind the projector."""
    one = tiny.build_duet_model(tmp_path / "base", family="llava_onevision", prompts=PROMPTS)
    large, small = (
        tiny.random_image(5, 90, width=120),
        images.load_image(tiny.random_image(5, 90, width=120)),
    )
    small.thumbnail((48, 48))
    again = one.backbone.prepare_image(ImageRef(data=images.encode_png(small)))
    made = one.backbone.prepare_image(large)
    assert made.inputs["pixel_values"].shape == (10, 3, 16, 16)
    assert made.num_tokens == again.num_tokens and torch.equal(
        made.inputs["pixel_values"], again.inputs["pixel_values"]
    )
    config = one.backbone.model.config
    config.vision_aspect_ratio = "anyres_max_4"
    with pytest.raises(ModelError, match="vision_aspect_ratio 'anyres_max_4'"):
        one.backbone.prepare_image(large)


HUB = {
    "gemma3": (
        "Gemma3ImageProcessorFast",
        {"size": {"height": 16, "width": 16}, "processor_class": "Gemma3Processor"},
    ),
    "gemma4": (
        "Gemma4ImageProcessor",
        {"max_soft_tokens": 70, "pooling_kernel_size": 2, "patch_size": 4},
    ),
    "mistral3": (
        "PixtralImageProcessorFast",
        {"size": {"longest_edge": 32}, "processor_class": "PixtralProcessor"},
    ),
    "llava_next": (
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 16}, "aspect_ratio_setting": "anyres"},
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 16, "width": 16}, "do_pad": True},
    ),
    "glm4v": ("Glm4vImageProcessor", {"size": {"shortest_edge": 512, "longest_edge": 2048}}),
    "glm46v": ("Glm46VImageProcessor", {"size": {"shortest_edge": 512, "longest_edge": 2048}}),
}


@pytest.mark.parametrize("family", HUB)
def test_other_folders_as_the_hub_has_them_open_without_torchvision(
    tmp_path: Path, family: str
) -> None:
    tiny.FAMILY_BUILDERS[family](tmp_path / "base")
    path = tmp_path / "base" / "preprocessor_config.json"
    before, (kind, settings) = load_backbone(tmp_path / "base").prepare_image(WIDE), HUB[family]
    given = json.loads(path.read_text())
    kept = (
        "crop_size",
        "image_grid_pinpoints",
        "patch_size",
        "temporal_patch_size",
        "merge_size",
        "image_mean",
        "image_std",
    )
    named = {name: given[name] for name in kept if given.get(name)}
    path.write_text(json.dumps(named | settings | {"image_processor_type": kind}))
    again = load_backbone(tmp_path / "base").prepare_image(WIDE)
    assert torch.equal(again.inputs["pixel_values"], before.inputs["pixel_values"])


# ------------------------------------------------------------------ SmolVLM and Idefics3


@pytest.fixture(params=["smolvlm", "idefics3"])
def smol(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )


def theirs_of(folder: Path) -> Idefics3Processor:
    """Idefics3's processor, for SmolVLM's needs a package more; they write the same."""
    pictures = Idefics3ImageProcessorPil.from_pretrained(folder)
    return Idefics3Processor(pictures, AutoTokenizer.from_pretrained(folder), image_seq_len=4)


def uncut(folder: Path) -> DuetModel:
    """The same checkpoint, whose processor leaves pictures whole."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_image_splitting": False}))
    return DuetModel(load_backbone(folder), prompts=PROMPTS).eval()


def test_a_picture_is_cut_into_squares_as_its_processor_says(smol: DuetModel) -> None:
    made = [
        smol.prepare_image(ref) for ref in (WIDE, TALL, ODD)
    ]  # 32 x 16, 32 x 32, 32 x 32 pixels, and each of them whole
    assert [image.num_features for image in made] == [3 * 4, 5 * 4, 5 * 4]
    assert [len(image.interleaved_tokens) for image in made] == [
        3 * 2 + 2 + 1,
        5 * 2 + 3 + 1,
        5 * 2 + 3 + 1,
    ]  # with line ends
    assert [smol.backbone.vision_tower_pixels(image).shape for image in made] == [(3, 16, 16)] * 3
    assert len(smol.vision_features(made)) == 52
    assert [image.feature_span for image in made] == [(2, 20), (2, 33), (2, 33)]
    whole = [uncut(smol.backbone.folder).prepare_image(ref) for ref in (WIDE, TALL, ODD)]
    assert [(image.num_features, image.num_tokens) for image in whole] == [(4, 7)] * 3


def test_logits_of_squares_and_of_whole_pictures_are_those_of_transformers(smol: DuetModel) -> None:
    for model in (smol, tiny.scale_up_weights(uncut(smol.backbone.folder))):
        sequences = [
            model.renderer.render_embedding(parts)
            for parts in ((WIDE, "then", ODD), ("before", TALL), (SMALL, "so"))
        ]
        batch = model.collate(sequences, padding_side="left")
        as_transformers_has_them(model, batch)
        with torch.no_grad():
            other = model.hidden_states(
                model.collate(
                    [model.renderer.render_embedding((tiny.random_image(9, 16), "then", ODD))]
                )
            )
            mine = model.hidden_states(model.collate(sequences[:1]))
        assert (other[0, -1] - mine[0, -1]).abs().max() > 1e-3, "else no image would be seen"


def test_squares_packed_and_padded_are_those_of_one_alone(smol: DuetModel) -> None:
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so"), (ODD, WIDE)]
    together = smol.encode(items)
    assert_close(
        together, np.concatenate([smol.encode([item]) for item in items]), atol=1e-5, rtol=0
    )
    answered = [
        smol.generate([Message("user", (ref, "what?"))], max_new_tokens=6) for ref in (ODD, WIDE)
    ]
    start = smol.prefill_inputs(
        [
            smol.renderer.render_chat(
                (Message("user", (ref, "what?")),), add_generation_prompt=True
            )
            for ref in (ODD, WIDE)
        ]
    )
    assert beam.generate_texts(smol.backbone, start, 6) == answered


def test_where_it_looks_is_drawn_on_the_whole_square(smol: DuetModel) -> None:
    with internals.eager_attention(smol):
        found = internals.attention_map(smol, WIDE)
    assert found.weights.shape == (2, 2) and found.weights.sum() < 0.99 * found.share, (
        "tiles have their share, too"
    )


def test_what_is_exported_is_prompted_so_by_its_own_processor(
    smol: DuetModel, tmp_path: Path
) -> None:
    smol.save_merged(tmp_path / "merged")
    prompt = "<|user|>{}what?</s><|assistant|>"
    for refs in ((WIDE,), (TALL,), (ODD, WIDE)):
        pictures = [images.load_image(ref) for ref in refs]
        text = prompt.format("<image>" * len(refs))
        written = theirs_of(tmp_path / "merged")(text=text, images=[pictures], return_tensors="pt")
        chat = smol.renderer.render_chat(
            (Message("user", (*refs, "what?")),), add_generation_prompt=True
        )
        assert written["input_ids"][0].tolist() == list(chat.token_ids)
        assert_close(
            written["pixel_values"][0],
            torch.cat([smol.prepare_image(ref).inputs["pixel_values"] for ref in refs]),
        )


def test_an_export_says_what_was_set_where_the_base_keeps_its_settings_in_one_file(
    smol: DuetModel, tmp_path: Path
) -> None:
    base = smol.backbone.folder
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "processor_config.json").write_text(
        json.dumps({"image_seq_len": 4, "image_processor": settings})
    )
    backbone = load_backbone(base)
    backbone.image_processor.do_image_splitting = False
    DuetModel(backbone, prompts=PROMPTS).save_merged(tmp_path / "merged")
    assert AutoImageProcessor.from_pretrained(base, backend="pil").do_image_splitting
    assert not AutoImageProcessor.from_pretrained(
        tmp_path / "merged", backend="pil"
    ).do_image_splitting
    assert json.loads((tmp_path / "merged/processor_config.json").read_text())["image_seq_len"] == 4


def test_lora_stands_in_the_language_model_alone(smol: DuetModel) -> None:
    smol.make_trainable(lora=LoraSettings(rank=2), projector=True)
    names = list(smol.adapter_tensors())
    assert names and all(".text_model.layers." in name for name in names)
    trained = {name for name, tensor in smol.named_parameters() if tensor.requires_grad}
    assert any("connector" in name for name in trained) and not any(
        "vision_model" in name for name in trained
    )


def test_the_chat_template_that_they_are_published_with_is_read(smol: DuetModel) -> None:
    smol.backbone.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    turns = (Message("system", ("Be short.",)), Message("user", (WIDE, "what?")))
    inside = tiny.image_as_text(smol.renderer, WIDE)
    written = f"<|im_start|>System: Be short.<end_of_utterance>\nUser:{inside}what?<end_of_utterance>\nAssistant:"
    pieces = list(smol.renderer.render_chat(turns, add_generation_prompt=True).token_ids)
    assert smol.backbone.tokenizer.decode(pieces) == written


# ------------------------------------------------------------------ Mistral 3


@pytest.fixture
def mistral(tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family="mistral3", prompts=PROMPTS, head="none")
    )


def test_rows_of_an_image_end_with_a_word(mistral: DuetModel) -> None:
    """As PixtralProcessor writes it, which cannot be imported without torchvision; and never a cell too many."""
    row_end, end = tiny.PIXTRAL_TOKENS
    for ref, rows_, columns in (
        (WIDE, 2, 4),
        (TALL, 3, 2),
        (SMALL, 2, 2),
        (ODD, 3, 4),
    ):  # the largest is 32 x 32
        made = mistral.prepare_image(ref)
        assert (
            tiny.image_as_text(mistral.renderer, ref)
            == row_end.join(["<image>" * columns] * rows_) + end
        )
        assert (made.num_tokens, made.num_features) == (rows_ * (columns + 1) - 1, rows_ * columns)
        batch = mistral.collate([mistral.renderer.render_embedding(("x", ref))])
        assert torch.equal(batch.image_mask, batch.token_ids == mistral.renderer.image_token_id)


def test_logits_of_rows_are_those_of_transformers(mistral: DuetModel) -> None:
    batch = mistral.collate(rows(mistral), padding_side="left")
    as_transformers_has_them(mistral, batch)


def test_images_of_several_sizes_are_seen_as_one_alone(mistral: DuetModel) -> None:
    made = [mistral.prepare_image(ref) for ref in (WIDE, TALL, ODD)]
    together = mistral.backbone._run_vision_tower(made)
    assert len(together) == sum(image.num_features for image in made)
    assert_close(
        together,
        torch.cat([mistral.backbone._run_vision_tower([image]) for image in made]),
        **CLOSE,
    )
    items = [ODD, "no image", (WIDE, "then", TALL), (SMALL, "so")]
    assert_close(
        mistral.encode(items),
        np.concatenate([mistral.encode([item]) for item in items]),
        atol=1e-5,
        rtol=0,
    )


def test_the_cells_are_the_picture_that_the_processor_made(mistral: DuetModel) -> None:
    processor = mistral.backbone.image_processor
    for ref in (WIDE, TALL, ODD):
        made = mistral.backbone.prepare_image(ref)
        whole = processor(images=images.load_image(ref), return_tensors="pt")
        assert torch.equal(mistral.backbone.vision_tower_pixels(made), whole["pixel_values"][0])
        assert torch.equal(made.inputs["image_sizes"], whole["image_sizes"])


def test_means_of_the_tower_leave_the_words_out(tmp_path: Path) -> None:
    """The reading in the tower is the mean of an image's features, whatever stands beside and behind it."""
    prompts = replace(PROMPTS, image_pool="vision")
    made = tiny.build_duet_model(
        tmp_path / "base", family="mistral3", prompts=prompts, head="split"
    )
    found = made.encode([WIDE, "a text", TALL, ODD])
    for row, ref in ((0, WIDE), (2, TALL), (3, ODD)):
        features = made.backbone.compute_vision_features([made.prepare_image(ref)]).mean(
            0, keepdim=True
        )
        assert_close(
            found[row], made.head.embed_vision_features(features)[0].detach().numpy(), **CLOSE
        )


def test_where_it_looks_leaves_the_words_out(mistral: DuetModel) -> None:
    with internals.eager_attention(mistral):
        assert internals.attention_map(mistral, WIDE).weights.shape == (2, 4)
        assert internals.attention_map(mistral, TALL).weights.shape == (3, 2)


# ------------------------------------------------------------------ Gemma 3


@pytest.fixture
def gemma(tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family="gemma3", prompts=PROMPTS, head="none")
    )


def test_logits_of_images_that_see_both_ways_are_those_of_transformers(gemma: DuetModel) -> None:
    """Some rows are longer than the window of 16 of one of the two layers."""
    for side in ("left", "right"):
        batch = gemma.collate(rows(gemma), padding_side=side)
        ours = as_transformers_has_them(gemma, batch)
    assert batch.num_tokens > 16 * len(batch.token_ids)
    one_way = {"full_attention": False, "sliding_attention": False}
    gemma.backbone.family = replace(
        gemma.backbone.family, attention_mask_kinds=lambda config: one_way
    )
    with torch.no_grad():
        causal = gemma.hidden_states(batch) @ gemma.lm_head_weight.T
    assert (causal - ours).abs().amax(2)[batch.segment_ids > 0].max() > 1e-2, (
        "they would else see one way"
    )


def test_images_that_see_both_ways_are_the_same_in_any_company(gemma: DuetModel) -> None:
    items = [ODD, "no image " * 4, (WIDE, "then", TALL), (SMALL, "so"), (SMALL, TALL)]
    packed = packed_as_alone(gemma, items, pack_to=128)
    assert packed.attention_mask().shape[1:] == (1, *packed.token_ids.shape[1:] * 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_images_that_see_both_ways_are_answered_with(gemma: DuetModel, beams: int) -> None:
    answered_as_transformers_does(
        gemma, [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?")], beams=beams
    )


@pytest.mark.parametrize("line", ["", "\n"])
def test_line_ends_around_an_image_are_the_tokens_of_its_own_processor(
    gemma: DuetModel, tmp_path: Path, line: str
) -> None:
    """Gemma's processor writes two before and two behind an image; with others beside them they are one token."""
    gemma.backbone.tokenizer.chat_template = f"{{{{ bos_token }}}}{tiny.gemma_chat_template(line)}"
    gemma.save_merged(tmp_path / "merged")
    pictures = Gemma3ImageProcessorPil.from_pretrained(tmp_path / "merged")
    theirs = Gemma3Processor(
        pictures, AutoTokenizer.from_pretrained(tmp_path / "merged"), image_seq_length=4
    )
    texts = ["what?", "a thing", "and this?"]
    turns = [
        ("user", (WIDE, texts[0])),
        ("assistant", (texts[1],)),
        ("user", (TALL, SMALL, texts[2])),
    ]
    first, last = tiny.VISION_TOKENS[0], "</s>" + line
    said = f"<|user|>{line}{first}what?{last}<|assistant|>{line}a thing{last}<|user|>{line}{first}{first}and this?{last}"
    refs = [WIDE, TALL, SMALL]
    written = theirs(
        text="<s>" + said,
        images=[[images.load_image(ref) for ref in refs]],
        add_special_tokens=False,
    )
    whole = gemma.renderer.render_chat(
        tuple(Message(role, parts) for role, parts in turns), add_generation_prompt=False
    )
    assert list(whole.token_ids) == written["input_ids"][0]
    assert ("ĊĊĊ" in gemma.backbone.tokenizer.convert_ids_to_tokens(list(whole.ids))) == bool(line)
    embedded = gemma.renderer.render_embedding((WIDE,))
    alone = theirs(
        text=f"<s>See {first} sum:", images=[[images.load_image(WIDE)]], add_special_tokens=False
    )
    assert list(embedded.token_ids) == alone["input_ids"][0]
    assert_close(
        torch.as_tensor(np.array(alone["pixel_values"])),
        gemma.prepare_image(WIDE).inputs["pixel_values"],
    )


def test_a_square_that_sees_both_ways_is_looked_at(gemma: DuetModel) -> None:
    with internals.eager_attention(gemma):
        assert internals.attention_map(gemma, WIDE).weights.shape == (2, 2)


def test_an_answer_also_ends_where_the_generation_config_says(tmp_path: Path) -> None:
    """Gemma's tokenizer tells where a text ends; where a turn does, its generation config."""
    path = tiny.build_gemma3(tmp_path / "base") / "generation_config.json"
    end = tiny.SPECIAL_TOKENS.index("<|user|>")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, end]}))
    model = DuetModel(load_backbone(tmp_path / "base"), prompts=PROMPTS).eval()
    assert (
        model.renderer.eos_token_ids
        == [2, end]
        == list(load_processor(tmp_path / "base").eos_token_ids)
    )
    assert end not in beam.suppressed_tokens(model.backbone, model.renderer.eos_token_ids)
    model.backbone.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<|user|>\n{% endfor %}"
    )
    chat = model.renderer.render_chat(
        (Message("user", ("a",)), Message("assistant", ("b",))), add_generation_prompt=False
    )
    assert [i for i in chat.labels if i != -100] == [
        *model.backbone.tokenizer.encode("b", add_special_tokens=False),
        end,
    ]


# ------------------------------------------------------------------ Gemma 4


@pytest.fixture(params=["gemma4", "gemma4_large"])
def gemma4(request: pytest.FixtureRequest, tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family=request.param, prompts=PROMPTS, head="none")
    )


def test_tokens_by_proportions_are_those_of_gemma_s_processor(gemma4: DuetModel) -> None:
    made = [gemma4.prepare_image(ref) for ref in (WIDE, TALL, SMALL, ODD)]
    counted = [
        gemma4.backbone.image_processor(images=images.load_image(ref))
        for ref in (WIDE, TALL, SMALL, ODD)
    ]
    assert [one.num_tokens for one in made] == [
        int(one["num_soft_tokens_per_image"][0]) for one in counted
    ]
    assert len({one.num_tokens for one in made}) > 2
    together = gemma4.backbone._run_vision_tower(made)
    assert_close(
        together,
        torch.cat([gemma4.backbone.compute_vision_features([image]) for image in made]),
        **CLOSE,
    )
    for one in made:
        pixels = gemma4.backbone.vision_tower_pixels(one)
        assert pixels.shape[1] * pixels.shape[2] == one.num_tokens * 8 * 8
    seen = (
        np.asarray(
            images.load_image(WIDE).resize(
                tuple(gemma4.backbone.vision_tower_pixels(made[0]).shape[:0:-1]), 3
            )
        )
        / 255
    )
    assert (
        np.abs(gemma4.backbone.vision_tower_pixels(made[0]).permute(1, 2, 0).numpy() - seen).max()
        < 0.01
    )


def test_logits_with_tables_for_layers_are_those_of_transformers(gemma4: DuetModel) -> None:
    for side in ("left", "right"):
        batch = gemma4.collate(rows(gemma4), padding_side=side)
        ours = as_transformers_has_them(gemma4, batch)
    assert ours.abs().max() < 2, "they are capped"
    large = gemma4.backbone.model.config.text_config.use_bidirectional_attention == "vision"
    one_way = {"full_attention": False, "sliding_attention": not large}
    gemma4.backbone.family = replace(
        gemma4.backbone.family, attention_mask_kinds=lambda config: one_way
    )
    with torch.no_grad():
        other = gemma4.backbone.compute_logits(gemma4.hidden_states(batch))
    assert (other - ours).abs().amax(2)[batch.segment_ids > 0].max() > 1e-3, (
        "an image sees both ways in the large ones alone"
    )


def test_what_is_lost_of_a_token_is_what_transformers_says(gemma4: DuetModel) -> None:
    sequence = gemma4.renderer.render_caption(WIDE, "a flower of two colours")
    plain = tiny.transformers_inputs(
        gemma4, torch.tensor([sequence.token_ids]), [image for _, image in sequence.images]
    )
    with torch.no_grad():
        theirs = gemma4.backbone.model(**plain, labels=torch.tensor([sequence.labels])).loss
    ((total, count),) = gemma4.compute_sequence_nll([sequence])
    assert_close(total / count, float(theirs), atol=1e-5, rtol=1e-5)


def test_tables_for_layers_are_read_in_any_company(gemma4: DuetModel) -> None:
    packed_as_alone(
        gemma4, [ODD, "no image " * 9, (WIDE, "then", TALL), (SMALL, "so"), "a"], pack_to=256
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_answered_with_tables_for_layers(gemma4: DuetModel, beams: int) -> None:
    answered_as_transformers_does(
        gemma4, [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?")], beams=beams
    )


def test_prompts_join_answers_with_tables_for_layers(gemma4: DuetModel) -> None:
    turns = [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?"), ("no image",)]
    starts = [
        gemma4.prefill_inputs(
            [gemma4.renderer.render_chat((Message("user", parts),), add_generation_prompt=True)]
        )
        for parts in turns
    ]
    alone = [beam.generate_texts(gemma4.backbone, start, 9)[0] for start in starts]
    decoder, answers = (
        ContinuousBatcher(gemma4.backbone, gemma4.renderer.eos_token_ids),
        [Request(9) for _ in starts],
    )
    for start, answer in zip(starts, answers, strict=True):  # each joins one token later
        decoder.add_requests(start, [answer])
        decoder.step()
    while decoder.requests:
        decoder.step()
    written = [
        gemma4.backbone.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        for answer in answers
    ]
    assert [text.strip() for text in written] == alone


def test_learned_prompts_are_no_words_of_the_tables_for_layers(
    gemma4: DuetModel, tmp_path: Path
) -> None:
    """Trained one step, merged, opened again here and by transformers: the same embeddings and logits."""
    gemma4.save_merged(tmp_path / "bold")
    gemma4 = DuetModel.from_pretrained(tmp_path / "bold")
    gemma4.make_trainable(lora=LoraSettings(rank=2), projector=True, soft_prompts=True)
    batch = gemma4.collate(rows(gemma4))
    gemma4.train()(batch).embeddings[:, 0].sum().backward()
    grads = {
        name: p.grad
        for name, p in gemma4.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    assert {
        "soft.rows",
        "backbone.model.model.embed_vision.embedding_projection.weight",
    } <= grads.keys()
    gemma4.zero_grad()
    gemma4.backbone.enable_gradient_checkpointing()
    gemma4(batch).embeddings[:, 0].sum().backward()
    for name, parameter in gemma4.named_parameters():
        if name in grads:
            assert_close(
                parameter.grad, grads[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
            )
    with torch.no_grad():
        for parameter in gemma4.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    before = gemma4.eval().encode([WIDE, "a text"])
    gemma4.save_pretrained(tmp_path / "kept")
    assert_close(
        DuetModel.from_pretrained(tmp_path / "kept").encode([WIDE, "a text"]),
        before,
        atol=1e-6,
        rtol=0,
    )
    gemma4.save_merged(tmp_path / "merged")
    again = DuetModel.from_pretrained(tmp_path / "merged")
    assert_close(again.encode([WIDE, "a text"]), before, atol=1e-5, rtol=0)
    as_transformers_has_them(again, again.collate(rows(again)))


def test_a_gemma_that_cannot_write_is_refused(gemma4: DuetModel) -> None:
    gemma4.backbone.model.config.text_config.use_bidirectional_attention = "all"
    with pytest.raises(ModelError, match="cannot write"):
        gemma4.encode(["a"])


def test_a_llava_with_its_tower_is_refused(tmp_path: Path) -> None:
    """Its images have words between their rows, too, of which LLaVA's family knows nothing."""
    made = tiny.build_duet_model(tmp_path / "base", family="llava")
    made.backbone.model.config.vision_config = PixtralVisionConfig()
    with pytest.raises(ModelError, match="Pixtral tower"):
        made.backbone.prepare_image(WIDE)

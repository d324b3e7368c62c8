"""Entropy, explained variance and attention against slow references, and the analysis command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import pages, tiny
from vlduet.cli.main import app
from vlduet.data import images
from vlduet.data.quarantine import Quarantine
from vlduet.errors import DataError
from vlduet.inspect import internals
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts

# ------------------------------------------------------------------ numbers


def test_entropy_equals_the_slow_reference() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 4
    expected = []
    for row in logits.double().tolist():
        total = math.fsum(math.exp(x) for x in row)
        probabilities = [math.exp(x) / total for x in row]
        expected.append(-math.fsum(p * math.log(p) for p in probabilities))
    entropy = internals.next_token_entropy(logits).tolist()
    assert entropy == pytest.approx(expected, rel=1e-5)


def test_entropy_of_equal_and_of_certain_tokens() -> None:
    equal = torch.zeros(1, 16)
    certain = torch.tensor([[0.0, -math.inf, -1e9]])
    assert internals.next_token_entropy(equal).item() == pytest.approx(math.log(16))
    assert internals.next_token_entropy(equal.bfloat16()).item() == pytest.approx(math.log(16))
    assert internals.next_token_entropy(certain).item() == 0.0


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_explained_variance_equals_the_slow_reference(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    # Squared singular values are the eigenvalues of the Gram matrix.
    gram = matrix.astype(np.float64).T @ matrix.astype(np.float64)
    values = sorted(np.linalg.eigvalsh(gram), reverse=True)
    expected = [sum(values[: k + 1]) / sum(values) for k in range(min(shape))]
    np.testing.assert_allclose(internals.explained_variance(matrix), expected, rtol=1e-9)


def test_explained_variance_of_equal_and_of_orthogonal_embeddings() -> None:
    curve = internals.explained_variance(np.ones((6, 3)))
    assert curve[0] == pytest.approx(1) and internals.num_components(curve, 0.9) == 1
    curve = internals.explained_variance(np.eye(4))
    np.testing.assert_allclose(curve, [0.25, 0.5, 0.75, 1])
    assert [internals.num_components(curve, share) for share in (0.5, 0.51, 0.99)] == [2, 3, 4]


def test_attention_to_image_equals_the_slow_reference() -> None:
    layers = [torch.rand(1, 2, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = np.zeros(4)
    for layer in layers:
        for head in range(2):
            expected += layer[0, head, 5, 1:5].numpy() / 6
    weights = internals.attention_to_image(layers, query_index=5, image_tokens=slice(1, 5))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_evenness_is_one_for_equal_weights_and_zero_for_a_single_one() -> None:
    assert internals.evenness([3, 3, 3]) == pytest.approx(1)
    assert internals.evenness([0, 5, 0]) == 0
    assert internals.evenness([2.0]) == 1
    entropy = -sum(p * math.log(p) for p in (1 / 6, 2 / 6, 3 / 6))
    assert internals.evenness([1, 2, 3]) == pytest.approx(entropy / math.log(3))


@pytest.mark.parametrize(
    ("count", "height", "width", "shape"),
    [
        (4, 16, 16, (2, 2)),
        (6, 20, 30, (2, 3)),
        (6, 30, 20, (3, 2)),
        (10, 9, 9, (3, 3)),  # with a class token
        (7, 9, 9, (1, 7)),  # no grid
    ],
)
def test_weights_get_the_proportions_of_the_picture(
    count: int, height: int, width: int, shape: tuple[int, int]
) -> None:
    grid = internals.to_patch_grid(np.arange(count, dtype=float), height, width)
    assert grid.shape == shape
    first = count - shape[0] * shape[1]
    assert grid.ravel().tolist() == list(range(first, count))


# ------------------------------------------------------------------ a model


def test_attention_weights_are_those_of_the_forward_pass(model: DuetModel) -> None:
    sequence = model.renderer.render_embedding((tiny.random_image(3), "and a text"))
    batch = model.collate([sequence])
    masks = model.backbone.family.attention_mask_kinds()
    is_hidden = ~batch.block_causal_mask(bidirectional_images=any(masks.values()))
    hidden_states = model.hidden_states(batch)
    with internals.eager_attention(model):
        layers = internals.attention_weights(model, sequence)
        eager_states = model.hidden_states(model.collate([sequence]))
    torch.testing.assert_close(eager_states, hidden_states, atol=1e-5, rtol=1e-4)
    assert len(layers) == 2 and layers[0].shape[-2:] == (len(sequence), len(sequence))
    for layer in layers:
        torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)))
        assert not layer[is_hidden.expand_as(layer)].any(), "later tokens are not seen"


def test_eager_attention_is_undone_after_the_block(model: DuetModel) -> None:
    config = model.backbone.language_model.config
    previous = config._attn_implementation
    assert previous != "eager"
    with pytest.raises(ZeroDivisionError), internals.eager_attention(model):
        assert config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert config._attn_implementation == previous


SUMMARY_PROMPTS = replace(tiny.PLAIN_PROMPTS, image="{image}</s>", image_pool="last")


@pytest.mark.parametrize(
    ("prompts", "tokens_after_image"),
    [(tiny.PLAIN_PROMPTS, 0), (SUMMARY_PROMPTS, 1)],
    ids=["mean of the image", "summary token"],
)
def test_attention_map_is_read_at_the_reading_token(
    prompts: Prompts, tokens_after_image: int, tmp_path: Path
) -> None:
    model = tiny.build_duet_model(tmp_path / "base", prompts=prompts)
    sequence = model.renderer.render_embedding((tiny.random_image(1),))
    ((start, prepared),) = sequence.images
    reading_token = sequence.anchors[0].end - 1
    last_image_token = start + prepared.num_tokens - 1
    assert reading_token == last_image_token + tokens_after_image
    with internals.eager_attention(model):
        attention = internals.attention_map(model, tiny.random_image(1))
        layers = internals.attention_weights(model, sequence)
    expected = internals.attention_to_image(
        layers, query_index=reading_token, image_tokens=slice(start, last_image_token + 1)
    )
    np.testing.assert_allclose(attention.weights.ravel(), expected)
    assert attention.weights.shape == (2, 2) and attention.pixels.shape == (8, 8, 3)
    assert attention.share == pytest.approx(expected.sum()) and attention.share <= 1 + 1e-6
    assert attention.evenness == pytest.approx(internals.evenness(expected))


def test_readings_are_those_of_encode_and_of_generation(model: DuetModel) -> None:
    items = internals.AnalysisItems(
        tuple(tiny.random_image(i) for i in range(3)), ("one", "two, longer")
    )
    analysis = internals.analyse_model(model, items, name="m", num_attention_maps=2)
    assert analysis.images is not None and analysis.texts is not None
    assert analysis.readings == {"images": analysis.images, "texts": analysis.texts}
    assert len(analysis.attention_maps) == 2
    np.testing.assert_allclose(analysis.images.embeddings, model.encode(items.images), atol=1e-5)
    np.testing.assert_allclose(analysis.texts.embeddings, model.encode(items.texts), atol=1e-5)
    sequence = model.renderer.render_embedding(("one",))
    hidden = model.hidden_states(model.collate([sequence]))[0, sequence.anchors[0].end - 1]
    entropy = internals.next_token_entropy(model.backbone.lm_head(hidden)[None]).item()
    assert analysis.texts.entropy[0] == pytest.approx(entropy, rel=1e-4)


def test_soft_prompt_rows_are_no_next_tokens_merged_or_not(tmp_path: Path) -> None:
    """Merged soft prompts are rows of the LM head where it is tied to the embedding table."""
    prompts = Prompts(image="{image} sum:", text="{text} sum:", parts="{parts} sum:", chat=False)
    model = tiny.build_duet_model(tmp_path / "base", prompts=prompts)
    model.make_trainable(lora=None, projector=False, soft_prompts=True)
    assert model.soft_prompts is not None
    with torch.no_grad():
        model.soft_prompts.rows.add_(9 * torch.randn_like(model.soft_prompts.rows))
    items = internals.AnalysisItems((), ("one", "two words"))
    before = internals.analyse_model(model.eval(), items, name="before", num_attention_maps=1)
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    after = internals.analyse_model(merged, items, name="after", num_attention_maps=1)
    assert before.texts is not None and after.texts is not None
    assert before.images is None and before.attention_maps == ()
    np.testing.assert_allclose(after.texts.entropy, before.texts.entropy, rtol=1e-5)


def test_pixels_are_those_that_the_model_sees(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    colour = (200, 100, 0)
    image = images.from_pixels(np.full((20, 20, 3), colour, dtype=np.uint8))
    prepared = model.backbone.prepare_image(images.ImageRef(data=images.encode_png(image)))
    pixels = internals.denormalize_pixels(
        model.backbone.vision_tower_pixels(prepared), model.backbone.image_processor
    )
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 1


# ------------------------------------------------------------------ the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a file of five good pairs after one with a broken image."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows: list[dict[str, Any]] = [{"id": "b", "image": "broken.png", "short": "<b>broken</b>"}]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
        rows.append(
            {"id": str(i), "image": f"{i}.png", "short": f"text {i}", "long": "Always the same."}
        )
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "x.jsonl"


def test_items_are_distinct_and_broken_images_are_dropped(source: Path) -> None:
    dropped = Quarantine(None)
    items = internals.collect_items(source, limit=10, dropped=dropped)
    assert [image.path.name for image in items.images if image.path] == [
        f"{i}.png" for i in range(5)
    ]
    texts = [f"text {i}" for i in range(5)]
    assert items.texts == ("<b>broken</b>", "text 0", "Always the same.", *texts[1:])
    assert dropped.count == 1
    limited = internals.collect_items(source, limit=2, dropped=Quarantine(None))
    assert (limited.images, limited.texts) == (items.images[:2], items.texts[:2])


def test_command_compares_a_model_before_and_after(source: Path, tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.make_trainable(lora=LoraSettings(rank=2, alpha=2), projector=False)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["analyse", str(tmp_path / "model"), str(source), "--to", str(out)]
    arguments += ["--examples", "2", "--before", str(tmp_path / "base"), "--limit", "4", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    saved = json.loads((out / "analysis.json").read_text())
    assert saved["models"] == printed["models"]
    assert [numbers["name"] for numbers in saved["models"]] == ["before", "after"]
    for numbers in saved["models"]:
        assert numbers["images"]["count"] == numbers["texts"]["count"] == 4
        assert numbers["attention"]["count"] == 2
        assert numbers["images"]["explained_variance"][-1] == pytest.approx(1)
        assert set(numbers["images"]["components"]) == {"0.5", "0.9", "0.99"}
    assert printed["dropped"] == 1
    assert "broken.png" in (out / "quarantine.jsonl").read_text()
    html = (out / "analysis.html").read_text()
    pages.parse_checked_page(html)
    assert html.count('class="overlay"') == 4
    assert "--limit 4 --examples 2" in html and "--limit 4 --examples 2" in saved["command"]


def test_command_prints_lines_for_what_was_measured(source: Path, tmp_path: Path) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    source.unlink()  # what remains is a folder of images, without texts
    arguments = ["analyse", str(tmp_path / "model"), str(tmp_path), "--to", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--examples", "0"])
    assert done.exit_code == 0, done.output
    assert "model, 5 images: entropy" in done.stdout
    assert "texts" not in done.stdout and "attention" not in done.stdout
    assert "Where it looks" not in (out / "analysis.html").read_text()


def test_source_without_images_and_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="neither an image nor a text"):
        internals.collect_items(tmp_path / "x.jsonl", limit=2, dropped=Quarantine())

"""Entropy, explained variance and attention: against slow twins, and as a page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
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

RANDOM = np.random.default_rng(0)

# ------------------------------------------------------------------ numbers


def test_entropy_equals_its_slow_twin() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 4
    wanted = []
    for row in logits.double().tolist():
        total = math.fsum(math.exp(x) for x in row)
        wanted.append(-math.fsum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row))
    assert internals.next_token_entropy(logits).tolist() == pytest.approx(wanted, rel=1e-5)


def test_entropy_at_its_ends() -> None:
    even, sure = torch.zeros(1, 16), torch.tensor([[0.0, -math.inf, -1e9]])
    assert internals.next_token_entropy(even).item() == pytest.approx(math.log(16))
    assert internals.next_token_entropy(sure).item() == 0.0
    assert internals.next_token_entropy(even.bfloat16()).item() == pytest.approx(math.log(16))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_explained_variance_equals_its_slow_twin(shape: tuple[int, int]) -> None:
    matrix = RANDOM.normal(size=shape).astype(np.float32)
    # Squared singular values are the eigenvalues of the Gram matrix.
    values = sorted(
        np.linalg.eigvalsh(matrix.astype(np.float64).T @ matrix.astype(np.float64)), reverse=True
    )
    wanted = [sum(values[: k + 1]) / sum(values) for k in range(min(shape))]
    np.testing.assert_allclose(internals.explained_variance(matrix), wanted, rtol=1e-9)


def test_explained_variance_at_its_ends() -> None:
    one = np.ones((6, 3))
    assert (
        internals.explained_variance(one)[0] == pytest.approx(1)
        and internals.num_components(np.array([1.0, 1, 1]), 0.9) == 1
    )
    spread = internals.explained_variance(np.eye(4))
    np.testing.assert_allclose(spread, [0.25, 0.5, 0.75, 1])
    assert [internals.num_components(spread, share) for share in (0.5, 0.51, 0.99)] == [2, 3, 4]


def test_attention_to_image_equals_its_slow_twin() -> None:
    layers = [torch.rand(1, 2, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    wanted = [
        sum(layer[0, head, 5, column].item() for layer in layers for head in range(2)) / 6
        for column in range(1, 5)
    ]
    found = internals.attention_to_image(layers, query_index=5, image_tokens=slice(1, 5))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_evenness() -> None:
    assert internals.evenness([3, 3, 3]) == pytest.approx(1) and internals.evenness([0, 5, 0]) == 0
    assert 0 < internals.evenness([1, 2, 3]) < 1 and internals.evenness([2.0]) == 1


@pytest.mark.parametrize(
    ("count", "height", "width", "shape"),
    [
        (4, 16, 16, (2, 2)),
        (6, 20, 30, (2, 3)),
        (6, 30, 20, (3, 2)),
        (10, 9, 9, (3, 3)),
        (7, 9, 9, (1, 7)),
    ],
)
def test_tokens_are_laid_out_as_the_picture_is(
    count: int, height: int, width: int, shape: tuple[int, int]
) -> None:
    found = internals.to_patch_grid(np.arange(count, dtype=float), height, width)
    assert found.shape == shape and found[-1, -1] == count - 1


# ------------------------------------------------------------------ a model


def test_attention_is_that_of_the_forward_and_leaves_the_model_as_it_was(model: DuetModel) -> None:
    sequence = model.renderer.render_embedding((tiny.random_image(3), "and a text"))
    unseen = ~model.collate([sequence]).block_causal_mask(
        bidirectional_images=any(
            model.backbone.family.attention_mask_kinds(model.backbone.model.config).values()
        )
    )
    before = model.hidden_states(model.collate([sequence]))
    was = model.backbone.language_model.config._attn_implementation
    with internals.eager_attention(model):
        layers = internals.attention_weights(model, sequence)
        torch.testing.assert_close(
            model.hidden_states(model.collate([sequence])), before, atol=1e-5, rtol=1e-4
        )
    assert model.backbone.language_model.config._attn_implementation == was != "eager"
    assert len(layers) == 2 and layers[0].shape[-2:] == (len(sequence), len(sequence))
    for layer in layers:
        torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)))
        assert not layer[unseen.expand_as(layer)].any(), "nothing is seen before it stands there"


def test_the_reading_token(tmp_path: Path) -> None:
    """The prompt's last token; for a mean, the last of the image's."""
    summary = replace(tiny.PLAIN_PROMPTS, image="{image}</s>", image_pool="last")
    for prompts, last in ((tiny.PLAIN_PROMPTS, "image"), (summary, "prompt")):
        model = tiny.build_duet_model(tmp_path / last, prompts=prompts)
        sequence = model.renderer.render_embedding((tiny.random_image(1),))
        ((start, prepared),) = sequence.images
        at = sequence.anchors[0].end - 1
        assert at == start + prepared.num_tokens - (last == "image")
        with internals.eager_attention(model):
            found = internals.attention_map(model, tiny.random_image(1))
            layers = internals.attention_weights(model, sequence)
        wanted = internals.attention_to_image(
            layers, query_index=at, image_tokens=slice(start, start + prepared.num_tokens)
        )
        np.testing.assert_allclose(found.weights.ravel(), wanted)
        assert (
            found.weights.shape == (2, 2)
            and found.share == pytest.approx(wanted.sum())
            and found.share <= 1 + 1e-6
        )
        assert found.picture.startswith("data:image/")


def test_what_is_read_is_what_encode_gives_and_generation_starts_from(
    model: DuetModel, tmp_path: Path
) -> None:
    items = internals.AnalysisItems(
        tuple(tiny.random_image(i) for i in range(3)), ("one", "two, longer")
    )
    found = internals.analyse_model(model, items, name="m", num_attention_maps=2)
    assert found.images is not None and found.texts is not None and len(found.attention_maps) == 2
    np.testing.assert_allclose(found.images.embeddings, model.encode(items.images), atol=1e-5)
    np.testing.assert_allclose(found.texts.embeddings, model.encode(items.texts), atol=1e-5)
    (sequence,) = [model.renderer.render_embedding(("one",))]
    hidden = model.hidden_states(model.collate([sequence]))[0, sequence.anchors[0].end - 1]
    entropy = internals.next_token_entropy(model.backbone.lm_head(hidden)[None]).item()
    assert found.texts.entropy[0] == pytest.approx(entropy, rel=1e-4)


def test_learned_tokens_are_no_next_words_merged_or_not(tmp_path: Path) -> None:
    """Where the LM head is the embedding table, folded rows stand among the words."""
    prompts = Prompts(image="{image} sum:", text="{text} sum:", parts="{parts} sum:", chat=False)
    model = tiny.build_duet_model(tmp_path / "base", prompts=prompts)
    model.make_trainable(lora=None, projector=False, soft_prompts=True)
    assert model.soft_prompts is not None
    with torch.no_grad():
        model.soft_prompts.rows.add_(9 * torch.randn_like(model.soft_prompts.rows))
    items = internals.AnalysisItems((), ("one", "two words"))
    before = internals.analyse_model(model.eval(), items, name="before", num_attention_maps=1).texts
    model.save_merged(tmp_path / "merged")
    after = internals.analyse_model(
        DuetModel.from_pretrained(tmp_path / "merged"), items, name="after", num_attention_maps=1
    ).texts
    assert before is not None and after is not None
    np.testing.assert_allclose(after.entropy, before.entropy, rtol=1e-5)


def test_the_picture_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    pixels = np.full((20, 20, 3), (200, 100, 0), dtype=np.uint8)
    picture = images.ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    seen = internals.denormalize_pixels(
        model.backbone.vision_tower_pixels(model.backbone.prepare_image(picture)),
        model.backbone.image_processor,
    )
    assert seen.shape == (8, 8, 3) and np.abs(seen.astype(int) - (200, 100, 0)).max() <= 1


# ------------------------------------------------------------------ the verb


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows: list[dict[str, Any]] = [{"id": "b", "image": "broken.png", "short": "<b>broken</b>"}]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
        rows.append(
            {"id": str(i), "image": f"{i}.png", "short": f"text {i}", "long": "Always the same."}
        )
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "x.jsonl"


def test_before_and_after(source: Path, tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.make_trainable(lora=LoraSettings(rank=2, alpha=2), projector=False)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [
        "analyse",
        str(tmp_path / "model"),
        str(source),
        "--to",
        str(out),
        "--examples",
        "2",
    ]
    done = CliRunner().invoke(
        app, [*arguments, "--before", str(tmp_path / "base"), "--limit", "4", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    saved = json.loads((out / "analysis.json").read_text())
    assert saved["models"] == told["models"] and [one["name"] for one in saved["models"]] == [
        "before",
        "after",
    ]
    for one in saved["models"]:
        assert (
            one["images"]["count"] == 4
            and one["texts"]["count"] == 4
            and one["attention"]["count"] == 2
        )
        assert one["images"]["explained_variance"][-1] == pytest.approx(1)
        assert set(one["images"]["components"]) == {"0.5", "0.9", "0.99"}
    assert told["dropped"] == 1 and "broken.png" in (out / "quarantine.jsonl").read_text()
    page = (out / "analysis.html").read_text()
    pages.parse_checked_page(page)
    assert (
        page.count('class="overlay"') == 4
        and "<script" not in page
        and not re.search(r"(src|href)=.https?:", page)
    )
    assert "--limit 4 --examples 2" in page


def test_one_model_in_words(source: Path, tmp_path: Path) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    arguments = [
        "analyse",
        str(tmp_path / "model"),
        str(tmp_path),
        "--to",
        str(tmp_path / "out"),
        "--examples",
        "0",
    ]
    source.unlink()  # a folder of images: no texts, and no attention is asked for
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (
        "model, 5 images: entropy" in done.stdout
        and "texts" not in done.stdout
        and "attention" not in done.stdout
    )
    assert "Where it looks" not in (tmp_path / "out" / "analysis.html").read_text()


def test_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="neither an image nor a text"):
        internals.collect_items(tmp_path / "x.jsonl", limit=2, dropped=Quarantine())

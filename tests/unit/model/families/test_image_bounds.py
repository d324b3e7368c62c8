"""Every family keeps to a limit of tokens per image, with the settings it is published with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from helpers import published_settings
from helpers.published_settings import FAMILIES, PublishedFamily, count_tokens
from vlduet.model.families.registry import find_family
from vlduet.model.limits import DEFAULT_MAX_IMAGE_TOKENS, DEFAULT_MAX_TOKENS
from vlduet.model.processing import load_tokenizer_and_image_processor

DOCUMENT = Path(__file__).parents[4] / "docs" / "train.md"
FEWEST_TOKENS = {"LLaVA-OneVision": 1485, "LLaVA-NeXT": 1176, "LLaVA 1.5": 576}
"""Most tokens of an image of one tile or square, which is the least that a family can do."""


@pytest.fixture(params=FAMILIES, ids=lambda family: family.label)
def published(request: pytest.FixtureRequest) -> PublishedFamily:
    family: PublishedFamily = request.param
    return family


@pytest.fixture
def checkpoint(published: PublishedFamily, tmp_path: Path) -> Path:
    return published_settings.write_checkpoint(published, tmp_path / "base")


def test_the_table_of_the_documentation_is_computed_and_a_photo_fits(
    published: PublishedFamily, checkpoint: Path
) -> None:
    row = published_settings.describe_row(published, checkpoint)
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()
    *counts, own_count = [int(n) for n in re.findall(r"\d+", row.replace(",", ""))[-4:]]
    assert max(counts) <= DEFAULT_MAX_IMAGE_TOKENS <= DEFAULT_MAX_TOKENS - 500
    assert counts[0] <= own_count


def test_no_image_exceeds_a_limit_or_the_checkpoint_s_own_settings(
    published: PublishedFamily, checkpoint: Path
) -> None:
    for size in ((1100, 800), (100, 700)):
        own_count = count_tokens(checkpoint, size)
        assert count_tokens(checkpoint, size, max_image_tokens=100_000) == own_count
        for limit in (300, 1200):
            count = count_tokens(checkpoint, size, max_image_tokens=limit)
            assert count <= min(own_count, max(limit, FEWEST_TOKENS.get(published.label, 0)))


def test_a_settled_bound_is_not_changed_again(published: PublishedFamily, tmp_path: Path) -> None:
    """Settings that keep to a limit stay, so that a merged folder has the same fingerprint."""
    folder = published_settings.write_checkpoint(published, tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    family = find_family(config.model_type, folder)(config)
    _, image_processor = load_tokenizer_and_image_processor(folder, family)
    before = image_processor.to_json_string()
    settings = family.bounded_settings(image_processor, DEFAULT_MAX_IMAGE_TOKENS)
    assert image_processor.to_json_string() == before, "only described, not applied"
    assert bool(settings) == (published.bound != "none needed")
    replaced = family.apply_settings(image_processor, settings)
    assert family.bounded_settings(image_processor, DEFAULT_MAX_IMAGE_TOKENS) == {}
    family.apply_settings(image_processor, replaced)
    assert image_processor.to_json_string() == before

"""Corpus stamps, from a small package made here; the real one is behind ``-m network``."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from helpers.small_corpora import (
    build_samples,
    write_noise_png,
    write_stamp_package,
    write_text,
)
from vlduet.corpora import build, catalog, stamps
from vlduet.corpora.build import CorpusSample
from vlduet.data import images
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    find_near_duplicates,
    fingerprint_image,
)


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, CorpusSample]:
    """All samples of the small package by their ids."""
    return build_samples("stamps", {stamps.PACKAGE_NAME: write_stamp_package(tmp_path)})


def test_alphabets_repetitions_and_captions_without_image_are_left_out(
    samples: dict[str, CorpusSample],
) -> None:
    assert len(samples) == 42
    assert not any("alphabets" in name or "no-image" in name for name in samples)
    assert len({"town/bird4", "animals/birds/bird4"} & set(samples)) == 1


def test_equal_captions_and_equal_images_are_in_one_split(
    samples: dict[str, CorpusSample],
) -> None:
    assert samples["animals/copy"].split == samples["animals/birds/bird3"].split
    splits_by_caption: dict[str, set[str]] = {}
    for sample in samples.values():
        splits_by_caption.setdefault(sample.record["short"], set()).add(sample.split)
    assert len(splits_by_caption) == 12
    assert all(len(splits) == 1 for splits in splits_by_caption.values())
    assert len({sample.split for sample in samples.values()}) > 1


def test_a_copy_under_another_caption_moves_all_stamps_of_its_caption(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/tuxpaint/stamps"
    for i in range(12):
        write_noise_png(root / f"{i}/first.png", i)
        write_text(root / f"{i}/first.txt", f"Bird {i}.")
        write_noise_png(root / f"{i}/second.png", 100 + i)
        write_text(root / f"{i}/second.txt", f"Bird {i}.")
        # The smallest name decides the split of a group: that of the copy.
        write_noise_png(root / f"{i}/copy.png", i)
        write_text(root / f"{i}/copy.txt", f"Ant {i}.")
    samples = build_samples("stamps", {stamps.PACKAGE_NAME: tmp_path})
    assert len(samples) == 36
    for i in range(12):
        names = (f"{i}/first", f"{i}/second", f"{i}/copy")
        assert len({samples[name].split for name in names}) == 1, i
    assert len({sample.split for sample in samples.values()}) > 1


def test_records_have_the_english_caption_and_the_category(
    samples: dict[str, CorpusSample],
) -> None:
    assert samples["animals/birds/bird0"].record["short"] == "A bird of kind a."
    assert samples["town/sign"].record["metadata"] == {"category": "town", "photo": False}


@pytest.mark.network
@pytest.mark.slow
def test_the_real_stamps_do_not_leak_between_splits(tmp_path: Path) -> None:
    summary = catalog.fetch_corpus("stamps", tmp_path)
    assert summary.counts["test"] >= 128
    splits: dict[str, list[Record]] = {
        split: list(read_jsonl(summary.folder / f"{split}.jsonl")) for split in build.SPLITS
    }
    captions: dict[str, set[str]] = {}
    keys: dict[str, set[str]] = {}
    fingerprints: dict[str, list[ImageFingerprint]] = {}
    for split, records in splits.items():
        texts = [text for record in records for text in record.short]
        captions[split] = {build.normalize_caption(text) for text in texts}
        refs = [record.images()[0] for record in records]
        keys[split] = {images.image_key(ref) for ref in refs}
        fingerprints[split] = [fingerprint_image(ref) for ref in refs]
    for first, second in combinations(build.SPLITS, 2):
        assert not captions[first] & captions[second]
        assert not keys[first] & keys[second]
        assert not find_near_duplicates(fingerprints[first], fingerprints[second])

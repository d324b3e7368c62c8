"""Small packages for tests of corpora: files in the layout of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlduet.corpora.build import CorpusSample
from vlduet.corpora.catalog import get_corpus
from vlduet.data import images

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20mm" height="10mm">'
    '<rect width="{}" height="9" fill="{}"/></svg>'
)
"""A drawing of one rectangle, with its width and colour."""


def write_noise_png(path: Path, seed: int, size: int = 80) -> None:
    """Write a square image of 8 x 8 random colours; images of different seeds look different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    squares = np.ones((size // 8, size // 8, 1), dtype=np.uint8)
    path.write_bytes(images.encode_png(images.from_pixels(np.kron(colours, squares))))


def write_text(path: Path, text: str) -> None:
    """Write a text file and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build_samples(corpus: str, folders: dict[str, Path]) -> dict[str, CorpusSample]:
    """Return the samples of a corpus built from these package folders, by record id."""
    samples = list(get_corpus(corpus).build(folders))
    by_id = {sample.record["id"]: sample for sample in samples}
    assert len(by_id) == len(samples), "ids are unique"
    return by_id


def write_stamp_package(folder: Path) -> Path:
    """Write a package of 42 distinct stamps, with repetitions, look-alikes and an alphabet."""
    root = folder / "usr/share/tuxpaint/stamps"
    for i in range(40):
        write_noise_png(root / f"animals/birds/bird{i}.png", i)
        caption = f"A bird of kind {'abcdefghij'[i % 10]}.\nde.utf8=Ein Vogel.\n"
        write_text(root / f"animals/birds/bird{i}.txt", caption)
    write_noise_png(root / "animals/copy.png", 3)  # the image of bird3 under another caption
    write_text(root / "animals/copy.txt", "A copy.\n")
    write_noise_png(root / "town/bird4.png", 4)  # image and caption of bird4 in another folder
    write_text(root / "town/bird4.txt", "A bird of kind e.\n")
    write_text(root / "town/sign.svg", SVG.format(60, "red"))
    write_text(root / "town/sign.txt", "A sign!\n")
    write_text(root / "town/no-image.txt", "Nothing to see.\n")
    write_noise_png(root / "symbols/alphabets/a.png", 99)
    write_text(root / "symbols/alphabets/a.txt", "The letter a.\n")
    return folder

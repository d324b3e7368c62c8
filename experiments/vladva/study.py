"""Measure the value of every part of VladVA, with nano and captions of two lengths.

    vlduet model nano models/nano
    vlduet data fetch stamps emoji wesnoth endless-sky --to data
    python experiments/vladva/study.py --work runs/vladva-study
    python experiments/vladva/study.py --work runs/vladva-study --report docs/results

Trained on stamps (only short captions) and on units, ships and planets (wesnoth, endless-sky: a
name as the short caption, a description as the long one). The embedding is the hidden state of the
last token of the prompt, without a head, as in the paper. Measured on the test splits:

    stamps    retrieval of images and captions in both directions: mean reciprocal rank; cross
              entropy of captions after their images
    edits     the caption of a stamp against one that a rule made wrong
              (vlduet.data.tools.caption_negatives). Captions this short have nothing to swap, so
              two stamps in one image are "A on the left and B on the right" against the swap
    long      descriptions: reciprocal rank of their image among 127, and their cross entropy
    reading   at the summary token of stamps: entropy of the next token, number of components with
              90 % of the variance of the image embeddings, and how evenly the token attends to
              the tokens of the image (1: evenly)
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _study import Measurements, Study, run_study
from PIL import Image, ImageOps

from vlduet.data.formats import read_jsonl
from vlduet.data.images import encode_png, load_image
from vlduet.data.records import ImageRef, Record
from vlduet.data.tools.caption_negatives import generate_caption_negatives
from vlduet.eval import protocols
from vlduet.eval.benchmarks.runners import best_positive_ranks
from vlduet.eval.benchmarks.scores import average
from vlduet.eval.protocols import unit_rows
from vlduet.inspect import internals
from vlduet.model.duet import DuetModel

LONG_CORPORA = ("wesnoth", "endless-sky")
MAX_TOKENS = 160
"""Number of tokens of a sequence; a longer description is cut."""
NUM_ATTENTION_MAPS = 16
EDIT_KINDS = ("replace", "add")
STAMP_PIXELS = 224
"""Height and width of each of two stamps in one image."""


@dataclass(frozen=True)
class CaptionChoice:
    """An image with its caption and a wrong one."""

    kind: str
    """Kind of the error: one of `EDIT_KINDS`, or "swap"."""
    image: ImageRef
    right: str
    wrong: str


def measure(model: DuetModel, data: Path) -> Measurements:
    """Return all numbers of one model; random choices are the same for every model."""
    stamps = [
        record
        for record in read_jsonl(data / "stamps" / "test.jsonl")
        if record.image is not None and record.short
    ]
    described = []
    for corpus in LONG_CORPORA:
        records = read_jsonl(data / corpus / "test.jsonl")
        described += [record for record in records if record.image is not None and record.long]
    return {
        **measure_short_captions(model, stamps),
        **measure_edits(model, stamps),
        **measure_long_captions(model, described),
        **measure_summary_token(model, stamps),
    }


def measure_short_captions(model: DuetModel, stamps: list[Record]) -> Measurements:
    """Return retrieval in both directions, and the cross entropy of the captions."""
    retrieval = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=stamps
    )
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, stamps)
    nats = entropy.total_nats_right_image / entropy.num_tokens
    return {
        "text to image": average(1 / retrieval.text_to_image.ranks),
        "image to text": average(1 / retrieval.image_to_text.ranks),
        "captions, nats": average(nats, entropy.num_tokens, scale=1.0),
    }


def make_caption_choices(stamps: list[Record]) -> list[CaptionChoice]:
    """Return a choice for every edit of every caption, and for every two neighbours in the list."""
    choices = []
    for record in stamps:
        caption = record.short[0]
        for kind in EDIT_KINDS:
            for edit in generate_caption_negatives(caption):
                if edit.kind.startswith(kind) and record.image is not None:
                    choices.append(CaptionChoice(kind, record.image, caption, edit.text))
    for left, right in itertools.pairwise(stamps):
        if left.short != right.short:
            choices.append(make_swap_choice(left, right))
    return choices


def make_swap_choice(left: Record, right: Record) -> CaptionChoice:
    """Return two stamps as one image, with a text that names them and the text with them
    swapped."""
    canvas = Image.new("RGB", (2 * STAMP_PIXELS, STAMP_PIXELS), "white")
    for position, record in enumerate((left, right)):
        assert record.image is not None
        size = (STAMP_PIXELS, STAMP_PIXELS)
        stamp = ImageOps.pad(load_image(record.image), size, color="white")
        canvas.paste(stamp, (position * STAMP_PIXELS, 0))
    image = ImageRef(data=encode_png(canvas))
    captions = (left.short[0].rstrip("."), right.short[0].rstrip("."))
    return CaptionChoice(
        "swap", image, describe_places(*captions), describe_places(*reversed(captions))
    )


def describe_places(left: str, right: str) -> str:
    """Return a text that says what is on the left and what is on the right."""
    return f"{left} on the left and {right[0].lower()}{right[1:]} on the right."


def measure_edits(model: DuetModel, stamps: list[Record]) -> Measurements:
    """Return how often the right caption is strictly nearer to its image than the wrong one.

    Chance is 50.
    """
    choices = make_caption_choices(stamps)
    images = unit_rows(model.encode_document([choice.image for choice in choices]))
    right = unit_rows(model.encode_query([choice.right for choice in choices]))
    wrong = unit_rows(model.encode_query([choice.wrong for choice in choices]))
    is_nearer = (images * right).sum(1) > (images * wrong).sum(1)
    kinds = np.array([choice.kind for choice in choices])
    return {f"edits, {kind}": average(is_nearer[kinds == kind]) for kind in (*EDIT_KINDS, "swap")}


def measure_long_captions(model: DuetModel, records: list[Record]) -> Measurements:
    """Return the reciprocal ranks of descriptions as queries, and their cross entropy."""
    texts = [str(record.long) for record in records]
    images = [record.image for record in records if record.image is not None]
    queries = model.encode_query(texts)
    targets = [[row] for row in range(len(images))]
    ranks, _ = best_positive_ranks(queries, model.encode_document(images), targets)
    pairs = zip(images, texts, strict=True)
    sequences = [model.renderer.render_caption(image, text) for image, text in pairs]
    losses = np.array(model.compute_sequence_nll(sequences), dtype=np.float64)
    nats = losses[:, 0]
    num_tokens = losses[:, 1]
    return {
        "long text to image": average(1 / ranks),
        "long, nats": average(nats / num_tokens, num_tokens, scale=1.0),
    }


def measure_summary_token(model: DuetModel, stamps: list[Record]) -> Measurements:
    """Return the three analyses of the paper: entropy, variance and attention."""
    images = tuple(record.image for record in stamps if record.image is not None)
    analysis = internals.analyse_model(
        model,
        internals.AnalysisItems(images, ()),
        name="model",
        num_attention_maps=NUM_ATTENTION_MAPS,
    )
    assert analysis.images is not None
    variance = internals.explained_variance(analysis.images.embeddings)
    num_components = float(internals.num_components(variance, 0.9))
    evenness = [attention_map.evenness for attention_map in analysis.attention_maps]
    return {
        "entropy, nats": average(analysis.images.entropy, scale=1.0),
        "components of 90 %": average([num_components], scale=1.0),
        "evenness of attention": average(evenness),
    }


def write_long_as_short(data: Path) -> None:
    """Write training records with the description in the place of the short caption.

    VladVA advises against a contrastive loss on such captions. The files are train-long.jsonl
    beside train.jsonl."""
    for corpus in LONG_CORPORA:
        lines = []
        text = (data / corpus / "train.jsonl").read_text(encoding="utf-8")
        for row in map(json.loads, text.splitlines()):
            if row["long"]:
                changed = {**row, "short": row["long"], "long": None}
                lines.append(json.dumps(changed, ensure_ascii=False) + "\n")
        (data / corpus / "train-long.jsonl").write_text("".join(lines), encoding="utf-8")


def training_sources(file_name: str) -> str:
    """Return the override with the training data of a row."""
    paths = ["data/stamps/train.jsonl"]
    paths += [f"data/{corpus}/{file_name}.jsonl" for corpus in LONG_CORPORA]
    return "data.train=[" + ", ".join(f"{{path: {path}, weight: 1}}" for path in paths) + "]"


CONTRASTIVE = "objectives={contrastive: 1}"
STUDY = Study(
    name="vladva",
    base=Path("vladva-nano"),
    overrides=(
        training_sources("train"),
        "data.validation=null",
        f"data.max_tokens={MAX_TOKENS}",
        "data.cache=runs/features",
        "recipe.language_on=long",
        "model.head=none",
        "model.prompts={image: '{image}\\nSummarize the provided image in one word:', "
        "text: '{text}\\nSummarize the provided text in one word:', image_pool: last, chat: true}",
        "train.projector=false",
        "train.batch_size=24",
        "train.pack=192",
        "train.steps=20",
        "train.log_every=1",
        "train.save_every=20",
        "train.lr=4.0e-4",
        "train.lr_new=3.0e-3",
    ),
    rows={
        "soft prompts": (CONTRASTIVE, "train.soft_prompts=true", "train.lora=null"),
        "LoRA": (CONTRASTIVE,),
        "both": (CONTRASTIVE, "train.soft_prompts=true"),
        "both and long": ("train.soft_prompts=true",),
        "long contrasted": (
            CONTRASTIVE,
            "train.soft_prompts=true",
            training_sources("train-long"),
        ),
    },
    reference="both",
    measure=measure,
    max_tokens=MAX_TOKENS,
    lower_is_better=frozenset({"captions, nats", "long, nats"}),
)

if __name__ == "__main__":
    if Path("data/wesnoth/train.jsonl").exists():
        write_long_as_short(Path("data"))
    run_study(STUDY)

"""What each part of VladVA is worth: nano read at a summary token, captions of two lengths, two CPU cores.

    vlduet model nano models/nano
    vlduet data fetch stamps emoji wesnoth endless-sky --to data
    python experiments/vladva/study.py --work runs/vladva-study
    python experiments/vladva/study.py --work runs/vladva-study --tell docs/results

Trained on stamps (short captions alone) and on units, ships and planets (wesnoth, endless-sky: a name as the short
caption, a description as the long one). The embedding is the hidden state of the prompt's last token, without a head, as
in the paper.
Measured on the test splits:

    stamps        retrieval of images and captions both ways: mean reciprocal rank; captions after their images
    edits         the caption of a stamp against one that a rule made wrong (vlduet.data.tools.caption_negatives); captions this short have
                  nothing to swap, so two stamps side by side are "A on the left and B on the right" against their swap
    long          descriptions: reciprocal rank of their image among 127, and their cross entropy after it
    reading       at the summary token of stamps: entropy of the next token, components that hold 90 % of the variance of the
                  images' embeddings, and how evenly the token attends to the image's tokens (1: evenly)
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _study import Numbers, Study, main
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

LONG = ("wesnoth", "endless-sky")
TOKENS = 160
"""Of a training sequence; a longer description is cut."""
LOOKS = 16
"""Images whose attention is looked at."""
EDITS = ("replace", "add")
SIDE = 224
"""Of each of two stamps that stand side by side, in pixels."""


def measure(model: DuetModel, data: Path) -> Numbers:
    """All numbers of one model. What is drawn is the same for every model."""
    model.renderer.max_tokens = TOKENS
    stamps = [
        r for r in read_jsonl(data / "stamps" / "test.jsonl") if r.image is not None and r.short
    ]
    told = [
        r
        for corpus in LONG
        for r in read_jsonl(data / corpus / "test.jsonl")
        if r.image is not None and r.long
    ]
    return {
        **short_captions(model, stamps),
        **edited(model, stamps),
        **long_captions(model, told),
        **reading(model, stamps),
    }


def short_captions(model: DuetModel, stamps: list[Record]) -> Numbers:
    """Retrieval both ways, and what captions cost."""
    found = protocols.measure_retrieval(model.encode_document, model.encode_query, records=stamps)
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, stamps)
    return {
        "text to image": average(1 / found.text_to_image.ranks),
        "image to text": average(1 / found.image_to_text.ranks),
        "captions, nats": average(
            entropy.total_nats_right_image / entropy.num_tokens, entropy.num_tokens, scale=1.0
        ),
    }


def edited(model: DuetModel, stamps: list[Record]) -> Numbers:
    """How often the right caption is strictly nearer to its image than a wrong one; chance is 50."""
    asked = [
        (kind, record.image, record.short[0], edit.text)
        for record in stamps
        for kind in EDITS
        for edit in generate_caption_negatives(record.short[0])
        if edit.kind.startswith(kind) and record.image is not None
    ]
    asked += [
        ("swap", *side_by_side(*pair))
        for pair in itertools.pairwise(stamps)
        if pair[0].short != pair[1].short
    ]
    images = unit_rows(model.encode_document([image for _, image, _, _ in asked]))
    right, wrong = (
        unit_rows(model.encode_query([question[n] for question in asked])) for n in (2, 3)
    )
    nearer = (images * right).sum(1) > (images * wrong).sum(1)
    return {
        f"edits, {kind}": average(
            [bool(hit) for hit, (of, *_) in zip(nearer, asked, strict=True) if of == kind]
        )
        for kind in (*EDITS, "swap")
    }


def side_by_side(left: Record, right: Record) -> tuple[ImageRef, str, str]:
    """Two pictures as one, what is where, and the same words with the places changed."""
    both = Image.new("RGB", (2 * SIDE, SIDE), "white")
    for n, record in enumerate((left, right)):
        assert record.image is not None
        both.paste(
            ImageOps.pad(load_image(record.image), (SIDE, SIDE), color="white"), (n * SIDE, 0)
        )
    one, other = (record.short[0].rstrip(".") for record in (left, right))
    told = [
        f"{a} on the left and {b[0].lower()}{b[1:]} on the right."
        for a, b in ((one, other), (other, one))
    ]
    return ImageRef(data=encode_png(both)), told[0], told[1]


def long_captions(model: DuetModel, told: list[Record]) -> Numbers:
    """Descriptions as queries, and as what follows the image."""
    texts = [str(record.long) for record in told]
    images = [record.image for record in told if record.image is not None]
    ranks, _ = best_positive_ranks(
        model.encode_query(texts), model.encode_document(images), [[n] for n in range(len(images))]
    )
    sequences = [
        model.renderer.render_caption(image, text)
        for image, text in zip(images, texts, strict=True)
    ]
    losses = model.compute_sequence_nll(sequences)
    nats, tokens = np.array(losses, dtype=np.float64).T
    return {
        "long text to image": average(1 / ranks),
        "long, nats": average(nats / tokens, tokens, scale=1.0),
    }


def reading(model: DuetModel, stamps: list[Record]) -> Numbers:
    """The three analyses of the paper."""
    images = tuple(record.image for record in stamps if record.image is not None)
    found = internals.analyse_model(
        model, internals.AnalysisItems(images, ()), name="model", num_attention_maps=LOOKS
    )
    assert found.images is not None
    spread = internals.num_components(internals.explained_variance(found.images.embeddings), 0.9)
    return {
        "entropy, nats": average(found.images.entropy, scale=1.0),
        "components of 90 %": average([float(spread)], scale=1.0),
        "evenness of attention": average([look.evenness for look in found.attention_maps]),
    }


def write_long_as_short(data: Path) -> None:
    """Training records whose description stands where the short caption stood: what VladVA warns of."""
    for corpus in LONG:
        rows = [
            json.loads(line)
            for line in (data / corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        made = [
            json.dumps({**row, "short": row["long"], "long": None}, ensure_ascii=False)
            for row in rows
            if row["long"]
        ]
        (data / corpus / "train-long.jsonl").write_text("\n".join(made) + "\n", encoding="utf-8")


def sources(name: str) -> str:
    """The training data of a row."""
    paths = ("data/stamps/train.jsonl", *(f"data/{corpus}/{name}.jsonl" for corpus in LONG))
    return "data.train=[" + ", ".join(f"{{path: {path}, weight: 1}}" for path in paths) + "]"


CONTRASTIVE = "objectives={contrastive: 1}"
STUDY = Study(
    name="vladva",
    base=Path("vladva-nano"),
    overrides=(
        sources("train"),
        "data.validation=null",
        f"data.max_tokens={TOKENS}",
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
        "long contrasted": (CONTRASTIVE, "train.soft_prompts=true", sources("train-long")),
    },
    reference="both",
    measure=measure,
    lower=frozenset({"captions, nats", "long, nats"}),
)

if __name__ == "__main__":
    if Path("data/wesnoth/train.jsonl").exists():
        write_long_as_short(Path("data"))
    main(STUDY)

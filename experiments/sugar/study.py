"""What each part of Sugar is worth on real documents: gimp-help and campaigns, nano, two CPU cores.

    vlduet model nano models/nano && vlduet model minilm models/minilm
    vlduet data fetch stamps emoji gimp-help campaigns --to data
    vlduet train clip-nano
    python experiments/sugar/study.py --work runs/sugar-study
    python experiments/sugar/study.py --work runs/sugar-study --tell docs/results

Measured on the test splits, which share no image with the training splits:

    next image    the last new image of a document, given up to three parts before it (their texts alone, or all): its
                  reciprocal rank among all images, where those that the document has shown may be found or not
    order         a window of a document against the same without one part, in order and in another order (with the same
                  last part, which decides most of an embedding): how often the ordered one is nearer, and how often it is
                  the nearest of all ordered and shuffled windows
    stamps        retrieval of single images and captions, both ways; captions after the right and after a wrong image;
                  written captions: is the reference among the five nearest of all, as a sentence encoder sees it
    pairs         emoji whose names differ in one word, as Winoground judges them: its text and image score
    place         which of six captioned stamps is shown again, by the place of the relevant one (WebQA's probe in small)
    text          cross entropy of documents from their first image on
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _captions import nearness
from _study import Numbers, Study, main

from vlduet.data.formats import read_jsonl
from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.demo.measure import MAX_CAPTION_TOKENS
from vlduet.eval import protocols
from vlduet.eval.benchmarks.builtin import IMAGES_PER_PROMPT, find_one_word_pairs, make_position_questions
from vlduet.eval.benchmarks.runners import best_positive_ranks
from vlduet.eval.benchmarks.scores import MetricSample, average
from vlduet.eval.protocols import unit_rows
from vlduet.harness.builtin import answer_nlls
from vlduet.model.duet import DuetModel

CORPORA = ("gimp-help", "campaigns")
CONTEXT = 3
"""Parts before the image that is looked for."""
WINDOW, LONGEST = 5, 25
"""Parts of a window whose order is judged, and words of the longest text in one."""
TOKENS = 96
"""Of a document whose cross entropy is measured."""
PROMPTS = 16
"""Of the probe of places."""


def measure(model: DuetModel, data: Path) -> Numbers:
    """All numbers of one model. What is drawn is the same for every model."""
    documents = [
        record for corpus in CORPORA for record in read_jsonl(data / corpus / "test.jsonl")
    ]
    return {
        **next_image(model, documents),
        **order(model, documents),
        **stamps(model, data),
        **pairs(model, data),
        **places(model, data),
        **texts(model, documents),
    }


def next_image(model: DuetModel, documents: list[Record]) -> Numbers:
    """Mean reciprocal rank (x 100) of every document's last new image, given what stands before it."""
    gallery: dict[str, ImageRef] = {}
    asked: list[tuple[Parts, str, set[str]]] = []
    for record in documents:
        keys = {
            n: image_key(part) for n, part in enumerate(record.parts) if isinstance(part, ImageRef)
        }
        gallery |= {
            key: part for n, key in keys.items() if isinstance(part := record.parts[n], ImageRef)
        }
        fresh = [n for n, key in keys.items() if n and key not in [keys[m] for m in keys if m < n]]
        if fresh:
            before = record.parts[max(0, fresh[-1] - CONTEXT) : fresh[-1]]
            if any(isinstance(part, str) for part in before):
                asked.append((before, keys[fresh[-1]], {keys[n] for n in keys if n < fresh[-1]}))
    place = {key: i for i, key in enumerate(gallery)}
    images = model.encode_document(list(gallery.values()))
    right = [[place[key]] for _, key, _ in asked]
    shown = [[place[key] for key in seen] for _, _, seen in asked]
    found: Numbers = {}
    for name, queries in (
        (
            "texts",
            [tuple(part for part in before if isinstance(part, str)) for before, _, _ in asked],
        ),
        ("texts and images", [before for before, _, _ in asked]),
    ):
        vectors = model.encode_query(queries)
        for seen, excluded in (("", shown), (", seen ones too", [])):
            ranks, _ = best_positive_ranks(vectors, images, right, excluded=excluded)
            found[f"next image by {name}{seen}"] = average(1 / ranks)
    return found


def order(model: DuetModel, documents: list[Record]) -> Numbers:
    """Whether a window without a part is nearer in order than shuffled: by itself, and among all windows."""
    draw = random.Random(0)
    windows: list[Parts] = []
    for record in documents:
        parts = [p for p in record.parts if isinstance(p, ImageRef) or len(p.split()) <= LONGEST]
        starts = [
            n
            for n in range(len(parts) - WINDOW + 1)
            if any(isinstance(p, ImageRef) for p in parts[n : n + WINDOW])
            and len(set(parts[n : n + WINDOW])) == WINDOW
        ]
        if starts:
            begin = draw.choice(starts)
            windows.append(tuple(parts[begin : begin + WINDOW]))
    ordered, shuffled = [], []
    for window in windows:
        dropped = draw.randrange(WINDOW - 1)
        kept = [part for n, part in enumerate(window[:-1]) if n != dropped]
        other = kept[:]
        while other == kept:
            draw.shuffle(other)
        ordered.append((*kept, window[-1]))
        shuffled.append((*other, window[-1]))
    whole, kept_order, lost_order = (
        unit_rows(model.encode_document(rows)) for rows in (windows, ordered, shuffled)
    )
    own, other_order = (whole * kept_order).sum(1), (whole * lost_order).sum(1)
    ranks, _ = best_positive_ranks(
        whole, np.concatenate([kept_order, lost_order]), [[n] for n in range(len(windows))]
    )
    return {
        "order kept is nearer": average(own > other_order),
        "order kept is nearest of all": average(ranks == 1),
    }


def stamps(model: DuetModel, data: Path) -> Numbers:
    """Single images and captions, which nothing in this study trains."""
    records = [
        r for r in read_jsonl(data / "stamps" / "test.jsonl") if r.image is not None and r.short
    ]
    found = protocols.measure_retrieval(model.encode_document, model.encode_query, records=records)
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, records)
    images = [record.image for record in records if record.image is not None]
    written = model.caption_images(images, max_new_tokens=MAX_CAPTION_TOKENS, batch_size=16)
    _, rank = nearness(written, [record.short[0] for record in records])
    return {
        "stamps, text to image R@10": average(found.text_to_image.ranks <= 10),
        "stamps, image to text R@10": average(found.image_to_text.ranks <= 10),
        "stamps, nats of captions": per_token(entropy.total_nats_right_image, entropy.num_tokens),
        "stamps, nats their image is worth": per_token(
            entropy.total_nats_wrong_image - entropy.total_nats_right_image, entropy.num_tokens
        ),
        "stamps, captions like theirs": average(rank <= 5),
    }


def pairs(model: DuetModel, data: Path) -> Numbers:
    """Winoground's text and image score on emoji of one subgroup."""
    items = find_one_word_pairs(list(read_jsonl(data / "emoji" / "test.jsonl")), "subgroup")
    texts = unit_rows(model.encode_query([text for item in items for text in item.texts])).reshape(
        len(items), 2, -1
    )
    images = unit_rows(
        model.encode_document([image for item in items for image in item.images])
    ).reshape(texts.shape)
    same = np.einsum("nie,nje->nij", images, texts)  # [items, image, text]
    text = (same[:, 0, 0] > same[:, 0, 1]) & (same[:, 1, 1] > same[:, 1, 0])
    image = (same[:, 0, 0] > same[:, 1, 0]) & (same[:, 1, 1] > same[:, 0, 1])
    return {"pairs, text score": average(text), "pairs, image score": average(image)}


def places(model: DuetModel, data: Path) -> Numbers:
    """Whether the likeliest of six captions is the right one: over all places, and at the edges less in the middle."""
    path = data / "stamps" / "test.jsonl"
    items = make_position_questions(list(read_jsonl(path)), num_prompts=PROMPTS, seed=0, place=path)
    losses = np.array(
        [
            nats / tokens
            for nats, tokens in answer_nlls(model, [(q.prompt, o) for q in items for o in q.options])
        ]
    )
    right = losses.reshape(PROMPTS, IMAGES_PER_PROMPT, IMAGES_PER_PROMPT).argmin(2) == np.arange(IMAGES_PER_PROMPT)  # [prompts, places]
    edge = np.isin(np.arange(IMAGES_PER_PROMPT), (0, IMAGES_PER_PROMPT - 1))
    return {
        "place, accuracy": average(right.ravel()),
        "place, edges less middle": average(right[:, edge].mean(1) - right[:, ~edge].mean(1)),
    }


def texts(model: DuetModel, documents: list[Record]) -> Numbers:
    """Nats a token of documents, from their first image on."""
    kept, model.renderer.max_tokens = model.renderer.max_tokens, TOKENS
    sequences = []
    for record in documents:
        first = next(n for n, part in enumerate(record.parts) if isinstance(part, ImageRef))
        sequences.append(model.renderer.render_document(record.parts[first:])[0].build(TOKENS))
    model.renderer.max_tokens = kept
    losses = model.compute_sequence_nll(sequences)
    return {
        "documents, nats": per_token(
            np.array([nats for nats, _ in losses]), np.array([n for _, n in losses])
        )
    }


def per_token(nats: np.ndarray, tokens: np.ndarray) -> MetricSample:
    """Mean nats a token, each item weighted by its tokens."""
    return average(nats / np.maximum(tokens, 1), tokens, scale=1.0)


STUDY = Study(
    name="sugar",
    base=Path("sugar-nano"),
    overrides=(
        "data.train=[{path: data/gimp-help/train.jsonl, weight: 1}, {path: data/campaigns/train.jsonl, weight: 1}]",
        "data.validation=null",
        "train.batch_size=8",
        "train.steps=24",
        "train.log_every=1",
        "train.save_every=24",
        "recipe.n_ref=32",
    ),
    rows={
        "joint": (),
        "L_g only": ("objectives={language: 1}",),
        "L_d only": ("objectives={structure: 1}",),
        "mean": ("recipe.target=mean",),
        "awm": ("recipe.target=awm",),
        "one encoder": ("recipe.triple=false",),
        "last token": ("recipe.pool=last", "model.prompts={image_pool: last}"),
        "kl": ("recipe.loss=kl",),
        "narrow": ("recipe.delta=0.35",),
    },
    reference="joint",
    measure=measure,
    lower=frozenset({"stamps, nats of captions", "place, edges less middle", "documents, nats"}),
)

if __name__ == "__main__":
    main(STUDY)

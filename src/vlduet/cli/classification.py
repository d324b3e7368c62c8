"""`vlduet classify`: name images by labels that the model was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlduet.cli._common import Json, ModelFolder, print_json, print_text

LABELS = "A file with one label per line, or labels with commas: 'a cat,a dog'."
TEMPLATE = "Prompt of a label, with {} in its place; repeatable, their embeddings are averaged."

ImagePaths = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of images.")
]


def classify(
    model: ModelFolder,
    images: ImagePaths,
    *,
    labels: Annotated[str, typer.Option("--labels", metavar="FILE|A,B,...", help=LABELS)],
    template: Annotated[
        list[str] | None, typer.Option("--template", metavar="TEXT", help=TEMPLATE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the likeliest label of every image, and its probability.

    A line has image, label and probability, separated by tabs; --json has the probabilities of all
    labels. MODEL may also be a dual encoder. It is an error if labels are missing or repeated, if a
    folder has no image, or if an image cannot be read.
    """
    from vlduet.data.labels import TEMPLATES
    from vlduet.encoders.dual import open_embedder
    from vlduet.eval import classification

    label_texts = classification.read_labels(labels)
    refs = classification.list_images(images)
    templates = template or TEMPLATES
    result = classification.classify(open_embedder(model), refs, label_texts, templates=templates)
    rows: list[dict[str, Any]] = []
    for ref, label, row in zip(refs, result.predicted_labels, result.probabilities, strict=True):
        probabilities = dict(zip(result.labels, map(float, row), strict=True))
        rows.append({"image": ref.name, "label": label, "probabilities": probabilities})
    if as_json:
        print_json({"labels": list(result.labels), "images": rows})
        return
    for image in rows:
        probability = image["probabilities"][image["label"]]
        print_text(f"{image['image']}\t{image['label']}\t{probability:.3f}")

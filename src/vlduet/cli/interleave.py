"""`vlduet interleave`: a page of generated text with images that are retrieved meanwhile."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlduet.cli._common import Json, ModelFolder, print_json, print_text
from vlduet.cli.retrieval import Filters, IndexFolder, hit_fields, open_index
from vlduet.logs import logger

if TYPE_CHECKING:
    from vlduet.model.generation.interleave import RetrievedImage, TextDelta
    from vlduet.reports.story import StoryImage
    from vlduet.retrieval.search import Hit

TEMPLATE = "Text of the page with {image} wherever an image is wanted; nothing is generated."
THRESHOLD = "Lowest score of an image, from -1 to 1; by default every sentence gets its best one."
MAX_IMAGES = "Number of images, at most; by default 8, or that of the places of a template."
TEMPERATURE = "0 takes the likeliest token; more samples, always with the same seed."
FEED_BACK = "Let the model see each retrieved image before it continues."

ImageFiles = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image before the prompt; repeatable."),
]


def interleave(
    model: ModelFolder,
    folder: IndexFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked for.")],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="FILE.html", help="The page.")],
    images: ImageFiles = None,
    template: Annotated[str | None, typer.Option(metavar="TEXT", help=TEMPLATE)] = None,
    threshold: Annotated[float | None, typer.Option(help=THRESHOLD)] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help=MAX_IMAGES)] = None,
    where: Filters = None,
    feed_back: Annotated[bool, typer.Option("--feed-back", help=FEED_BACK)] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the text.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help=TEMPERATURE)] = 0.0,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a text and images of an index, and write both as a page.

    After each sentence, the image that fits everything before it best is retrieved; none appears
    twice. The text and a line for each image are printed while they are generated. The page is one
    file without script that contains its images and names their sources. An older page is replaced
    only by a complete one. A model that does not generate, an index of another model, and an answer
    without any text or image are errors; an answer without images is logged.
    """
    import torch

    from vlduet.data.records import ImageRef, Message, Parts
    from vlduet.errors import ConfigError
    from vlduet.locks import lock_output
    from vlduet.model.duet import DuetModel
    from vlduet.model.generation.interleave import IMAGE_SLOT, ImageOptions
    from vlduet.reports.story import Story, write_story
    from vlduet.structured_files import require_regular_file

    for place, text in (("PROMPT", prompt), ("--template", template)):
        if text is not None and not text.strip():
            raise ConfigError("an empty text", place=place, fix="Write some words")
    if template is not None and threshold is not None:
        fix = "Leave one out: every place of a template gets its best image"
        raise ConfigError("a threshold for a template", place="--threshold", fix=fix)
    num_places = (template or "").count(IMAGE_SLOT)
    max_images = max_images or max(ImageOptions().max_images, num_places)
    parts: Parts = (*[ImageRef(path=path) for path in images or ()], prompt)
    # All before the model is loaded, so that a wrong option does not cost an answer.
    require_regular_file(to, error_class=ConfigError)
    with lock_output(to), open_index(folder) as opened:
        opened.check_image_search(where)
        loaded = DuetModel.from_pretrained(model)
        torch.manual_seed(0)
        pieces = loaded.interleave(
            [Message("user", parts)],
            opened,
            template=template or "",
            feed_back=feed_back,
            images=ImageOptions(threshold=threshold, where=where, max_images=max_images),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        content = _collect(pieces, is_printed=not as_json)
        facts = {
            "model": f"{model.resolve().name}, fingerprint {opened.manifest.fingerprint}",
            "index": f"{folder.resolve().name}, {opened.count()} documents",
        }
        command = shlex.join(["vlduet", *sys.argv[1:]])
        write_story(to, Story(parts, _story_content(content), template is None, facts, command))
    _print_result(to, content, folder=folder, as_json=as_json)


def _collect(
    pieces: Iterable[TextDelta | RetrievedImage[Hit]], *, is_printed: bool
) -> list[str | RetrievedImage[Hit]]:
    """Return an answer as texts and images in order, adjacent texts joined.

    Args:
        pieces: pieces of the answer, while they are generated.
        is_printed: print the texts at once, and each image as a line.

    Raises:
        ModelError: the answer has neither an image nor a text that is not blank.
    """
    from vlduet.errors import ModelError
    from vlduet.model.generation.interleave import RetrievedImage
    from vlduet.retrieval.rag import format_source

    content: list[str | RetrievedImage[Hit]] = []
    num_images = 0
    is_new_line = True
    try:
        for piece in pieces:
            if isinstance(piece, RetrievedImage):
                num_images += 1
                hit = replace(piece.hit, rank=num_images)
                content.append(replace(piece, hit=hit))
                text = format_source(hit) + "\n" if is_new_line else f"\n{format_source(hit)}\n"
            else:
                previous = content.pop() if content and isinstance(content[-1], str) else ""
                content.append(f"{previous}{piece.text}")
                text = piece.text.lstrip() if is_new_line else piece.text
            if text and is_printed:
                print_text(text, end="")
            is_new_line = text.endswith("\n") if text else is_new_line
    finally:
        if is_printed and not is_new_line:
            print_text("")  # an error gets a line of its own
    if not any(not isinstance(part, str) or part.strip() for part in content):
        fix = "Ask for something else, or give the text as --template"
        raise ModelError("the model wrote nothing, and no image was retrieved", fix=fix)
    return content


def _print_result(
    to: Path, content: list[str | RetrievedImage[Hit]], *, folder: Path, as_json: bool
) -> None:
    """Print the page's path and number of images, or the parts of the answer as JSON.

    An answer without an image of the index `folder` is logged.
    """
    num_images = sum(not isinstance(part, str) for part in content)
    if not num_images:
        fix = "Lower --threshold, change --where, or index documents with images"
        logger.warning(f"no image was retrieved from {folder}. {fix}")
    if as_json:
        print_json({"page": str(to), "parts": [_part_fields(part) for part in content]})
    else:
        print_text(f"{to}: {num_images} {'image' if num_images == 1 else 'images'}")


def _story_content(content: list[str | RetrievedImage[Hit]]) -> tuple[str | StoryImage, ...]:
    """Return the texts and images of an answer as those of the page."""
    from vlduet.reports.story import StoryImage

    parts: list[str | StoryImage] = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        else:
            hit = part.hit
            assert hit.image is not None, "documents without an image are not retrieved"
            parts.append(StoryImage(hit.id, part.score, hit.image, hit.text, hit.metadata))
    return tuple(parts)


def _part_fields(part: str | RetrievedImage[Hit]) -> dict[str, Any]:
    """Return a text or an image of an answer as JSON values."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    fields = {"type": "image", "slice": part.slice, "is_fed_back": part.is_fed_back}
    return {**fields, "hit": hit_fields(part.hit)}

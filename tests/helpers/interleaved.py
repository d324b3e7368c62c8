"""Requests for answers with images of an index, and a model that writes sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from helpers import tiny
from vlduet.data.images import encode_png, from_pixels, load_image, to_pixels
from vlduet.data.records import Message
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import Request
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index

CHAT = "/v1/chat/completions"
QUESTION = (Message("user", ("tell me a story",)),)
SENTENCE_TOKENS = 7
"""Number of tokens of a sentence of `make_sentence_sampler`, with the blank before it."""


def build_image_index(duet: DuetModel, root: Path) -> None:
    """Write an index of images in two groups, a text, and an image without a URL to a folder."""
    lines = []
    for i in range(8):
        pixels = to_pixels(load_image(tiny.random_image(i)))
        (root / f"{i}.png").write_bytes(encode_png(from_pixels(pixels)))
        parts = [{"image": f"{i}.png"}]
        lines.append({"id": f"image {i}", "parts": parts, "metadata": {"group": "ab"[i % 2]}})
    lines.append({"id": "..", "parts": parts, "metadata": {"group": "a"}})
    lines.append({"id": "text", "parts": [{"text": "tell me"}], "metadata": {"group": "a"}})
    (root / "source.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    build_index(duet, root / "source.jsonl", to=root / "index", side="record")


def make_sentence_sampler(duet: DuetModel) -> Callable[[Request, torch.Tensor], torch.Tensor]:
    """Return a `Request.sample_token` of sentences of five letters, which the model chooses.

    The first letter of each sentence is always the same.
    """
    tokenizer = duet.backbone.tokenizer
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    ends = {
        position: tokenizer.encode(text, add_special_tokens=False)
        for position, text in ((0, " "), (1, "B"), (6, "."))
    }

    def sample_token(request: Request, logits: torch.Tensor) -> torch.Tensor:
        position = (len(request.token_ids) + 1) % SENTENCE_TOKENS
        if position in ends:
            return torch.tensor(ends[position])
        return torch.tensor(letters)[logits[:, letters].argmax(1)]

    return sample_token


def chat_body(*contents: Any, retrieval: dict[str, Any] | None = None, **more: Any) -> Any:
    """Return the body of a request for an interleaved answer of four sentences.

    `contents` are those of the messages, of the user and the assistant in turn.
    """
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents or ["tell me a story"])
    ]
    options = {"mode": "interleave"} | (retrieval or {})
    return {"messages": messages, "max_tokens": 28, "retrieval": options} | more


def collect_parts(outputs: Iterable[Any]) -> list[str]:
    """Return the texts and the ids of the images among outputs, without blanks around them."""
    parts = [""]
    for output in outputs:
        if hasattr(output, "hit"):
            parts += [output.hit.id, ""]
        elif isinstance(output, dict):
            parts[-1] += output.get("content") or output.get("text", "")
            for image in output.get("parts", [output] if "hit" in output else []):
                parts += [image["hit"]["id"], ""]
        else:
            parts[-1] += output.text
    return [part.strip() for part in parts if part.strip()]


def generate_parts(
    duet: DuetModel, index: Index, messages: Sequence[Message] = QUESTION, **options: Any
) -> list[str]:
    """Return the texts and the ids of the images of an answer of the library."""
    options = {"max_new_tokens": 28} | options
    return collect_parts(duet.interleave(messages, index, **options))


def answer_parts(response: tuple[int, dict[str, Any]]) -> list[str]:
    """Return the texts and the ids of the images of a whole answer."""
    status, body = response
    assert status == 200, body
    return collect_parts(body["choices"][0]["message"]["content"])


def image_part(url: str) -> dict[str, Any]:
    """Return a content part for the image at a URL."""
    return {"type": "image_url", "image_url": {"url": url}}

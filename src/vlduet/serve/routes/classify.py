"""POST /v1/classify: the likeliest of some labels for images or texts, without training.

Requests and responses have Jina's form. The numbers are those of `vlduet classify`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from vlduet.data.labels import (
    TEMPLATES,
    check_labels,
    check_templates,
    fill_templates,
    label_probabilities,
)
from vlduet.errors import DataError
from vlduet.serve.content import check_text
from vlduet.serve.inputs import INPUTS_DESCRIPTION, Inputs, parse_inputs
from vlduet.serve.openapi import describe_body
from vlduet.serve.resources import Resources, json_response
from vlduet.serve.schemas import MAX_INPUTS, EmbeddingOptions, EmbeddingUsage, embedding_usage

MAX_PROMPTS = 2048
"""Number of labels times templates in one request."""
MAX_PROMPT_CHARS = 1 << 24
"""Number of characters in all prompts together: they repeat every label for each template, so that
a small request could fill the memory."""


class ClassifyBody(EmbeddingOptions):
    """Body of POST /v1/classify."""

    input: Inputs = Field(description=INPUTS_DESCRIPTION)
    labels: Annotated[list[str], Field(min_length=2, max_length=MAX_INPUTS)]
    templates: Annotated[list[str], Field(min_length=1, max_length=100)] | None = Field(
        None, description="Prompts of a label, each with {} in its place."
    )

    def make_prompts(self) -> list[str]:
        """Return the prompts of all labels, those of one label after those of another.

        Raises:
            DataError: labels or templates as `check_labels` and `check_templates`, or more than
                `MAX_PROMPTS` prompts or `MAX_PROMPT_CHARS` characters in them.
        """
        templates = self.templates or TEMPLATES
        for i, label in enumerate(self.labels):
            check_text(label, f"labels[{i}]")
        check_labels(self.labels)
        check_templates(templates)
        if len(self.labels) * len(templates) > MAX_PROMPTS:
            message = f"{len(self.labels)} labels with {len(templates)} templates"
            fix = f"Send {MAX_PROMPTS} combinations at most"
            raise DataError(message, place="labels", fix=fix)
        num_label_chars = sum(map(len, self.labels))
        num_chars = sum(
            len(self.labels) * len(template) + template.count("{}") * num_label_chars
            for template in templates
        )
        if num_chars > MAX_PROMPT_CHARS:
            message = f"labels and templates make prompts of {num_chars} characters"
            fix = f"Send shorter ones: {MAX_PROMPT_CHARS} at most"
            raise DataError(message, place="labels", fix=fix)
        return fill_templates(self.labels, templates)


class LabelScore(BaseModel):
    """Probability of a label."""

    label: str
    score: float


class ClassifyRow(BaseModel):
    """Labels of one input, the likeliest first."""

    object: Literal["classification"]
    index: int
    prediction: str
    score: float = Field(description="Probability of the prediction.")
    predictions: list[LabelScore]


class ClassifyResponse(BaseModel):
    """Response of POST /v1/classify."""

    object: Literal["list"]
    model: str
    data: list[ClassifyRow]
    usage: EmbeddingUsage
    truncated: int | None = Field(None, description="Number of texts that were cut.")


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()

    @router.post(
        "/v1/classify",
        response_model=ClassifyResponse,
        openapi_extra=describe_body(ClassifyBody),
        tags=["Classify"],
    )
    async def classify_inputs(request: Request) -> Response:
        """Return the probabilities of labels for each input, an image or a text."""
        body = await resources.read_body(request, ClassifyBody)
        truncate = resources.allows_truncation(body)
        prompts = await asyncio.to_thread(body.make_prompts)
        load_url = resources.url_images(request).load
        items, places = await asyncio.to_thread(parse_inputs, body.input, load_url)
        num_templates = len(prompts) // len(body.labels)
        prompt_places = [f"labels[{i // num_templates}]" for i in range(len(prompts))]
        labelled = await resources.embed(
            request, prompts, prompt_places, is_query=False, truncate=truncate
        )
        embedded = await resources.embed(request, items, places, is_query=False, truncate=truncate)
        common: dict[str, Any] = {
            "object": "list",
            "model": resources.name,
            "usage": embedding_usage(labelled.num_tokens + embedded.num_tokens),
        }
        if truncate:
            common["truncated"] = labelled.num_truncated + embedded.num_truncated

        def format_response() -> dict[str, Any]:
            probabilities = label_probabilities(
                embedded.vectors,
                labelled.vectors,
                num_labels=len(body.labels),
                temperature=resources.temperature,
            )
            rows = [_format_row(i, row, body.labels) for i, row in enumerate(probabilities)]
            return common | {"data": rows}

        return await json_response(format_response)

    return router


def _format_row(index: int, probabilities: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Return the labels of one input in the order of their probabilities float32[L]."""
    order = np.argsort(-probabilities, kind="stable")
    predictions = [{"label": labels[i], "score": round(float(probabilities[i]), 6)} for i in order]
    best = predictions[0]
    row = {"object": "classification", "index": index, "prediction": best["label"]}
    return row | {"score": best["score"], "predictions": predictions}

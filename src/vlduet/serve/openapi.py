"""OpenAPI document, and the page /docs that shows it without requests to other servers."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vlduet import __version__
from vlduet.serve.schemas import ErrorBody

REFERENCE = "#/components/schemas/{model}"
TITLE = "VLDuet"
DESCRIPTION = (
    "Chats, embeddings, search, reranking and classification with one model. Requests and "
    "responses have the form of OpenAI's API where it has such an endpoint."
)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong; `param` names the field."},
    "5XX": {"model": ErrorBody, "description": "The server is busy, or an error inside it."},
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { border-top: 1px solid #ccc; padding-top: 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace; background: #f4f4f4 }
pre { padding: .5rem; overflow: auto }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .5rem }
td, th { text-align: left; vertical-align: top }
"""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
"""Headers with which a browser loads nothing else for the page."""


def describe_body(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the description of a JSON body for a route that reads it by itself.

    FastAPI would parse a body in the event loop. The schema must be given to `make_document` too.
    """
    reference = {"$ref": REFERENCE.format(model=schema.__name__)}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": True, "content": content}}


def make_document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Return the OpenAPI document of an application, with the schemas of the bodies it reads."""
    document = get_openapi(
        title=TITLE, version=__version__, description=DESCRIPTION, routes=app.routes
    )
    mode: Literal["validation"] = "validation"
    inputs = [(body, mode) for body in bodies]
    _, definitions = models_json_schema(inputs, ref_template=REFERENCE)
    document["components"]["schemas"].update(definitions["$defs"])
    return document


def render_page(document: dict[str, Any]) -> str:
    """Return an HTML page of the endpoints, their fields and their responses."""
    schemas = document["components"]["schemas"]
    sections = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            title = f"{method.upper()} {path}"
            sections.append(f"<h2><code>{html.escape(title)}</code></h2>")
            sections.append(f"<p>{html.escape(operation.get('description', ''))}</p>")
            content = operation.get("requestBody", {}).get("content", {})
            parameters = operation.get("parameters", [])
            if content:
                sections.append("<h3>Request</h3>")
                sections.append(_render_fields(content["application/json"]["schema"], schemas))
            elif parameters:
                rows = {item["name"]: item["schema"] for item in parameters}
                required = [item["name"] for item in parameters if item.get("required")]
                fields = {"properties": rows, "required": required}
                sections.append(_render_fields(fields, schemas))
            response = operation["responses"].get("200", {}).get("content", {})
            if schema := response.get("application/json", {}).get("schema"):
                sections.append("<h3>Response</h3>" + _render_fields(schema, schemas))
    body = "\n".join(sections)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{TITLE}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{TITLE} {html.escape(document['info']['version'])}</h1>"
        f"<p>{html.escape(DESCRIPTION)} The same as a document for tools: "
        f"<a href=openapi.json>openapi.json</a>.</p>{body}</html>"
    )


def _render_fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Return an HTML table of the fields of an object: name, type and description."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        necessity = "required" if name in required else "optional"
        kind = html.escape(_describe_type(field, schemas))
        text = html.escape(field.get("description", ""))
        name_cell = f"<code>{html.escape(name)}</code><br>{necessity}"
        rows.append(f"<tr><td>{name_cell}<td>{kind}<td>{text}")
    return f"<table><tr><th>Field<th>Type<th>Meaning{''.join(rows)}</table>"


def _describe_type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Return the type of a field in words, such as ``text or list of (text or number)``."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = schemas[name]
        fields = ", ".join(target.get("properties", {}))
        return f"object with {fields}" if fields else _describe_type(target, schemas)
    for key in ("oneOf", "anyOf"):
        if key in schema:
            kinds = [_describe_type(branch, schemas) for branch in schema[key]]
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(json.dumps(value) for value in values)
    if schema.get("type") == "array":
        return f"list of ({_describe_type(schema.get('items', {}), schemas)})"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    kind = names.get(schema.get("type", ""), schema.get("type", "any value"))
    bounds = [f"{key} {schema[key]}" for key in ("minimum", "maximum") if key in schema]
    return " ".join([kind, *bounds])

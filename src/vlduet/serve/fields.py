"""Fields of requests that this server does not have: accepted, ignored or refused.

    requests nothing      accepted, such as `tools: []` (NEUTRAL_VALUES) and any empty value
    cannot change much    ignored with one line in the log, unless it is in SILENT_FIELDS
    changes the meaning   refused, such as `tools` with content
    a typing mistake      refused with the name of the field that it resembles

A strict server refuses every field of the second kind too.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from vlduet.errors import DataError, quote_value, suggest_name

logger = logging.getLogger("uvicorn.error")

SILENT_FIELDS = frozenset(
    {
        "chat_id",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
    }
)
"""Fields about the request itself, which never change a result."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": (),
    "logit_bias": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_calls": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_logprobs": (0,),
    "web_search_options": (),
    # vLLM, and servers with its parameters
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": (),
    "min_tokens": (0,),
    "mm_processor_kwargs": (),
    "normalize": (True,),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "stop_token_ids": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    # llama.cpp, Ollama and others
    "dry_multiplier": (0,),
    "grammar": (),
    "json_schema": (),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical_p": (1,),
    "xtc_probability": (0,),
    # Contents in fields of other APIs, which must not be lost
    "image": (),
    "images": (),
    "input": (),
    "inputs": (),
    "instruction": (),
    "instructions": (),
    "messages": (),
    "prompt": (),
    "query": (),
    "system": (),
    "text": (),
    "texts": (),
    "videos": (),
    # Cohere and Jina
    "embedding_types": (["float"],),
    "embedding_type": ("float",),
    "late_chunking": (False,),
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (),
    "normalized": (True,),
    "rank_fields": (["text"],),
    "return_multivector": (False,),
    "task": (),
}
"""Fields that would change the result, and the values beside empty ones that request nothing."""
MAX_LOGGED_FIELDS = 200
"""Number of names that get a line in the log, so that a client cannot fill the log."""
MAX_NAME_CHARS = 40
"""Length to which the name of an unknown field is cut, for messages and comparisons."""
MAX_UNKNOWN_FIELDS = 256
"""Number of different unknown names in one body: the comparison with known ones takes time."""
TYPING_MISTAKE_RATIO = 0.8
"""Similarity from which an unknown name is taken for a mistake of a known one."""

_logged_fields: set[str] = set()


def check_fields(body: BaseModel, *, strict: bool) -> None:
    """Check the unknown fields of a body and of all objects inside it, as this module says.

    Raises:
        DataError: a field that requests something that is not served, or that resembles a known
            one; with `strict`, every unknown field; more than `MAX_UNKNOWN_FIELDS` in all.
    """
    names = set()
    for place, model in _iterate_models(body, ""):
        for key, value in (model.model_extra or {}).items():
            name = key[:MAX_NAME_CHARS]
            names.add(name)
            if len(names) > MAX_UNKNOWN_FIELDS:
                message = f"the body has more than {MAX_UNKNOWN_FIELDS} unknown fields"
                raise DataError(message, fix="Leave them out")
            path = f"{place}.{name}" if place else name
            _check_field(name, value, path, schema=type(model), strict=strict)


def _iterate_models(value: Any, place: str) -> Iterator[tuple[str, BaseModel]]:
    """Yield the pydantic models inside a value, itself first, with their paths."""
    if isinstance(value, BaseModel):
        yield place, value
        for name in type(value).model_fields:
            yield from _iterate_models(getattr(value, name), f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if not isinstance(item, str):
                yield from _iterate_models(item, f"{place}[{i}]")


@lru_cache(maxsize=1024)
def _find_similar(name: str, schema: type[BaseModel]) -> str | None:
    """Return the field of an object that an unknown name resembles, or None."""
    similar = difflib.get_close_matches(name, schema.model_fields, 1, TYPING_MISTAKE_RATIO)
    return similar[0] if similar else None


def _check_field(
    key: str, value: Any, place: str, *, schema: type[BaseModel], strict: bool
) -> None:
    """Accept, ignore or refuse one unknown field; raises as `check_fields`.

    `key` is its name, cut to `MAX_NAME_CHARS`; `schema` has the known fields of its object.
    """
    if strict:
        raise DataError("unknown field", place=place, fix=suggest_name(key, schema.model_fields))
    if value is None or key in SILENT_FIELDS:
        return
    is_empty = value is False or value in ("", [], {})
    if (neutral_values := NEUTRAL_VALUES.get(key)) is not None:
        # False requests something of a field that is on by itself.
        requests_nothing = is_empty and not any(
            v is True and value is False for v in neutral_values
        )
        if not requests_nothing and value not in neutral_values:
            message = f"{quote_value(value)} is not served"
            raise DataError(message, place=place, fix="Leave it out")
        return
    if similar := _find_similar(key, schema):
        raise DataError("unknown field", place=place, fix=f"Did you mean '{similar}'?")
    if is_empty:
        return
    if key not in _logged_fields and len(_logged_fields) < MAX_LOGGED_FIELDS:
        _logged_fields.add(key)
        logger.warning("the field %a of a request is unknown and is ignored", place)
